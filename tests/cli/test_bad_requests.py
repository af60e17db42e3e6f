"""What a user may get wrong: one line that names it, an exit code, and nothing written."""

import json
import pickle
import shlex
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents, pictures
from PIL import Image
from processes import command
from safetensors.torch import save_file

import retrofit
from retrofit.files.model_sources import build

NETS = """
import torch
from torch import nn

def make(inputs=3, kernel=3):
    torch.manual_seed(0)
    convs = nn.Conv2d(inputs, 4, kernel), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()

def other(): return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval()
def wide(): return make(inputs=7)
def grey(): return make(inputs=1)
def alpha(): return make(inputs=4)
def huge(): return make(kernel=99)
def normed(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).eval()
def nothing(): pass
def failing(): raise OSError("no such\\nluck")
def needy(width): pass
constant = 3
"""


class Something:
    """What no state dict holds."""


def write_odd_weights(kit, model):
    """Files that are no state dict of the model, or more than one."""
    state = model.state_dict()
    torch.save(model, kit / "whole.pth")
    torch.save({"model": model}, kit / "old-whole.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "config": Something()}, kit / "beside.ckpt")
    torch.save({"student": state, "teacher": state.copy(), "epoch": 3}, kit / "pair.pth")
    (kit / "runs").mkdir()
    for name in ("last.ckpt", "best.ckpt", "old.pth"):
        torch.save(state, kit / "runs" / name)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 9, 9)).sum().backward()
    optimizer.step()
    model.load_state_dict(torch.load(kit / "w.pth", weights_only=True))
    torch.save({"optimizer": optimizer.state_dict(), "epoch": 3}, kit / "optimizer.pth")
    weight = state["0.weight"]
    torch.save({**state, "0.weight": weight.to_sparse()}, kit / "sparse.pth")
    torch.save({**state, "0.weight": weight.to("meta")}, kit / "meta.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what it calls deprecated
        quantized = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
        torch.save({**state, "0.weight": quantized}, kit / "quantized.pth")
        torch.jit.script(model).save(kit / "script.pt")
    (kit / "odd.onnx").write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99))
    (kit / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    np.savez(kit / "arrays.npz", a=np.zeros(2))
    for name in ("hub/a", "several/a", "several/b"):
        (kit / name).parent.mkdir(exist_ok=True)
        save_file({"0.weight": weight}, kit / f"{name}.safetensors")
    for name, places in {
        "up": {"0.weight": "../w.pth"},
        "root": {"0.weight": "/w.pth"},
        "gone": {"0.weight": "gone.safetensors"},
        "other": {"0.weight": "a.safetensors", "2.weight": "a.safetensors"},
        "list": ["a.safetensors"],
    }.items():
        index = kit / "hub" / f"{name}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A folder with files good and bad."""
    kit = tmp_path_factory.mktemp("kit")
    (kit / "net.py").write_text(NETS)
    (kit / "broken.py").write_text("def make(:\n")
    for name, count in (("pictures", 6), ("single", 1), ("mixed", 1), ("damaged", 3)):
        pictures(kit / name, count)
    (kit / "empty").mkdir()
    (kit / "script.py").write_text("import sys\nsys.exit(0)\n")
    whole = (kit / "damaged" / "1.png").read_bytes()
    (kit / "damaged" / "1.png").write_bytes(whole[: len(whole) // 2])
    (kit / "texts").mkdir()
    for name in ("texts/1.png", "texts/2.png", "text.pth", "text.safetensors", "there.pth",
                 "there.html", "text.txt", "text.state", "texts.jpg", "text.tar"):  # fmt: skip
        (kit / name).write_text("precious")
    for name in ("none.pth", "none.safetensors", "none.npy"):
        (kit / name).touch()

    model = build(f"{kit}/net.py:make")
    state = model.state_dict()
    torch.save(state, kit / "w.pth")
    (kit / "cut.pth").write_bytes((kit / "w.pth").read_bytes()[:700])
    torch.save({"list": [1, 2]}, kit / "list.pth")
    torch.save(Something(), kit / "object.pth")
    (kit / "pickle.pth").write_bytes(pickle.dumps(Something()))
    torch.save({**state, "0.weight": state["0.weight"][:2]}, kit / "shapes.pth")
    torch.save({**state, "0.weight": state["0.weight"] * float("nan")}, kit / "nan.pth")
    torch.save({**state, "more": torch.ones(2)}, kit / "more.pth")
    torch.save({"0.weight": state["0.weight"]}, kit / "fewer.pth")
    write_odd_weights(kit, model)
    data = [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))]
    converted = retrofit.add_batchnorm(model, data, progress=False)
    retrofit.save(converted, kit / "bn.safetensors", name="net.py:make")
    retrofit.save(converted, kit / "bn.pth")
    retrofit.save(model, kit / "plain.safetensors", name="net.py:make")
    written = (kit / "bn.safetensors").read_bytes()
    (kit / "cut.safetensors").write_bytes(written[:-100])
    with torch.no_grad():
        converted[0].conv.weight.mul_(1.5)
    retrofit.save(converted, kit / "trained.safetensors", name="net.py:make")

    np.save(kit / "floats.npy", np.full((3, 16, 16, 3), 7.0))
    np.save(kit / "first.npy", np.zeros((3, 1, 16, 17), dtype=np.uint8))
    np.save(kit / "colour.npy", np.zeros((3, 16, 17, 3), dtype=np.uint16))
    np.save(kit / "narrow.npy", np.arange(256, dtype=np.uint16).reshape(1, 16, 16).repeat(3, 0))
    np.save(kit / "alone.npy", np.zeros((16, 17, 3), dtype=np.uint8))
    np.save(kit / "alone_first.npy", np.zeros((3, 16, 17), dtype=np.uint8))
    np.save(kit / "four.npy", np.zeros((3, 16, 17, 4), dtype=np.uint8))
    np.save(kit / "nan.npy", np.full((4, 16, 17), np.nan, dtype=np.float32))
    np.save(kit / "integers.npy", np.zeros((3, 16, 17, 3), dtype=np.int64))
    np.savez(kit / "two.npz", train=np.zeros((3, 16, 16)), test=np.zeros((2, 16, 16)))
    for name, most in (("over", 70000), ("under", 200)):
        (kit / name).mkdir()
        Image.fromarray(np.array([[0, most]], dtype=np.int32)).save(kit / name / "0.tif")
        Image.fromarray(np.array([[0, most]], dtype=np.int32)).save(kit / name / "1.tif")
    np.save(kit / "flat.npy", np.zeros((3, 16), dtype=np.uint8))
    np.save(kit / "objects.npy", np.array([Something()]), allow_pickle=True)
    np.savez(kit / "labels.npz", labels=np.arange(3))
    (kit / "broken.npz").write_bytes(b"PK broken")
    with tarfile.open(kit / "texts.tar", "w") as tar:
        tar.add(kit / "text.txt", "text.txt")
    shutil.copy(kit / "texts.tar", kit / "mixed" / "texts.tar")
    return kit


PICTURES = "--data pictures --crop 16 --workers 0"
PLAN, DEMO = "plan net.py:make", "demo"
CONVERT = f"convert net.py:make --weights w.pth --output out.safetensors {PICTURES}"
GREY, MIDDLE = f"convert net.py:grey --output o.pth {PICTURES}", "--mean .5 --std .5"
VERIFY = f"verify bn.safetensors --model net.py:make --weights w.pth {PICTURES}"
FOLD = "fold bn.safetensors --model net.py:make --output out.pth"
ADAPT = f"adapt bn.safetensors --model net.py:make --output out.safetensors {PICTURES}"
INSPECT = "inspect"
REPORT = "report bn.safetensors --output out.html"

# (command, exit code, what its line says); of an option given twice the last counts.
CASES = [
    ("--quiet", 2, "the following arguments are required: COMMAND"),
    ("frobnicate", 2, "frobnicate is no command: the commands are plan, convert, verify, fold"),
    ("conver net.py:make --data d", 2, "no command: did you mean convert? (see retrofit --help)"),
    ("conver plan", 2, "conver is no command: did you mean convert? (see retrofit --help)"),
    ("plan fold --frobnicate", 2, "arguments: --frobnicate (see retrofit plan --help)"),
    ("--debug Plan vgg16", 2, "Plan is no command: did you mean plan? (see"),
    ("vgg16 --data d", 2, "vgg16 is no command: the commands are plan"),
    ("plan", 2, "the following arguments are required: model"),
    ("plan vgg61", 2, "torchvision has no model 'vgg61'; nearest: vgg19"),
    ("plan nope.py:make", 2, "there is no file nope.py"),
    ("plan net.py:maek", 2, "net.py has no factory 'maek'; nearest: make"),
    ("plan net.py:constant", 2, "net.py has no factory 'constant'"),
    ("plan net.py:", 2, "net.py"),
    ("plan broken.py:make", 2, "broken.py cannot be imported: SyntaxError"),
    ("plan no.such.module:make", 2, "no.such.module cannot be imported: ModuleNotFoundError"),
    ("plan timm:vgg61", 2, "timm has no model 'vgg61'"),
    ("plan net.py:failing", 2, "net.py:failing() failed: OSError: no such luck"),
    ("plan net.py:nothing", 2, "net.py:nothing returned a NoneType, not an nn.Module"),
    ("plan net.py:needy", 2, "net.py:needy() failed: TypeError"),
    (f"{PLAN} --frobnicate", 2, "unrecognized arguments: --frobnicate (see"),
    (f"{PLAN} --exlcude=x", 2, "unrecognized arguments: --exlcude=x: did you mean --exclude?"),
    (f"{CONVERT} --tolernace 1", 2, "--tolernace: did you mean --tolerance? (see"),
    ("convert net.py:make --data d --ouptut o.pth", 2, "--ouptut: did you mean --output? (see"),
    (f"{CONVERT} --tol 1", 2, "unrecognized arguments: --tol: did you mean --tolerance? (see"),
    (f"{CONVERT} --model x", 2, "--model: it has no name, and stands by itself: retrofit convert"),
    ("inspect --file a.pth", 2, "--file: it has no name, and stands by itself: retrofit inspect"),
    ("plan vgg11 --model-arg a=1", 2, "--model-arg: did you mean --model-args? (see"),
    (f"{CONVERT} --weights=a --i 3", 2, "--i: did you mean --include or --images?"),
    ("--verison", 2, "unrecognized arguments: --verison: did you mean --version? (see retrofit --"),
    (f"{CONVERT} --force", 2, "unrecognized arguments: --force (see"),  # of no option's likeness
    (f"{PLAN} --no-verify", 2, "unrecognized arguments: --no-verify (see"),
    (f"{PLAN} --layout tree", 2, "argument --layout: invalid choice: 'tree'"),
    (f"{PLAN} --placement before", 2, "argument --placement: invalid choice: 'before'"),
    (f"{PLAN} --include nope.*", 2, "'nope.*' matches none of the 2 convolutions"),
    (f"{PLAN} --exclude nope", 2, "'nope' matches none of the 2 convolutions"),
    (f"{PLAN} --data nope", 2, "there is no folder or file nope"),
    (f"{PLAN} --data pictures --mean 1 .2", 2, "--mean has 2 values, and the pictures have 3"),
    (f"{PLAN} --data pictures --mean 1 2", 2, "--mean 1.0 2.0 cannot be of pixels in 0 to 1"),
    (f"{PLAN} --data pictures --mean a b c", 2, "argument --mean: a is not a finite number"),
    ("convert net.py:make", 2, "the following arguments are required: --output, --data"),
    (f"convert vgg11 --output a.pth {PICTURES}", 2, "vgg11 without weights is random"),
    (f"{CONVERT} --weights nope.pth", 2, "there is no file nope.pth"),
    ("plan script.py:make", 2, "script.py cannot be imported: it ends the process"),
    (f"{PLAN} --data pictures --crop 9999999999", 2, "9999999999 is not between 1 and 16384"),
    (f"{PLAN} --data pictures --resize 100000000", 2, "100000000 is not between 1 and 16384"),
    (f"{PLAN} --data texts --skip-bad-images", 2, "none of 2 pictures can be read: texts/"),
    (f"{PLAN} --include 6", 2, "(6 is a Linear layer, which gets one with linear=True, --linear)"),
    (f"{PLAN} --exclude 1", 2, "2 convolutions of Sequential (1 is a ReLU): patterns are globs"),
    (f"{CONVERT} --device hpu", 2, "device hpu cannot be used here"),
    (f"{PLAN} --data pictures --std inf 1 1", 2, "inf is not a finite number"),
    (f"{CONVERT} --weights empty", 2,
     "empty is a folder without weights: it has none of model.safetensors, "),
    (f"{CONVERT} --weights DEFAULT", 2, "'DEFAULT' is no .safetensors, .pth, .pt, .ckpt or .bin"),
    (f"{CONVERT} --weights nope.ckpt", 2, "there is no file nope.ckpt"),
    (f"{CONVERT} --weights nope/w", 2, "there is no file nope/w"),
    (f"{CONVERT} --weights text.txt", 2,
     "text.txt is no weights file but text, 'precious', perhaps a server's message in its place"),
    (f"{CONVERT} --weights odd.onnx", 2,
     "odd.onnx is an ONNX file, and no file of weights: it can be the MODEL of plan and convert"),
    (f"{CONVERT} --weights flat.npy", 2, "flat.npy is no weights file but one array of numpy"),
    (f"{CONVERT} --weights texts.tar", 2, "texts.tar is no weights file but a tar archive: unpack"),
    (f"{CONVERT} --weights pictures", 2, "pictures is a folder without weights"),
    (f"{CONVERT} --weights pointer.bin", 2, "is no weights file but only Git LFS's pointer"),
    (f"{CONVERT} --weights whole.pth", 2,
     "model = torch.load('whole.pth', weights_only=False); torch.save(model.state_dict(), "),
    (f"{CONVERT} --weights old-whole.pth", 2,
     "it holds a whole pickled model (torch.nn.modules.container.Sequential)"),
    (f"{CONVERT} --weights beside.ckpt", 2,
     "it holds a test_bad_requests.Something, which only its code can read; where you trust the"),
    (f"{CONVERT} --weights script.pt", 2,
     "torch.save(torch.jit.load('script.pt').state_dict(), 'weights.pth')"),
    (f"{CONVERT} --weights arrays.npz", 2, "it is numpy's .npz; save its arrays as tensors: torch"),
    (f"{CONVERT} --weights optimizer.pth", 2, "optimizer.pth holds no state dict"),
    (f"{CONVERT} --weights pair.pth", 2,
     "pair.pth holds several state dicts, 'student', 'teacher': choose one with --weights-key"),
    (f"{INSPECT} pair.pth", 2, "choose one with --weights-key"),
    (f"{CONVERT} --weights pair.pth --weights-key nope", 2,
     "pair.pth has no weights under 'nope': it has them under 'student', 'teacher'"),
    (f"{CONVERT} --weights-key ema", 2, "w.pth has no weights under 'ema': it is a state dict"),
    (f"{FOLD} --weights-key ema", 2, "bn.safetensors has no weights under 'ema'"),
    (f"convert net.py:make --weights-key ema --output out.pth {PICTURES}", 2,
     "--weights-key ema is a place in a file: give that with --weights"),
    (f"{REPORT} --weights-key ema", 2, "--weights-key needs --weights"),
    (f"{CONVERT} --weights sparse.pth", 2, "0.weight is sparse: save it after to_dense()"),
    (f"{CONVERT} --weights quantized.pth", 2, "0.weight is quantized: save it after dequantize()"),
    (f"{CONVERT} --weights meta.pth", 2, "0.weight is on the meta device, without numbers"),
    (f"{CONVERT} --weights hub/up.safetensors.index.json", 2,
     "names '../w.pth', which is not in its own folder"),
    (f"{CONVERT} --weights hub/root.safetensors.index.json", 2,
     "names '/w.pth', which is not in its own folder"),
    (f"{CONVERT} --weights hub/gone.safetensors.index.json", 2,
     "names 1 files, and 1 of them do not exist (gone.safetensors)"),
    (f"{CONVERT} --weights hub/other.safetensors.index.json", 2,
     "a.safetensors has no 2.weight, which other.safetensors.index.json says is in it"),
    (f"{CONVERT} --weights hub/list.safetensors.index.json", 2,
     "list.safetensors.index.json cannot be read as an index of weights"),
    (f"{CONVERT} --weights several", 2,
     "several is a folder with several weights files (a.safetensors, b.safetensors)"),
    (f"{CONVERT} --weights runs", 2,
     "runs is a folder with several weights files (best.ckpt, last.ckpt, old.pth): name one"),
    (VERIFY.replace("bn.safetensors", "pair.pth"), 2,
     "pair.pth holds several state dicts, 'student', 'teacher': choose one with load(weights_key"),
    ("report pair.pth --output out.html", 2, "choose one with load(weights_key=) in Python, and"),
    (f"{CONVERT} --weights none.pth", 2, "none.pth is no weights file but empty: copy or"),
    (f"{CONVERT} --weights text.pth", 2, "text.pth is no weights file but text, 'precious'"),
    (f"{CONVERT} --weights cut.pth", 2, "cut.pth cannot be read as a state dict: it is cut short"),
    (f"{CONVERT} --weights list.pth", 2, "list.pth holds no state dict"),
    (f"{CONVERT} --weights object.pth", 2,
     "object.pth cannot be read as a state dict: it holds a test_bad_requests.Something"),
    (f"{CONVERT} --weights pickle.pth", 2, "pickle.loads(pathlib.Path('pickle.pth').read"),
    (f"{CONVERT} --weights none.safetensors", 2, "none.safetensors is no weights file but empty"),
    (f"{CONVERT} --weights text.safetensors", 2, "text.safetensors is no weights file but text"),
    (f"{CONVERT} --weights shapes.pth", 2, "0.weight (2, 3, 3, 3) instead of (4, 3, 3, 3)"),
    (f"{CONVERT} --weights more.pth", 2, "1 unexpected (more)"),
    (f"{CONVERT} --weights fewer.pth", 2, "5 missing (0.bias, 2.weight, 2.bias, ...)"),
    (f"{CONVERT} --weights nan.pth", 2, "there is a NaN or Inf at 0 for pictures/"),
    (f"{CONVERT} --data nope", 2, "there is no folder or file nope"),
    (f"{CONVERT} --data empty", 2, "empty has no pictures in it"),
    (f"{CONVERT} --data single", 2, "at least 2 pictures: single has 1"),
    (f"{CONVERT} --data text.txt", 2, "text.txt is neither a folder of pictures nor"),
    (f"{CONVERT} --data texts", 2, "texts/"),
    (f"{CONVERT} --data texts --skip-bad-images", 2, "none of 2 pictures can be read: texts/"),
    (f"{VERIFY} --data texts --skip-bad-images", 2, "can be read: texts/1.png: it is no picture"),
    (f"{ADAPT} --data texts --skip-bad-images", 2, "none of 2 pictures can be read: texts/"),
    (f"{REPORT} --model net.py:make {PICTURES} --data texts --skip-bad-images", 2,
     "none of 2 pictures can be read: texts/"),
    (f"{CONVERT} --data damaged", 2, "damaged/1.png cannot be read"),
    (f"{CONVERT} --data mixed", 2, "mixed has both pictures (mixed/0.png, ...) and tar shards"),
    (f"{CONVERT} --data text.tar", 2, "text.tar"),
    (f"{CONVERT} --data texts.tar", 2, "texts.tar"),
    (f"{CONVERT} --data x-{{0..2}}.tar", 2, "stands for 3 shards, and 3 of them do not exist"),
    (f"{CONVERT} --data none.npy", 2, "none.npy cannot be read as arrays"),
    (f"{CONVERT} --data floats.npy", 2, "] cannot be read: its floats are from 7 to 7: scale them"),
    (f"{CONVERT} --data flat.npy", 2, "uint8 (3, 16) (a picture alone needs a batch axis: save"),
    (f"{CONVERT} --data objects.npy", 2, "objects.npy cannot be read as arrays of plain numbers"),
    (f"{CONVERT} --data labels.npz", 2, "labels.npz must hold one array of pictures, (N, H, W, C)"),
    (f"{CONVERT} --data first.npy", 2, "(the last axis of (3, 1, 16, 17)): save array"),
    (f"{CONVERT} --data alone.npy", 2, "(16, 17, 3), without a batch axis or a channel axis"),
    (f"{CONVERT} --data alone_first.npy", 2, "(3, 16, 17), without a batch axis or a channel axis"),
    (f"{CONVERT} --data narrow.npy", 2, "and all below 256: save them with .astype('uint8')"),
    (f"{CONVERT} --data nan.npy", 2, "] cannot be read: it has NaN or Inf among its floats"),
    (f"{CONVERT} --data integers.npy", 2, "save integers with .astype('uint8') if they are from 0"),
    (f"{CONVERT} --data two.npz", 2, "it has: train float64 (3, 16, 16), test float64 (2, 16, 16)"),
    (f"{CONVERT} --data pictures/0.png", 2, "pictures/0.png is one picture: name the folder"),
    (f"{CONVERT} --data over", 2, ".tif cannot be read: its integers are from 0 to 70000, and"),
    (f"{CONVERT} --data under", 2, "its integers are from 0 to 200, and what is white cannot"),
    (f"{CONVERT} --data under --skip-bad-images", 2, "its integers are from 0 to 200, and what"),
    (f"{CONVERT} --mean .5 --std .2 .2", 2, "have 3 channels: give 3, or one for all"),
    (f"{CONVERT} --std 0", 2, "the std must be positive, not 0.0"),
    (f"{CONVERT} --mean 123.7 116.3 103.5", 2, "cannot be of pixels in 0 to 1: of 0 to 255,"),
    (f"{CONVERT} --mean 0 --std 255", 2, "--std 255.0 cannot be of pixels in 0 to 1"),
    (f"{PLAN} --data pictures --mean .5 net.py:make", 2, "(a model or file goes before such an"),
    (GREY, 2, "for pictures of 1 channel there is no usual mean and std: give --mean and --std"),
    (f"{GREY} --mean 0.5", 2, "of 1 channel there is no usual mean and std: give --std, for"),
    (f"{GREY} {MIDDLE} .5 .5", 2, "--std has 3 values, and the pictures have 1 channel: give one"),
    (f"{GREY} {MIDDLE} --data colour.npy", 2, "the network takes 1 channel, the pictures in colo"),
    (f"{GREY} {MIDDLE} --data first.npy", 2, "save array.transpose(0, 2, 3, 1)"),
    (f"{CONVERT} {MIDDLE} --data four.npy", 2, "the network takes 3 channels, the pictures in fo"),
    (f"convert net.py:alpha --output o.pth {PICTURES} {MIDDLE}", 2, "it is RGB, without alpha"),
    (f"convert net.py:wide --output o.pth {PICTURES} {MIDDLE}", 2, "a .npy of (N, H, W, 7)"),
    (f"{CONVERT} --data broken.npz", 2, "broken.npz cannot be read as arrays"),
    (f"{CONVERT} --output there.pth", 2, "there.pth exists: choose another name, or --overwrite"),
    (f"{CONVERT} --output empty --overwrite", 2, "empty must end in .safetensors"),
    (f"{CONVERT} --output out.onnx", 2, "out.onnx must end in .safetensors, .pth or .pt"),
    (f"{CONVERT} --output nope/out.pth", 2, "the folder nope does not exist"),
    (f"{CONVERT} --report there.html", 2, "there.html exists"),
    (f"{CONVERT} --report out.pdf", 2, "out.pdf must end in .html"),
    (f"{CONVERT} --state out.safetensors", 2, "--state and --output are both out.safetensors"),
    (f"{CONVERT} --state text.state", 2, "text.state is no state file of a calibration"),
    (f"{CONVERT} --state nope/s", 2, "nope/s"),
    (f"{CONVERT} --images 0", 2, "argument --images: 0 is not between 1 and"),
    (f"{CONVERT} --images 1.5", 2, "argument --images: 1.5 is not a whole number"),
    (f"{CONVERT} --images 1", 2, "at least 2 images"),
    (f"{CONVERT} --batch-size -3", 2, "argument --batch-size: -3 is not between 1 and"),
    (f"{CONVERT} --workers -1", 2, "argument --workers: -1 is not between 0 and"),
    (f"{CONVERT} --seed nan", 2, "argument --seed: nan is not a whole number"),
    (f"{CONVERT} --resize 0", 2, "argument --resize: 0 is not between 1 and"),
    (f"{CONVERT} --crop -16", 2, "argument --crop: -16 is not between 1 and"),
    (f"{CONVERT} --std 0 1 1", 2, "the std must be positive, not 0.0 1.0 1.0"),
    (f"{CONVERT} --tolerance 2", 2, "argument --tolerance: 2 is not between 0 and 1"),
    (f"{CONVERT} --tolerance nan", 2, "argument --tolerance: nan is not a number"),
    (f"{CONVERT} --device gpu", 2, "device gpu cannot be used here: torch calls its devices"),
    (f"{CONVERT} --device meta", 2, "device meta cannot be used here"),
    (f"{CONVERT} --include nope", 2, "'nope' matches none of the 2 convolutions"),
    (f"{CONVERT} --crop 4", 2, "Kernel size can't be greater than actual input size"),
    (f"convert net.py:wide --output a.pth --weights w.pth {PICTURES}", 2, "(4, 7, 3, 3)"),
    (f"{VERIFY} --model net.py:other", 2, "the plan does not fit this Sequential"),
    (f"verify nope.safetensors --weights w.pth {PICTURES}", 2, "there is no file nope.safetensors"),
    (f"verify bn.safetensors --weights w.pth {PICTURES}", 2, "--model"),
    (f"{VERIFY} --tolerance -1", 2, "argument --tolerance: -1 is not a number from 0 up"),
    (f"{VERIFY} --weights shapes.pth", 2, "shapes.pth do not fit"),
    (VERIFY.replace("bn.", "trained."), 1, "the models differ: 0 by"),
    (VERIFY.replace("bn.", "cut."), 2, "cut.safetensors cannot be read as safetensors"),
    (f"{FOLD} --output there.pth", 2, "there.pth exists"),
    (f"{FOLD} --output bn.safetensors", 2, "bn.safetensors exists"),
    (FOLD.replace("bn.", "plain."), 2, "plain.safetensors has no BatchNorm that can be folded"),
    ("fold bn.pth --output out.pth", 2, "bn.pth does not say what model it is: give --model"),
    ("fold empty --output out.pth --model net.py:make", 2, "empty is a folder without"),
    ("fold text.txt --output out.pth", 2, "text.txt is no weights file but text"),
    (f"{ADAPT} --prior -1", 2, "argument --prior: -1 is not a number from 0 up"),
    (f"{ADAPT} --prior inf", 2, "argument --prior: inf is not a number from 0 up"),
    (f"{ADAPT} --data empty", 2, "empty has no pictures in it"),
    (ADAPT.replace("bn.", "plain."), 2, "plain.safetensors has no BatchNorm to adapt"),
    (f"{INSPECT} nope.pth", 2, "there is no file nope.pth"),
    (f"{INSPECT} text.txt", 2, "text.txt is no weights file but text"),
    (f"{INSPECT} cut.safetensors", 2, "cut.safetensors cannot be read as safetensors"),
    (f"{REPORT} --output there.html", 2, "there.html exists"),
    (f"{REPORT} --weights w.pth", 2, "--weights needs --data"),
    ("report w.pth --output out.html", 2, "w.pth cannot be reported on: it has no BatchNorm"),
    ("report text.pth --output out.html", 2, "text.pth is no weights file but text, 'precious'"),
    (f"{DEMO} --output text.txt", 2, "cannot write to text.txt"),
    (f"{DEMO} --output there.pth/x", 2, "cannot write to there.pth/x"),
    ("convert net.py:normed --weights plain.safetensors --data pictures --output o.pth", 2,
     "do not fit Sequential"),
    (f"{CONVERT} --exclude *", 1, "there is nothing to convert, and nothing was written"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code", "message"), CASES, ids=[words for words, _, _ in CASES])
def test_a_bad_request_is_one_line_and_writes_nothing(kit, tmp_path, words, code, message):
    folder = tmp_path / "kit"
    shutil.copytree(kit, folder)
    before = contents(folder)
    found = command(folder, *words.split())
    assert (found.code, len(found.err)) == (code, 1), found
    assert found.err[0].startswith("retrofit: ")
    assert message in found.err[0]
    assert "Traceback" not in found.out
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "after"),
    [
        (f"{CONVERT} --weights ''", "--weights"),
        (f"{CONVERT} --data ''", "--data"),
        (f"{CONVERT} --report=", "--report="),
        ("convert ''", "convert"),
        ("inspect ''", "inspect"),
        ("demo --output ''", "--output"),
    ],
)
def test_an_argument_that_is_empty_does_not_mean_this_folder(kit, tmp_path, words, after):
    folder = shutil.copytree(kit, tmp_path / "kit")
    before = contents(folder)
    found = command(folder, *shlex.split(words))
    message = f"retrofit: an argument is empty, after {after} (a variable without value?)"
    assert (found.code, found.err) == (2, [f"{message} (see retrofit {words.split()[0]} --help)"])
    assert contents(folder) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(kit, tmp_path):
    test_a_bad_request_is_one_line_and_writes_nothing(
        kit, tmp_path, f"{CONVERT} --device cuda", 2, "device cuda cannot be used here"
    )


@pytest.mark.slow
def test_the_installed_program_too(kit):
    program = Path(sys.executable).with_name("retrofit")
    done = subprocess.run(
        [program, *f"{CONVERT} --data empty".split()],
        capture_output=True, text=True, cwd=kit, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("retrofit: empty has no pictures in it")
    assert done.stderr.count("\n") == 1


def test_debug_shows_where_a_bad_request_was_refused(kit, tmp_path):
    folder = shutil.copytree(kit, tmp_path / "kit")
    found = command(folder, "--debug", *f"{CONVERT} --weights missing.pth".split())
    assert found.code == 2
    assert found.err[0].startswith("Traceback")
    assert found.err[-1] == "retrofit: there is no file missing.pth"


def test_a_blank_in_a_command_is_shown(tmp_path):
    found = command(tmp_path, "plan ", "vgg16")
    assert found.code == 2
    assert found.err[0].startswith("retrofit: 'plan ' is no command: did you mean plan?")


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_what_follows_a_question_does_not_matter(tmp_path, asked):
    assert command(tmp_path, asked, "pln").code == 0
