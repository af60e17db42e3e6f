"""`--data file.py:loader`: audio, medical and other data, in batches of the user's own making."""

import json
import re
import sys

import pytest
import torch
from folders import contents
from onnx_files import export
from processes import command, started
from safetensors import safe_open
from safetensors.torch import load_file

from retrofit.cli import main
from retrofit.cli.data_sources import is_code
from retrofit.files.model_sources import build

NETS = """
import torch
from torch import nn

def audio():
    torch.manual_seed(0)
    convs = nn.Conv1d(1, 4, 9, stride=4), nn.ReLU(), nn.Conv1d(4, 4, 5), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)).eval()

def volumes():
    torch.manual_seed(0)
    convs = nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 3), nn.ReLU()
    return nn.Sequential(*convs, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)).eval()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv1d(1, 4, 3), nn.Conv1d(2, 4, 3)
        self.act, self.head = nn.ReLU(), nn.Conv1d(4, 2, 1)

    def forward(self, left, right):
        return self.head(self.act(self.left(left) + self.right(right)))
"""
DATA = """
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

def noise(count, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, *shape[1:], generator=generator).expand(count, *shape).clone()

sounds = noise(48, 1, 64)
batches = list(sounds.split(8))
labelled = TensorDataset(sounds, torch.arange(48) % 3)
whole = sounds
nothing = []
generator = (batch for batch in batches)
number = 3

class Sounds(Dataset):
    def __len__(self): return 48
    def __getitem__(self, index): return sounds[index]

class Broken(Sounds):
    def __getitem__(self, index):
        if index == 5:
            raise ValueError("bad\\nfile")
        return sounds[index]

class CutShort(Sounds):
    def __getitem__(self, index): raise EOFError("cut short")

class Rows:
    # Of another library, with torch's protocol: Hugging Face's, for example.
    def __len__(self): return 48
    def __getitem__(self, index): return {"label": index % 3, "input": sounds[index]}
    def __getitems__(self, indices): return [self[index] for index in indices]

class Empty(Sounds):
    def __len__(self): return 0

class Endless(Dataset):
    def __getitem__(self, index): return sounds[0]

class Lengths(Sounds):
    def __getitem__(self, index): return sounds[index, :, : 40 + index]

class Stream(IterableDataset):
    def __iter__(self): return iter(batches)

class Silent(Sounds):
    def __getitem__(self, index): return sounds[index] * (float("nan") if index == 7 else 1)

def loader(): return DataLoader(labelled, batch_size=8)
def shuffled(): return DataLoader(labelled, batch_size=8, shuffle=True)
def made():
    for batch in batches:
        yield batch
def reused():
    memory = torch.empty(8, 1, 64)
    for batch in batches:
        yield memory.copy_(batch)
def used_up(): return generator
def volumes(): return [noise(16, 2, 6, 6, 6).split(4), ][0]
def named():
    return [{"left": x, "right": x.expand(-1, 2, -1), "label": 3} for x in batches]
def failing():
    x = 1
    raise OSError("no such\\nluck")
def half():
    yield from batches[:3]
    raise OSError("no such luck")
def needy(path): return batches
def none(): pass
def empty(): return iter(())
def pictures(): return [torch.zeros(8, 3, 9, 9)]
def flat(): return [torch.zeros(64)]
def integers(): return [torch.zeros(8, 1, 64, dtype=torch.int64)]
def stops(): raise SystemExit(3)
def single(): return [sounds[:1]]
"""
pytestmark = pytest.mark.filterwarnings("ignore:the statistics", "ignore:the two halves")
AUDIO = ("convert", "net.py:audio", "--output", "bn.safetensors")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(NETS)
    (tmp_path / "data.py").write_text(DATA)
    yield tmp_path
    for name in ("net", "data"):
        sys.modules.pop(name, None)


@pytest.fixture
def sounds():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 1, 64, generator=generator)


def source(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["retrofit"])["data"]


