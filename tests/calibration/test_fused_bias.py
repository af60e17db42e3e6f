"""Bias and moments in one kernel: where it is used, and that it leaves nothing behind.

The kernel here is made of PyTorch's operations, and the CPU is taken for a GPU; the kernel itself
runs in Triton's interpreter, in interpreted_kernel.py, and in test_gpu.py.
"""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nets
import pytest
import torch
from torch import nn

import retrofit
from retrofit.calibration import fused_bias, site_samples
from retrofit.numerics.reductions import Samples


@pytest.mark.slow
def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton")
    here = Path(__file__).with_name("interpreted_kernel.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", here],
        capture_output=True, text=True, check=False, cwd=here.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


class Kernel(SimpleNamespace):
    """Has the functions of `triton_kernel`, and counts its calls, and those with ReLU."""

    def __init__(self, error=None, off=0.0):
        super().__init__(calls=0, relus=0, error=error, off=off)

    def takes(self, _):
        return True

    def add_bias(self, y, bias, *, relu=False):
        self.calls += 1
        self.relus += relu
        y.data.add_(bias.view(-1, 1, 1))  # Triton does not count what it writes either
        if self.error:
            raise self.error
        wide = y.double().flatten(2)
        if relu:
            y.data.relu_()
        return Samples(wide.shape[2], wide.mean(2) + self.off, wide.var(2, correction=0))


@pytest.fixture
def use(monkeypatch):
    """Make calibrations use a kernel, trusted or not."""

    def used(kernel, trusted=True):
        monkeypatch.setattr(fused_bias, "DEVICE", "cpu")
        monkeypatch.setattr(fused_bias, "_given_up", set())
        monkeypatch.setattr(fused_bias, "_kernel", lambda: kernel)
        monkeypatch.setattr(fused_bias, "_is_added_afterwards", lambda *_: True)
        right = (lambda *_: True) if trusted else fused_bias._is_right.__wrapped__
        monkeypatch.setattr(fused_bias, "_is_right", right)
        return kernel

    return used


