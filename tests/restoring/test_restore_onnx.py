"""restore: a file of ONNX, whatever exporter wrote it, comes back in its own class."""

import nets
import pytest
import torch
import torchvision
from normed_networks import trained
from onnx_files import written
from torch import nn

import retrofit
from retrofit import RetrofitError

X = nets.images(4, 3, 64, 64)
pytestmark = [
    pytest.mark.filterwarnings("ignore:the statistics of:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning"),
]


def assert_close(result, expected, *inputs):
    with torch.no_grad():
        assert (result(*inputs) - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_onnx_files_of_both_exporters(dynamo, named, tmp_path):
    make = torchvision.models.mobilenet_v3_small
    torch.manual_seed(0)
    model = trained(make())
    source = retrofit.fold(model) if named else model  # which the exporter folds and renames
    path = tmp_path / "folded.onnx"
    options = {"dynamo": True} if dynamo else {"dynamo": False, "input_names": ["x"]}
    torch.onnx.export(source, (X,), path, verbose=False, **options)
    result = retrofit.restore(make().eval(), path, [X], progress=False)
    make().load_state_dict(result.state_dict(), strict=True)
    assert_close(result, model(X), X)
    with pytest.raises(RetrofitError, match="neither by names nor layer by layer"):
        retrofit.restore(torchvision.models.resnet18().eval(), path, [X], progress=False)


BATCHES = {
    "labels": (lambda x: (x, torch.zeros(len(x))), None),
    "mapping": (lambda x: {"image": x, "label": torch.zeros(len(x))}, None),
    "forward_fn": (
        lambda x: {"a": torch.zeros(len(x)), "b": x / 2},
        lambda m, batch: m(batch["b"] * 2),
    ),
}


def test_a_batchnorm_without_a_weight_that_stays(tmp_path):
    def make():
        return nn.Sequential(
            nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6), nn.ReLU(),
        )  # fmt: skip

    torch.manual_seed(0)
    model, x, file = trained(make()), nets.images(32, 3, 9, 9), tmp_path / "net.onnx"
    torch.onnx.export(model, (x,), file, dynamo=False, verbose=False)
    result = retrofit.restore(make().eval(), file, [x], progress=False)
    assert retrofit.restoration_of(result).kept == ("0",)
    assert torch.equal(result[0].running_var, model[0].running_var)
    assert_close(result, model(x), x)


@pytest.mark.parametrize("dynamo", [False, True])
def test_of_other_classes(dynamo, tmp_path):
    def make(num_classes):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes),
        )  # fmt: skip

    x, file = nets.images(8, 3, 9, 9), tmp_path / "net.onnx"
    torch.onnx.export(trained(make(7)), (x,), file, dynamo=dynamo, verbose=False)
    with pytest.raises(RetrofitError) as refused:
        retrofit.restore(make(10).eval(), file, [x], progress=False)
    assert "they are of 7 classes, it seems, and the model of 10: build it with num_classes=7" in (
        str(refused.value)
    )
    assert "key_map" not in str(refused.value)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.b, self.b_norm = nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x, y):
        return self.a_norm(self.a(x)).mean((2, 3)) + self.b_norm(self.b(y))


def test_inputs_go_by_their_names_in_the_class(tmp_path):
    torch.manual_seed(0)
    model, file = trained(TwoInputs()), tmp_path / "two.onnx"
    x, y = nets.images(32, 3, 9, 9), torch.randn(32, 5)
    folded = retrofit.fold(model, example={"x": x, "y": y})
    torch.onnx.export(folded, (x, y), file, dynamo=False, verbose=False)
    result = retrofit.restore(TwoInputs().eval(), file, [{"y": y, "x": x}], progress=False)
    assert_close(result, model(x, y), x, y)


@pytest.mark.parametrize("kind", BATCHES)
def test_the_file_gets_what_the_class_gets(kind, tmp_path):
    batch_of, forward_fn = BATCHES[kind]
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()))
    x, file = nets.images(32, 3, 9, 9), tmp_path / "net.onnx"
    torch.onnx.export(model, (x,), file, dynamo=False, verbose=False)
    architecture = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    result = retrofit.restore(
        architecture.eval(), file, [batch_of(x)], forward_fn=forward_fn, progress=False
    )
    assert_close(result, model(x), x)