def assert_calibrated_on(file, inputs):
    """The first BatchNorm has the moments, in float64, of what the first convolution gives."""
    torch.manual_seed(0)
    first = torch.nn.Conv1d(1, 4, 9, stride=4).double()
    with torch.no_grad():
        y = first(inputs.double())
    found = load_file(file)
    assert torch.allclose(found["0.bn.running_mean"].double(), y.mean((0, 2)), atol=1e-5)
    assert torch.allclose(found["0.bn.running_var"].double(), y.var((0, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["loader", "batches", "made", "reused", "generator", "Stream", "shuffled", "used_up"]
)
def test_batches_come_as_the_code_gives_them(run, folder, sounds, name):
    code, out, err = run(*AUDIO, "--data", f"data.py:{name}")
    assert (code, err) == (0, [])
    assert "calibrated on       48 samples in" in out
    assert "samples/s" in out
    assert "samples needed" in out
    assert "verified on         16 samples, the first of them" in out
    assert "picture" not in out
    assert source(folder / "bn.safetensors") == f"48 samples of data.py:{name}"
    assert_calibrated_on(folder / "bn.safetensors", sounds)


@pytest.mark.parametrize("name", ["Sounds", "labelled", "Rows"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_dataset_is_shuffled_and_put_together(run, folder, sounds, name, workers):
    data = ("--data", f"data.py:{name}", "--workers", workers, "--seed", "3", "--images", "20")
    code, out, err = run(*AUDIO, *data, "--batch-size", "6")
    assert (code, err) == (0, [])
    assert "verified on         16 other samples" in out
    assert source(folder / "bn.safetensors") == f"20 samples of data.py:{name}, seed 3"
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    assert_calibrated_on(folder / "bn.safetensors", sounds[order[:20]])


@pytest.mark.usefixtures("folder")
def test_volumes_of_floats_and_two_inputs_by_name(run):
    for net, data in (("volumes", "volumes"), ("Two", "named")):
        words = ("convert", f"net.py:{net}", "--data", f"data.py:{data}", "--output", f"{net}.pth")
        code, out, err = run(*words)
        assert (code, err) == (0, [])
        assert "equal bit for bit" in out
        assert {"volumes": "2.bn", "Two": "right.bn"}[net] in out


@pytest.mark.parametrize(
    "name",
    [
        "Sounds",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("batches", "labelled", "loader")),
        "made",
    ],
)
def test_every_command_takes_it(run, folder, name):
    data = ("--data", f"data.py:{name}")
    model = ("--model", "net.py:audio")
    assert run("plan", "net.py:audio", *data)[0] == 0
    code, _, err = run(*AUDIO, *data, "--report", "a.html", "--state", "s.state")
    assert (code, err) == (0, [])
    assert "samples of data.py" in (folder / "a.html").read_text()
    code, out, err = run("verify", "bn.safetensors", *model, *data)
    assert (code, err) == (0, [])
    assert out.endswith("equal bit for bit on 16 samples, top-1 agreement 100.00%\n")
    code, out, err = run("adapt", "bn.safetensors", *model, *data, "--output", "b.safetensors")
    assert (code, err) == (0, [])
    assert "adapted on          48 samples in" in out
    assert f"adapted on 48 samples of data.py:{name}" in source(folder / "b.safetensors")
    code, _, err = run("report", "bn.safetensors", *model, *data, "--output", "b.html")
    assert (code, err) == (0, [])
    page = (folder / "b.html").read_text()
    assert re.search(rf"drift, on (up to 128|48) samples of data.py:{name}", page)


def test_a_killed_run_goes_on_from_its_state(run, folder, sounds, monkeypatch):
    words = (*AUDIO, "--data", "data.py:made", "--state", "s.state")
    with monkeypatch.context() as patch:  # as if it was killed when all was calibrated
        patch.setattr("retrofit.cli.convert.retrofit.convert", lambda *_, **__: 1 / 0)
        assert run(*words)[0] == 1
    assert (folder / "s.state").exists()
    code, out, err = run(*words)
    assert (code, err) == (0, [])
    assert "verified on         16 samples, the first of them" in out
    assert_calibrated_on(folder / "bn.safetensors", sounds)


def test_restore_takes_it(run, folder):
    (folder / "bn.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv1d(1, 4, 9, bias=False), "
        "nn.BatchNorm1d(4), nn.ReLU()).eval()\n"
    )
    torch.save({"0.weight": torch.randn(4, 1, 9), "0.bias": torch.randn(4)}, folder / "f.pth")
    code, out, err = run("restore", "bn.py:net", "--weights", "f.pth", "--output", "r.safetensors",
                         "--data", "data.py:made")  # fmt: skip
    assert (code, err) == (0, [])
    assert "samples" in out
    assert "image" not in out


def test_it_is_announced_and_the_bar_counts_samples(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main([*AUDIO, "--data", "data.py:Sounds"]) == 0
    said = capsys.readouterr().err
    assert "retrofit: up to 48 samples, on cpu ...\ncalibrate: up to 48 samples ..." in said
    assert "verify: 16 samples ..." in said
    assert main([*AUDIO, "--data", "data.py:made", "--overwrite"]) == 0
    said = capsys.readouterr().err
    assert "retrofit: samples of data.py:made, on cpu ...\ncalibrate ...\n" in said


def test_of_an_onnx_file_too(run, folder):
    name = f"{folder}/net.py:audio"
    export(build(name), torch.zeros(8, 1, 64), folder / "net.onnx", "script")
    words = ("convert", "net.onnx", "--data", "data.py:loader", "--output", "bn.onnx")
    code, out, err = run(*words)
    assert (code, err) == (0, [])
    assert "in onnxruntime      equal bit for bit" in out


@pytest.mark.usefixtures("folder")
def test_a_nan_is_named_by_its_index_in_the_dataset(run):
    code, _, err = run(*AUDIO, "--data", "data.py:Silent", "--workers", "0")
    assert code == 2
    assert "there is a NaN or Inf at 0 for sample 7 of data.py:Silent" in err[0]


CONVERT = "convert net.py:audio --output out.safetensors"
CASES = [
    ("--data nope.py:loader", "there is no file nope.py"),
    ("--data nope.nope:loader", "nope.nope cannot be imported: ModuleNotFoundError"),
    ("--data data.py:laoder", "data.py has no loader 'laoder'; nearest: loader"),
    ("--data data.py", "data.py is code: name the function in it that gives the data"),
    ("--data data.py:failing", "data.py:failing failed: OSError: no such luck (data.py, line "),
    ("--data data.py:half", "data.py:half failed: OSError: no such luck (data.py, line "),
    ("--data data.py:Broken --workers 0", "data.py:Broken failed: ValueError: bad file (data.py, "),
    ("--data data.py:Broken --workers 2", "data.py:Broken failed: ValueError: bad file (data.py, "),
    ("--data data.py:CutShort --workers 0", "data.py:CutShort failed: EOFError: cut short"),
    ("--data data.py:CutShort --workers 2", "data.py:CutShort failed: EOFError: cut short"),
    ("--data data.py:stops", "data.py:stops failed: SystemExit: it ends the process (data.py, "),
    ("--data data.py:needy", "data.py:needy failed: TypeError: needy() missing 1 required"),
    (
        "--data data.py:none",
        "data.py:none returned no data: data must be an iterable of batches, not NoneType",
    ),
    (
        "--data data.py:number",
        "data.py:number is no data: data must be an iterable of batches, not int",
    ),
    ("--data data.py:whole", "data is one tensor of shape (48, 1, 64): pass an iterable"),
    ("--data data.py:nothing", "data.py:nothing gives no batches: it is empty, or used up"),
    ("--data data.py:empty", "data.py:empty gives no batches: it is empty, or used up"),
    ("--data data.py:Empty", "at least 2 samples: data.py:Empty has 0"),
    ("--data data.py:Endless", "data.py:Endless gives a Endless without __len__"),
    ("--data data.py:single", "at least 2 images"),
    ("--data data.py:pictures", "0 takes (N, 1, W), and gets (8, 3, 9, 9)"),
    ("--data data.py:flat", "0 takes (N, 1, W), and gets (64,)"),
    ("--data data.py:integers", "the batches are torch.int64 of shape (8, 1, 64)"),
    ("--data data.py:Lengths --workers 0", "need a DataLoader with a collate_fn of yours"),
    ("--data data.py:generator --report out.html", "--report needs the batches once more, and"),
    ("--data data.py:batches --batch-size 8", "--batch-size is for a Dataset: data.py:batches"),
    ("--data data.py:batches --workers 0", "--workers is for a Dataset"),
    ("--data data.py:batches --seed 0", "--seed is for a Dataset"),
    ("--data data.py:Sounds --crop 8", "--crop is for pictures: data.py:Sounds gives its own"),
    ("--data data.py:Sounds --resize 8", "--resize is for pictures"),
    ("--data data.py:batches --mean 0", "--mean is for pictures"),
    ("--data data.py:batches --std 1", "--std is for pictures"),
    ("--data data.py:batches --skip-bad-images", "--skip-bad-images is for pictures"),
]


@pytest.mark.parametrize(("words", "message"), CASES, ids=[words for words, _ in CASES])
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(run, folder, words, message):
    before = contents(folder)
    code, _, err = run(*CONVERT.split(), *words.split())
    assert (code, len(err)) == (2, 1), err
    assert message in err[0]
    assert contents(folder) == before


@pytest.mark.usefixtures("folder")
def test_a_dataset_of_no_samples_is_refused_by_the_other_commands(run):
    assert run(*AUDIO, "--data", "data.py:batches")[0] == 0
    words = ("adapt", "bn.safetensors", "--model", "net.py:audio", "--data", "data.py:Empty")
    code, _, err = run(*words, "--output", "adapted.safetensors")
    assert (code, err) == (2, ["retrofit: data.py:Empty gives a Empty of no samples"])


def test_a_generator_that_is_used_up_is_refused_where_it_is_needed_twice(run, folder):
    assert run(*AUDIO, "--data", "data.py:batches")[0] == 0
    torch.save(build("net.py:audio").state_dict(), folder / "plain.pth")
    words = ("report", "bn.safetensors", "--model", "net.py:audio", "--weights", "plain.pth")
    code, _, err = run(*words, "--output", "r.html", "--data", "data.py:used_up")
    assert (code, len(err)) == (2, 1)
    assert "data.py:used_up gives a generator that is used up, and its batches are needed" in err[0]
    assert not (folder / "r.html").exists()


def test_processes_share_a_dataset_and_refuse_batches(folder, sounds):
    words = (*AUDIO, "--data", "data.py:Sounds", "--images", "32", "--workers", "0")
    found = [one.finished() for one in started(folder, words, words)]
    assert [one.code for one in found] == [0, 0], found
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    assert_calibrated_on(folder / "bn.safetensors", sounds[order[:32]])
    words = (*AUDIO, "--overwrite", "--data", "data.py:batches")
    found = [one.finished() for one in started(folder, words, words)]
    assert {one.code for one in found} <= {1, 2}
    message = "2 processes cannot share the batches of data.py:batches: let it give a torch Dataset"
    assert all(message in one.err[0] for one in found)


@pytest.mark.usefixtures("folder")
def test_processes_must_agree_in_the_arguments_of_the_model(tmp_path):
    (tmp_path / "width.py").write_text(
        "from torch import nn\ndef net(width=4): return nn.Sequential(nn.Conv1d(1, width, 3), "
        "nn.ReLU(), nn.Conv1d(width, 2, 1))\n"
    )
    words = ("convert", "width.py:net", "--output", "o.pth", "--data", "data.py:Sounds")
    found = started(tmp_path, words, (*words, "--model-args", "width=5"))
    for one in [process.finished() for process in found]:
        assert one.code == 1
        assert "has a different --model-args ({'width': 5}, not {}) than process 0" in one.err[0]


def test_a_module_is_imported_by_its_name(folder):
    found = command(folder, *AUDIO, "--data", "data:batches")
    assert (found.code, found.err) == (0, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data.py:loader", True),
        ("a/b c/data.py:loader", True),
        ("package.module:loader", True),
        ("data.py", False),
        ("data.py:", False),
        ("C:\\pictures", False),
        ("train-{000..012}.tar", False),
        ("a/b:c", False),
        ("pictures", False),
    ],
)
def test_code_is_told_from_paths(text, expected):
    assert is_code(text) is expected
