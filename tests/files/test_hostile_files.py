"""Files made to do harm: none is executed, imported from, or believed."""

import contextlib
import functools
import io
import json
import os
import random
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from folders import pictures
from PIL import Image
from processes import command
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

import retrofit
from retrofit import RetrofitError
from retrofit.files.weights import read_weights
from retrofit.pictures.sources import open_pictures

EVIL = "open('sentinel', 'w').close()\ndef make(*_): open('sentinel', 'w').close()\n"
CONVERT = (
    "convert net.py:make --data pictures --output out.pth --crop 16 --mean 0.5 --std 0.5 "
    "--workers 0"
)
COMMANDS = {
    "inspect": "inspect {}",
    "fold": "fold {} --output out.pth",
    "verify": "verify {} --weights w.pth --data pictures",
    "adapt": "adapt {} --data pictures --output out.pth",
    "report": "report {} --output out.html",
    "report with data": "report {} --data pictures --output out.html",
}


class Evil:
    """Pickles to a call that leaves a file."""

    def __reduce__(self):
        return (exec, ("open('sentinel', 'w').close()",))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()).eval()


@functools.cache
def converted():
    return retrofit.add_batchnorm(net(), [torch.randn(8, 3, 16, 16)], progress=False)


def written(file, **changes):
    """What `save` writes, with other provenance."""
    retrofit.save(converted(), file, overwrite=True)
    tensors, told = read_weights(file)
    told = {**told.to_json(), **changes}
    file.write_bytes(save(tensors, {"retrofit": json.dumps(told)}))
    return file


def one_line(code, out, err):
    assert code in (1, 2), (code, out, err)
    assert len(err) == 1, err
    assert err[0].isprintable(), err


# --- code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evil:make", "evil.py:make", "./evil.py:make", "os:system"])
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_model_that_a_file_names_is_not_imported(run, tmp_path, words, name):
    (tmp_path / "evil.py").write_text(EVIL)
    pictures(tmp_path / "pictures", 2)
    torch.save(net().state_dict(), tmp_path / "w.pth")
    written(tmp_path / "a.safetensors", model=name)
    code, _, err = run(*words.format("a.safetensors").split())
    assert not (tmp_path / "sentinel").exists()
    if words.startswith(("inspect", "report {} --output")):  # they need no model
        assert (code, err) == (0, [])
    else:
        one_line(code, "", err)
        assert "--model" in err[0]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_pickle_is_not_run(run, tmp_path, words, legacy):
    pictures(tmp_path / "pictures", 2)
    torch.save({"a": Evil()}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    one_line(*run(*words.format("a.pth").split()))
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("option", ["--weights a.pth", "--data a.npy", "--data a.npz",
                                    "--data a.tar", "--state a.state"])  # fmt: skip
def test_a_pickle_in_any_other_file_is_not_run(run, tmp_path, option):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    )
    pictures(tmp_path / "pictures", 3)
    objects = np.array([Evil()] * 3)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=objects)
    for name in ("a.pth", "a.state", "0.pkl"):
        torch.save(Evil(), tmp_path / name)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "0.pkl", "0.pkl")
    words = CONVERT
    one_line(*run(*words.split(), *option.split()))
    assert not (tmp_path / "sentinel").exists()
    assert not (tmp_path / "out.pth").exists()


# --- safetensors and provenance ----------------------------------------------------------------


