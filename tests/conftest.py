"""Fixtures of several test files."""

import multiprocessing
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings
from processes import without_bars

from retrofit.cli import main

# Of the server whose forks are the processes of the tests: they need not import it each.
multiprocessing.set_forkserver_preload(
    [
        "retrofit.cli.commands",
        "torchvision.transforms.v2",
        "safetensors.torch",
        "hypothesis",
        "pytest",
    ]
)

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that they start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# `max_examples` is what CI draws of whatever takes an arbitrary network or number.
settings.register_profile(
    "ci", max_examples=15, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("ci")


@pytest.fixture
def without_gpus(monkeypatch):
    """For DataParallel, which moves a model to a GPU where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder: exit code, stdout, and stderr but for what is done."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, without_bars(err)

    return call


@pytest.fixture(scope="module")
def chromium():
    """A browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    program = program or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        # Its sandbox refuses to start for root, as which containers run.
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
