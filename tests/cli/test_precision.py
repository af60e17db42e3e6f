"""Networks of 16 and of 64 bits on the command line: pictures come in the precision of each."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from folders import pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from retrofit.running.input_channels import input_channels

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten())

def float16(): return make().half()
def bfloat16(): return make().bfloat16()
def float64(): return make().double()
"""
DATA = "--data pictures --crop 16 --workers 0 --mean .5 --std .5"
DTYPES = [
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    pytest.param(torch.float64, marks=pytest.mark.slow),
]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    pictures(tmp_path / "pictures", 24)
    return request.param


def named(dtype):
    return str(dtype).removeprefix("torch.")


def state(dtype):
    """What no other precision holds to the bit, unless it is wider."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (8, 3, 3, 3), "0.bias": (8,), "2.weight": (4, 8, 3, 3), "2.bias": (4,)}
    wide = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    return {key: tensor.to(dtype) for key, tensor in wide.items()}


def converted(run, folder, dtype, *more):
    """Convert the network with weights of that precision: what the command printed."""
    save_file(state(dtype), folder / "w.safetensors")
    words = f"convert net.py:{named(dtype)} --weights w.safetensors --output bn.safetensors {DATA}"
    code, out, err = run(*words.split(), *more)
    assert (code, err) == (0, [])
    return out


def test_a_network_is_converted_in_its_precision(run, tmp_path, dtype):
    out = converted(run, tmp_path, dtype, "--report", "page.html")
    assert f"calibrated on       24 images as {named(dtype)}" in out
    written, plain = load_file(tmp_path / "bn.safetensors"), state(dtype)
    assert torch.equal(written["0.conv.weight"], plain["0.weight"])
    pixels = np.stack([np.array(Image.open(f)) for f in (tmp_path / "pictures").iterdir()])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    y = F.conv2d((x - 0.5) / 0.5, plain["0.weight"].double(), plain["0.bias"].double())
    mean, tolerance = written["0.bn.running_mean"], 4 * max(torch.finfo(dtype).eps, 1e-7)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (mean - y.mean((0, 2, 3))).abs() / y.std((0, 2, 3))
    assert float(error.max()) < tolerance


@pytest.mark.parametrize("spec", ["net.py:make", None])
def test_a_converted_network_is_compared_in_its_precision(run, tmp_path, dtype, spec):
    converted(run, tmp_path, dtype)
    spec = spec or f"net.py:{named(dtype)}"
    words = f"verify bn.safetensors --model {spec} --weights w.safetensors {DATA}"
    code, out, err = run(*words.split())
    assert (code, err) == (0, [])
    assert "equal bit for bit on 16 images" in out
    assert out.endswith(f"compared in {named(dtype)}, the precision of bn.safetensors\n")
    words = f"report bn.safetensors --model {spec} --weights w.safetensors --output a.html {DATA}"
    assert run(*words.split())[::2] == (0, [])
    assert f"images as {named(dtype)}" in (tmp_path / "a.html").read_text()


def test_a_converted_network_is_adapted_in_its_precision(run, tmp_path, dtype):
    converted(run, tmp_path, dtype)
    words = f"adapt bn.safetensors --model net.py:make --output a.safetensors {DATA}"
    code, out, err = run(*words.split())
    assert (code, err) == (0, [])
    assert f"adapted on          24 images as {named(dtype)}" in out
    adapted, before = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "bn.safetensors")
    assert {k: t.dtype for k, t in adapted.items()} == {k: t.dtype for k, t in before.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_how_many_channels_a_network_takes_is_told_in_any_precision(dtype, channels):
    assert input_channels(nn.Sequential(nn.Conv2d(channels, 4, 3)).to(dtype), (16, 16)) == channels
