"""Models of torchvision, as it builds them with and without weights."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torchvision
from torch import nn
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.ops import FrozenBatchNorm2d

from retrofit.errors import RetrofitError
from retrofit.files.fitting import load_weights
from retrofit.files.model_args import ModelArgs, call_factory, refuse_weights
from retrofit.files.model_source import Source, call_of, nearest, refuse_other_classes
from retrofit.pictures.preprocessing import Transforms

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
    def __init__(self, name: str, arguments: ModelArgs, built_for: str | None = None) -> None:
        """Name a model, and weights whose settings it gets, without loading them.

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
        self.built_for = None if built_for is None else self._entry(built_for)

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
        if self.built_for is not None and self.name in FROZEN:
            body: Any = model.backbone.body  # type: ignore[union-attr]
            _freeze(body, 0.0 if self.built_for in NO_EPS else None)
        return model

    def _settings(self) -> dict[str, Any]:
        """List what torchvision builds the model with, for its weights or for none."""
        found: dict[str, Any] = {"weights": None}
        if self.built_for is None:
            return found
        if self.name in ("googlenet", "inception_v3"):
            found["transform_input"] = True
        if self.name == "googlenet":
            found["aux_logits"] = False
        if self.name.startswith(("fcn_", "deeplabv3_")):
            found["aux_loss"] = True
        if self.name.startswith("vit_"):
            found["image_size"] = self.built_for.meta["min_size"][0]
        return found

    @property
    def code(self) -> str:
        return f"torchvision.models.get_model({call_of(self.name, self.arguments)})"

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
            refuse_other_classes(str(entry), classes, self.arguments)
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
