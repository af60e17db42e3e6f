"""What the commands say on stderr while they work; stdout is the result alone."""

import sys

import pytest
from folders import pictures
from torchvision.transforms import CenterCrop, Compose, ToTensor

import retrofit
from retrofit.cli import main
from retrofit.cli.picture_sample import prepared_in_words
from retrofit.demo import trained_vgg

NET = "retrofit.demo:trained_vgg"
DATA = "--data pictures --crop 32 --workers 0 --batch-size 8"
SAYS = {
    f"plan {NET} --data pictures": [],
    f"convert {NET} {DATA} --output out.safetensors --report out.html": [
        "up to 40 images of 32 x 32 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, on cpu",
        "calibrate: up to 40 images",
        "verify: 16 images",
        "writing out.safetensors",
        "drift: 10 images",
        "writing out.html",
    ],
    f"verify bn.safetensors --model {NET} {DATA} --images 9": [
        "9 images of 32 x 32 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, on cpu",
        "verify: 9 images",
    ],
    f"adapt bn.safetensors --model {NET} {DATA} --output out.pth --images 9": [
        "9 images of 32 x 32 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, on cpu",
        "first pass: 9 images",
        "recalibrate: 8 layers",
        "writing out.pth",
    ],
    f"fold bn.safetensors --model {NET} --output out.pth": [
        "writing out.pth",
    ],
    f"report bn.safetensors --model {NET} {DATA} --output out.html": [
        "40 images of 32 x 32 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, on cpu",
        "drift: 40 images",
        "writing out.html",
    ],
    "inspect bn.safetensors": [],
}
STAGES = ("calibrate", "verify", "drift", "first pass", "recalibrate")
pytestmark = pytest.mark.filterwarnings("ignore:the ")  # statistics of nine pictures


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 40)
    retrofit.save(retrofit.insert(trained_vgg()), tmp_path / "bn.safetensors", name=NET)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", SAYS, ids=lambda words: words.split()[0])
def test_before_each_wait_a_line_says_what_it_is_for(words, capsys):
    assert main(words.split()) == 0
    said = capsys.readouterr().err.splitlines()
    expected = [line.format(net=NET) for line in SAYS[words]]
    lines = [line if line.startswith(STAGES) else f"retrofit: {line}" for line in expected]
    assert [line for line in said if "warning" not in line] == [f"{line} ..." for line in lines]


@pytest.mark.usefixtures("folder")
def test_at_a_terminal_the_first_line_comes_before_torch_is_imported(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["plan", NET, "--data", "pictures"]) == 0
    assert capsys.readouterr().err == f"retrofit: reading {NET}, pictures ...\n"


@pytest.mark.usefixtures("folder")
def test_of_several_processes_the_first_one_speaks(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", "bn.safetensors"]) == 0
    assert capsys.readouterr().err == ""


def test_of_pictures_that_keep_their_size_none_is_told():
    assert prepared_in_words(ToTensor(), 3) == "sizes of their own, mean 0, std 1"
    crop = Compose([ToTensor(), CenterCrop((32, 48))])
    assert prepared_in_words(crop, 3) == "32 x 48 pixels, mean 0, std 1"
    each_by_its_contrast = Compose([crop, lambda x: (x - x.mean()) / x.std()])
    assert prepared_in_words(each_by_its_contrast, 3) == "32 x 48 pixels"
