"""`--model-args num_classes=10`: networks that are built with arguments of their factories."""

import json
import shlex
import sys

import pytest
import timm
import torch
import torchvision
from folders import pictures
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.fx.experimental.optimization import fuse

import retrofit
from retrofit.files.model_args import parse_argument
from retrofit.files.model_sources import build, trained

DATA = ("--data", "pictures", "--crop", "48", "--workers", "0", "--images", "4")
TEN = ("--model-args", "num_classes=10")
NET = """
from torch import nn

def make(width, depth=1, head="linear"):
    convs = [nn.Conv2d(3 if i == 0 else width, width, 3) for i in range(depth)]
    return nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, 2))
"""


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path / "pictures", 6)
    torch.manual_seed(0)
    ten = torchvision.models.squeezenet1_1(num_classes=10)
    torch.save(ten.state_dict(), tmp_path / "ten.pth")
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def provenance(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["retrofit"])


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore:the statistics")  # of four pictures
def test_a_fine_tuned_network_is_converted_and_the_file_says_how_it_is_built(run, tmp_path):
    weights = ("--weights", "ten.pth", *DATA)
    code, out, err = run("convert", "squeezenet1_1", *TEN, *weights, "--output", "bn.safetensors")
    assert (code, err) == (0, [])
    assert "equal bit for bit" in out
    assert provenance(tmp_path / "bn.safetensors")["model_args"] == {"num_classes": 10}
    for more in ((), ("--model", "squeezenet1_1"), TEN):
        assert run("verify", "bn.safetensors", *weights, *more)[0] == 0
    code, out, _ = run("inspect", "bn.safetensors")
    assert code == 0
    assert "model               squeezenet1_1(num_classes=10)" in out
    assert run("adapt", "bn.safetensors", *DATA, "--output", "adapted.safetensors")[0] == 0
    assert run("fold", "adapted.safetensors", "--output", "folded.safetensors")[0] == 0
    assert run("fold", "bn.safetensors", "--output", "plain.safetensors")[0] == 0
    assert provenance(tmp_path / "plain.safetensors")["model_args"] == {"num_classes": 10}
    original, folded = torch.load("ten.pth"), load_file("plain.safetensors")
    assert all(torch.equal(folded[key], value) for key, value in original.items())
    page = ("--output", "page.html", *weights)
    assert run("report", "bn.safetensors", *page)[0] == 0
    assert "squeezenet1_1(num_classes=10)" in (tmp_path / "page.html").read_text()


def test_save_and_load_in_python_know_the_arguments(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1(num_classes=3, dropout=0.1).eval()
    converted = retrofit.insert(model)
    arguments = {"num_classes": 3, "dropout": 0.1}
    retrofit.save(converted, tmp_path / "a.safetensors", name="squeezenet1_1", model_args=arguments)
    loaded = retrofit.load(tmp_path / "a.safetensors")
    assert loaded.classifier[0].p == 0.1
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("value", [{1, 2}, {"a": 1}, float("nan"), object(), [[1]], b"a"])
def test_python_refuses_arguments_that_no_file_can_hold_and_writes_nothing(tmp_path, value):
    with pytest.raises(retrofit.RetrofitError, match="model_args cannot have 'num_classes'"):
        retrofit.save(
            torch.nn.Conv2d(1, 1, 1), tmp_path / "a.safetensors", model_args={"num_classes": value}
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=10", 10),
        ("a=-1.5", -1.5),
        ("a=True", True),
        ("a=None", None),
        ("a=[2, 2]", [2, 2]),
        ("a=pool", "pool"),
        ("a='True'", "True"),
        ("a=b=c", "b=c"),
        ("a=1e", "1e"),
        ("a=__import__('os')", "__import__('os')"),
    ],
)
def test_values_are_literals_of_python_or_else_texts(text, expected):
    key, value = parse_argument(text)
    assert (key, value) == ("a", expected)
    assert type(value) is type(expected)


