"""scripts/peers.py on a tiny network: what it measures of a tool, and what it says of one."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import retrofit

pytest.importorskip("timm")
import imagenet_networks
import peers
from peers_contenders import CONTENDERS, Contender, Done, Subject
from peers_outcomes import Modules, Moments, two_passes
from peers_tables import Row, table
from recorded_runs import RecordedRuns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the statistics of"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
]


class Stock(nn.Module):
    """With BatchNorms, which are folded away: the second convolution then has a bias it had not."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


def trained():
    torch.manual_seed(0)
    model = Stock().eval()
    for norm in (model.bn1, model.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return model


def draw(count, seed):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.fixture(scope="module")
def trial():
    plain = retrofit.fold(trained())
    batches = list(draw(24, seed=1).split(8))
    subject = Subject(plain, batches, Stock, "Stock", folded=True)
    others = list(draw(20, seed=2).split(8))
    labels = torch.cat([trained()(x).argmax(1) for x in others])
    labels[:5] = (labels[:5] + 1) % 4
    return peers.Trial(subject, others, labels, two_passes(plain, batches))


def activations(plain, x):
    """What each convolution gives, in float64, written out."""
    w = {name: t.double() for name, t in plain.state_dict().items()}
    first = nn.functional.conv2d(x.double(), w["conv1.weight"], w["conv1.bias"])
    second = nn.functional.conv2d(first.relu(), w["conv2.weight"], w["conv2.bias"], stride=2)
    return {"conv1": first, "conv2": second}


def tool(name):
    contender = CONTENDERS[name]
    if missing := contender.missing():
        pytest.skip(missing)
    return contender


def close(found, expected):
    assert found.keys() == expected.keys()
    for path, (mean, std) in expected.items():
        torch.testing.assert_close(found[path].mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[path].std, std, rtol=1e-5, atol=1e-5)


def made(trial, name):
    return tool(name).ready(trial.subject)().outcome.moments(trial.subject.plain, trial.batches[0])


def test_the_reference_has_the_moments_of_what_each_convolution_gives(trial):
    values = activations(trial.subject.plain, torch.cat(trial.subject.batches))
    expected = {
        path: Moments(y.mean((0, 2, 3)), y.var((0, 2, 3)).sqrt()) for path, y in values.items()
    }
    close(trial.moments, expected)


@pytest.mark.parametrize("name", ["retrofit.add_batchnorm", "retrofit.restore"])
def test_retrofit_has_the_moments_of_the_plain_network_wherever_its_biases_went(trial, name):
    close(made(trial, name), trial.moments)
    row = trial.measured(tool(name))
    assert row["batchnorms"] == 2
    assert row["loads"] == {"retrofit.restore": "Stock"}.get(name, peers.INSERTED)
    assert (row["off"] == 0) == (name == "retrofit.add_batchnorm")
    assert row["off"] < 1e-5
    assert row["accuracy"] == row["left"] == row["plain_accuracy"] == 15 / 20
    assert max(row["mean_worst"], row["std_worst"]) < 1e-5


def test_the_moving_average_starts_with_the_first_batch(trial):
    expected = {}
    for x in trial.subject.batches:
        for path, y in activations(trial.subject.plain, x).items():
            now = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
            old = expected.get(path, now)
            expected[path] = [0.9 * a + 0.1 * b for a, b in zip(old, now, strict=True)]
    found = made(trial, "RepVGG-style moving average")
    close(found, {path: Moments(m, var.sqrt()) for path, (m, var) in expected.items()})


@pytest.mark.parametrize("name", ["torch.optim.swa_utils.update_bn", "fvcore update_bn_stats"])
def test_running_statistics_alone_are_those_of_another_network_and_change_the_outputs(trial, name):
    contender = tool(name)
    found = contender.ready(trial.subject)().outcome.moments(trial.subject.plain, trial.batches[0])
    # The first layer sees what it always did; the second, what the first BatchNorm has normalised.
    mean = trial.moments["conv1"].mean
    torch.testing.assert_close(found["conv1"].mean, mean, rtol=1e-5, atol=1e-5)
    row = trial.measured(contender)
    assert row["mean_worst"] > 0.1
    assert row["off"] < 1e-5
    left = contender.ready(trial.subject)().left()
    plain = trial.outputs(left.plain)
    assert (trial.outputs(left.answer) - plain).abs().max() > 0.1 * plain.abs().max()


def test_tinynn_makes_a_network_that_its_weights_fit_alone(trial):
    row = trial.measured(tool("TinyNeuralNetwork model_restore_bn"))
    assert row["loads"] == "its own modules alone"
    assert row["mean_worst"] > 0.1  # three batches leave much of the mean of 0 that it begins with


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnxsim_measures_a_graph_and_whitens_it_without_a_target(trial):
    row = trial.measured(tool("onnxsim bn_recovery"))
    assert row["loads"] == "an ONNX graph alone"
    assert row["batchnorms"] == 2
    assert max(row["mean_worst"], row["off"]) < 1e-3
    assert row["left"] < row["accuracy"]


def test_channels_that_do_not_vary_are_counted_and_left_out():
    one, two = torch.ones(2).double(), torch.tensor([2.0, 0]).double()
    found = {"a": Moments(one, one)}
    true = {"a": Moments(torch.zeros(2).double(), two)}
    summary = peers.errors(found, true)
    assert summary["constant"] == 1
    assert (summary["mean_worst"], summary["std_worst"]) == (0.5, 0.5)


def test_weights_that_fit_and_compute_something_else_do_not_load(trial):
    subject = trial.subject
    right = tool("retrofit.restore").ready(subject)().outcome
    wrong = Modules(Stock(), subject.plain)
    wrong.answer = right.answer
    assert peers.loads_into(right, subject, trial.batches[0]) == "Stock"
    assert peers.loads_into(wrong, subject, trial.batches[0]) == "its own modules alone"


def test_what_is_missing_or_raises_has_a_row_and_is_tried_again(monkeypatch, trial, tmp_path):
    def broken(_subject):
        def run():
            raise ValueError("no such layer\nand more")

        return run

    def same(subject):
        return lambda: Done(Modules(retrofit.insert(subject.plain), subject.plain))

    contenders = {
        "absent": Contender(same, "no_such.module", source="nowhere"),
        "broken": Contender(broken),
        "good": Contender(same),
    }
    monkeypatch.setattr(peers, "CONTENDERS", contenders)
    record = RecordedRuns(tmp_path / "peers.csv", Row)
    for _ in range(2):
        peers.study("tiny", trial, record)
    rows = RecordedRuns(tmp_path / "peers.csv", Row).runs
    assert [row.peer for row in rows] == ["absent", "broken", "good", "absent", "broken"]
    assert rows[0].error == "not installed: no_such.module; get it from nowhere"
    assert rows[1].error == "ValueError: no such layer"
    lines = table(rows).splitlines()
    assert len(lines) == 5
    assert lines[3].endswith("| ValueError: no such layer |")
    assert lines[4].startswith("| tiny | good | 2 | 0.0e+00 | 75.0 | 75.0 | 75.0 |")


def test_the_command_calibrates_on_some_pictures_and_tests_others(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(6):
        array = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i}.png")
    plain = retrofit.fold(trained())
    save_file(plain.state_dict(), tmp_path / "tiny.safetensors")
    network = imagenet_networks.Network(lambda _: plain, retrofit.restore, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(peers.NETWORKS, "squeezenet1_1", network)
    monkeypatch.setitem(peers.STOCK, "squeezenet1_1", ("Stock", Stock))
    monkeypatch.setattr(
        peers, "CONTENDERS", {k: CONTENDERS[k] for k in CONTENDERS if k.startswith("retrofit")}
    )
    files = {
        "data": folder,
        "weights": tmp_path / "tiny.safetensors",
        "results": tmp_path / "r.csv",
    }
    words = [str(word) for name, file in files.items() for word in (f"--{name}", file)]
    words += ["--network", "squeezenet1_1", "--markdown", str(tmp_path / "r.md")]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words, "--calibrate", "4", "--test", "2"])
    peers.main()
    rows = RecordedRuns(files["results"], Row).runs
    assert [(row.loads, row.error) for row in rows] == [(peers.INSERTED, ""), ("Stock", "")]
    assert all((row.calibration_pictures, row.test_pictures) == (4, 2) for row in rows)
    assert (tmp_path / "r.md").read_text() in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    with pytest.raises(SystemExit, match="has 6 pictures, and 756 are wanted: give smaller"):
        peers.main()
