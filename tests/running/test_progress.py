"""What is said while something is done: a bar where one can move, a line where none can."""

import contextlib
import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios

import nets
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import retrofit

X = nets.images(12, 3, 8, 8)
MODEL = nets.build(nets.Residual)
CONVERTED = retrofit.add_batchnorm(MODEL, X.split(6), progress=False)
END = "(end)"
TASKS = {
    "calibrate": lambda x: retrofit.calibrate(retrofit.prepare(MODEL), x),
    "verify": lambda x: retrofit.verify(MODEL, CONVERTED, x, progress=True),
    "drift": lambda x: retrofit.drift(MODEL, CONVERTED, x, [4], progress=True),
    "recalibrate": lambda x: retrofit.recalibrate(retrofit.insert(MODEL), x),
}
pytestmark = pytest.mark.filterwarnings("ignore:the statistics of:UserWarning")


@contextlib.contextmanager
def terminal(rows, columns):
    """Stderr is a terminal of that size; what it shows is read by calling what this gives."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(theirs, "w") as stderr, contextlib.redirect_stderr(stderr):

        def shown():
            stderr.write(END)  # what was written before may come in several pieces
            stderr.flush()
            text = b""
            while not text.endswith(END.encode()):
                text += os.read(ours, 1 << 16)
            return text.decode().removesuffix(END)

        yield shown
    os.close(ours)


@pytest.mark.parametrize("stage", TASKS)
def test_a_log_has_a_line_for_each_stage_and_no_bar(stage, capsys):
    TASKS[stage](X.split(5))
    assert capsys.readouterr().err == f"{stage}: 12 images ...\n"


@pytest.mark.parametrize("stage", TASKS)
def test_a_terminal_has_a_bar_that_comes_to_its_end(stage):
    with terminal(24, 100) as shown:
        TASKS[stage](X.split(5))
        first, *_, last = shown().strip().split("\r")
    assert (first.split("|")[0], last.split("|")[0]) == (f"{stage}:   0%", f"{stage}: 100%")
    assert " 12/12 [" in last


def test_a_terminal_of_no_size_on_which_bars_are_not_seen_has_lines():
    with terminal(0, 0) as shown:
        TASKS["verify"](X.split(5))
        assert shown() == "verify: 12 images ...\r\n"


def test_a_notebook_has_bars_too_although_its_stream_is_no_terminal(monkeypatch):
    notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", notebook)
    TASKS["verify"](X.split(5))
    assert "100%" in notebook.getvalue()


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (X.split(5), {"max_images": 8}, "calibrate: 8 images ..."),
        (X.split(5), {"max_images": 80}, "calibrate: 12 images ..."),
        (DataLoader(TensorDataset(X), batch_size=5), {}, "calibrate: 12 images ..."),
        ([(part, "labels") for part in X.split(5)], {}, "calibrate: 12 images ..."),
        ([{"x": part, "y": part[:1]} for part in X.split(5)], {}, "calibrate: 12 images ..."),
        ([[part, torch.arange(len(part))] for part in X.split(5)], {}, "calibrate: 12 images ..."),
        ([X[:0], X], {}, "calibrate: 12 images ..."),
        (iter(X.split(5)), {}, "calibrate ..."),
        (iter(X.split(5)), {"max_images": 8}, "calibrate: 8 images ..."),
        ([X], {"forward_fn": lambda model, x: model(x)}, "calibrate: 12 images ..."),
        ([[X], [None]], {"forward_fn": lambda model, _: model(X)}, "calibrate ..."),
    ],
)
def test_the_number_of_images_is_told_where_it_is_known(data, options, said, capsys):
    retrofit.calibrate(retrofit.prepare(MODEL), data, **options)
    assert capsys.readouterr().err == f"{said}\n"


def test_add_batchnorm_which_looks_at_the_first_batch_knows_it_too(capsys):
    retrofit.add_batchnorm(MODEL, list(X.split(5)))
    assert capsys.readouterr().err == "calibrate: 12 images ...\n"


def test_layer_by_layer_the_first_pass_is_told_too(capsys):
    retrofit.recalibrate(retrofit.insert(MODEL), X.split(6), layerwise=True)
    assert capsys.readouterr().err == "first pass: 12 images ...\nrecalibrate: 3 layers ...\n"


class TakesList(nn.Module):
    """As a detector does: pictures without a batch axis."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: list[torch.Tensor]):
        return torch.relu(self.conv(torch.stack(images)))


