"""scripts/zoo.py on a few models of the zoos, each of a structure of its own."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from recorded_runs import RecordedRuns
from zoo_tables import Result

import retrofit

pytestmark = pytest.mark.slow

pytest.importorskip("timm")
SCRIPT = Path(__file__).parents[2] / "scripts" / "zoo.py"
check = importlib.import_module("zoo_checks").check


@pytest.mark.parametrize(
    ("name", "inserted"),
    [
        ("squeezenet1_1", 25),  # branches, and a convolution for a head
        ("lraspp_mobilenet_v3_large", 0),  # a dict comes out
        ("raft_small", 31),  # two pictures; a loop that torch.fx cannot follow
        ("fcos_resnet50_fpn", 9),  # a list of pictures; one head on five feature maps
        ("r2plus1d_18", 0),  # video
        ("timm:test_nfnet", 25),  # weight-standardised convolutions
        ("timm:test_convnext", 3),  # a norm behind a permutation
        ("timm:test_efficientnet_evos", 0),  # norms that torch does not have
        ("timm:edgenext_xx_small", 9),  # the model's own code reads a weight
        ("timm:crossvit_9_dagger_240", 6),  # two sizes of patches, one size of picture
        ("timm:coat_lite_tiny", 16),  # convolutions shared between blocks
        ("timm-reparameterized:mobileone_s0", 43),  # BatchNorm merged
    ],
)
def test_a_model_of_every_structure_is_converted_exactly_and_folds_back(name, inserted):
    result = check(name)
    assert not result.error
    assert result.equal
    assert result.folded
    assert result.inserted == inserted
    left_out = sum(len(paths) for paths in result.left_out.values())
    assert result.inserted + left_out == result.convs


def test_a_batchnorm_that_is_not_the_identity_is_a_failure(monkeypatch):
    exact = retrofit.add_batchnorm

    def inexact(model, data, **options):
        converted = exact(model, data, **options)
        converted.features[0].bn.bias.data += 1e-3
        return converted

    monkeypatch.setattr(retrofit, "add_batchnorm", inexact)
    result = check("squeezenet1_1")
    assert not result.equal
    assert not result.folded
    assert result.failed


def test_an_interrupted_sweep_goes_on_where_it_stopped_and_fails_if_a_model_did(tmp_path):
    results, page = tmp_path / "zoo.csv", tmp_path / "zoo.md"
    earlier = Result("squeezenet1_0", "torchvision, classification", "torch 2", error="Oops: 7")
    earlier.left_out["output head: the model returns its values"] = ["classifier.1"]
    RecordedRuns(results, Result).append(earlier)
    with results.open("a") as file:
        file.write('squeezenet1_1,"torchvision, cl')  # killed while it wrote

    command = [sys.executable, SCRIPT, "--results", results, "--markdown", page]
    done = subprocess.run(
        [*command, "--only", "squeezenet*"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "2 models, 1 failures"
    first, second = RecordedRuns(results, Result).runs
    assert first == earlier
    assert second.name == "squeezenet1_1"
    assert second.left_out == earlier.left_out
    assert (
        "| squeezenet1_1 | 2 x 3 x 48 x 48 | 26 | 25 | 1 x output head (`classifier.1`) | yes"
        in (page.read_text())
    )
    assert "Oops: 7; 1 x output head (`classifier.1`) | **no** | **no**" in page.read_text()
