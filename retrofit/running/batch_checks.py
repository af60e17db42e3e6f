"""What users pass for data, and what is wrong with it."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from retrofit.errors import RetrofitError
from retrofit.running.nested import first_tensor, tensors
from retrofit.running.signatures import first_channels, sample_axes, takes_lists

LOADER = "wrap the data set in torch.utils.data.DataLoader(dataset, batch_size=32)"
PIXELS = "convert them to float and normalise them as the model was trained"
AXES = "DHW"
_CALL = nn.Module._call_impl.__code__  # through which every module is called


def check_data(data: Iterable[Any]) -> None:
    """Raise RetrofitError for what is no iterable of batches, or an iterable of something else."""
    kind = f"data must be an iterable of batches, not {type(data).__name__}"
    if isinstance(data, (Tensor, np.ndarray)):
        what = "tensor" if isinstance(data, Tensor) else "numpy array"
        raise RetrofitError(
            f"data is one {what} of shape {tuple(data.shape)}: pass an iterable of batches, "
            "such as [images] or images.split(32)"
        )
    if isinstance(data, (str, bytes, PathLike)):
        raise RetrofitError(
            f"{kind}: a DataLoader over torchvision.datasets.ImageFolder reads a folder of "
            "pictures, and so does the command, `retrofit convert --data`"
        )
    if isinstance(data, nn.Module):
        raise RetrofitError(f"{kind}: the data comes after the model")
    if isinstance(data, Mapping):
        raise RetrofitError(f"{kind}: of one batch make a list, [batch]")
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise RetrofitError(kind)


def nothing_in(data: Iterable[Any]) -> str:
    """Say that `data` gave no batch, and why that may be."""
    if isinstance(data, Iterator):
        return (
            f"there is no data: this {type(data).__name__} is used up, or was empty; it can be "
            "gone through once: pass a list or a DataLoader"
        )
    return "there is no data: the first batch never came"


def input_of(model: nn.Module, batch: Any) -> Tensor:
    """Find the first tensor in a batch; RetrofitError when no convolution could take it."""
    found = list(tensors(batch).values())
    if not found or _arrays(batch):
        raise _no_tensor(batch)
    x = found[0]
    refuse_single_sample(model, batch)
    later = next((t for t in found[1:] if t.dim() > 2 and t.is_floating_point()), None)
    if x.dim() < 2 and later is not None:
        raise RetrofitError(
            f"a batch begins with {described(x)}, labels it seems, and {described(later)} comes "
            "later: give batches of (images, labels), or pass forward_fn= to say how the model is "
            "called"
        )
    if not x.is_floating_point() and not _embeds(model, x):
        raise RetrofitError(f"the batches are {x.dtype} of shape {tuple(x.shape)}: {PIXELS}")
    return x


def refuse_single_sample(model: nn.Module, batch: Any) -> None:
    """Raise RetrofitError for one picture without a batch axis, as a data set gives it."""
    x = first_tensor(batch)
    axes, channels = sample_axes(model), first_channels(model)
    if x is None or not channels or axes < 3 or x.dim() != axes:
        return
    items = batch[1:] if isinstance(batch, (list, tuple)) else []
    label = any(isinstance(i, int) or (isinstance(i, Tensor) and not i.dim()) for i in items)
    if label or 1 < x.shape[0] == channels:
        raise RetrofitError(
            f"a batch is a single picture of shape {tuple(x.shape)}, without a batch axis: "
            f"{LOADER}, or add the axis with x.unsqueeze(0)"
        )


@contextmanager
def explained(model: nn.Module, batch: Any) -> Iterator[None]:
    """Raise RetrofitError for a failure in the block that the batch plainly is the cause of."""
    try:
        yield
    except RetrofitError:
        raise
    except Exception as error:
        if reason := _misfit(model, batch) or _misfit_inside(model, batch, error):
            text = " ".join(str(error).split())[:200]
            raise RetrofitError(
                f"{type(model).__name__} does not run on a batch: {reason} "
                f"({type(error).__name__}: {text})"
            ) from error
        raise


def described(value: Any) -> str:
    """Say in a few words what a batch is: the types and shapes of its first items."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (list, tuple)) and value:
        more = ", ..." if len(value) > 4 else ""
        return f"[{', '.join(map(described, value[:4]))}{more}]"
    return f"a {type(value).__name__}"