def framed(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS = {
    "a huge length": struct.pack("<Q", 1 << 60) + b"{}",
    "longer than the file": struct.pack("<Q", 5000) + b"{}",
    "no length": b"\x02",
    "not JSON": framed(b"{nope"),
    "a list": framed([]),
    "overlapping": framed({"a": TENSOR, "b": TENSOR}),
    "out of range": framed({"a": {**TENSOR, "data_offsets": [1 << 40, (1 << 40) + 16]}}),
    "backwards": framed({"a": {**TENSOR, "data_offsets": [16, 0]}}),
    "wrong dtype": framed({"a": {**TENSOR, "dtype": "F99"}}),
    "wrong shape": framed({"a": {**TENSOR, "shape": [1 << 40, 1 << 40]}}),
    "nested": framed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_damaged_header_is_one_line(run, tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    one_line(*run("inspect", "a.safetensors"))


WRONG = [None, 0, -1, 1e400, "text", [], {}, [[]], {"a": 1}, True]
FIELDS = ["model", "plan", "eps", "momentum", "images", "aliases", "drift", "calibration",
          "preparation", "verification", "data", "class", "date", "torch"]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_provenance_of_any_type_is_used_or_refused(tmp_path, field):
    for value in WRONG:
        file = written(tmp_path / "a.safetensors", **{field: value})
        try:
            loaded = retrofit.load(file, net())
        except RetrofitError:
            continue
        assert isinstance(loaded, nn.Sequential)


@pytest.mark.parametrize("field", FIELDS)
def test_provenance_of_any_type_is_one_line_on_the_command_line(run, tmp_path, field):
    for value in WRONG:
        written(tmp_path / "a.safetensors", **{field: value})
        for words in ("inspect {}", "report {} --output out.html --overwrite"):
            code, out, err = run(*words.format("a.safetensors").split())
            if code:
                one_line(code, out, err)


PREPARATIONS = [
    {"crop": 1 << 40}, {"resize": 20_000}, {"crop": 0}, {"mean": [1e300]}, {"std": [0]},
    {"std": [-1, 1, 1]}, {"mean": [0.5] * 7}, {"mean": []}, {"std": ["1"]}, {"crop": "16"},
    {"crop": True}, {"other": 1}, {"std": [1e-300]},
]  # fmt: skip


@pytest.mark.parametrize("preparation", PREPARATIONS, ids=str)
def test_a_preparation_in_a_file_is_checked(run, tmp_path, preparation):
    pictures(tmp_path / "pictures", 3)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), "
        "nn.ReLU())\n"
    )
    written(tmp_path / "a.safetensors", preparation=preparation)
    words = "adapt a.safetensors --model net.py:make --data pictures --output out.pth --workers 0"
    one_line(*run(*words.split()))
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("text", ["{", "[]", "1", "null", '"x"', "[" * 100_000, '{"a":' * 100_000])
def test_provenance_that_is_no_object_is_one_line(run, tmp_path, text):
    file = tmp_path / "a.safetensors"
    file.write_bytes(save(dict(net().state_dict()), {"retrofit": text}))
    for words in COMMANDS.values():
        one_line(*run(*words.format(file.name).split()))
    if text in ("[]", "1", "null", '"x"'):
        with pytest.raises(RetrofitError, match=r"its metadata is damaged: a \w+, no object$"):
            retrofit.load(file, net())


@pytest.mark.parametrize(
    "path", ["__class__", "..", "", "0.weight", "../../etc", "a" * 10_000, "1"]
)
@pytest.mark.parametrize("field", ["path", "host", "layer", "norm"])
def test_a_plan_of_other_places_is_refused(tmp_path, field, path):
    file = written(tmp_path / "a.safetensors")
    plan = read_weights(file)[1].to_json()["plan"]
    plan["sites"][0][field] = path
    with pytest.raises(RetrofitError):
        retrofit.load(written(file, plan=plan), net())


@pytest.mark.parametrize(
    "key",
    [
        "a\x1b[2Jb",
        "../../evil",
        "a." * 100_000 + "b",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("/evil", "a\nb", "a\rb", "\x00")),
    ],
)
def test_names_of_tensors_are_only_names(run, tmp_path, key):
    tensors = {f"{key}.{name}": torch.ones(2) for name in
               ("running_mean", "running_var", "weight", "bias")}  # fmt: skip
    (tmp_path / "a.safetensors").write_bytes(save(tensors))
    torch.save(tensors, tmp_path / "a.pth")
    before = sorted(tmp_path.rglob("*"))
    for file in ("a.safetensors", "a.pth"):
        code, out, err = run("inspect", file)
        assert out.replace("\n", "").isprintable()
        assert code == 0 or not one_line(code, out, err)
        one_line(*run("fold", file, "--model", "squeezenet1_1", "--output", "out.pth"))
    assert sorted(tmp_path.rglob("*")) == before


# --- size --------------------------------------------------------------------------------------


def a_gigabyte():
    """As much more memory as a command may have."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))


HEADER = {"descr": "|u1", "fortran_order": False, "shape": (2 << 10, 1 << 10, 1 << 10, 1)}


@pytest.mark.parametrize(
    ("option", "member"),
    [("--data a.npz", "images.npy"), ("--data a.npy", None), ("--weights a.pth", "a/data.pkl")],
)
@pytest.mark.slow
def test_what_inflates_to_gigabytes_is_one_line(tmp_path, option, member):
    folder = tmp_path / "kit"
    pictures(folder / "pictures", 3)
    (folder / "net.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 4, 3)\n")
    header, file = io.BytesIO(), folder / option.split()[1]
    np.lib.format.write_array_header_1_0(header, HEADER)
    if member is None:
        file.write_bytes(header.getvalue())
    else:
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
            bomb.open(member, "w", force_zip64=True) as opened,
        ):
            opened.write(header.getvalue())
            for _ in range(128):
                opened.write(bytes(1 << 24))
    words = CONVERT
    one_line(*command(folder, *words.split(), *option.split(), first=a_gigabyte))
    assert not (folder / "out.pth").exists()


def test_a_picture_that_is_a_program_is_not_run(tmp_path):
    """Pillow would give PostScript to Ghostscript, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    ghostscript.chmod(0o755)
    folder = tmp_path / "kit"
    pictures(folder / "pictures", 3)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    (folder / "pictures" / "0.jpg").write_bytes(eps)
    (folder / "net.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 4, 3)\n")
    words = CONVERT
    one_line(*command(folder, *words.split(), first=functools.partial(in_path, ghostscript.parent)))
    assert not (tmp_path / "run").exists()


