"""The tensors of a weights file under the names of a model's own, and into the model.

Files have the network under keys (`state_dict`, `model`), and its names under prefixes (`module.`
of DataParallel, `_orig_mod.` of torch.compile, `model.` of a Lightning module). What they are is
decided by the model's own names, which may begin like that, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from retrofit.errors import RetrofitError, warn
from retrofit.files.model_args import OPTION
from retrofit.files.state_dicts import State
from retrofit.files.weights import WeightsFile
from retrofit.numerics.comparison import Comparison
from retrofit.numerics.tensor_checks import is_dense
from retrofit.tables import few

COUNTS, VARIANCE = ".num_batches_tracked", ".running_var"


@dataclass(frozen=True)
class Fit:
    """A state dict of a file, less a prefix of its names, beside the names of a model.

    Attributes:
        path: of the state dict in the file.
        prefix: of its names.
        state: what has the prefix, without it.
        others: names that do not have it.
        exact: the names are the model's; counts of batches may be missing.
        shapes: and so are all shapes.
        wrong: how many names are not, of the file's and of the model's.
    """

    path: str
    prefix: str
    state: State
    others: list[str]
    exact: bool
    shapes: bool
    wrong: int

    @property
    def place(self) -> str:
        """Where it is in the file, for messages and as a key."""
        return f"{self.path}.{self.prefix}".strip(".")


def fits(file: WeightsFile, own: Mapping[str, Any], key: str | None = None) -> list[Fit]:
    """List where the model's tensors may be in a file: all places that fit exactly, or the nearest.

    Args:
        file: as `open_weights` returns it.
        own: the model's state dict, or None for each of its names.
        key: where to look in the file.

    Raises:
        RetrofitError: nothing is under the key; or the model is lazy.
    """
    if lazy := [name for name, value in own.items() if is_lazy(value)]:
        raise RetrofitError(
            f"{lazy[0]} has no shape yet: run one batch through the model first, in its factory if "
            "it has one"
        )
    states = file.under(key)
    found = [
        _fit(path, prefix, state, own)
        for path, state in states.items()
        for prefix in _prefixes(state, own)
    ]
    exact = [fit for fit in found if fit.exact]
    nearest = [min(found, key=lambda fit: fit.wrong)]
    return [fit for fit in exact if fit.shapes] or exact or nearest


def fitted(file: WeightsFile, model: nn.Module, key: str | None = None) -> State:
    """Select the tensors for a model from a file, under the model's own names.

    Warns where the file holds several that would do, and where names beside them are passed over.
    Whether they fit is for `load_weights` to say.

    Raises:
        RetrofitError: nothing is under the key, or nothing speaks for one of several.
    """
    found = fits(file, model.state_dict(), key)
    chosen = found[0]
    if len(found) > 1:
        place = file.preferred([fit.place for fit in found])
        chosen = next(fit for fit in found if fit.place == place)
    theirs = tuple(fit.prefix for fit in found if fit.path == chosen.path)
    others = [name for name in chosen.others if not name.startswith(theirs)]
    if others and chosen.exact:
        warn(
            f"{file.path} holds {len(others)} tensors beside the network in {chosen.place!r}, "
            f"which are passed over ({few(others)})"
        )
    return chosen.state


def _refuse_untied(own: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> None:
    """Raise RetrofitError where a model has one tensor under two names, and a file has two."""
    first: dict[tuple[object, ...], str] = {}
    for key, value in own.items():
        if not isinstance(value, Tensor) or not value.numel() or value.is_meta:
            continue
        name = first.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), key)
        if name != key and not Comparison().add(tensors[name], tensors[key], key):
            raise RetrofitError(
                f"{name} and {key} are one tensor in the model, and differ in {source}: give the "
                "model that these weights were made for"
            )


def load_weights(model: nn.Module, tensors: Mapping[str, Any], source: str) -> None:
    """Load a state dict strictly.

    Warns where the model's precision cannot hold the numbers of the file.

    Raises RetrofitError naming `source` and the keys that do not fit, or two that are one tensor
    in the model and differ.
    """
    own = model.state_dict()
    # Files from before torch 0.4.1, and some that were made smaller, lack these; torch allows it.
    counts = {key for key in own if key.endswith(COUNTS) and key not in tensors}
    tensors = {**tensors, **{key: own[key] for key in counts}}
    both = {k: (tensors[k], v) for k, v in own.items() if k in tensors and isinstance(v, Tensor)}
    wrong = {
        "missing": [key for key in own if key not in tensors],
        "unexpected": [key for key in tensors if key not in own],
        "of another shape": [
            f"{key} {tuple(new.shape)} instead of {tuple(old.shape)}"
            for key, (new, old) in both.items()
            if isinstance(new, Tensor) and new.shape != old.shape
        ],
        "of another kind": [
            f"{key} {_kind(new)}" for key, (new, old) in both.items() if not _suits(new, old)
        ],
    }
    wrong = {kind: keys for kind, keys in wrong.items() if keys}
    if problems := [f"{len(keys)} {kind} ({few(keys)})" for kind, keys in wrong.items()]:
        odd = next((f"; {k} is {form}" for k, (t, _) in both.items() if (form := _form(t))), "")
        raise RetrofitError(
            f"the weights in {source} do not fit {type(model).__name__}, by their keys: "
            f"{'; '.join(problems)}{odd}{_advice(wrong, tensors, both, model)}"
        )
    _refuse_untied(own, tensors, source)
    if rounded := [key for key, (new, old) in both.items() if _is_rounded(new, old.dtype)]:
        new, old = both[rounded[0]]
        warn(
            f"{len(rounded)} tensors in {source} are rounded to the model's precision "
            f"({rounded[0]} from {_kind(new)} to {_kind(old)})"
        )
    whole = model.state_dict()  # with the versions that some modules ask for (MNASNet)
    whole.update(tensors)
    model.load_state_dict(whole)


def _advice(
    wrong: Mapping[str, Sequence[str]],
    tensors: Mapping[str, Any],
    both: Mapping[str, tuple[Any, Any]],
    model: nn.Module,
) -> str:
    """Guess whose weights they are, and say what to do with those; "" without a guess."""
    own = model.state_dict()
    head = other_head(both, model)
    if "of another kind" in wrong:
        return ""
    if _are_folded(wrong, own) and (head or "of another shape" not in wrong):
        return (
            "; they seem to be of this network with its BatchNorms folded away, which restore "
            f"(retrofit restore, retrofit.restore) gives back{head}"
        )
    if _have_more_batchnorms(tensors, own):
        return (
            "; they have BatchNorms that it lacks, like the files that convert writes: "
            "retrofit.load reads those, and there is nothing to convert"
        )
    if list(wrong) == ["of another shape"]:
        asked = f"; does its factory need the arguments that it was trained with ({OPTION})?"
        return head or asked
    fitting = len(both) - len(wrong.get("of another shape", ()))
    return "; are they of another architecture?" if 2 * fitting < len(own) else ""


def _have_more_batchnorms(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Tell whether weights are those of the network with BatchNorms put in, under any names."""
    if any(key.endswith(VARIANCE) for key in own):
        return False
    layers, theirs = (
        [value.shape for value in state.values() if isinstance(value, Tensor) and value.ndim > 1]
        for state in (own, tensors)
    )
    return any(key.endswith(VARIANCE) for key in tensors) and layers == theirs