@pytest.mark.usefixtures("folder")
def test_several_arguments_go_to_a_factory_and_add_up(run):
    code, out, err = run("plan", "net.py:make", "--model-args", "width=4", "depth=3",
                         "--model-args", "head=none at all")  # fmt: skip
    assert (code, err) == (0, [])
    assert out.count("Conv2d") == 3


def test_a_timm_model_takes_the_arguments_of_its_class(folder, run):
    torch.manual_seed(0)
    model = timm.create_model("test_nfnet", num_classes=7).eval()
    torch.save(model.state_dict(), folder / "seven.pth")
    seven = ("--model-args", "num_classes=7")
    words = ("--weights", "seven.pth", *DATA)
    code, _, err = run("convert", "timm:test_nfnet", *seven, *words, "--output", "bn.safetensors")
    assert (code, err) == (0, [])
    code, _, err = run("verify", "bn.safetensors", "--model", "timm:test_nfnet", *seven, *words)
    assert (code, err) == (0, [])
    # What a file says is for torchvision's models alone; others are not built without it either.
    code, _, err = run("verify", "bn.safetensors", "--model", "timm:test_nfnet", *words)
    assert (code, len(err)) == (2, 1)
    assert err[0].endswith("typed: --model timm:test_nfnet --model-args num_classes=7")


REFUSED = {
    "plan vgg11 --model-args num_classes": "num_classes is not KEY=VALUE, as num_classes=10",
    "plan --model-args num_classes=2 vgg11": "vgg11 is not KEY=VALUE",
    "plan vgg11 --model-args 2=3": "2=3 is not KEY=VALUE",
    "plan vgg11 --model-args init_weights=false": "Python writes init_weights=False",
    "plan vgg11 --model-args num_classes=": "num_classes= has no value",
    "plan vgg11 --model-args num_classes={1}": "must be a number, a text, True, False, None, or",
    "plan vgg11 --model-args a=1 --model-args a=1": "argument --model-args: a is given twice",
    "plan squeezenet1_1 --model-args classes=10": (
        "squeezenet1_1 takes no argument 'classes' (--model-args), but version, num_classes"
    ),
    "plan squeezenet1_1 --model-args num_classes=ten": (
        "squeezenet1_1 cannot be built with num_classes='ten' (--model-args): TypeError"
    ),
    "plan squeezenet1_1 --model-args weights=DEFAULT": "--model-args weights is not for squeeze",
    "plan timm:test_nfnet --model-args pretrained=True": "--model-args pretrained is not for test_",
    "plan timm:test_vit --model-args classes=10": "timm:test_vit takes no argument 'classes'",
    "plan net.py:make": "'width' (--model-args gives a factory its arguments)",
    "plan net.py:make --model-args widht=3": (
        "net.py:make takes no argument 'widht' (--model-args), but width, depth, head"
    ),
    "plan net.py:make --model-args width=-3": "net.py:make cannot be built with width=-3",
    "plan net.onnx --model-args num_classes=10": "net.onnx holds a whole network, which takes no",
    "plan ultralytics:yolo11n --model-args nc=3": "ultralytics:yolo11n takes no --model-args",
    "convert squeezenet1_1 --weights DEFAULT --data pictures --output o.pth --model-args "
    "num_classes=10": (
        "the weights of SqueezeNet1_1_Weights.IMAGENET1K_V1 are for 1000 classes, and with "
        "--model-args num_classes=10 the head would be random"
    ),
    "convert timm:test_nfnet --weights DEFAULT --data pictures --output o.pth --model-args "
    "num_classes=10": "the weights of timm's test_nfnet are for 1000 classes",
    "convert squeezenet1_1 --weights ten.pth --data pictures --output o.pth": (
        "they are of 10 classes, it seems, and the model of 1000: build it with num_classes=10 "
        "(--model-args num_classes=10)"
    ),
    "restore resnet18 --weights small.pth --data pictures --output o.pth": (
        "build it with num_classes=10 (--model-args num_classes=10)"
    ),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_meant_is_one_line(run, folder, words, message):
    if "small.pth" in words:
        small = fuse(torchvision.models.resnet18(num_classes=10).eval())
        torch.save(small.state_dict(), folder / "small.pth")
    code, _, err = run(*words.split())
    assert (code, len(err)) == (2, 1), err
    assert message in err[0]
    assert not (folder / "o.pth").exists()


def test_a_head_is_told_of_only_where_all_else_fits(tmp_path):
    torch.save({"0.weight": torch.zeros(5, 4, 3, 3), "0.bias": torch.zeros(5)}, tmp_path / "a.pth")
    with pytest.raises(retrofit.RetrofitError, match="do not fit") as caught:
        retrofit.load(tmp_path / "a.pth", torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)))
    assert "num_classes" not in str(caught.value)


