"""Pictures to batches."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VGG16_Weights
from torchvision.models.detection import SSD300_VGG16_Weights
from torchvision.transforms import CenterCrop, Compose, Resize

from retrofit.errors import RetrofitError

EXTENSIONS = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
Transform = Callable[[Image.Image], Tensor]
Transforms = Callable[..., Transform]
PRESET: Transforms = VGG16_Weights.IMAGENET1K_V1.transforms
DETECTION_PRESET: Transforms = SSD300_VGG16_Weights.COCO_V1.transforms


class Pictures(Protocol):
    """Pictures by index, with a name for each."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int) -> Image.Image: ...


class FolderPictures:
    """All pictures in a folder and its subfolders, by their extension, sorted by path.

    Hidden files are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(
            Path(root, file)
            for root, _, files in os.walk(folder)
            for file in files
            if Path(file).suffix.lower() in EXTENSIONS and not file.startswith(".")
        )
        if not self.files:
            extensions = " ".join(sorted(EXTENSIONS))
            raise RetrofitError(f"{folder} has no pictures in it (looked for {extensions})")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def read(self, index: int) -> Image.Image:
        with Image.open(self.files[index]) as picture:
            return picture.convert("RGB")


class ArrayPictures:
    """A .npy or .npz of uint8 pictures, (N, H, W, 3) or (N, H, W, 1); a .npy stays on disk."""

    def __init__(self, file: Path) -> None:
        try:
            loaded = np.load(file, mmap_mode="r", allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
        except (OSError, ValueError, EOFError) as error:
            raise RetrofitError(f"{file} cannot be read as arrays of plain numbers") from error
        usable = {
            key: array
            for key, array in arrays.items()
            if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (1, 3)
        }
        if len(usable) != 1:
            found = ", ".join(f"{k} {a.dtype} {a.shape}".strip() for k, a in arrays.items())
            raise RetrofitError(
                f"{file} must hold one uint8 array of shape (N, H, W, 3) or (N, H, W, 1); it has: "
                f"{found or 'nothing'}"
            )
        ((self.key, self.array),) = usable.items()
        self.file = file

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        return f"{self.file}[{index}]"

    def read(self, index: int) -> Image.Image:
        array = np.asarray(self.array[index])
        return Image.fromarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array)


def open_pictures(path: Path) -> Pictures:
    """The pictures at `path`: a folder, a .npy or a .npz; RetrofitError for anything else."""
    if path.is_dir():
        return FolderPictures(path)
    if not path.exists():
        raise RetrofitError(f"there is no folder or file {path}")
    if path.suffix not in (".npy", ".npz"):
        raise RetrofitError(f"{path} is neither a folder of pictures nor a .npy or .npz file")
    return ArrayPictures(path)


def preprocessing(
    transforms: Transforms = PRESET,
    *,
    resize: int | None = None,
    crop: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Transform:
    """From a picture to the model's input (3, H, W).

    Args:
        transforms: makes the transform that the model was trained for, and takes the steps that
            are to be replaced as torchvision's weights do: resize_size, crop_size, mean, std. By
            default torchvision's classification preset (shorter side to 256, centre crop of 224,
            ImageNet's mean and std).
        resize, crop: pixels; added at the end where the transform has no such step. The default
            of `resize` is then `crop`.
        mean, std: of the channels, for pixels in 0 to 1.
    """
    if std is not None and min(std) <= 0:
        raise RetrofitError(f"the std must be positive, not {' '.join(map(str, std))}")
    given = {"resize_size": resize or crop, "crop_size": crop, "mean": mean, "std": std}
    changes = {name: value for name, value in given.items() if value is not None}
    own = inspect.signature(transforms).parameters
    transform = transforms(**{name: value for name, value in changes.items() if name in own})
    _try_out(transform)
    if not own.keys() >= changes.keys() & {"mean", "std"}:
        raise RetrofitError(
            f"{type(transform).__name__} leaves it to the model to normalise: leave out --mean and "
            "--std"
        )
    sizes = {"resize_size": Resize, "crop_size": CenterCrop}
    added = [step(changes[n]) for n, step in sizes.items() if n in changes and n not in own]
    return Compose([transform, *added]) if added else transform


def _try_out(transform: Transform) -> None:
    """Those of videos and of optical flow take other things than a picture."""
    try:
        transform(Image.new("RGB", (64, 64)))
    except (AttributeError, TypeError) as error:
        raise RetrofitError(
            f"the model takes no single pictures (its transform is {type(transform).__name__}): "
            "convert it in Python, with batches of your own"
        ) from error


class _Item(NamedTuple):
    name: str
    tensor: Tensor | None
    problem: str


class _Items(Dataset[_Item]):
    """Reads and transforms; an unreadable picture is an item too, for the loader to judge."""

    def __init__(self, pictures: Pictures, indices: Sequence[int], transform: Transform) -> None:
        self.pictures, self.indices, self.transform = pictures, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> _Item:
        index = self.indices[position]
        name = self.pictures.name(index)
        try:
            return _Item(name, self.transform(self.pictures.read(index)), "")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return _Item(name, None, str(error).splitlines()[0] if str(error) else "unreadable")


class PictureBatches:
    """Batches of pictures, read by worker processes: tensors (N, 3, H, W), or lists of (3, H, W).

    Args:
        pictures, indices: which pictures, in which order.
        transform: see `preprocessing`.
        lists: the model takes pictures of different sizes, as a list; such a batch is one.
        skip_bad: leave unreadable pictures out, and list them in `bad`, instead of raising.

    Attributes:
        names: of the pictures in the batch yielded last.
        bad: names of the unreadable pictures left out so far.

    Raises RetrofitError, while iterating, with the name of an unreadable picture, or when pictures
    have different sizes and the model takes no lists.
    """

    def __init__(
        self,
        pictures: Pictures,
        indices: Sequence[int],
        transform: Transform,
        *,
        batch_size: int,
        workers: int,
        lists: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self.dataset = _Items(pictures, indices, transform)
        self.loader: DataLoader[_Item] = DataLoader(
            self.dataset, batch_size=batch_size, num_workers=workers, collate_fn=list
        )
        self.lists, self.skip_bad = lists, skip_bad
        self.names: list[str] = []
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        for items in self.loader:
            self.names = [item.name for item in items if item.tensor is not None]
            for item in items:
                if item.tensor is None:
                    if not self.skip_bad:
                        raise RetrofitError(
                            f"{item.name} cannot be read: {item.problem} (--skip-bad-images "
                            "leaves such pictures out)"
                        )
                    self.bad.append(item.name)
            tensors = [item.tensor for item in items if item.tensor is not None]
            if tensors:
                yield self._batch(tensors)

    def _batch(self, tensors: list[Tensor]) -> Any:
        sizes = list(dict.fromkeys(tuple(tensor.shape[1:]) for tensor in tensors))
        if len(sizes) == 1:
            return torch.stack(tensors)
        if not self.lists:
            shown = ", ".join(f"{height} x {width}" for height, width in sizes[:3])
            raise RetrofitError(
                f"the pictures have different sizes ({shown}{', ...' if len(sizes) > 3 else ''}) "
                "and the model takes them as one tensor: give --crop, or --batch-size 1"
            )
        return tensors


def shuffled(count: int, seed: int) -> list[int]:
    """0 ... count - 1 in an order that depends on the seed alone."""
    order: list[Any] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
