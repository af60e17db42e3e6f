"""Models of timm and ultralytics, by the names that these have for them."""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.transforms import Compose
from torchvision.transforms.functional import to_tensor

from retrofit.errors import RetrofitError
from retrofit.files.fitting import fits, fitted, load_weights
from retrofit.files.model_args import (
    OPTION,
    ModelArgs,
    call_factory,
    refuse_weights,
)
from retrofit.files.model_source import (
    Source,
    call_of,
    in_precision,
    nearest,
    refuse_other_classes,
)
from retrofit.files.suffixes import KINDS
from retrofit.files.weights import WeightsFile
from retrofit.pictures.preprocessing import Transform, Transforms


class Timm(Source):
    names = ("DEFAULT",)

    def __init__(self, name: str, arguments: ModelArgs) -> None:
        try:
            import timm.data  # noqa: PLC0415 - an extra, and slow to import
            import timm.utils  # noqa: PLC0415
        except ImportError as error:
            raise RetrofitError(
                f"timm is needed for its model {name}: pip install 'batchnorm-retrofit[timm]'"
            ) from error
        # Names that it lists, and no others: it would take those of hubs and folders too.
        known = [*timm.list_models(), *timm.list_models(include_tags=True)]
        if name not in known:
            raise RetrofitError(f"timm has no model {name!r}{nearest(name, known)}")
        refuse_weights(name, arguments)
        self.name, self.arguments = name, arguments
        self.timm: Any = timm

    def build(self) -> nn.Module:
        create = functools.partial(self.timm.create_model, self.name)
        module = sys.modules[self.timm.models.model_entrypoint(self.name).__module__]
        model: nn.Module = call_factory(f"timm:{self.name}", create, self.arguments, module)
        return model

    @property
    def code(self) -> str:
        return f"timm.create_model({call_of(self.name, self.arguments)})"

    def pretrained(self, weights: str) -> nn.Module:
        if weights != "DEFAULT":
            raise RetrofitError(
                f"{weights!r} is no file: timm's weights are DEFAULT, or named by a tag as in "
                f"timm:vgg11.tv_in1k"
            )
        if self.name not in (
            *self.timm.list_models(pretrained=True, include_tags=False),
            *self.timm.list_models(pretrained=True),
        ):
            raise RetrofitError(f"timm has no weights for {self.name}: give a file")
        if self.arguments:
            self._refuse_unfit_arguments()
        try:
            with _quiet("huggingface_hub"):  # it tells of every retry
                model: nn.Module = self.timm.create_model(
                    self.name, pretrained=True, **self.arguments
                )
        except Exception as error:  # the hub's client raises errors of many kinds
            reason = " ".join(str(error).split())
            raise RetrofitError(
                f"the weights of timm's {self.name} cannot be loaded: {type(error).__name__}: "
                f"{reason}"
            ) from error
        return model

    def _refuse_unfit_arguments(self) -> None:
        """Raise RetrofitError, before a download, for arguments that do not go with its weights."""
        Timm.build(self)
        config = self.timm.models.get_pretrained_cfg(self.name)
        if self.arguments.get("num_classes") != 0:  # without a head
            refuse_other_classes(f"timm's {self.name}", config.num_classes, self.arguments)

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:  # noqa: ARG002
        config = self.timm.data.resolve_model_data_config(model)

        def made(
            *,
            resize_size: int | None = None,
            crop_size: int | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
        ) -> Transform:
            changed = {**config}
            if crop_size is not None:
                changed["input_size"] = (3, crop_size, crop_size)
            if resize_size is not None:  # timm resizes to the crop / crop_pct, rounded down
                changed["crop_pct"] = min(changed["input_size"][1:]) / (resize_size + 0.5)
            changed.update({k: v for k, v in (("mean", mean), ("std", std)) if v is not None})
            transform: Transform = self.timm.data.create_transform(**changed, is_training=False)
            return transform

        return made


