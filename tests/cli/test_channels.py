"""Networks of any number of channels, and pictures of any depth, on the command line."""

import json
import struct
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import command
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZE = ("--crop", "12", "--workers", "0")
MEAN, STD = 0.4, 0.3
NORMALISED = ("--mean", MEAN, "--std", STD)


@pytest.fixture
def net(tmp_path):
    """Name a network that takes that many channels, and that many only."""

    def written(channels):
        (tmp_path / f"net{channels}.py").write_text(
            "import torch\nfrom torch import nn\n\n"
            "def net():\n"
            "    torch.manual_seed(0)\n"
            f"    convs = nn.Conv2d({channels}, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()\n"
            "    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        )
        return f"net{channels}.py:net"

    return written


def noise(channels, *, count=24):
    """Each picture of another brightness: uint8 (N, 12, 12, C)."""
    random = np.random.default_rng(channels)
    brightness = random.integers(0, 128, (count, 1, 1, channels))
    return (brightness + random.integers(0, 128, (count, 12, 12, channels))).astype(np.uint8)


def moments(pixels, channels):
    """Mean and variance of what the first convolution gives, in float64."""
    torch.manual_seed(0)
    first = torch.nn.Conv2d(channels, 8, 3).double()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    with torch.no_grad():
        y = F.conv2d((x - MEAN) / STD, first.weight, first.bias)
    return y.mean((0, 2, 3)), y.var((0, 2, 3))


def save_files(folder, pictures, suffix=".png"):
    folder.mkdir()
    for i, pixels in enumerate(pictures):
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.save(folder / f"{i}{suffix}")


def assert_calibrated_on(file, pixels, channels):
    found = load_file(file)
    mean, var = moments(pixels, channels)
    assert (found["0.bn.running_mean"] - mean).abs().max() < 1e-5 * var.max().sqrt()
    assert (found["0.bn.running_var"] / var - 1).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_an_array_goes_to_a_network_of_as_many_channels(run, net, tmp_path, channels):
    pixels = noise(channels)
    np.save(tmp_path / "a.npy", pixels)
    code, out, err = run("convert", net(channels), "--data", "a.npy", "--output", "o.safetensors",
                         *SIZE, *NORMALISED)  # fmt: skip
    assert (code, err) == (0, [])
    assert "equal bit for bit" in out
    assert_calibrated_on(tmp_path / "o.safetensors", pixels, channels)


def test_grey_and_coloured_files_go_in_grey_to_a_network_of_one_channel(run, net, tmp_path):
    grey, colours = noise(1), noise(3)
    save_files(tmp_path / "grey", grey[..., 0])
    save_files(tmp_path / "colours", colours)
    in_grey = np.stack([np.asarray(Image.fromarray(c).convert("L")) for c in colours])[..., None]
    for data, pixels in (("grey", grey), ("colours", in_grey)):
        code, out, err = run("convert", net(1), "--data", data, "--output", "o.safetensors", *SIZE,
                             *NORMALISED, "--overwrite")  # fmt: skip
        assert (code, err) == (0, [])
        assert "calibrated on       24 grey images in" in out
        assert_calibrated_on(tmp_path / "o.safetensors", pixels, 1)


def test_pictures_with_alpha_go_to_a_network_of_four_channels(run, net, tmp_path):
    save_files(tmp_path / "rgba", noise(4))
    code, out, err = run("convert", net(4), "--data", "rgba", "--output", "o.safetensors", *SIZE,
                         "--mean", *[MEAN] * 4, "--std", STD)  # fmt: skip
    assert (code, err) == (0, [])
    assert "24 images (4 channels) in" in out
    assert_calibrated_on(tmp_path / "o.safetensors", noise(4), 4)


@pytest.fixture
def silent(tmp_path):
    """Name a network that takes that many channels, and does not tell by what NaN becomes."""

    def written(channels):
        (tmp_path / f"silent{channels}.py").write_text(
            "import torch\nfrom torch import nn\n\n"
            "class Net(nn.Sequential):\n"
            "    def __init__(self):\n"
            "        torch.manual_seed(0)\n"
            f"        convs = nn.Conv2d({channels}, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)\n"
            "        super().__init__(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
            "    def forward(self, x):\n"
            "        return super().forward(torch.nan_to_num(x))\n"
        )
        return f"silent{channels}.py:Net"

    return written


@pytest.mark.parametrize(
    ("suffix", "given", "takes", "mean", "words"),
    [
        (".npy", 5, 5, [MEAN], "24 images (5 channels)"),
        (".npy", 1, 3, [MEAN], "24 images"),
        (".png", 3, 3, [MEAN], "24 images"),
        (".png", 4, 4, [MEAN] * 4, "24 images (4 channels)"),
    ],
)
def test_a_network_that_does_not_tell_its_channels_gets_those_of_the_data_or_as_many_as_asked(
    run, silent, tmp_path, suffix, given, takes, mean, words
):
    pixels = noise(given)
    if suffix == ".npy":
        np.save(tmp_path / "data.npy", pixels)
    else:
        save_files(tmp_path / "data", pixels)
    data = "data.npy" if suffix == ".npy" else "data"
    code, out, err = run("convert", silent(takes), "--data", data, "--output", "o.safetensors",
                         *SIZE, "--device", "cpu", "--mean", *mean, "--std", STD)  # fmt: skip
    assert (code, err) == (0, [])
    assert f"calibrated on       {words} in" in out
    assert_calibrated_on(tmp_path / "o.safetensors", pixels.repeat(takes // given, axis=3), takes)


def tar_of(folder, file):
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.iterdir(), key=lambda path: int(path.stem)):
            tar.add(path, path.name)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_depth_give_the_file_that_8_bits_give(run, net, tmp_path, channels):
    grey = noise(1)[..., 0]
    deep, floats = grey.astype(np.uint16) * 257, (grey / 255).astype(np.float32)
    np.save(tmp_path / "bytes.npy", grey)
    np.save(tmp_path / "deep.npy", deep)
    np.savez(tmp_path / "floats.npz", images=floats, labels=np.arange(24))
    save_files(tmp_path / "deep", deep)
    tar_of(tmp_path / "deep", tmp_path / "deep.tar")
    save_files(tmp_path / "floats", floats, ".tif")
    save_files(tmp_path / "integers", deep.astype(np.int32), ".tiff")
    for data in ("bytes.npy", "deep.npy", "floats.npz", "deep.tar", "deep", "floats", "integers"):
        code, _, err = run("convert", net(channels), "--data", data, "--output",
                           f"{data}.safetensors", *SIZE, *NORMALISED)  # fmt: skip
        assert (code, err) == (0, []), data
        pixels = np.stack([grey] * channels, axis=-1)
        assert_calibrated_on(tmp_path / f"{data}.safetensors", pixels, channels)


def test_a_picture_whose_white_is_unknown_is_left_out_of_folder_and_shard(run, net, tmp_path):
    pictures = [Image.fromarray(pixels) for pixels in noise(3)]
    save_files(tmp_path / "mixed", pictures, ".tif")
    Image.fromarray(np.full((12, 12), 7.5, np.float32)).save(tmp_path / "mixed" / "24.tif")
    tar_of(tmp_path / "mixed", tmp_path / "mixed.tar")
    for data in ("mixed", "mixed.tar"):
        command = ("convert", net(3), "--data", data, "--output", f"{data}.safetensors", *SIZE,
                   *NORMALISED)  # fmt: skip
        code, _, err = run(*command)
        assert (code, len(err)) == (2, 1)
        assert f"{data}/24.tif cannot be read: its floats are from 7.5 to 7.5" in err[0]
        code, _, err = run(*command, "--skip-bad-images")
        assert (code, err) == (0, [f"left out 1 unreadable pictures: {data}/24.tif"])
        assert_calibrated_on(tmp_path / f"{data}.safetensors", noise(3), 3)


def bands(pixels):
    """A TIFF of eight bands or of floats in colour: what PIL does not read, and says so twice."""
    (height, width, count), data = pixels.shape, pixels.tobytes()
    bits, kind = 8 * pixels.itemsize, 3 if pixels.dtype.kind == "f" else 1
    tags = {256: width, 257: height, 259: 1, 262: 2, 273: 8, 277: count, 278: height,
            279: len(data), 339: kind}  # fmt: skip
    end = 8 + len(data) + 2 + 12 * (len(tags) + 1) + 4
    entries = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()}
    entries[258] = struct.pack("<HHII", 258, 3, count, end)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    start = b"II*\0" + struct.pack("<I", 8 + len(data))
    return start + data + directory + bytes(4) + struct.pack("<H", bits) * count


@pytest.mark.parametrize("values", [np.zeros((4, 5, 3), np.float32), np.zeros((4, 5, 8), np.uint8)])
def test_tiffs_that_pil_does_not_read_are_one_line(net, tmp_path, values):
    (tmp_path / "tiffs").mkdir()
    for i in range(2):
        (tmp_path / "tiffs" / f"{i}.tif").write_bytes(bands(values))
    tar_of(tmp_path / "tiffs", tmp_path / "tiffs.tar")
    for data in ("tiffs", "tiffs.tar"):
        found = command(tmp_path, "convert", net(3), "--data", data, "--output", "o.pth", *SIZE)
        assert (found.code, len(found.err)) == (2, 1), found
        assert (
            ".tif cannot be read: it is no picture, or of a kind that PIL does not" in found.err[0]
        )


def test_all_commands_take_such_pictures_and_the_file_says_how_they_were_prepared(
    run, net, tmp_path
):
    np.save(tmp_path / "a.npy", noise(2))
    pictures = ("--model", net(2), "--data", "a.npy", *SIZE, *NORMALISED)
    assert run("plan", net(2), "--data", "a.npy", *SIZE[:2], *NORMALISED)[0] == 0
    assert run("convert", *pictures[1:], "--output", "o.safetensors")[0] == 0
    with safe_open(tmp_path / "o.safetensors", framework="pt") as file:
        data = json.loads(file.metadata()["retrofit"])["data"]
    assert data == "24 images (2 channels) of a.npy, seed 0, of 12 x 12 pixels, mean 0.4, std 0.3"
    assert run("verify", "o.safetensors", *pictures)[0] == 0
    code, out, err = run("adapt", "o.safetensors", *pictures, "--output", "b.safetensors")
    assert (code, err) == (0, [])
    assert "adapted on          24 images (2 channels) in" in out
    assert_calibrated_on(tmp_path / "b.safetensors", noise(2), 2)
    assert run("report", "o.safetensors", *pictures, "--output", "r.html")[0] == 0
    code, _, err = run("adapt", "o.safetensors", *pictures[:-4], "--output", "c.safetensors")
    assert (code, err) == (0, [])  # the file says how
    assert_calibrated_on(tmp_path / "c.safetensors", noise(2), 2)
    bare = load_file(tmp_path / "b.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")  # that file does not
    code, _, err = run("adapt", "bare.safetensors", *pictures[:-4], "--output", "d.safetensors")
    assert code == 2
    assert "for pictures of 2 channels there is no usual mean and std" in err[0]
