"""The code on the pages of the documentation runs as it stands there."""

import ast
import inspect
import json
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import nets
import numpy as np
import page_blocks
import pytest
import timm
import torch
import torchvision
from folders import pictures
from page_blocks import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.utils import reparameterize_model
from torch import nn

import retrofit
from retrofit.cli import arguments

few_images = pytest.mark.filterwarnings("ignore:the statistics of", "ignore::DeprecationWarning")


@pytest.fixture
def page(tmp_path, monkeypatch, capsys):
    """Run a page in an empty folder; the names of weights stand for random ones.

    The test is skipped in the end if a package that blocks of the page need is not there.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    page_blocks.without_downloads(monkeypatch)
    torch.manual_seed(0)
    missing = set()

    def run(name, extra=(), points=None, **variables):
        path = f"docs/{name}.md"
        missing.update(page_blocks.run_page(path, variables, capsys, extra, points))
        return variables

    yield run
    sys.modules.pop("net", None)
    if missing:
        pytest.skip(f"the rest of the page has run, what needs {', '.join(missing)} has not")


@pytest.mark.slow
def test_quick_start(page):
    # What training comes to differs between machines, and more with the oldest torch.
    names = page("quick-start", points=None if torch.__version__.startswith("2.6.") else 8)
    before, after = map(names["accuracy"], (names["folded"], names["plain"]))
    assert before < 0.3
    assert after > 0.6


@pytest.mark.slow
@few_images
def test_readme(page, tmp_path):
    for name, count in (("pictures", 40), ("foggy", 8)):
        pictures(tmp_path / name, count)
    resnet = trained(torchvision.models.resnet18())
    torch.onnx.export(resnet, (nets.images(1, 3, 64, 64),), "folded.onnx", dynamo=False)
    page("../README", ["--workers", "0", "--crop", "64"])


def test_own_network(page, tmp_path):
    (tmp_path / "net.py").write_text(page_blocks.blocks("docs/own-network.md")[0].code)
    page("own-network")


@pytest.mark.slow
def test_detectors(page, tmp_path):
    pictures(tmp_path / "pictures", 20)
    page("detectors", ["--images", "4", "--workers", "0"])


def test_fine_tuning(page, tmp_path):
    (factory,) = (b for b in page_blocks.blocks("docs/fine-tuning.md") if "def ten" in b.code)
    (tmp_path / "net.py").write_text(factory.code)
    images = [nets.images(8, 3, 64, 64, seed=i) for i in range(4)]
    loader = [(x, torch.arange(8)) for x in images]
    page("fine-tuning", task_images=images, loader=loader)


def test_adaptation(page, tmp_path):
    for name, count in (("pictures", 20), ("foggy", 8), ("sixteen", 4)):
        pictures(tmp_path / name, count)
    images, new = ([scale * nets.images(8, 3, 64, 64, seed=i) for i in (1, 2)] for scale in (1, 2))
    small = ["--crop", "64", "--workers", "0"]
    page("adaptation", small, images=images, new_images=new, sixteen_images=new)


def test_many_gpus(page):
    page("many-gpus", batches=[nets.images(8, 3, 64, 64, seed=i) for i in (1, 2)])


GREY = """from torch import nn


def grey():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), *head).eval()
"""


MAKE = """

def make():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *head).eval()
"""


@pytest.mark.slow
def test_calibration(page, tmp_path):
    pictures(tmp_path / "train", 20)
    (tmp_path / "net.py").write_text(GREY)
    np.save("mnist.npy", np.random.default_rng(0).integers(0, 256, (64, 28, 28), dtype=np.uint8))
    x = nets.images(256, 3, 16, 16)
    prepared = retrofit.prepare(nets.build(nets.Residual))
    loader = torch.utils.data.DataLoader(x, batch_size=8, shuffle=True)
    group = {"init_method": f"file://{tmp_path}/group", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **group)
    try:
        ranks = {"batches": x.split(64), "rank": 0, "size": 1}
        page("calibration", ["--workers", "0"], prepared=prepared, loader=loader, **ranks)
    finally:
        torch.distributed.destroy_process_group()


def test_own_data(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "net.py").write_text(GREY)
    for file, content in (("listener", "def listener"), ("sounds", "class Sounds")):
        (code,) = (b.code for b in page_blocks.blocks("docs/own-data.md") if content in b.code)
        (tmp_path / f"{file}.py").write_text(code)
    for name in ("a", "b"):
        pictures(tmp_path / "pictures" / "train" / name, 10)
    np.save("digits.npy", np.random.default_rng(0).integers(0, 256, (64, 28, 28), dtype=np.uint8))
    page("own-data", ["--workers", "0"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning(page, tmp_path):
    (factory,) = (b for b in page_blocks.blocks("docs/lightning.md") if "def make" in b.code)
    (tmp_path / "net.py").write_text(factory.code)
    pictures(tmp_path / "pictures", 20)
    x = torch.utils.data.TensorDataset(nets.images(16, 3, 64, 64), torch.arange(16) % 10)
    model = torchvision.models.squeezenet1_1(num_classes=10)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, "plain.ckpt")
    page("lightning", ["--workers", "0"], loader=torch.utils.data.DataLoader(x, batch_size=8))


@torch.no_grad()
def assert_close(model, other, x):
    expected = other.eval()(x)
    assert (model.eval()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def trained(model):
    """In eval mode, with BatchNorms as after training: the statistics are of what reaches them."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            norm.momentum = 0.5
    for _ in range(4):
        model.train()(nets.images(4, 3, 64, 64))
    return model.eval()


