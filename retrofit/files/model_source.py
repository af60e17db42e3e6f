"""What every source of models can do."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from retrofit.errors import RetrofitError
from retrofit.files.fitting import fitted, load_weights
from retrofit.files.model_args import OPTION, ModelArgs, in_words
from retrofit.files.weights import WeightsFile
from retrofit.pictures.preprocessing import DETECTION_PRESET, PRESET, Transforms
from retrofit.running.input_channels import input_dtype
from retrofit.running.signatures import takes_lists


class Source(ABC):
    """Where models come from.

    Attributes:
        random: not trained before weights are loaded.
        names: of the weights that can be loaded by name.
    """

    random = True
    names: Sequence[str] = ()

    @property
    def untold(self) -> Sequence[str]:
        """The steps of `Preparation` of which nothing tells how the model was trained."""
        return ()

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the model, with fresh weights where it has no others."""

    @property
    @abstractmethod
    def code(self) -> str:
        """The line of Python that builds it."""

    @abstractmethod
    def pretrained(self, weights: str) -> nn.Module:
        """Build the model with the weights of that name."""

    def loaded(
        self, file: WeightsFile, key: str | None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """Build the model with the weights of a file, those under a key of it, in a precision."""
        model = in_precision(dtype, self.build())
        load_weights(model, fitted(file, model, key), str(file.path))
        return model

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:  # noqa: ARG002
        """Find the transforms for the model; `weights` may name some that bring their own."""
        return DETECTION_PRESET if takes_lists(model) else PRESET


def in_precision(dtype: torch.dtype | None, model: nn.Module) -> nn.Module:
    """Cast a model, but for one of that precision: what it has in others is meant like that."""
    return model if dtype in (None, input_dtype(model)) else model.to(dtype)


def nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def call_of(name: str, arguments: ModelArgs) -> str:
    """Write the arguments of the call that builds a model by its name."""
    return ", ".join(filter(None, (repr(name), in_words(arguments))))


def refuse_other_classes(weights: str, classes: int, arguments: ModelArgs) -> None:
    """Raise RetrofitError for a head that these weights are not for, and that would be random."""
    asked = arguments.get("num_classes", classes)
    if asked != classes:
        raise RetrofitError(
            f"the weights of {weights} are for {classes} classes, and with {OPTION} "
            f"num_classes={asked} the head would be random: convert the network as it is and give "
            "it another head then, or give --weights a file of yours"
        )