HOSTILE = [
    {"weights": "DEFAULT"},
    {"num_classes": 10**9},
    {"num_classes": "os.system"},
    {"num_classes": {"a": 1}},
    {"num_classes": [[1]]},
    {"num_classes": 1e999},
    {"unknown": 1},
    ["num_classes"],
    "num_classes=10",
]


@pytest.mark.parametrize("arguments", HOSTILE, ids=str)
def test_the_arguments_in_a_file_are_checked(tmp_path, arguments):
    model = torchvision.models.squeezenet1_1(num_classes=10)
    told = {"model": "squeezenet1_1", "model_args": arguments}
    save_file(model.state_dict(), tmp_path / "a.safetensors", {"retrofit": json.dumps(told)})
    with pytest.raises(retrofit.RetrofitError):
        retrofit.load(tmp_path / "a.safetensors")


def test_the_arguments_in_a_file_import_no_code_that_it_names(run, folder):
    model = build("net.py:make", {"width": 4})
    sys.modules.pop("net")
    retrofit.save(retrofit.insert(model), "a.safetensors", name="net.py:make",
                  model_args={"width": 4})  # fmt: skip
    (folder / "net.py").write_text("raise SystemExit('imported')")
    code, _, err = run("fold", "a.safetensors", "--output", "o.pth", "--model-args", "width=4")
    assert code == 2
    assert err[0].endswith("typed: --model net.py:make --model-args width=4")


ARGUMENTS = [
    {"act": "silu"}, {"act": "True"}, {"act": "true"}, {"act": ""}, {"act": "a b'c"},
    {"act": "a\nb\t"},
    {"width": 4, "sizes": [1, 2], "eps": -0.5},
    {"act": None, "bias": False, "names": ["x y", "z"]},
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("spec", ["any.py:make", "same.py:make"])
def test_arguments_in_a_file_are_never_left_out(run, folder, arguments, spec):
    """A network without them may well fit the weights, and be another one."""
    code = (
        "import torch\ndef make(**arguments):\n    print(arguments)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())\n"
    )
    for name in ("any.py", "same.py"):
        (folder / name).write_text(code)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    retrofit.save(retrofit.insert(model), "a.safetensors", name="any.py:make", model_args=arguments)
    words = ("fold", "a.safetensors", "--output", "o.pth", "--model", spec)
    code, out, err = run(*words)
    assert (code, out, len(err)) == (2, "", 1)
    typed = shlex.split(err[0].partition("typed: ")[2])
    options = typed if spec == "any.py:make" else typed[typed.index("--model-args") :]
    code, out, _ = run(*words[:4], *([] if options[0] == "--model" else words[4:]), *options)
    assert code == 0
    assert out.startswith(f"{dict(sorted(build_args(arguments).items()))}")


def build_args(arguments):
    """The arguments, as a file and the command line give them."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}


def test_detection_models_are_built_with_another_number_of_classes():
    model = build("fasterrcnn_mobilenet_v3_large_320_fpn", {"num_classes": 3, "min_size": 64})
    assert model.roi_heads.box_predictor.cls_score.out_features == 3
    assert model.transform.min_size == (64,)


def test_timm_without_a_head_has_pretrained_weights(monkeypatch):
    torch.manual_seed(0)
    state = timm.create_model("test_nfnet").state_dict()
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state)
    )
    model = trained("timm:test_nfnet", "DEFAULT", model_args={"num_classes": 0})
    assert torch.equal(model.state_dict()["stem.conv1.weight"], state["stem.conv1.weight"])