def test_of_lists_of_pictures_each_counts(capsys):
    batches = [(list(part), [{"boxes": torch.zeros(1, 4)}] * len(part)) for part in X.split(5)]
    model = TakesList().eval()
    prepared = retrofit.prepare(model, retrofit.plan(model, example=batches[0]))
    found = retrofit.calibrate(prepared, batches)
    assert found.images == 12
    assert capsys.readouterr().err == "calibrate: 12 images ...\n"


def test_a_batch_that_is_refused_is_told_as_ever_and_no_total_before(capsys):
    with pytest.raises(retrofit.RetrofitError, match="holds no tensor"):
        retrofit.calibrate(retrofit.prepare(MODEL), [X, "a picture"])
    assert capsys.readouterr().err == "calibrate ...\n"


@pytest.mark.parametrize("data", [lambda: iter(X.split(5)), lambda: X.split(5)])
def test_a_bar_that_ends_before_what_was_asked_for_is_at_its_end(data):
    with terminal(24, 100) as shown:
        retrofit.calibrate(retrofit.prepare(MODEL), data(), max_images=80)
        last = shown().strip().split("\r")[-1]
    assert "100%" in last
    assert " 12/12 [" in last


def test_a_bar_that_an_error_stops_stays_where_it_was():
    def broken():
        yield X
        raise KeyError

    with terminal(24, 100) as shown:
        with pytest.raises(KeyError):
            retrofit.calibrate(retrofit.prepare(MODEL), broken(), max_images=80)
        assert " 12/80 [" in shown().strip().split("\r")[-1]


# As in the kernel of a notebook, with stand-ins for the packages that it has.
KERNEL = """
import json, sys
from types import ModuleType, SimpleNamespace

class OutStream:
    write = flush = lambda *_: None
OutStream.__module__ = "ipykernel.iostream"
sys.stderr = OutStream()

class Widget:
    config = {"IPKernelApp": {}}  # which tqdm 4.66 and 4.67 ask for
    def __init__(self, children=(), **options):
        self.children, self.layout = children, SimpleNamespace(width=None)
        self.bar_style, self.style = "", SimpleNamespace(bar_color=None)
        vars(self).update(options)

def stand_in(name, **content):
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(content)

drawn = []
stand_in("ipykernel.zmqshell")
stand_in("IPython", get_ipython=Widget)
stand_in("IPython.display", display=drawn.append)
"""
WIDGETS = """
stand_in("ipywidgets", HTML=Widget, FloatProgress=Widget, HBox=Widget)
"""
NO_WIDGETS = """
sys.modules["ipywidgets"] = None
"""
CALIBRATE = """
import nets, retrofit
x = nets.images(60, 3, 8, 8)
def bar(data, **options):
    retrofit.calibrate(retrofit.prepare(nets.build(nets.Residual)), data, **options)
bar(x.split(5))
bar(iter(x.split(5)))
bar(iter(x.split(5)), max_images=1000)
bar(x.split(2), tolerance=0.5)
bars = [box.children[1] for box in drawn]
print(json.dumps([[one.value, one.max, one.bar_style, one.layout.width] for one in bars]))
"""


def kernel(*parts):
    """What such a kernel prints."""
    done = subprocess.run(
        [sys.executable, "-c", "".join([KERNEL, *parts])],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_notebook_with_widgets_has_bars_of_them_that_come_to_their_ends():
    *whole, early = json.loads(kernel(WIDGETS, CALIBRATE))
    assert whole == [[60, 60, "success", None]] * 3
    assert early == [early[0], early[0], "success", None]
    assert early[0] < 60


@pytest.mark.slow
def test_a_notebook_without_widgets_has_bars_of_text_and_no_warning():
    said = """
import warnings
warned = []
warnings.showwarning = lambda _, category, *__: warned.append(category.__name__)
warnings.simplefilter("always")
import retrofit.running.progress
ours = list(warned)
from importlib import reload
import tqdm.autonotebook
reload(tqdm.autonotebook)
print(json.dumps([ours, warned]))
"""
    ours, theirs = json.loads(kernel(NO_WIDGETS, said))
    assert "TqdmWarning" not in ours
    assert "TqdmWarning" in theirs  # so it was such a kernel