def in_path(folder):
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_tar_that_leads_back_to_its_beginning_is_read_once(tmp_path):
    header = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    back = tarfile.TarInfo("b.jpg")
    back.size = -512
    (tmp_path / "loop.tar").write_bytes(header + back.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(RetrofitError, match=r"loop\.tar is cut short or damaged"):
        open_pictures(tmp_path / "loop.tar")


def test_what_a_terminal_would_obey_is_written_out_wherever_it_stands(tmp_path):
    folder = tmp_path / "kit"
    folder.mkdir()
    told = {"retrofit": json.dumps({"ev\x1b[2Jil": 1, "\ud800": 2})}
    name = "b\x1b[31m.safetensors"
    (folder / name).write_bytes(save({"w": torch.zeros(2)}, told))
    found = command(folder, "inspect", name)
    assert (found.code, found.err) == (0, [])
    assert "\x1b" not in found.out
    found = command(folder, "inspect", name, "b\x1b[2J\nc.pth")
    assert (found.code, len(found.err)) == (2, 1)
    assert "\x1b" not in found.err[0]


def png(width, height):
    """Of these dimensions, with hardly any data."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1_000_000, 1_000_000), (20_000, 20_000)])
@pytest.mark.parametrize("skip", [[], ["--skip-bad-images"]])
def test_a_picture_that_claims_to_be_huge(run, tmp_path, size, skip):
    pictures(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "bomb.png").write_bytes(png(*size))
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    )
    words = CONVERT
    code, _, err = run(*words.split(), *skip)
    if skip:
        assert code == 0
        assert "left out 1 unreadable pictures: pictures/bomb.png" in err[-1]
    else:
        assert code == 2
        assert "pictures/bomb.png cannot be read" in err[-1]


def test_what_is_no_file_in_a_folder_of_pictures(run, tmp_path):
    pictures(tmp_path / "pictures", 3)
    folder = tmp_path / "pictures"
    (folder / "folder.png").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.png").symlink_to("nothing")
    os.mkfifo(folder / "pipe.png")  # to open it would be to wait for a writer, for ever
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    )
    words = CONVERT
    code, out, err = run(*words.split(), "--skip-bad-images")
    assert code == 0
    assert "calibrated on       3 images" in out
    assert "left out 2 unreadable pictures" in err[-1]
    assert "pictures/pipe.png" in err[-1]
    assert "pictures/nowhere.png" in err[-1]


def test_a_tar_with_names_of_other_places(tmp_path):
    pictures(tmp_path / "pictures", 2)
    picture = (tmp_path / "pictures" / "0.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../../up.png", "/absolute.png", "in.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    found = open_pictures(tmp_path / "a.tar")
    for i in range(len(found)):
        assert isinstance(found.read(i), Image.Image)
    assert len(found) == 3
    assert sorted(tmp_path.rglob("*")) == before


# --- any damage --------------------------------------------------------------------------------


def damaged(content, rng):
    """Some bytes changed, or cut off."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        # The first and last bytes hold the structure of most formats.
        place = rng.choice(
            [rng.randrange(len(changed)), rng.randrange(100), -rng.randrange(1, 100)]
        )
        changed[place] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz", ".npy", ".tar"])
def test_damage_anywhere_is_refused_or_does_not_matter(tmp_path, suffix):
    good = tmp_path / f"good{suffix}"
    if suffix in (".safetensors", ".pth"):
        retrofit.save(converted(), good)
    elif suffix == ".tar":
        pictures(tmp_path / "pictures", 3)
        with tarfile.open(good, "w") as tar:
            for i in range(3):
                tar.add(tmp_path / "pictures" / f"{i}.png", f"{i}.png")
    else:
        array = np.zeros((3, 8, 8, 3), dtype=np.uint8)
        np.savez(good, images=array) if suffix == ".npz" else np.save(good, array)
    content, rng = good.read_bytes(), random.Random(0)
    for _ in range(150):
        bad = tmp_path / f"bad{suffix}"
        bad.write_bytes(damaged(content, rng))
        with contextlib.suppress(RetrofitError):  # nothing else
            if suffix in (".safetensors", ".pth"):
                retrofit.load(bad, net())
            else:
                found = open_pictures(bad)
                list(map(found.name, range(len(found))))


def test_an_archive_that_says_it_is_of_two_disks_is_refused(tmp_path):
    torch.save(net().state_dict(), tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    end = content.rindex(b"PK\5\6")
    locator = struct.pack("<4sLQL", b"PK\6\7", 1, 0, 2)
    (tmp_path / "a.pth").write_bytes(b"?" + content[1:end] + locator + content[end:])
    with pytest.raises(RetrofitError, match=r"a\.pth"):
        retrofit.load(tmp_path / "a.pth", net())


ODD = {
    "int32": torch.zeros(4, 3, 3, 3, dtype=torch.int32),
    "complex64": torch.zeros(4, 3, 3, 3, dtype=torch.complex64),
    "float32": torch.zeros(4, 3, 3, 3).to_sparse(),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights_are_named(tmp_path, kind):
    torch.save({**net().state_dict(), "0.weight": ODD[kind]}, tmp_path / "odd.pth")
    with pytest.raises(RetrofitError, match=rf"1 of another kind \(0\.weight {kind}\)"):
        retrofit.load(tmp_path / "odd.pth", net())


@pytest.mark.parametrize("eps", [10**400, 0, -1, "inf", True])
def test_an_eps_that_is_none_is_damage(tmp_path, eps):
    made = retrofit.insert(net())
    retrofit.save(made, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        told = json.loads(opened.metadata()["retrofit"])
    told["eps"] = eps
    content = save(made.state_dict(), {"retrofit": json.dumps(told)})
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(RetrofitError, match="its metadata is damaged, eps"):
        retrofit.load(tmp_path / "a.safetensors", net())


@pytest.mark.parametrize("count", [10**9, [3, 10**9]])
def test_a_network_larger_than_its_file_is_not_built(tmp_path, count):
    model = torchvision.models.squeezenet1_1(num_classes=2).eval()
    told = {"model": "squeezenet1_1", "model_args": {"num_classes": count}}
    file = tmp_path / "a.safetensors"
    file.write_bytes(save(model.state_dict(), {"retrofit": json.dumps(told)}))
    with pytest.raises(RetrofitError, match=r"damaged, model_args: num_classes=.* numbers$"):
        retrofit.load(file)


@pytest.mark.parametrize(
    "change",
    [
        {"statistics": 3},
        {"checked": None},
        {"statistics": {"mean": torch.zeros(16, 8)}},
        {"images": "many"},
        {"data": [1]},
        lambda old: {"statistics": {k: t[..., :1] for k, t in old["statistics"].items()}},
        lambda old: {"statistics": {k: t.half() for k, t in old["statistics"].items()}},
    ],
    ids=["a number", "nothing", "a part", "a text", "a list", "fewer channels", "16 bits"],
)
def test_a_state_file_with_other_entries_is_damage(tmp_path, change):
    state, data = tmp_path / "state", [torch.rand(4, 3, 12, 12)] * 2
    retrofit.calibrate(retrofit.prepare(net()), data, state=state, progress=False)
    content = torch.load(state, weights_only=True)
    process = content["processes"][0]
    process.update(change(process) if callable(change) else change)
    torch.save(content, state)
    prepared = retrofit.prepare(net())
    before = prepared.state_dict()
    with pytest.raises(RetrofitError, match="is damaged"):
        retrofit.calibrate(prepared, data, state=state, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())


@pytest.mark.slow
def test_batchnorms_of_any_tensors_can_be_inspected(tmp_path):
    names = ("running_mean", "running_var", "weight", "bias")
    norms = {
        "good": torch.ones(3), "scalar": torch.ones(()), "empty": torch.ones(0),
        "negative": -torch.ones(3), "whole": torch.ones(3, dtype=torch.int64),
    }  # fmt: skip
    state = {f"{norm}.{name}": value.clone() for norm, value in norms.items() for name in names}
    state["uneven.running_mean"] = torch.ones(2)
    state |= {f"uneven.{name}": torch.ones(3) for name in names[1:]}
    (tmp_path / "kit").mkdir()
    torch.save(state, tmp_path / "kit" / "a.pth")
    found = command(tmp_path / "kit", "inspect", "a.pth")
    assert (found.code, found.err) == (0, [])
    assert found.out.count("not those of a BatchNorm") == 4
    assert "nan" in found.out
