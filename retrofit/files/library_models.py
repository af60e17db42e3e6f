"""Models of libraries, by the names that these have for them."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms import Compose
from torchvision.transforms.functional import to_tensor

from retrofit.errors import RetrofitError
from retrofit.files.fitting import fits, fitted, load_weights
from retrofit.files.model_args import (
    OPTION,
    ModelArgs,
    call_factory,
    in_words,
    refuse_weights,
)
from retrofit.files.model_source import Source, in_precision, nearest
from retrofit.files.suffixes import KINDS
from retrofit.files.weights import WeightsFile
from retrofit.pictures.preprocessing import Transform, Transforms

# Detectors that torchvision builds with a backbone of FrozenBatchNorm2d where they are trained, and
# the weights for which it sets their eps to 0.
FROZEN = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
)
NO_EPS = (
    FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
    MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    RetinaNet_ResNet50_FPN_Weights.COCO_V1,
)


class Torchvision(Source):
    def __init__(self, name: str, arguments: ModelArgs, weights: str | None = None) -> None:
        """Name a model; `weights` those that it is built for, as torchvision does, but not loaded.

        Raises RetrofitError for a name that torchvision does not have.
        """
        known = torchvision.models.list_models()
        if name not in known:
            raise RetrofitError(
                f"torchvision has no model {name!r}{nearest(name, known)}; other models are given "
                "as timm:NAME, package.module:factory or path/to/file.py:factory"
            )
        refuse_weights(name, arguments)
        self.name, self.arguments = name, arguments
        self.entries = torchvision.models.get_model_weights(name)
        self.names = list(self.entries.__members__)
        self.weights = None if weights is None else self._entry(weights)

    def build(self) -> nn.Module:
        builder = torchvision.models.get_model_builder(self.name)
        known = inspect.signature(builder).parameters
        options = self._settings()  # where the arguments do not decide
        if "weights_backbone" in known:
            options["weights_backbone"] = None
        if self.name in ("googlenet", "inception_v3"):  # they warn of a slow start otherwise
            options["init_weights"] = False
        module = sys.modules[builder.__module__]
        model: nn.Module = call_factory(self.name, builder, self.arguments, module, **options)
        if self.weights is not None and self.name in FROZEN:
            body: Any = model.backbone.body  # type: ignore[union-attr]
            _freeze(body, 0.0 if self.weights in NO_EPS else None)
        return model

    def _settings(self) -> dict[str, Any]:
        """List what torchvision builds the model with, for its weights or for none."""
        found: dict[str, Any] = {"weights": None}
        if self.weights is None:
            return found
        if self.name in ("googlenet", "inception_v3"):
            found["transform_input"] = True
        if self.name == "googlenet":
            found["aux_logits"] = False
        if self.name.startswith(("fcn_", "deeplabv3_")):
            found["aux_loss"] = True
        if self.name.startswith("vit_"):
            found["image_size"] = self.weights.meta["min_size"][0]
        return found

    @property
    def code(self) -> str:
        return f"torchvision.models.get_model({_call(self)})"

    def _entry(self, weights: str) -> Any:
        if weights not in self.names:
            raise RetrofitError(
                f"{weights!r} is no file and no weights of {self.name}; those are "
                f"{', '.join(self.names)}"
            )
        return self.entries[weights]

    def pretrained(self, weights: str) -> nn.Module:
        entry = self._entry(weights)
        classes = len(entry.meta.get("categories", ()))
        if classes:
            _refuse_other_classes(str(entry), classes, self.arguments)
        try:
            tensors = entry.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise RetrofitError(f"{entry} cannot be downloaded: {error}") from error
        model = Torchvision(self.name, self.arguments, weights).build()
        # As torchvision: auxiliary classifiers that the model is built without are left out.
        own = model.state_dict()
        load_weights(model, {key: t for key, t in tensors.items() if key in own}, str(entry))
        return model

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:  # noqa: ARG002
        entry = weights if weights in self.entries.__members__ else "DEFAULT"
        made: Transforms = self.entries[entry].transforms
        return made


def _freeze(model: nn.Module, eps: float | None) -> None:
    """Replace BatchNorms, as new as they are, by FrozenBatchNorm2d, of this eps or its own."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            own = {} if eps is None else {"eps": eps}
            model.set_submodule(name, FrozenBatchNorm2d(module.num_features, **own))


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
        return f"timm.create_model({_call(self)})"

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
            _refuse_other_classes(f"timm's {self.name}", config.num_classes, self.arguments)

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


def _call(source: Torchvision | Timm) -> str:
    """Write the arguments of the call that builds a model by its name."""
    return ", ".join(filter(None, (repr(source.name), in_words(source.arguments))))


def _refuse_other_classes(weights: str, classes: int, arguments: ModelArgs) -> None:
    """Raise RetrofitError for a head that these weights are not for, and that would be random."""
    asked = arguments.get("num_classes", classes)
    if asked != classes:
        raise RetrofitError(
            f"the weights of {weights} are for {classes} classes, and with {OPTION} "
            f"num_classes={asked} the head would be random: convert the network as it is and give "
            "it another head then, or give --weights a file of yours"
        )


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
