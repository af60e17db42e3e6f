"""The transform from a picture of 8 bits to the input of a model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import VGG16_Weights
from torchvision.models.detection import SSD300_VGG16_Weights
from torchvision.transforms import CenterCrop, Compose, Resize

from retrofit.errors import RetrofitError
from retrofit.pictures.eight_bits import Picture, counted, eight_bits
from retrofit.pictures.preparation import check_numbers

Transform = Callable[[Any], Tensor]  # of a picture in PIL, or of uint8 (C, H, W)
Transforms = Callable[..., Transform]
PRESET: Transforms = VGG16_Weights.IMAGENET1K_V1.transforms
DETECTION_PRESET: Transforms = SSD300_VGG16_Weights.COCO_V1.transforms


def preprocessing(
    transforms: Transforms = PRESET,
    *,
    resize: int | None = None,
    crop: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int = 3,
) -> Transform:
    """Make the transform from a picture of 8 bits to the model's input (C, H, W).

    Args:
        transforms: makes the transform that the model was trained for, and takes the steps that
            are to be replaced as torchvision's weights do: resize_size, crop_size, mean, std. By
            default torchvision's classification preset (shorter side to 256, centre crop of 224,
            ImageNet's mean and std).
        resize, crop: pixels; where the transform has no such step, one is added: the resize before
            it, the crop after it. The default of `resize` is then `crop`.
        mean, std: of each channel, or one number for all, for pixels in 0 to 1. They are needed
            where the transform normalises and `channels` is not 3, which its own mean and std are
            for.
        channels: of the picture.

    Raises RetrofitError for numbers that cannot be meant, and for a transform of something else
    than pictures.
    """
    check_numbers("mean", mean)
    check_numbers("std", std)
    mean, std = _for_each("mean", mean, channels), _for_each("std", std, channels)
    given = {"resize_size": resize or crop, "crop_size": crop, "mean": mean, "std": std}
    changes = {name: value for name, value in given.items() if value is not None}
    own = inspect.signature(transforms).parameters
    needed = own.keys() & {"mean", "std"} if channels != 3 else set()
    if missing := sorted(needed - changes.keys()):
        raise RetrofitError(
            f"for pictures of {counted(channels)} there is no usual mean and std: give "
            f"{' and '.join(f'--{name}' for name in missing)}, for pixels in 0 to 1 (--mean 0 and "
            "--std 1 leave them as they are)"
        )
    transform = transforms(**{name: value for name, value in changes.items() if name in own})
    _try_out(transform, channels)
    if not own.keys() >= changes.keys() & {"mean", "std"}:
        raise RetrofitError(
            f"{type(transform).__name__} leaves it to the model to normalise: leave out --mean and "
            "--std"
        )
    steps: list[Transform] = [transform]
    if "resize_size" in changes.keys() - own.keys():
        steps.insert(0, Resize(changes["resize_size"]))
    if "crop_size" in changes.keys() - own.keys():
        steps.append(CenterCrop(changes["crop_size"]))
    made = Compose(steps) if len(steps) > 1 else transform
    if (resize or crop) and _pads(made, channels):
        raise RetrofitError(
            "the crop is larger than the resized pictures, which would get black edges: give "
            "--resize and --crop that fit together"
        )
    return made


def black(channels: int, height: int = 64, width: int = 64) -> Picture:
    """Make a picture for transforms to be tried on."""
    return _filled(0, channels, height, width)


def normalisation(
    transform: Transform, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Measure which mean and std, of pixels in 0 to 1, a transform normalises each channel with.

    None for one that does something else, with the contrast of each picture for instance.
    """
    dark, light = (_middle(transform(_filled(value, channels))) for value in (0, 255))
    ranges = [most - least for least, most in zip(dark, light, strict=True)]
    if not all(math.isfinite(one) and one for one in ranges):
        return None
    std = tuple(1 / one for one in ranges)
    return tuple(0.0 - least * of for least, of in zip(dark, std, strict=True)), std


def _pads(transform: Transform, channels: int) -> bool:
    """Tell whether a white picture has dark corners when it is prepared."""
    white, dark = (transform(_filled(value, channels)) for value in (255, 0))
    corner, middle, black = white[:, 0, 0], torch.tensor(_middle(white)), dark[:, 0, 0]
    return bool(((corner - middle).abs() > (corner - black).abs()).any())


def _middle(image: Tensor) -> list[float]:
    values: list[float] = image[:, image.shape[-2] // 2, image.shape[-1] // 2].double().tolist()
    return values


def _filled(value: int, channels: int, height: int = 64, width: int = 64) -> Picture:
    return eight_bits(np.full((height, width, channels), value, np.uint8), channels)


def _for_each(name: str, numbers: Sequence[float] | None, channels: int) -> list[float] | None:
    """Give each channel its number; RetrofitError if there are not as many."""
    if numbers is None:
        return None
    if len(numbers) not in (1, channels):
        most = f"{channels}, or one for all" if channels > 1 else "one"
        raise RetrofitError(
            f"--{name} has {len(numbers)} values, and the pictures have {counted(channels)}: give "
            f"{most}"
        )
    return list(numbers) * (channels if len(numbers) == 1 else 1)


def _try_out(transform: Transform, channels: int) -> None:
    """Raise RetrofitError for a transform that takes no picture (of videos, of optical flow)."""
    try:
        transform(black(channels))
    except (AttributeError, TypeError) as error:
        raise RetrofitError(
            f"the model takes no single pictures (its transform is {type(transform).__name__}): "
            "give batches of your own, --data file.py:loader"
        ) from error
    except MemoryError as error:
        raise RetrofitError(
            "pictures of that size do not fit into memory: give smaller --resize and --crop"
        ) from error
    except Exception as error:
        raise RetrofitError(
            f"pictures cannot be prepared like that: {type(error).__name__}: {error}"
        ) from error