def _are_folded(wrong: Mapping[str, Sequence[str]], own: Collection[str]) -> bool:
    """Tell whether whole BatchNorms are missing, and nothing is in their place but biases."""
    norms = {key.removesuffix(VARIANCE) for key in own if key.endswith(VARIANCE)}
    missing = set(wrong.get("missing", ()))
    lacking = {key.rpartition(".")[0] for key in missing}
    whole = {key for key in _required(own) if key.rpartition(".")[0] in lacking}
    biases = all(key.endswith(".bias") for key in wrong.get("unexpected", ()))
    return bool(lacking) and lacking <= norms and missing == whole and biases


def other_head(both: Mapping[str, tuple[Any, Any]], model: nn.Module) -> str:
    """Say how to build a model for the file's number of classes, if all but its head fits.

    Args:
        both: tensors of the file, each beside the model's own of that name.
        model: of which a head is the last layer, or one like it: Linear, or of single pixels.
    """
    shapes = {key: (getattr(new, "shape", None), old.shape) for key, (new, old) in both.items()}
    other = {key.rpartition(".")[0] for key, (new, old) in shapes.items() if new != old}
    layers = [key.rpartition(".")[0] for key in model.state_dict() if key.endswith(".weight")]
    heads = all(_is_head(model.get_submodule(path)) for path in other)
    return other_classes(both.values()) if heads and layers and layers[-1] in other else ""