def _misfit(model: nn.Module, batch: Any) -> str:
    """Say in what the first tensor of a batch differs from what the model can take; "" if in none.

    Asked when the model has failed: one that runs may convert what it gets.
    """
    x = first_tensor(batch)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if x is None or not weights:
        return ""
    dtypes, devices = {w.dtype for w in weights}, {w.device for w in weights}
    axes, channels = sample_axes(model), first_channels(model)
    if not x.is_floating_point() and not x.is_complex() and not _embeds(model, x):
        return f"the batches are {x.dtype} of shape {tuple(x.shape)}: {PIXELS}"
    if len(devices) == 1 and x.device not in devices:
        return f"the batches are on {x.device}, the model on {weights[0].device}: move either"
    if len(dtypes) == 1 and x.is_floating_point() and x.dtype not in dtypes:
        return (
            f"the batches are {x.dtype}, the model {weights[0].dtype}: convert either, as by "
            f"batch.to({weights[0].dtype})"
        )
    if not channels or axes < 3:
        return ""
    if takes_lists(model):  # of pictures without a batch axis
        fits = x.dim() == axes and len(x) == channels
        taken = f"({channels}, {', '.join(AXES[1 - axes :])})"
        return "" if fits else f"it takes pictures {taken}, and gets {tuple(x.shape)}"
    if x.dim() == axes and len(x) == channels:
        return f"a batch of shape {tuple(x.shape)} has no batch axis: {LOADER}"
    last = x.dim() == axes + 1 and x.shape[-1] == channels != x.shape[1]
    return f"a batch of shape {tuple(x.shape)} has its channels last: permute it" if last else ""


def _misfit_inside(model: nn.Module, batch: Any, error: Exception) -> str:
    """Name the layer that raised, where it got other axes than it takes; "" for other errors."""
    layer, got = _last_called(error)
    x, takes = first_tensor(batch), _taken_instead(layer, got)
    if x is None or not takes:
        return ""
    path = next((path for path, module in model.named_modules() if module is layer), "")
    shapes = f"takes {takes}, and gets {tuple(got.shape)} of a batch of {described(x)}"
    return f"{path or type(layer).__name__} {shapes}: give batches like those it was trained on"


def _last_called(error: Exception) -> tuple[nn.Module | None, Any]:
    """Find the module that an error came out of, and the first tensor that it was called with."""
    found: tuple[nn.Module | None, Any] = None, None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is _CALL:
            found = frame.f_locals["self"], first_tensor(frame.f_locals["args"])
    return found


def _taken_instead(layer: nn.Module | None, x: Tensor | None) -> str:
    """Say in axes what a convolution or Linear layer takes, if that is not a tensor like `x`."""
    if x is None or not isinstance(layer, (_ConvNd, nn.Linear)):
        return ""
    if isinstance(layer, nn.Linear):
        return "" if x.shape[-1:] == (layer.in_features,) else f"(..., {layer.in_features})"
    dims = len(layer.kernel_size)
    fits = x.dim() == dims + 2 and x.shape[1] == layer.in_channels
    return "" if fits else f"(N, {layer.in_channels}, {', '.join(AXES[-dims:])})"


def _embeds(model: nn.Module, x: Tensor) -> bool:
    """Tell whether these may be tokens, for a model that embeds them."""
    tokens = x.dtype in (torch.int32, torch.int64)
    return tokens and any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in model.modules())


def _arrays(batch: Any) -> bool:
    """Tell whether a batch begins with a numpy array or a picture of PIL, beside its labels."""
    items = batch if isinstance(batch, (list, tuple)) else [batch]
    if isinstance(batch, Mapping):
        items = list(batch.values())
    kinds = (_kind(item) for item in items)
    return next((kind for kind in kinds if kind), "") in ("numpy array", "picture")


def _kind(item: Any) -> str:
    """Name what may be the input: "" for what never is one."""
    if isinstance(item, Tensor):
        return "tensor"
    if isinstance(item, np.ndarray):
        return "numpy array"
    return "picture" if type(item).__module__.partition(".")[0] == "PIL" else ""


def _inside(batch: Any) -> list[Any]:
    """List what is in nested lists, tuples and mappings."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if not isinstance(batch, (list, tuple)):
        return [batch]
    return [item for part in batch for item in _inside(part)]


def _no_tensor(batch: Any) -> RetrofitError:
    items = _inside(batch)
    kinds = [_kind(item) for item in items]
    what = f"a batch of type {type(batch).__name__} holds no tensor"
    if all(item is None for item in items):
        return RetrofitError(
            f"a batch is {batch}: there is nothing in it; look at what the data set and its "
            "collate_fn return"
        )
    if "picture" in kinds:
        return RetrofitError(
            f"a batch is a picture of PIL, or holds some: give the data set a transform that makes "
            f"tensors of them (torchvision.transforms.ToTensor, Normalize), and {LOADER}"
        )
    if "numpy array" in kinds:
        return RetrofitError(
            "a batch is a numpy array, or holds one: make a tensor of it, as by "
            "torch.from_numpy(x).float(), of shape (N, C, H, W)"
        )
    if any(isinstance(item, (str, bytes, PathLike)) for item in items[:2]):
        what += ", but the name of a file, it seems: read it first, or use `retrofit convert`"
        return RetrofitError(what)
    return RetrofitError(f"{what}: pass forward_fn= to say how the model is called")
