"""scripts/real_networks.py on tiny networks of the test's own: no other package is needed."""

import re
import sys

import pytest
import real_networks
import torch
from real_networks_checks import check
from real_networks_models import NETWORKS, Network, named, normal
from real_networks_tables import Result, document
from recorded_runs import RecordedRuns
from torch import nn
from torch.nn.utils import parametrizations

import retrofit


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, picture, scale=1.0):
        return {"mask": self.head(self.first(picture * scale).relu())}


def network(build=Tiny, batch=None, package="torch", name="Tiny", **options):
    return Network(package, name, "a test", build, batch or normal(4, 3, 8, 8), options)


def altered(monkeypatch, change):
    """Let `add_batchnorm` do something else to its result."""
    exact = retrofit.add_batchnorm

    def inexact(model, data, **options):
        converted = exact(model, data, **options)
        change(converted)
        return converted

    monkeypatch.setattr(retrofit, "add_batchnorm", inexact)


@pytest.mark.parametrize(
    ("batch", "shapes"),
    [
        (normal(4, 3, 8, 8), "4 x 3 x 8 x 8"),
        (named(picture=(4, 3, 8, 8)), "picture 4 x 3 x 8 x 8"),
        (lambda g: (torch.rand(4, 3, 8, 8, generator=g), torch.ones(1)), "4 x 3 x 8 x 8 and 1"),
    ],
)
def test_a_network_is_checked_with_a_tensor_with_names_and_with_several_arguments(batch, shapes):
    result = check(network(batch=batch))
    assert not result.failed, result.error
    assert (result.input, result.convs, result.inserted) == (shapes, 2, 1)
    assert result.left_out == {"output head: the model returns its values": ["head"]}


def test_the_graph_layout_is_checked_too():
    class Functional(Tiny):
        def forward(self, picture):
            return self.head(nn.functional.relu(self.first(picture)))

    result = check(network(Functional, layout="graph"))
    assert not result.failed, result.error


def test_a_batchnorm_that_is_not_the_identity_is_a_failure(monkeypatch):
    altered(monkeypatch, lambda converted: converted.first.bn.bias.data.add_(1e-3))
    result = check(network())
    assert not result.equal
    assert not result.folded
    assert result.failed


def test_a_parameter_that_no_longer_learns_is_a_failure(monkeypatch):
    altered(
        monkeypatch,
        lambda converted: converted.first.conv.register_forward_hook(lambda _m, _i, y: y.detach()),
    )
    result = check(network())
    assert result.equal
    assert not result.trained
    assert result.failed


def test_parameters_that_do_not_learn_in_the_original_are_only_remarked_on():
    def build():
        model = Tiny()
        model.first.requires_grad_(False)
        model.unused = nn.Linear(2, 2)
        return model

    result = check(network(build))
    assert not result.failed, result.error
    assert result.remarks == [
        "BatchNorms frozen, as their convolutions are: 1",
        "parameters without a gradient, as in the original: 2",
    ]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("normalised", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_is_removed_before_a_trained_network_is_folded(normalised):
    def build():
        model = Tiny()
        normalised(model.first)
        return model

    result = check(network(build))
    assert not result.failed, result.error
    assert result.remarks == ["weight norms removed before folding what was trained: 1"]


def test_a_network_whose_outputs_say_nothing_is_a_failure():
    class Silent(Tiny):
        def forward(self, picture):
            return super().forward(picture)["mask"] * 0

    assert check(network(Silent)).error.startswith("the outputs are constant or not finite")


def test_a_package_that_is_not_installed_has_a_row_and_makes_the_command_fail(
    monkeypatch, tmp_path, capsys
):
    networks = network(), network(package="not-installed", name="Absent")
    monkeypatch.setattr(real_networks, "NETWORKS", networks)
    file, page = tmp_path / "real.csv", tmp_path / "real.md"
    monkeypatch.setattr(sys, "argv", ["", "--results", str(file), "--markdown", str(page)])

    assert real_networks.main() == 1
    assert "1 networks, 0 failures, 1 not installed; 2 convolutions, 1 " in capsys.readouterr().out
    assert "| Absent | not-installed | a test | not installed |" in page.read_text()
    assert "| Tiny | torch | a test | 4 x 3 x 8 x 8 | 2 | 1 | yes | yes | yes |" in page.read_text()
    assert "| Tiny | torch | 1 x output head (`head`) |" in page.read_text()


def test_good_results_are_kept_and_the_others_are_tried_again(tmp_path):
    file = tmp_path / "real.csv"
    record = RecordedRuns(file, Result)
    done = {"equal": True, "folded": True, "trained": True, "difference": 0.0}
    record.append(Result("Tiny", "torch", "a test", "torch 2", convs=77, **done))
    record.append(Result("Again", "torch", "a test", "torch 2", convs=77, error="Oops: 7"))

    kept, again = real_networks.study([network(), network(name="Again")], file)

    assert kept.convs == 77
    assert (again.convs, again.error) == (2, "")
    assert len(RecordedRuns(file, Result).runs) == 3


def test_a_failure_is_shown_in_the_page():
    page = document([Result("Tiny", "torch", "a test", "torch 2", error="Oops: 7")])
    assert "| **no** | **no** | **no** | **no** |" in page
    assert "| Tiny | torch | **Oops: 7** |" in page


def test_a_pattern_that_matches_no_network_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["", "--results", str(tmp_path / "r.csv"), "--only", "resnet"])
    with pytest.raises(SystemExit, match="--only 'resnet' matches no network"):
        real_networks.main()


def test_the_networks_have_different_names_and_their_packages_are_in_the_line_to_install():
    names = [(network.package, network.name) for network in NETWORKS]
    assert len({*names}) == len(names)
    line = re.search(r"pip install (.*?)\n    python", real_networks.__doc__, re.DOTALL)[1]
    assert {*line.replace("\\", " ").split()} == {package for package, _ in names}