def whole(*layers):
    """A network of whole numbers, so that every order of adding up gives the same bits."""
    net = (layers[0] if len(layers) == 1 else nn.Sequential(*layers)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((parameter * 20).round())
    return net


def two_convolutions():
    return whole(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.Conv2d(5, 4, 3), nn.ReLU())


DATA = [(nets.images(n, 3, 9, 8, seed=n) * 4).round() for n in (4, 3)]


def moments(net, data=DATA, prepared=None, **options):
    prepared = prepared or retrofit.prepare(net, retrofit.plan(net, **options))
    retrofit.calibrate(prepared, data, progress=False)
    return retrofit.channel_moments(prepared)


def assert_close(found, expected):
    assert list(found) == list(expected)
    for site, theirs in expected.items():
        torch.testing.assert_close(found[site].mean, theirs.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[site].var, theirs.var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["native", "graph"])
def test_the_moments_are_the_same_and_no_activation_is_read_again(layout, use, monkeypatch):
    net = two_convolutions()
    expected = moments(net, layout=layout)
    kernel = use(Kernel())
    monkeypatch.setattr(site_samples, "reduced", None)
    assert_close(moments(net, layout=layout), expected)
    assert kernel.calls == 4  # two sites, two batches


def test_every_layer_gets_what_it_gets_otherwise(use):
    """What goes into each convolution, bit for bit."""
    inputs = {}

    def record(name):
        return lambda _module, args: inputs.setdefault(name, []).append(args[0].clone())

    for kernel in (None, Kernel()):
        use(kernel)
        prepared = retrofit.prepare(two_convolutions_of_one_seed())
        for module in prepared.modules():
            if isinstance(module, nn.Conv2d | nn.ReLU):
                module.register_forward_pre_hook(record(kernel is None))
        moments(None, prepared=prepared)
    assert (kernel.calls, kernel.relus) == (4, 0)  # the hook of the ReLU shall see what it gets
    assert len(inputs[True]) == len(inputs[False]) > 4
    assert all(torch.equal(a, b) for a, b in zip(inputs[True], inputs[False], strict=True))


def two_convolutions_of_one_seed():
    torch.manual_seed(0)
    return two_convolutions()


def blocks():
    """Convolution, ReLU, in a block of their own, thrice; a residual sum and a shared ReLU."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, 4, 3, padding=1)
            self.again = nn.Conv2d(4, 4, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.relu(self.conv(x))
            return self.relu(self.again(y) + y)

    return whole(Block(3), Block(4), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("layout", ["native", "graph"])
def test_a_relu_in_place_behind_it_is_computed_along(layout, use, monkeypatch):
    """Where it alone reads what the convolution gives: three of the six, and not the sums."""
    net = blocks()
    options = {"layout": layout, "include": "*"}  # the last is an output head
    inputs = {}

    def record(used):
        return lambda _module, args: inputs.setdefault(used, []).append(args[0].clone())

    expected = moments(net, **options)
    for used in (False, True):
        kernel = use(Kernel() if used else None)
        prepared = retrofit.prepare(net, retrofit.plan(net, **options))
        for module in prepared.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(record(used))
        ran = count_relus(monkeypatch)
        retrofit.calibrate(prepared, DATA, progress=False)
        assert len(ran) == len(DATA) * (2 if used else 5)
        assert_close(retrofit.channel_moments(prepared), expected)
    assert (kernel.calls, kernel.relus) == (6 * len(DATA), 3 * len(DATA))
    assert all(torch.equal(a, b) for a, b in zip(inputs[True], inputs[False], strict=True))


def count_relus(monkeypatch):
    """Note the inputs of `nn.ReLU.forward`."""
    ran, forward = [], nn.ReLU.forward

    def noted(self, x):
        ran.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(nn.ReLU, "forward", noted)
    return ran


class Read(nn.Module):
    """A convolution and its ReLU, and whatever else `reader` makes of what is between them."""

    def __init__(self, reader, relu=None):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 5, 3), relu or nn.ReLU(inplace=True)
        self.next, self.reader = nn.Conv2d(5, 4, 1), reader

    def forward(self, x, more=False):
        return self.next(self.reader(self, self.conv(x), more))


class Doubled(nn.ReLU):
    def forward(self, x):
        return super().forward(2 * x)


def own_forward():
    relu = nn.ReLU(inplace=True)
    relu.forward = lambda x: torch.relu(2 * x)
    return relu


def both(net, y, more):  # noqa: ARG001
    low = y.mean((2, 3), keepdim=True)
    return net.relu(y) + low


def sometimes(net, y, more):
    low = y.mean((2, 3), keepdim=True) if more else 0
    return net.relu(y) + low


def first_shape(net, y, more):  # noqa: ARG001
    return net.relu(y)[..., : y.shape[-1] - 1]


def flat(net, y, more):  # noqa: ARG001
    return net.relu(y.flatten(2)).view_as(y)


def untraceable(net, y, more):  # noqa: ARG001
    return net.relu(y) if y.sum() == y.sum() else y


def plainly(net, y, more):  # noqa: ARG001
    return net.relu(y)


def no_longer_in_place(net, y, more):  # noqa: ARG001
    net.relu.inplace = False
    return net.relu(y) + y


@pytest.mark.parametrize(
    ("make", "computed"),
    [
        (lambda: Read(plainly), True),
        (lambda: Read(first_shape), True),
        (lambda: Read(sometimes), True),  # not asked for
        (lambda: Read(both), False),
        (lambda: Read(flat), False),
        (lambda: Read(untraceable), False),
        (lambda: Read(no_longer_in_place), False),
        (lambda: Read(plainly, nn.ReLU()), False),
        (lambda: Read(plainly, nn.ReLU6(inplace=True)), False),
        (lambda: Read(plainly, Doubled(inplace=True)), False),
        (lambda: Read(plainly, own_forward()), False),
    ],
)
def test_a_relu_that_others_read_before_or_that_is_another_is_not(make, computed, use):
    net = whole(make())
    use(None)
    expected = moments(net, example=DATA[0], include="*")
    kernel = use(Kernel())
    assert_close(moments(net, example=DATA[0], include="*"), expected)
    assert (kernel.calls, kernel.relus) == (4, 2 * computed)


class Told(Read):
    """Does for what it is told, or sees, what torch.fx does not see it do."""

    def __init__(self, sees):
        super().__init__(None)
        self.sees = sees

    def forward(self, batch: dict):
        y = self.conv(batch["x"])
        low = y.mean((2, 3), keepdim=True) if self.sees(batch, y) else 0
        return self.next(self.relu(y) + low)


class Conditioned(nn.GroupNorm):
    """A layer to torch.fx, which reads what the model has put into it."""

    def forward(self, x):
        return super().forward(x) + self.seen.mean((2, 3), keepdim=True)


class Conditional(Read):
    def __init__(self):
        super().__init__(None)
        self.norm = Conditioned(1, 5)

    def forward(self, x):
        self.norm.seen = y = self.conv(x)
        seen = self.norm(x[:, :1, 1:-1, 1:-1].expand(-1, 5, -1, -1))
        return self.next(self.relu(y) + seen)


class Gate(nn.Conv2d):
    """A layer to torch.fx, which calls another one."""

    def forward(self, x):
        return super().forward(x) + self.others[0](x).mean((2, 3), keepdim=True)


class Gated(Read):
    def __init__(self):
        super().__init__(plainly)
        self.gate = Gate(3, 5, 3)
        self.gate.others = [self.conv]

    def forward(self, x):
        return self.next(self.relu(self.conv(x)) + self.gate(x))


class Twice(nn.Module):
    """Calls a container twice, which has a hook: what it gives the first time is not rectified."""

    def __init__(self):
        super().__init__()
        self.steps, self.next = Steps(), nn.Conv2d(5, 4, 1)
        self.steps.register_forward_hook(lambda _module, _args, y: y + 1)

    def forward(self, x):
        return self.next(self.steps(self.steps(x, True), False))


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True)

    def forward(self, x, first: bool):
        return self.conv(x) if first else self.relu(x)


AS_TOLD = [{"x": x} for x in DATA]


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: Told(lambda batch, _: batch.get("context") is None), AS_TOLD),
        (lambda: Told(lambda _, y: isinstance(y, torch.Tensor)), AS_TOLD),
        (lambda: Told(lambda *_: not torch.fx._symbolic_trace.is_fx_tracing()), AS_TOLD),
        (Conditional, DATA),
        (Gated, DATA),
        (Twice, DATA),
    ],
)
def test_readers_that_torch_fx_does_not_see_get_what_they_get_otherwise(make, data, use):
    torch.manual_seed(0)
    net = whole(make())
    use(None)
    expected = moments(net, data, include=["*conv", "next"])
    kernel = use(Kernel())
    assert_close(moments(net, data, include=["*conv", "next"]), expected)
    assert kernel.calls


def test_a_model_that_cannot_be_copied_any_more_is_calibrated_without(use):
    kernel = use(Kernel())
    prepared = retrofit.prepare(two_convolutions())
    prepared.lock = threading.Lock()
    assert moments(None, prepared=prepared)
    assert (kernel.calls, kernel.relus) == (4, 0)


def test_arguments_that_the_trace_did_not_have_are_left_alone(use):
    """They may lead another way: there the mean is taken of what is between the two."""
    net, data = whole(Read(sometimes)), [{"x": x, "more": True} for x in DATA]
    use(None)
    expected = moments(net, data, include="*")
    kernel = use(Kernel())
    assert_close(moments(net, data, include="*"), expected)
    assert (kernel.calls, kernel.relus) == (4, 0)


def hooked(path, kind):
    """A block, of which one module, or container, has a hook that sees what is between the two."""
    parts = nn.Sequential(nn.Conv2d(3, 5, 3)), nn.Sequential(nn.ReLU(inplace=True))
    net = whole(*parts, nn.Conv2d(5, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    seen = []
    getattr(net.get_submodule(path), f"register_forward_{kind}")(
        lambda _module, args, *output: seen.append([*output, *args][0].clone())
    )
    return net, seen


@pytest.mark.parametrize(
    ("path", "kind"), [("0.0", "hook"), ("0", "hook"), ("1", "pre_hook"), ("1.0", "pre_hook")]
)
def test_hooks_see_what_they_see_otherwise(path, kind, use):
    seen = {}
    for kernel in (None, Kernel()):
        torch.manual_seed(0)
        use(kernel)
        net, seen[kernel is None] = hooked(path, kind)
        retrofit.calibrate(retrofit.prepare(net), DATA, progress=False)
    assert kernel.calls
    assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))
    assert min(x.min() for x in seen[True]) < 0


def test_a_hook_of_all_modules_sees_what_it_sees_otherwise(use):
    seen = {}
    for kernel in (None, Kernel()):
        use(kernel)
        prepared = retrofit.prepare(two_convolutions_of_one_seed())
        handle = nn.modules.module.register_module_forward_hook(
            lambda _module, _args, y, used=kernel is not None: seen.setdefault(used, []).append(
                y.clone()
            )
        )
        with contextlib.closing(SimpleNamespace(close=handle.remove)):
            retrofit.calibrate(prepared, DATA, progress=False)
    plain, fused = seen[False], seen[True]
    assert kernel.calls == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


def test_the_model_is_afterwards_what_it_was_after_errors_too(use):
    net = two_convolutions()
    prepared = retrofit.prepare(net)
    use(Kernel())
    moments(net, prepared=prepared)
    with pytest.raises(retrofit.NonFiniteError, match="at 0 for image 2 of the data"):
        moments(net, [torch.where(torch.arange(3).view(-1, 1, 1, 1) == 2, torch.inf, DATA[1])])
    with pytest.raises(retrofit.NonFiniteError):
        moments(net, [DATA[0] / 0], prepared=prepared)
    for module in prepared.modules():
        assert vars(module).keys().isdisjoint({"forward", "_conv_forward"})


def test_what_a_hook_makes_of_the_output_is_what_is_measured(use):
    def halved(_module, _args, output):
        return output / 2

    def doubled(_module, _args, output):
        output.mul_(2)

    for hook in (halved, doubled):
        net = two_convolutions()
        net[0].register_forward_hook(hook)
        use(None)
        expected = moments(net)
        kernel = use(Kernel())
        assert_close(moments(net), expected)
        assert kernel.calls == 4


def with_its_own_forward():
    net = two_convolutions()
    for conv in (net[0], net[2]):
        conv.forward = conv.forward
    return net


def normed():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))
    return nn.Sequential(conv, nn.ReLU()).eval()


def reflecting():
    return whole(nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), nn.ReLU())


def subclassed():
    class Convolution(nn.Conv2d):
        pass

    return whole(Convolution(3, 5, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: whole(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU()), {}),
        (lambda: whole(nn.ConvTranspose2d(3, 5, 3), nn.ReLU()), {}),
        (lambda: whole(nn.Conv2d(3, 5, 3, padding="same"), nn.ReLU()), {}),
        (normed, {}),
        (two_convolutions, {"placement": "post_activation"}),
        (with_its_own_forward, {}),
        (reflecting, {}),
        (subclassed, {}),
    ],
)
def test_convolutions_that_it_does_not_fit_are_left_alone(make, options, use):
    kernel = use(Kernel())
    assert moments(make(), **options)
    assert kernel.calls == 0


def test_autocast_is_left_alone(use):
    kernel = use(Kernel())
    with torch.autocast("cpu", torch.bfloat16):
        assert moments(two_convolutions())
    assert kernel.calls == 0


def test_a_forward_fn_is_left_alone(use):
    kernel = use(Kernel())
    prepared = retrofit.prepare(two_convolutions())
    retrofit.calibrate(prepared, DATA, forward_fn=lambda m, x: m(x), progress=False)
    assert kernel.calls == 0


def test_on_a_cpu_nothing_is_touched():
    conv = nn.Conv2d(3, 5, 3)
    assert fused_bias.fusable([conv]) == []


def test_backends_that_begin_with_the_bias_are_left_alone(use, monkeypatch):
    """As those of the CPU do."""
    added_afterwards = fused_bias._is_added_afterwards
    kernel = use(Kernel())
    monkeypatch.setattr(fused_bias, "_is_added_afterwards", added_afterwards)
    assert moments(two_convolutions())  # warnings are errors
    assert kernel.calls == 0


def of_the_kernel(caught):
    return [one for one in caught if "uncertain" not in str(one.message)]  # few images


def test_a_pytorch_that_does_not_tell_the_backend_is_left_alone_with_one_warning(use, monkeypatch):
    net = two_convolutions()
    expected = moments(net)
    added_afterwards = fused_bias._is_added_afterwards
    kernel = use(Kernel())
    monkeypatch.setattr(fused_bias, "_is_added_afterwards", added_afterwards)
    monkeypatch.delattr(torch._C, "_select_conv_backend")
    with pytest.warns(UserWarning, match="not used on cpu .*_select_conv_backend") as caught:
        assert_close(moments(net), expected)
    assert (kernel.calls, len(of_the_kernel(caught))) == (0, 1)


def test_a_kernel_that_fails_is_left_with_one_warning_and_the_same_moments(use):
    net = two_convolutions()
    expected = moments(net)
    kernel = use(Kernel(error=RuntimeError("out of registers\nat line 3")))
    with pytest.warns(UserWarning, match=r"\(RuntimeError: out of registers\)") as caught:
        found = moments(net)
    assert_close(found, expected)
    assert (kernel.calls, len(of_the_kernel(caught))) == (1, 1)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Kernel(off=0.01), "other moments"),
        (Kernel(off=float("nan")), "other moments"),
        (Kernel(error=OSError("no C compiler")), "OSError: no C compiler"),
    ],
)
def test_a_kernel_is_compared_with_pytorch_before_it_is_used(kernel, reason, use, monkeypatch):
    net = two_convolutions()
    expected = moments(net)
    use(kernel, trusted=False)
    monkeypatch.setattr(fused_bias, "F", SimpleNamespace(conv2d=biased_afterwards))
    with pytest.warns(UserWarning, match=reason) as caught:
        found = moments(net)
    assert_close(found, expected)
    assert (kernel.calls, len(of_the_kernel(caught))) == (1, 1)


def biased_afterwards(x, weight, bias=None):
    y = nn.functional.conv2d(x, weight)
    return y if bias is None else y + bias.view(-1, 1, 1)


def test_a_bias_that_is_added_otherwise_is_found_out(use, monkeypatch):
    def biased_before(x, weight, bias=None):
        y = biased_afterwards(x, weight, bias)
        return y if bias is None else y.nextafter(y + 1)

    use(Kernel(), trusted=False)
    monkeypatch.setattr(fused_bias, "F", SimpleNamespace(conv2d=biased_before))
    with pytest.warns(UserWarning, match="otherwise than PyTorch"):
        moments(two_convolutions())


def test_without_triton_nothing_is_said(monkeypatch):
    monkeypatch.setattr(fused_bias, "DEVICE", "cpu")
    monkeypatch.setattr(fused_bias, "_kernel", fused_bias._kernel.__wrapped__)
    monkeypatch.setitem(sys.modules, "retrofit.numerics.triton_kernel", None)
    assert moments(two_convolutions())  # warnings are errors


def test_importing_retrofit_does_not_import_triton():
    code = "import sys, retrofit; retrofit.calibrate; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