class Reparameterized(Timm):
    """BatchNorm and parallel branches merged into single convolutions."""

    def build(self) -> nn.Module:
        return self._merged(super().build())

    @property
    def code(self) -> str:
        return f"timm.utils.reparameterize_model({super().code})"

    def loaded(
        self, file: WeightsFile, key: str | None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        plain = in_precision(dtype, super().build())
        merged = self._merged(plain)
        # The file is of the one that shares more keys with it, and is judged by that.
        near = min((plain, merged), key=lambda m: fits(file, m.state_dict(), key)[0].wrong)
        load_weights(near, fitted(file, near, key), str(file.path))
        return self._merged(plain) if near is plain else merged

    def pretrained(self, weights: str) -> nn.Module:
        return self._merged(super().pretrained(weights))

    def _merged(self, model: nn.Module) -> nn.Module:
        merged: nn.Module = self.timm.utils.reparameterize_model(model)
        if merged.state_dict().keys() == model.state_dict().keys():
            raise RetrofitError(
                f"{self.name} has nothing to reparameterise: name it timm:{self.name}"
            )
        return merged


class Ultralytics(Source):
    """The class that a YAML of ultralytics describes, by its name or its path."""

    def __init__(self, name: str, arguments: ModelArgs) -> None:
        if arguments:
            raise RetrofitError(
                f"ultralytics:{name} takes no {OPTION}: what it is stands in its YAML (nc: the "
                "number of classes), of which a copy of yours can be named"
            )
        try:
            import ultralytics  # noqa: PLC0415 - the user's to install, and slow to import
            import ultralytics.data.augment  # noqa: PLC0415
        except ImportError as error:
            raise RetrofitError(
                f"ultralytics is needed for its model {name}: pip install ultralytics"
            ) from error
        self.file = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
        self.ultralytics: Any = ultralytics

    @property
    def _facade(self) -> str:
        return "RTDETR" if Path(self.file).name.startswith("rtdetr") else "YOLO"

    @property
    def code(self) -> str:
        return f"ultralytics.{self._facade}({self.file!r}).model"

    def build(self) -> nn.Module:
        try:
            with _quiet("ultralytics"):  # it tells the size of each model
                model: nn.Module = getattr(self.ultralytics, self._facade)(self.file).model
        except FileNotFoundError as error:
            name = self.file.removesuffix(".yaml")
            raise RetrofitError(
                f"ultralytics has no model {name!r}{nearest(name, self._known())}"
            ) from error
        except Exception as error:  # of what stands in a YAML of the user's
            raise RetrofitError(
                f"ultralytics builds no model of {self.file}: {type(error).__name__}: {error}"
            ) from error
        return model

    def _known(self) -> list[str]:
        """List the names of its YAMLs; in those of YOLOs the size follows the number."""
        folder = Path(self.ultralytics.__file__).parent / "cfg" / "models"
        stems = [path.stem for path in folder.rglob("*.yaml")]
        sized = [
            re.sub(r"(\d+)", rf"\g<1>{size}", stem, count=1) for stem in stems for size in "nsmlx"
        ]
        return [*stems, *sized]

    def pretrained(self, weights: str) -> nn.Module:
        raise RetrofitError(
            f"{weights!r} is no {KINDS} file: give weights of ultralytics as a file, of what "
            "model.state_dict() gives"
        )

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:  # noqa: ARG002
        classifier = self.ultralytics.nn.tasks.ClassificationModel
        augment = self.ultralytics.data.augment

        def classified(*, crop_size: int = 224) -> Transform:
            transform: Transform = augment.classify_transforms(crop_size)
            return transform

        def detected(*, resize_size: int | None = None, crop_size: int | None = None) -> Transform:
            """Fit a picture into a grey square, as its predictor does, which needs one size."""
            side = crop_size or resize_size or 640
            if resize_size not in (None, side):
                raise RetrofitError(
                    f"ultralytics fits a picture into one square, of {side} pixels: leave out "
                    f"--resize {resize_size}"
                )
            boxed = augment.LetterBox((side, side), auto=False)
            transform: Transform = Compose(
                [np.asarray, lambda array: boxed(image=array), to_tensor]
            )
            return transform

        return classified if isinstance(model, classifier) else detected


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Let a logger log nothing but errors."""
    of = logging.getLogger(logger)
    level = of.level
    of.setLevel(logging.ERROR)
    try:
        yield
    finally:
        of.setLevel(level)