def test_a_forward_fn_that_calls_the_layers_alone_does_not_tell_what_a_file_gets(tmp_path):
    layers = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
    file, x = tmp_path / "net.onnx", nets.images(8, 3, 9, 9)
    torch.onnx.export(trained(nn.Sequential(*layers)), (x,), file, dynamo=False, verbose=False)
    with pytest.raises(RetrofitError, match="forward_fn does not call the model that it is given"):
        retrofit.restore(
            nn.Sequential(*layers).eval(), file, [x], progress=False,
            forward_fn=lambda model, batch: model[1](model[0](batch)),
        )  # fmt: skip


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_file_of_16_bits_is_restored_in_32(dynamo, tmp_path):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 4, 3),
            nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 25, 5),
        ).eval()  # fmt: skip

    x = nets.images(32, 3, 9, 9)
    folded = retrofit.fold(trained(make())).half()
    named = {} if dynamo else {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]}
    file = tmp_path / "half.onnx"
    torch.onnx.export(folded, (x[:2].half(),), file, dynamo=dynamo, verbose=False, **named)
    result = retrofit.restore(make(), file, [x], progress=False)
    assert_close(result, folded.float()(x), x)


class Branches(nn.Module):
    """A pair, then two convolutions beside each other; `first` is the one that runs first."""

    def __init__(self, names="ab", *, first=0, bias=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.names, self.first = names, first
        for name, size in zip(names, (1, 3), strict=True):
            setattr(self, name, nn.Conv2d(6, 6, size, padding=size // 2, bias=bias))

    def forward(self, x):
        x = self.norm(self.conv(x))
        found = {i: getattr(self, self.names[i])(x) for i in (self.first, 1 - self.first)}
        return found[0] * found[1]


def test_biases_that_a_file_leaves_out_are_zeros_in_branches_of_another_order(tmp_path):
    torch.manual_seed(0)
    model = trained(Branches("cd", first=1, bias=False))
    x = nets.images(32, 3, 9, 9)
    file = tmp_path / "net.onnx"
    torch.onnx.export(retrofit.fold(model), (x,), file, dynamo=False, verbose=False)
    result = retrofit.restore(Branches().eval(), file, [x], progress=False)
    assert not result.a.bias.any()
    assert_close(result, model(x), x)


def test_a_file_of_more_outputs_than_the_architecture_is_refused(tmp_path):
    class Both(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y, y.relu()

    layers = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
    file, x = tmp_path / "both.onnx", nets.images(8, 3, 9, 9)
    folded = retrofit.fold(trained(Both(*layers)))
    torch.onnx.export(folded, (x,), file, dynamo=False, verbose=False)
    with pytest.raises(RetrofitError, match=r"computes something else: outputs of shapes"):
        retrofit.restore(nn.Sequential(*layers).eval(), file, [x], progress=False)


HALF = """g (float16[N, 3, 5, 5] x) => (float16[N, 2, 5, 5] y) <float16[2, 3, 1, 1] w = {BITS}>
{
   a = Conv (x, w)
   b = Cast <to = 1> (a)
   c = Cast <to = 10> (b)
   size = Size (x)
   few = Constant <value = int64 {100000}> ()
   is_small = Less (size, few)
   y = If (is_small) <
      then_branch = more () => (float16[N, 2, 5, 5] d)
         { one = Constant <value = float16 {15360}> ()  d = Add (c, one) },
      else_branch = same () => (float16[N, 2, 5, 5] e) { e = Identity (c) }
   >
}"""


def test_casts_and_branches_of_a_file_of_16_bits_are_of_32_too(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.norm(self.conv(x)) + 1

    weight, x = torch.tensor([0.5, -1, 2, 0.25, 3, -0.125]), nets.images(32, 3, 5, 5)
    bits = weight.half().view(torch.int16).int() & 0xFFFF
    text = HALF.replace("BITS", ", ".join(map(str, bits.tolist())))
    file = written(tmp_path / "half.onnx", text)
    result = retrofit.restore(Net().eval(), file, [x], progress=False)
    assert_close(result, nn.functional.conv2d(x, weight.view(2, 3, 1, 1)) + 1, x)
