"""scripts/restored_zoo.py on tiny models: what it measures, what it calls a failure, its page."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import retrofit

pytest.importorskip("timm")
from recorded_runs import RecordedRuns
from restored_zoo_tables import Restored, document

SCRIPT = Path(__file__).parents[2] / "scripts" / "restored_zoo.py"
check = importlib.import_module("restored_zoo_checks").check
check_fold = importlib.import_module("fold_checks").check_fold


def test_a_model_is_folded_restored_and_compared():
    result = check("timm:test_efficientnet", most=1e9)
    assert not result.failed, result
    assert (result.restored, result.stays, result.batchnorms) == (13, 0, 13)
    assert 0 < result.difference < 5e-6
    assert 0 < result.folding < 5e-6


@pytest.mark.slow
def test_batchnorms_that_folding_does_not_reach_are_kept():
    result = check("timm:resnetv2_18", most=1e9)
    assert not result.failed, result
    assert result.restored + result.stays == result.batchnorms == 17
    assert result.stays
    (row,) = (line for line in document([], [result], (0, 0)).splitlines() if "resnetv2_18" in line)
    assert f"| {result.restored} | {result.stays} | {result.difference:.1e} |" in row


def test_a_restored_network_that_differs_is_a_failure(monkeypatch):
    right = retrofit.restore

    def wrong(*arguments, **options):
        restored = right(*arguments, **options)
        restored.bn1.bias.data += 1e-2
        return restored

    monkeypatch.setattr(retrofit, "restore", wrong)
    result = check("timm:test_resnet", most=1e9)
    assert result.failed
    assert not result.error
    page = document([], [result], (0, 0))
    far, folding = f"{result.difference:.1e}", f"{result.folding:.1e}"
    assert f"| test_resnet | a difference of {far} | {folding} |" in page


@pytest.mark.parametrize(
    "folder", [pytest.param("torch.nn.utils", marks=pytest.mark.slow), "retrofit"]
)
def test_a_network_is_restored_whatever_folded_it(folder):
    result = check_fold(f"timm:test_resnet, {folder}")
    assert not result.failed, result
    assert result.folded == result.batchnorms == 15
    assert 0 < result.module < 5e-6
    assert 0 < result.training < 1e-4


def test_what_a_folder_cannot_fold_is_told_and_no_failure():
    result = check_fold("timm:test_efficientnet, torch.ao")
    assert "BatchNormAct2d" in result.cannot
    assert not result.failed


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_stopped_and_fails_if_a_model_did(tmp_path):
    folds, models, page = (tmp_path / name for name in ("folds.csv", "zoo.csv", "zoo.md"))
    earlier = Restored("timm:test_resnet", "timm, resnet", "torch 2", error="Oops: 7")
    RecordedRuns(models, Restored).append(earlier)
    files = ["--folds", folds, "--results", models, "--markdown", page]
    done = subprocess.run(
        [sys.executable, SCRIPT, *files, "--only", "timm:test_[re]*"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "1 failures"
    found = {result.name: result for result in RecordedRuns(models, Restored).runs}
    assert found["timm:test_resnet"] == earlier
    assert found["timm:test_efficientnet"].restored == 13
    assert found["timm:test_efficientnet_gn"].skipped == "no BatchNorm"
    assert "| test_resnet | Oops: 7 |" in page.read_text()
    assert "| test_efficientnet | 2 x 3 x" in page.read_text()
