"""What is said while something is done: a bar where one can move, a line where none can."""

import contextlib
import fcntl
import io
import os
import struct
import sys
import termios

import nets
import pytest
from torch.utils.data import DataLoader, TensorDataset

import retrofit

X = nets.images(12, 3, 8, 8)
MODEL = nets.build(nets.Residual)
CONVERTED = retrofit.add_batchnorm(MODEL, X.split(6), progress=False)
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
        yield lambda: os.read(ours, 1 << 16).decode()
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
        ([(X, "labels")], {}, "calibrate ..."),  # what counts, only the model tells
        (iter(X.split(5)), {}, "calibrate ..."),
        (iter(X.split(5)), {"max_images": 8}, "calibrate: 8 images ..."),
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
