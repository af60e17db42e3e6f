"""Weights files that people have: a hypothesis strategy, and what must become of each.

A file is drawn part by part: the network, prefixes, wrappers, what stands beside the weights, an
average of them, a tensor that is none, format, suffix. What must come of it follows from the parts
that were drawn, not from the code that reads it.
"""

import argparse
import collections
import datetime
import functools
import json
import pathlib
import types
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import reject
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import retrofit
from retrofit import RetrofitError
from retrofit.files.weights import read_weights


class Config:
    """A class of a user's own."""


class Canary:
    """Pickles to a call that leaves a file."""

    def __reduce__(self):
        return (exec, ("open('sentinel', 'w').close()",))


class Named(nn.Module):
    """A network whose own keys begin as prefixes do."""

    def __init__(self, name, inside):
        super().__init__()
        setattr(self, name, inside)


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


NETS = {
    "plain": plain,
    "keys like model.0.weight": lambda: Named("model", plain()),
    "keys like module.model.0.weight": lambda: Named("module", Named("model", plain())),
    "with BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "converted": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    ),
}
PREFIXES = ["module.", "_orig_mod.", "model.", "net.", "backbone."]
WRAPPERS = ["state_dict", "model", "model_state_dict", "params", "net", "network", "weights"]
BESIDE = {
    "numbers": lambda: {"epoch": 3, "best": torch.tensor(0.5), "lr": [0.1], "name": "net"},
    "an optimizer": lambda: {"optimizer": adam(), "scaler": {"scale": 65536.0}},
    "an unnamed optimizer": lambda: {"o": adam()},
    "metrics": lambda: {"metrics": {"top1": torch.tensor(0.7), "top5": torch.tensor(0.9)}},
    "random states": lambda: {"rng": {"cpu": torch.get_rng_state()}, "numpy": generator_state()},
    "arguments": lambda: {"args": argparse.Namespace(lr=0.1, out=pathlib.Path("x"))},
    "a simple namespace": lambda: {"args": types.SimpleNamespace(lr=0.1)},
    "numpy": lambda: {"best": np.float64(0.7), "n": np.int64(3), "a": np.arange(4.0)},
    "dates": lambda: {"date": datetime.date(2020, 1, 2), "took": datetime.timedelta(1)},
    "collections": lambda: {"d": collections.defaultdict(list, a=[1]), "q": collections.deque([1])},
    "sets": lambda: {"f": frozenset([1]), "s": {1, 2}, "r": range(3)},
    "torch's": lambda: {"version": torch.__version__, "dtype": torch.float16},
}
CODE = {
    "a canary": lambda: {"args": Canary()},
    "a class of the user's": lambda: {"config": Config()},
    "a pickled model": lambda: {"whole": plain()},
    "a function": lambda: {"activation": torch.relu_},
}
# What becomes of the first tensor.
WRONG = {
    "missing": None,
    "of another shape": lambda t: t[:1],
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "on meta": lambda t: t.to("meta"),
    "whole numbers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "8 bits": lambda t: t.to(torch.float8_e4m3fn),
    "an array": lambda t: t.float().numpy(),
    "None": lambda _: None,
}
FINE = {
    "a Parameter": nn.Parameter,
    "not contiguous": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "a part of a larger one": lambda t: torch.stack([t, t])[1],
    "NaN and Inf": lambda t: t.clone().index_fill_(0, torch.tensor([0]), float("nan")),
}
PICKLED = ["zip", "legacy", "shards of pickles", "folder of a pickle"]
FLAT = ["safetensors", "shards", "folder", "folder of shards"]
# What safetensors can store.
STORED = ["a Parameter", "channels_last", "missing", "of another shape", "whole numbers", "8 bits"]
SUFFIXES = [".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pth.tar", ".weird"]


