"""The command restore: folded weights in, those of the stock class out."""

import pytest
import torch
import torchvision
from folders import contents, pictures
from processes import without_bars
from safetensors.torch import load_file, save_file
from torch import nn

import retrofit
from retrofit.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:the statistics of:UserWarning")
WORDS = "--data pictures --crop 64 --workers 0 --batch-size 4"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with pictures, and a ResNet that was folded."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 8)
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    folded = retrofit.fold(model.eval())
    torch.save({"state_dict": folded.state_dict()}, "folded.pth")
    save_file(folded.state_dict(), "folded.safetensors")
    torch.save(model.state_dict(), "plain.pth")
    return folded


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_file_loads_into_the_stock_class(folder, suffix, capsys):
    words = f"restore resnet18 --weights folded{suffix} --output out{suffix} {WORDS}"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert "20 BatchNorms restored; statistics of 8 images" in said
    assert "network = torchvision.models.get_model('resnet18'); network.load_state_dict(" in said
    assert f"({'torch' if suffix == '.pth' else 'safetensors.torch'}.load" in said
    stock = torchvision.models.resnet18()
    state = torch.load("out.pth") if suffix == ".pth" else load_file("out.safetensors")
    stock.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        actual, expected = stock.eval()(x), folder(x)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.usefixtures("folder")
def test_inspect_lists_the_batchnorms_of_the_file_by_name(capsys):
    words = f"restore resnet18 --weights folded.pth --output out.safetensors {WORDS}"
    assert main(words.split()) == 0
    capsys.readouterr()
    assert main(["inspect", "out.safetensors"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "/" in line]
    expected = [
        n for n, m in torchvision.models.resnet18().named_modules() if "Batch" in str(type(m))
    ]
    listed = [row for row in rows if "bn" in row or "downsample" in row]
    assert listed == sorted(expected)  # of single figures


BAD = [
    ("resnet34 --weights folded.pth", "has no layer1.2.conv1.weight"),
    ("squeezenet1_1 --weights folded.pth", "this SqueezeNet has no BatchNorm to restore"),
    ("resnet18 --weights plain.pth", "plain.pth loads as it is: all of its BatchNorms are there"),
    ("resnet18 --weights none.pth", "there is no file none.pth"),
    ("resnet81 --weights folded.pth", "torchvision has no model 'resnet81'"),
    ("resnet18 --weights folded.pth --weights-key ema", "folded.pth has no weights under 'ema'"),
    ("resnet18 --weights pictures", "pictures is a folder without weights"),
    ("resnet18 --weights folded.pth --data nowhere", "nowhere"),
    ("resnet18 --weights folded.pth --output out.onnx", "out.onnx must end in .safetensors"),
    ("resnet18 --weights folded.pth --output folded.pth", "folded.pth exists"),
    ("resnet18 --weights folded.pth --tolerance 3", "3 is not between 0 and 1"),
    ("resnet18", "the following arguments are required: --weights"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("words", "message"), BAD)
def test_a_bad_request_is_one_line_and_writes_nothing(words, message, tmp_path, capsys):
    before = contents(tmp_path)
    words = ["restore", *f"--output out.pth {WORDS} {words}".split()]
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    (error,) = without_bars(capsys.readouterr().err)
    assert code == 2
    assert message in error
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("folder")
def test_of_a_factory_only_the_architecture_matters(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch, torchvision\n"
        "def make():\n"
        "    model = torchvision.models.resnet18()\n"
        "    for m in model.modules():\n"
        "        if isinstance(m, torch.nn.BatchNorm2d):\n"
        "            torch.nn.init.constant_(m.running_var, 2.0)\n"
        "    return model\n"
    )
    words = f"restore net.py:make --weights folded.pth --output out.pth {WORDS}"
    assert main(words.split()) == 0
    loading = "network = make(); network.load_state_dict(torch.load('out.pth'))"
    assert f"to load: {loading}" in capsys.readouterr().out