def drawn_pictures(folder, count):
    """Pictures with something to see in 224 pixels."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((224, 224)).save(folder / f"{i}.png")


@pytest.mark.slow
@few_images
def test_folded(page, tmp_path):
    pictures(tmp_path / "pictures", 8)
    folded = retrofit.fold(trained(timm.create_model("mobilenetv2_100")))
    assert "conv_stem.bias" in folded.state_dict()
    assert "bn1.weight" not in folded.state_dict()
    save_file(folded.state_dict(), "mobilenetv2_edge.safetensors")
    images = [nets.images(4, 3, 64, 64, seed=i) for i in (1, 2)]
    names = page("folded", ["--workers", "0", "--crop", "64"], images=images)
    assert_close(names["restored"], names["folded"], images[0])
    assert_close(names["network"], folded, images[0])
    tuned = load_file("mobilenetv2_edge_tuned.safetensors")
    assert set(tuned) == set(folded.state_dict())
    folded.load_state_dict(tuned)
    assert_close(folded, names["network"], images[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8"])
def test_merged_branches_do_not_come_back(name):
    text = page_blocks.section("docs/folded.md", "What cannot come back")
    assert name.split("_")[0] in text.lower()
    merged = reparameterize_model(timm.create_model(name)).eval()
    images = [nets.images(2, 3, 64, 64)]
    for folded in (merged, merged.state_dict()):
        with pytest.raises(retrofit.RetrofitError, match=r"where the architecture has|has no"):
            retrofit.restore(timm.create_model(name), folded, images, progress=False)


@pytest.mark.slow
@few_images
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(page, tmp_path, dynamo):
    pictures(tmp_path / "pictures", 40)
    original = trained(torchvision.models.resnet18())
    images = [nets.images(4, 3, 64, 64, seed=i) for i in (1, 2)]
    plain = torchvision.models.squeezenet1_1()
    files = {
        "net.onnx": plain,
        "resnet18.onnx": original,
        "resnet18_softmax.onnx": nn.Sequential(original, nn.Softmax(1)),
    }
    for name, network in files.items():
        torch.onnx.export(network.eval(), (images[0],), name, dynamo=dynamo)
    small = ["--workers", "0", "--crop", "64", "--mean", "0.5", "--std", "0.25"]
    names = page("onnx", small, images=images)
    torchvision.models.resnet18().load_state_dict(names["restored"].state_dict())
    assert_close(names["network"], original, images[0])
    assert_close(names["restored"], original, images[0])
    assert_close(names["module"], plain, images[0])


@pytest.mark.slow
def test_timm(page, tmp_path, monkeypatch):
    drawn_pictures(tmp_path / "pictures", 18)
    original = timm.create_model("repvgg_a0")
    for norm in original.modules():  # each with values of its own
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        for _ in range(5):
            original(2 * nets.images(8, 3, 64, 64) + 0.5)
    source = "timm.models._builder.load_state_dict_from_hf"
    monkeypatch.setattr(source, lambda *_, **__: original.state_dict())
    released = reparameterize_model(original.eval()).eval()
    images = [nets.images(8, 3, 64, 64, seed=i) for i in range(4)]
    loader = [(x, torch.arange(8)) for x in images]
    names = page("timm", ["--workers", "0"], images=images, loader=loader)
    tuned = torch.load("repvgg_a0_tuned.pth", weights_only=True)
    assert list(tuned) == list(released.state_dict())
    again = load_file("repvgg_a0_tuned.safetensors")  # of the command line, not trained
    for key, value in released.state_dict().items():
        assert torch.equal(again[key], value)
    x, plain = images[0], released(images[0])
    released.load_state_dict(tuned)
    assert_close(released, names["folded"], x)
    assert (released(x) - plain).abs().max() > 0.1 * plain.std()
    converted = sum(isinstance(module, nn.BatchNorm2d) for module in names["network"].modules())
    assert converted == 22


@pytest.mark.slow
@few_images
def test_yolo(page, tmp_path):
    variables = {}
    if find_spec("ultralytics"):
        ultralytics = import_module("ultralytics")
        network = ultralytics.YOLO("yolov8n.yaml")
        trained(network.model)
        network.model.fuse()
        network.save("fused.pt")
        (tmp_path / "mine").mkdir()
        own = {**network.model.yaml, "nc": 80}
        (tmp_path / "mine" / "yolov8n.yaml").write_text(json.dumps(own))
        torch.onnx.export(
            network.model.eval(), (nets.images(1, 3, 64, 64),), "best.onnx", dynamo=False
        )
        pictures(tmp_path / "pictures", 8)
        x = nets.images(2, 3, 64, 64).sigmoid()
        box = {"batch_idx": torch.zeros(1), "cls": torch.zeros(1, 1)}
        variables = {
            "images": [x, x.flip(-1)],
            "loader": [{"img": x, "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]]), **box}],
        }
    names = page("yolo", ["--workers", "0", "--crop", "64"], **variables)
    if variables:
        assert len(retrofit.restoration_of(names["restored"]).seats) == 57


@pytest.mark.slow
@few_images
@pytest.mark.filterwarnings("ignore:the calibration ended after")
def test_command_line(page, tmp_path):
    for name, count in (("pictures", 40), ("foggy", 8)):
        pictures(tmp_path / name, count)
    (tmp_path / "net.py").write_text(GREY + MAKE)
    np.save("digits.npy", np.random.default_rng(0).integers(0, 256, (64, 28, 28), dtype=np.uint8))
    names = {"nn": nn}
    exec(MAKE, names)  # noqa: S102
    state = names["make"]().state_dict()
    inside = {f"model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": inside, "epoch": 3}, "lightning.ckpt")
    average = {key: 0.9 * value for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, "model_best.pth.tar")
    (tmp_path / "path" / "to" / "snapshot").mkdir(parents=True)
    save_file(state, "path/to/snapshot/model.safetensors")
    folded = retrofit.fold(trained(torchvision.models.resnet18()))
    torch.save(folded.state_dict(), "folded.pth")
    page("command-line", ["--workers", "0", "--crop", "64"])


PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", [*PAGES, "README.md", "CONTRIBUTING.md", "SECURITY.md"])


def test_every_page_with_code_is_run_by_a_test():
    source = Path(__file__).read_text()
    run = {f"docs/{name}.md" for name in re.findall(r'\bpage\(\s*"([\w-]+)"', source)}
    run.add("docs/merging.md")  # by test_merging, beside the script that it uses
    with_code = {page for page in PAGES if any(b.runs for b in page_blocks.code_of(page))}
    assert with_code == run


@each_page
def test_code_that_is_not_run_is_python_and_commands_that_exist_all_the_same(page):
    for block in page_blocks.blocks(page):
        assert block.language in ("python", "sh", "text"), f"{page}:{block.line}"
        assert not block.title or block.title.startswith((page_blocks.NOT_RUN, page_blocks.NEEDS))
        if block.language == "python":
            ast.parse(block.code, page)
        if block.language == "sh":
            for command in page_blocks.commands(block.code):
                words = page_blocks.words_of(command)
                assert words or command[0] == "pip" or not block.runs, command
                if words and words[0] != "--version":
                    arguments.parse(words)  # exits for what cannot be parsed


def usage(parser):
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", parser.format_usage()))


def test_the_page_of_the_command_line_has_every_option_of_every_command_and_no_other():
    page = "docs/command-line.md"
    prose = page_blocks.FENCE.sub("", (ROOT / page).read_text())
    explained = set(re.findall(r"`(--?[a-z][a-z-]*)", prose))
    every = {"--version"}
    for name, parser in page_blocks.parsers().items():
        (shown,) = (b for b in page_blocks.blocks_of(page_blocks.section(page, name))
                    if b.language == "text")  # fmt: skip
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", shown.code)) == usage(parser), name
        required = shown.code[: shown.code.rindex("[")]
        for action in parser._actions:
            if action.required and action.option_strings:
                assert f" {action.option_strings[0]} " in required, name
                assert f"[{action.option_strings[0]} " not in required, name
        every |= usage(parser)
    assert explained >= every
    assert explained - every <= {"--help"}


def test_every_option_of_the_functions_is_explained_on_a_page():
    text = "".join((ROOT / page).read_text() for page in PAGES)
    functions = ("plan", "calibrate", "convert", "add_batchnorm", "restore", "recalibrate",
                 "adapting")  # fmt: skip
    for name in functions:
        for option in inspect.signature(getattr(retrofit, name)).parameters.values():
            if option.kind is option.KEYWORD_ONLY:
                assert re.search(rf"`[^`\n]*\b{option.name}\b=?[^`\n]*`", text), (name, option.name)