def _is_head(module: nn.Module) -> bool:
    pixels = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear) or pixels


def other_classes(pairs: Iterable[tuple[Any, Any]]) -> str:
    """Say how to build a model for the file's number of classes, if all else fits; "" if not.

    Args:
        pairs: tensors of the file, each beside the model's own of that name.
    """
    shapes = [
        (tuple(new.shape), tuple(old.shape))
        for new, old in pairs
        if isinstance(new, Tensor) and isinstance(old, Tensor)
    ]
    other = [(new, old) for new, old in shapes if new != old]
    counts = {(new[:1], old[:1]) for new, old in other}
    if len(counts) != 1 or any(new[1:] != old[1:] for new, old in other):
        return ""
    (((new,), (old,)),) = counts
    return (
        f"; they are of {new} class{'' if new == 1 else 'es'}, it seems, and the model of {old}: "
        f"build it with num_classes={new} ({OPTION} num_classes={new}), or what your own factory "
        "calls that"
    )


def _fit(path: str, prefix: str, state: State, own: Mapping[str, Any]) -> Fit:
    inner = {k[len(prefix) :]: tensor for k, tensor in state.items() if k.startswith(prefix)}
    missing = [key for key in _required(own) if key not in inner]
    unexpected = inner.keys() - own.keys()
    shapes = all(
        key not in inner or getattr(inner[key], "shape", None) == getattr(value, "shape", None)
        for key, value in own.items()
        if isinstance(value, Tensor)
    )
    others = [key for key in state if not key.startswith(prefix)]
    exact = not missing and not unexpected
    return Fit(path, prefix, inner, others, exact, shapes, len(missing) + len(unexpected))


def _prefixes(state: State, own: Collection[str]) -> Iterator[str]:
    """List the prefixes with which a state dict has all names of the model; else the likeliest.

    A state dict that has all of them as they are is taken as it is.
    """
    required = list(_required(own))
    if all(key in state for key in required):
        yield ""
        return
    deepest = max((key.count(".") for key in own), default=0) + 1
    counts: Counter[str] = Counter({"": 0})
    for key in state:
        parts = key.rsplit(".", deepest)
        tails = [".".join(parts[i:]) for i in range(len(parts))]
        counts.update(key[: len(key) - len(tail)] for tail in tails if tail in own)
    full = [prefix for prefix, count in counts.items() if count >= len(required)]
    yield from full or [max(counts, key=lambda prefix: counts[prefix])]


def _required(own: Collection[str]) -> Iterator[str]:
    return (key for key in own if not key.endswith(COUNTS))


def _suits(tensor: Any, own: Tensor) -> bool:
    """Tell whether these numbers can take the place of the model's own."""
    if not isinstance(tensor, Tensor) or not is_dense(tensor):
        return False
    # 8 bits are quantised weights, that mean nothing without their scales.
    alike = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    alike = alike or not own.is_floating_point()
    return alike and tensor.is_complex() == own.is_complex()


def _is_rounded(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether some number changes in this dtype."""
    if tensor.dtype == dtype:
        return False
    same = tensor.to(dtype).to(tensor.dtype) == tensor
    return not (same | tensor.isnan()).all()


def _form(tensor: Any) -> str:
    """Say in a word why a tensor is not plain numbers; empty if it is."""
    if not isinstance(tensor, Tensor):
        return f"no tensor but a {type(tensor).__name__}"
    if tensor.is_quantized:
        return "quantized: save it after dequantize()"
    if tensor.is_meta:
        return "on the meta device, without numbers: save the model with its weights"
    if tensor.layout != torch.strided:
        return "sparse: save it after to_dense()"
    return ""


def _kind(tensor: Any) -> str:
    kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    return str(kind).removeprefix("torch.")
