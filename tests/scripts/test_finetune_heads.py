"""scripts/finetune_heads.py on tiny networks, and the networks that it reads from files."""

import csv
import importlib
import sys

import pytest
import torch
import torchvision
from folders import labelled_pictures
from safetensors.torch import load_file, save_file
from torch import nn

import retrofit

pytest.importorskip("timm")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the statistics of")]


class Stock(nn.Module):
    """With a BatchNorm, which is folded away before the weights are written."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x):
        return self.classifier(self.bn(self.conv(x)).relu().mean((2, 3)))


def folded(weights):
    model = retrofit.fold(Stock().eval())
    model.load_state_dict(load_file(weights))
    return model


def restored(plain, batches):
    return retrofit.restore(Stock().eval(), plain, batches, progress=False)


@pytest.fixture(scope="module")
def heads():
    return importlib.import_module("finetune_heads")


@pytest.fixture(scope="module")
def networks():
    return importlib.import_module("finetune_heads_networks")


@pytest.fixture
def command(heads, networks, monkeypatch, tmp_path):
    """Runs the script on two tiny networks; later options win. Returns the rows of its CSV."""
    labelled_pictures(tmp_path / "data", train=4, test=20)
    (tmp_path / "weights").mkdir()
    subjects = {}
    for name, back in (("tiny-folded", restored), ("tiny", None)):
        torch.manual_seed(0)
        save_file(
            retrofit.fold(Stock().eval()).state_dict(), f"{tmp_path}/weights/{name}.safetensors"
        )
        network = networks.Network(folded, back, (0.5,) * 3, (0.5,) * 3)
        size = {"pixels": 12 if back else 20, "steps": 4, "rates": (0.01, 0.1)}
        subjects[name] = networks.Subject(
            network, lambda: networks.Head(6, 2), folded=back is not None, **size
        )
    monkeypatch.setattr(heads, "SUBJECTS", subjects)

    def run(*options):
        words = f"x --data {tmp_path}/data --weights {tmp_path}/weights --output {tmp_path}/out"
        words += " --images 32 --batch-size 8"
        monkeypatch.setattr(sys, "argv", [*words.split(), *map(str, options)])
        heads.main()
        with (tmp_path / "out" / "finetune-heads.csv").open() as lines:
            return list(csv.DictReader(lines))

    return run


def keys(rows):
    return [(r["model"], r["variant"], float(r["learning_rate"]), int(r["seed"])) for r in rows]


def test_each_network_is_run_with_its_variants_in_its_size_and_all_of_a_seed_first(
    command, tmp_path, capsys
):
    rows = command()
    variants = {"tiny": ["plain", "plain, clipped", "add_batchnorm", "add_batchnorm, clipped"]}
    variants = {"tiny-folded": [*variants["tiny"], "restored"], **variants}
    assert keys(rows) == [
        (network, variant, rate, seed)
        for seed in (0, 1)
        for network, names in variants.items()
        for rate in (0.01, 0.1)
        for variant in names
    ]
    assert {(r["model"], r["pixels"]) for r in rows} == {("tiny-folded", "12"), ("tiny", "20")}
    assert {r["test_images"] for r in rows} == {"10"}
    table = (tmp_path / "out" / "finetune-heads.md").read_text()
    assert table in capsys.readouterr().out
    assert "tiny: 4 steps of 8, 32 pictures of 20 pixels, tested on 10\n" in table
    assert table.count("| restored |") == 2
    assert "restored" in (tmp_path / "out" / "finetune-heads.svg").read_text()


def test_a_study_goes_on_with_what_is_missing_and_refuses_other_settings_by_network(
    command, tmp_path
):
    rows = command("--seeds", 1, "--network", "tiny")
    assert {key[0] for key in keys(rows)} == {"tiny"}
    before = (tmp_path / "out" / "finetune-heads.csv").read_text()
    both = command("--seeds", 1)
    assert both[: len(rows)] == rows
    assert len(both) == 8 + 10
    with pytest.raises(SystemExit, match="runs with pixels = 12, this study has 16"):
        command("--seeds", 1, "--pixels", 16)
    assert (tmp_path / "out" / "finetune-heads.csv").read_text().startswith(before)


def test_variants_of_a_seed_see_the_same_pictures_in_the_same_order(command, heads, monkeypatch):
    seen = []

    def train(model, variant, _protocol, _rate, pictures, _labels, inputs):
        order = torch.randperm(100)
        answers = model.eval()(inputs(pictures))
        seen.append((variant.batchnorm, pictures.sum().item(), order.tolist(), answers))
        return [0.0]

    monkeypatch.setattr(heads, "train", train)
    command("--seeds", 2, "--learning-rates", 0.1, "--network", "tiny-folded")
    by_seed = seen[:5], seen[5:]
    for runs in by_seed:
        assert [run[0] for run in runs] == ["none"] * 2 + ["calibrated"] * 2 + ["restored"]
        assert all(run[1:3] == runs[0][1:3] for run in runs)
        assert all(torch.equal(run[3], torch.zeros(32, 10)) for run in runs)
    assert by_seed[0][0][1:3] != by_seed[1][0][1:3]


def test_a_variant_looks_the_same_in_each_panel_of_the_figure(heads):
    def run(variant):
        return heads.HeadRun("tiny", 32, 10, 4, 8, variant, 0.1, accuracy=0.5)

    panels = {"one": [run("plain"), run("restored")], "two": [run("restored")]}
    figure = heads.draw_panels(panels)
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.get_lines()}
        for axes in figure.axes
    ]
    assert looks[0]["restored"] == looks[1]["restored"] != looks[0]["plain"]


def test_weights_that_are_not_there_are_named(command, tmp_path):
    (tmp_path / "weights" / "tiny.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"there is no .*tiny\.safetensors: put it there"):
        command()


@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg16-features"])
def test_the_head_is_given_the_average_of_the_features(networks, tmp_path, name):
    torch.manual_seed(0)
    if name == "squeezenet1_1":
        model = torchvision.models.squeezenet1_1().eval()
        features, state = model.features, model.state_dict()
    else:
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
        state = {f"features.{path}": tensor for path, tensor in features.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    x = torch.randn(2, 3, 64, 64)
    subject = networks.SUBJECTS[name]
    for variant in subject.variants.values():
        built = subject.built(variant, tmp_path / "weights.safetensors", [x]).eval()
        (head,) = (module for module in built.modules() if isinstance(module, networks.Head))
        with torch.no_grad():
            head.weight[:, :10] = torch.eye(10)
            expected = features(x).mean((2, 3))[:, :10] / head.size
            torch.testing.assert_close(built(x), expected)


def test_pictures_are_resized_bilinearly_and_normalised_as_in_training(networks):
    pictures = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    x = networks.SUBJECTS["mobilenetv2_100-folded"].inputs(pictures, 8)
    torch.testing.assert_close(x, pictures / 255 * 2 - 1)
    flat = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    x = networks.SUBJECTS["vgg16-features"].inputs(flat, 16)
    assert x.shape == (1, 3, 16, 16)
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x.mean((0, 2, 3)), white)
