"""The models of both zoos with random weights, and inputs that they accept."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
import torchvision
from network_checks import batchnorms, call, convolutions, one_line, roughen
from torch import Tensor, nn

from retrofit.files import model_sources

# Models whose BatchNorm is folded away for deployment: they come after that.
MERGED = ("repvgg_a0", "mobileone_s0", "fastvit_t8")
# torchvision's models that are not converted, and why: pattern to reason.
LEFT_OUT = {
    "quantized_*": "integer arithmetic, into which a BatchNorm is folded before it is quantised",
}
# Detectors show a few boxes however low they score: with random weights none would pass the
# threshold, and outputs without boxes are always equal. And they scale pictures to 192 pixels, not
# to 800; SSD has a size of its own.
BOXES: dict[str, Any] = {"topk_candidates": 20, "score_thresh": 0.0, "detections_per_img": 5}
RCNN_BOXES: dict[str, Any] = {
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
SCALE: dict[str, Any] = {"min_size": 192, "max_size": 192}
SIZES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 300, 320, 384, 448, 512)
FRAMES = 16


def names(only: str) -> list[str]:
    """List all models of both packages that the glob pattern matches."""
    models = [
        *torchvision.models.list_models(),
        *(f"timm:{entry}" for entry in timm.list_models()),
        *(f"timm-reparameterized:{entry}" for entry in MERGED),
    ]
    return [name for name in models if fnmatchcase(name, only)]


def outlook(name: str) -> tuple[str, float]:
    """Say why the model is not converted, and how many GB of memory its check takes.

    The first is empty if it is converted; the second is for the weights twice, and for torch.
    """
    if not name.startswith("timm"):
        skipped = next((why for p, why in LEFT_OUT.items() if fnmatchcase(name, p)), "")
        weights = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        return skipped, 8e-9 * weights + 1
    with torch.device("meta"):  # costs neither time nor memory
        built = fresh(name)
    skipped = ""
    if name.startswith("timm:"):
        skipped = "fewer than four convolutions" if len(convolutions(built)) < 4 else ""
        skipped = "BatchNorm" if batchnorms(built) else skipped
    return skipped, 8e-9 * sum(p.numel() for p in built.parameters()) + 1


def family(name: str) -> str:
    """Name the package, and the task (torchvision) or the file (timm) that the model is from."""
    source, _, entry = name.rpartition(":")
    if source == "timm":
        return f"timm, {timm.models.model_entrypoint(entry).__module__.rpartition('.')[2]}"
    if source:
        return "timm, reparameterised"
    module = torchvision.models.get_model_builder(name).__module__.split(".")
    return f"torchvision, {module[2].replace('_', ' ') if len(module) > 3 else 'classification'}"


def fresh(name: str) -> nn.Module:
    """Build the model with the weights of its own initialisation."""
    if family(name) != "torchvision, detection":
        return model_sources.build(name)
    options = RCNN_BOXES if "rcnn" in name else BOXES
    if "ssd" not in name:
        options = options | SCALE
    detector: nn.Module = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, **options
    )
    return detector


def build(name: str) -> nn.Module:
    """Build the model with random weights, in eval mode."""
    torch.manual_seed(0)
    model = fresh(name).eval()
    roughen(model)
    return model


def batch(name: str, size: int, seed: int, count: int = 2) -> Any:
    """Draw pictures, clips or pairs of pictures of this size."""
    generator = torch.Generator().manual_seed(seed)
    match family(name):
        case "torchvision, detection":
            return list(torch.rand(count, 3, size, size, generator=generator))
        case "torchvision, optical flow":
            return tuple(torch.randn(2, count, 3, size, size, generator=generator))
        case "torchvision, video":
            return torch.randn(count, 3, FRAMES, size, size, generator=generator)
    return torch.randn(count, 3, size, size, generator=generator)


def size_for(model: nn.Module, name: str) -> int:
    """Find the smallest size that the model accepts and whose feature maps exceed one pixel.

    On maps of one pixel a BatchNorm cannot be trained, so that convolutions would be left out that
    get one in practice. Where every size gives some, it is the smallest that is accepted.
    """
    config = getattr(model, "pretrained_cfg", {})  # timm's
    sizes: Sequence[int] = (config["input_size"][-1],) if config.get("fixed_input_size") else SIZES
    if family(name) == "torchvision, detection":
        sizes = model.transform.min_size  # type: ignore[union-attr, assignment]
    accepted, refusal = 0, ""
    for size in sizes:
        try:
            vanishing = vanishes(model, batch(name, size, 0))
        except Exception as error:  # noqa: BLE001 - models refuse a size in every way there is
            refusal = one_line(error)
            continue
        if not vanishing:
            return size
        accepted = accepted or size
    if not accepted:
        raise ValueError(f"it runs at none of the sizes {sizes}: {refusal}")
    return accepted


def vanishes(model: nn.Module, inputs: Any) -> bool:
    """Tell whether a convolution with a kernel wider than a pixel gives maps of one pixel."""
    found = False

    def look(conv: nn.Module, _: Any, y: Tensor) -> None:
        nonlocal found
        kernel: tuple[int, ...] = conv.kernel_size  # type: ignore[assignment]
        found |= max(kernel) > 1 and y.shape[-len(kernel) :].numel() == 1

    hooks = [conv.register_forward_hook(look) for conv in convolutions(model)]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
