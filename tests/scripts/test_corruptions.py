"""scripts/cifar10c.py on the demo's pictures, scripts/corruptions.py on a tiny network."""

import importlib

import nets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import retrofit
from retrofit import demo
from retrofit.demo.network import CLASSES

pytestmark = pytest.mark.slow

pytest.importorskip("scipy")
NAMES = [
    *("gaussian noise", "shot noise", "impulse noise"),
    *("defocus blur", "glass blur", "motion blur", "zoom blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic", "pixelate", "jpeg"),
]
DRAWN = set(NAMES) - {"defocus blur", "zoom blur", "brightness", "contrast", "pixelate", "jpeg"}


@pytest.fixture(scope="module")
def cifar10c():
    return importlib.import_module("cifar10c")


@pytest.fixture(scope="module")
def corruptions():
    return importlib.import_module("corruptions")


@pytest.fixture(scope="module")
def normalise():
    return importlib.import_module("pictures").normalise


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Every twentieth of the demo's test pictures: uint8 (100, 32, 32, 3)."""
    folder = tmp_path_factory.mktemp("demo")
    demo.unpack(folder)
    files = sorted((folder / "test").rglob("*.jpg"))[::20]
    return np.stack([np.asarray(Image.open(file)) for file in files])


def corrupted(cifar10c, photos, name, severity, seed=0):
    return cifar10c.corrupt(photos, name, severity, np.random.default_rng(seed))


# --- the corruptions ---------------------------------------------------------------------------


def test_there_are_the_fifteen_of_cifar10c(cifar10c):
    assert list(cifar10c.CORRUPTIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_keeps_shape_and_type_and_leaves_its_input_alone(cifar10c, photos, name):
    before = photos.copy()
    for severity in range(1, 6):
        after = corrupted(cifar10c, photos, name, severity)
        assert after.shape == photos.shape
        assert after.dtype == np.uint8
        assert (after != photos).any(axis=(1, 2, 3)).all()  # every picture
    assert (photos == before).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(cifar10c, photos, name):
    first, again, other = (corrupted(cifar10c, photos, name, 3, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any() == (name in DRAWN)


# Not so elastic: its higher severities move small parts by a little instead of all by much.
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"elastic"}))
def test_the_higher_the_severity_the_less_is_left_of_the_picture(cifar10c, photos, name):
    original = photos.reshape(len(photos), -1)
    unlike = []
    for severity in range(1, 6):
        picture = corrupted(cifar10c, photos, name, severity).reshape(original.shape)
        unlike.append(np.abs(picture - original.astype(float)).mean())
    if name in ("glass blur", "frost"):  # each severity trades one thing for another
        unlike = [unlike[0], unlike[4]]
    assert unlike == sorted(unlike)
    assert unlike[-1] > 1.2 * unlike[0]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_other_sizes_are_taken(cifar10c, name):
    wide = np.random.default_rng(0).integers(256, size=(2, 24, 40, 3), dtype=np.uint8)
    assert corrupted(cifar10c, wide, name, 5).shape == wide.shape


def test_what_has_a_formula_follows_it(cifar10c, photos):
    pixels = photos / 255
    mean = pixels.mean((1, 2), keepdims=True)
    flat = 255 * (mean + 0.15 * (pixels - mean))
    assert np.abs(corrupted(cifar10c, photos, "contrast", 5) - flat).max() <= 0.51
    noise = corrupted(cifar10c, np.full_like(photos, 128), "gaussian noise", 5) / 255
    assert noise.std() == pytest.approx(0.10, rel=0.02)
    struck = corrupted(cifar10c, np.full_like(photos, 128), "impulse noise", 5)
    assert (struck != 128).mean() == pytest.approx(0.07, rel=0.05)
    grey = np.full_like(photos, 77)
    for blur in ("defocus blur", "glass blur", "motion blur", "zoom blur", "elastic", "pixelate"):
        assert (corrupted(cifar10c, grey, blur, 5) == 77).all()


@pytest.mark.parametrize(("name", "severity"), [("fog", 0), ("fog", 6), ("smog", 1)])
def test_what_does_not_exist_is_refused_by_name(cifar10c, photos, name, severity):
    with pytest.raises(SystemExit, match=f"{name}.*choose from"):
        corrupted(cifar10c, photos, name, severity)


# --- the study ---------------------------------------------------------------------------------

MAIN = [(0, 0), (500, 0), (16, 16), (16, 64), (-1, 64)]
PLAN = {("none", 0): MAIN, ("inverted", 0): MAIN, ("fog", 5): [*MAIN, (16, 0), (500, 16)]}