class DrawnFile(NamedTuple):
    """Parts of a file, by name; `features` lists them."""

    net: str
    dtype: torch.dtype
    prefixes: tuple[str, ...]
    wrappers: tuple[str, ...]
    beside: str | None
    passed_over: bool
    average: str | None
    tensor: str | None
    format: str
    suffix: str
    key: str | None
    without_counts: bool
    damage: int | None

    @property
    def features(self):
        yield from (f"net {self.net}", f"{self.format}", f"suffix {self.suffix}", str(self.dtype))
        yield from (f"prefix {prefix}" for prefix in set(self.prefixes))
        yield from (f"wrapper {wrapper}" for wrapper in set(self.wrappers))
        yield f"{len(self.prefixes)} prefixes"
        yield f"{len(self.wrappers)} wrappers"
        yield from (f"beside: {self.beside}",) * bool(self.beside)
        yield from (f"a tensor {self.tensor}",) * bool(self.tensor)
        yield from (f"average {self.average}",) * bool(self.average)
        yield from (f"key {self.key}",) * bool(self.key)
        yield from ("tensors beside the network",) * self.passed_over
        yield from ("without counts of batches",) * self.without_counts
        yield from ("damaged",) * (self.damage is not None)


@st.composite
def weights_files(draw):
    few = functools.partial(st.lists, max_size=3)
    # Only the first two have more than one level, and most of what there is to draw.
    form = draw(st.sampled_from(["zip"] * 5 + ["legacy"] * 3 + PICKLED[2:] + FLAT))
    whole = form in ("zip", "legacy")
    beside = draw(st.sampled_from([*BESIDE, *CODE, *[None] * 4])) if whole else None
    names = st.sampled_from(WRAPPERS)
    wrappers = draw(few(names, min_size=int(beside is not None))) if whole else []
    prefixes = draw(few(st.sampled_from(PREFIXES)))
    kinds = STORED if form in FLAT else [*FINE, *WRONG]
    average = draw(st.sampled_from([None, "beside", "prefix"])) if wrappers else None
    keys = ["average", "network", None] if average else [None] * 9 + ["no such key"]
    return DrawnFile(
        net=draw(st.sampled_from(sorted(NETS))),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        prefixes=tuple(prefixes),
        wrappers=tuple(wrappers),
        beside=beside,
        passed_over=bool(prefixes) and draw(st.booleans()),
        average=average,
        tensor=draw(st.sampled_from([*kinds, *[None] * (len(kinds) // 2)])),
        format=form,
        suffix=draw(st.sampled_from(SUFFIXES)),
        key=draw(st.sampled_from(keys)),
        without_counts=draw(st.booleans()),
        damage=draw(st.sampled_from([None] * 14 + [draw(st.integers(0, 2**31))])),
    )


# --- what is written ---------------------------------------------------------------------------


@functools.cache
def network(name):
    """The plain network, and the state dict that files have."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    if name != "converted":
        return net, net.state_dict()
    data = [torch.randn(8, 3, 12, 12)]
    return net, retrofit.add_batchnorm(net, data, progress=False).state_dict()


def generator_state():
    return np.random.RandomState(0).get_state()


def adam():
    net = plain()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def state_of(drawn, seed):
    """The tensors, and as they stand in the file: under prefixes, one of them odd."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(network(drawn.net)[1])
    if drawn.without_counts:
        state = {key: tensor for key, tensor in state.items() if "num_batches" not in key}
    for key, tensor in state.items():
        if tensor.is_floating_point():
            state[key] = torch.randn(tensor.shape, generator=generator).to(drawn.dtype)
    written = dict(state)
    first = next(iter(state))
    if drawn.tensor == "missing":
        del written[first]
    elif drawn.tensor is not None:
        written[first] = {**WRONG, **FINE}[drawn.tensor](state[first])
    if drawn.tensor == "NaN and Inf":
        state[first] = written[first]
    prefix = "".join(drawn.prefixes)
    written = {prefix + key: tensor for key, tensor in written.items()}
    return state, written


def content_of(drawn):
    """What the file holds; the network's tensors; and those of its average."""
    state, written = state_of(drawn, 1)
    ema, averaged = state_of(drawn, 2)
    if drawn.passed_over:
        written["criterion.weight"] = torch.ones(3)
    content: Any = written
    if drawn.average == "prefix":
        content |= {f"ema_copy.{key}": tensor for key, tensor in averaged.items()}
    for depth, wrapper in enumerate(reversed(drawn.wrappers)):
        content = {"epoch": 3, wrapper: content}
        if depth == 0 and drawn.average == "beside":
            content[f"{wrapper}_ema"] = averaged
    if drawn.beside:
        content |= {**BESIDE, **CODE}[drawn.beside]()
    return content, state, ema


def key_of(drawn):
    """The place in the file that a user names."""
    path = list(drawn.wrappers)
    if drawn.key in ("average", "network") and drawn.average == "beside":
        path[-1] += "_ema" * (drawn.key == "average")
    elif drawn.key == "average":
        path.append("ema_copy")
    elif drawn.key == "network":
        path += [prefix.rstrip(".") for prefix in drawn.prefixes]
    return drawn.key if drawn.key == "no such key" else ".".join(path) if drawn.key else None


def write(drawn, content, folder):
    """Write the file; returns the path that a user gives."""
    if drawn.format in ("zip", "legacy"):
        path = folder / f"file{drawn.suffix}"
        torch.save(content, path, _use_new_zipfile_serialization=drawn.format == "zip")
        return path
    if drawn.format == "safetensors":
        path = folder / f"file{drawn.suffix}"
        save_file({k: t.data.contiguous() for k, t in content.items()}, path)
        return path
    pickles = "pickle" in drawn.format
    stem, suffix = ("pytorch_model", "bin") if pickles else ("model", "safetensors")
    if "shards" not in drawn.format:
        put(content, folder / f"{stem}.{suffix}", pickles=pickles)
        return folder
    places = {key: f"{stem}-0000{i % 2 + 1}-of-00002.{suffix}" for i, key in enumerate(content)}
    for name in set(places.values()):
        part = {key: tensor for key, tensor in content.items() if places[key] == name}
        put(part, folder / name, pickles=pickles)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder if drawn.format.startswith("folder") else index


def put(state, path, *, pickles):
    if pickles:
        torch.save(state, path)
    else:
        save_file({key: tensor.data.contiguous() for key, tensor in state.items()}, path)


def damage(path, seed):
    file = next(f for f in ([path] if path.is_file() else sorted(path.iterdir())) if f.is_file())
    content, rng = bytearray(file.read_bytes()), np.random.default_rng(seed)
    if rng.random() < 0.5:
        content = content[: rng.integers(len(content))]
    else:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


# --- what must come of it ----------------------------------------------------------------------


def refused(drawn):
    """Whether there is a reason to refuse the file."""
    return (
        drawn.tensor in WRONG
        or drawn.beside in CODE
        or drawn.key == "no such key"
        or (drawn.average == "prefix" and not drawn.prefixes and drawn.key != "average")
    )


def check_file(drawn, folder):
    """Read to the bit, or refused in one line; nothing is run. Returns which of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what is odd
        try:
            content, state, ema = content_of(drawn)
            path = write(drawn, content, folder)
        except (RuntimeError, NotImplementedError, AttributeError):  # torch cannot write it
            reject()
    if drawn.damage is not None:
        damage(path, drawn.damage)
    net = network(drawn.net)[0]
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        outcome = outcome_of(drawn, path, net, ema if drawn.key == "average" else state)
    assert not pathlib.Path("sentinel").exists(), "code was run"
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
    said = " ".join(str(warning.message) for warning in seen)
    if outcome == "loaded" and drawn.average and not drawn.key:
        assert "choose another with --weights-key" in said
    if outcome == "loaded" and drawn.passed_over and drawn.key is None:
        assert "criterion.weight" in said
    return outcome


def outcome_of(drawn, path, net, expected):
    attempt(lambda: read_weights(path))  # as inspect does, without a model
    loaded, error = attempt(lambda: retrofit.load(path, net, weights_key=key_of(drawn)))
    if error is not None:
        assert refused(drawn) or drawn.damage is not None, error
        return "refused"
    if drawn.damage is None:  # else it was to a number, or to what nobody reads
        assert not refused(drawn), "it should have been refused"
        state = loaded.state_dict()
        for key, tensor in expected.items():
            assert state[key].dtype == tensor.dtype, key
            assert torch.equal(state[key].nan_to_num(), tensor.nan_to_num()), key
    return "loaded"


def attempt(call):
    """What it returns, and the error of one line that it raises."""
    try:
        return call(), None
    except RetrofitError as error:
        message = str(error)
    assert "\n" not in message, message
    return None, message