@pytest.fixture
def task(corruptions, normalise):
    """Pictures of one colour each, all of which an untrained network gets right by definition."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)
    plain = nets.build(lambda: nn.Sequential(nets.root_sequential(), *head))
    colours = np.random.default_rng(0).integers(256, size=(60, 3, 1, 1), dtype=np.uint8)
    pictures = torch.from_numpy(colours).repeat(1, 1, 12, 12)
    x = normalise(pictures)
    with torch.no_grad():
        labels = plain(x).argmax(1)
    return corruptions.Task(retrofit.add_batchnorm(plain, [x]), pictures, labels, 30, 24)


def test_the_study_writes_every_accuracy_once_and_goes_on_where_it_was(corruptions, task, tmp_path):
    whole = corruptions.study(task, PLAN, 2, tmp_path / "whole.csv")
    assert len(whole) == len({row.key for row in whole}) == 2 * 17
    file = tmp_path / "stopped.csv"
    written = (tmp_path / "whole.csv").read_text().splitlines(keepends=True)
    file.write_text("".join(written[:6]))
    assert corruptions.study(task, PLAN, 2, file) == whole
    assert file.read_text() == "".join(written)
    assert corruptions.study(task, PLAN, 1, file) == whole[:17]
    assert file.read_text() == "".join(written)


def test_the_study_adapts_to_pictures_that_it_does_not_test(normalise, task):
    test, labels, target = task.corrupted(0, "none", 0)
    ours = {tuple(picture.flatten().tolist()) for picture in normalise(test)}
    theirs = {tuple(picture.flatten().tolist()) for picture in target}
    assert (len(ours), len(theirs)) == (30, 24)
    assert not ours & theirs
    for picture, label in zip(test, labels, strict=True):
        (index,) = (task.pictures == picture).flatten(1).all(1).nonzero().flatten()
        assert task.labels[index] == label


def test_the_study_measures_what_recalibrate_does_and_undoes_it(corruptions, normalise, task):
    """Against torch's own running statistics after one pass in train mode."""
    test, labels, target = task.corrupted(0, "inverted", 0)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    ours = corruptions.adapted_accuracy(task.model, target, 0, test, labels)
    assert all(torch.equal(task.model.state_dict()[name], before[name]) for name in before)
    assert ours != corruptions.adapted_accuracy(task.model, target[:0], 0, test, labels)
    for norm in task.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    with torch.no_grad():
        task.model.train()(target)
        answers = task.model.eval()(normalise(test)).argmax(1)
    assert ours == pytest.approx(float((answers == labels).float().mean()))


def test_a_csv_of_other_settings_is_refused_with_what_differs(corruptions, task, tmp_path):
    file = tmp_path / "study.csv"
    corruptions.study(task, {("none", 0): [(0, 0)]}, 1, file)
    before = file.read_text()
    other = corruptions.Task(task.model, task.pictures, task.labels, 20, 24)
    with pytest.raises(SystemExit, match="test_pictures = 30, this study has 20"):
        corruptions.study(other, PLAN, 1, file)
    assert file.read_text() == before


def test_tables_and_figures_are_made_of_the_rows(corruptions, task, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    rows = corruptions.study(task, PLAN, 2, tmp_path / "study.csv")
    plain = [100 * r.accuracy for r in rows if (r.corruption, r.pictures) == ("fog", 0)]
    text = corruptions.summary(rows)
    assert f"| fog | {sum(plain) / 2:.1f} |" in text
    half = (max(plain) - min(plain)) / 2
    assert f"| **mean** | **{sum(plain) / 2:.1f} ± {half:.1f}** |" in text
    corruptions.draw_by_corruption(rows, tmp_path / "a.svg")
    corruptions.draw_by_pictures(rows, tmp_path / "b.svg")
    for name, words in {"a": "severity 5", "b": "How many pictures"}.items():
        assert words in (tmp_path / f"{name}.svg").read_text()


def test_a_folder_with_too_few_pictures_is_refused(corruptions, tmp_path, monkeypatch):
    for name in CLASSES:
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "test" / name / "black.png")
    options = ["corruptions.py", "--data", str(tmp_path), "--output", str(tmp_path), "--quick"]
    monkeypatch.setattr("sys.argv", options)
    with pytest.raises(SystemExit, match="test has 10 pictures, and 700 are needed: 200 to test"):
        corruptions.main()
