"""Models of the user's own code, and of ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from retrofit.errors import RetrofitError
from retrofit.files.model_args import OPTION, ModelArgs, call_factory, in_words
from retrofit.files.model_source import Source
from retrofit.files.onnx_files import picture_size
from retrofit.files.onnx_modules import module_from_onnx
from retrofit.files.suffixes import KINDS
from retrofit.files.user_code import named, said
from retrofit.pictures.preprocessing import PRESET, Transform, Transforms


class Code(Source):
    """A user's factory, which may load weights by itself."""

    random = False

    def __init__(self, spec: str, arguments: ModelArgs) -> None:
        self.spec, self.arguments = spec, arguments

    @property
    def untold(self) -> Sequence[str]:
        return "crop", "mean", "std"

    def build(self) -> nn.Module:
        factory = named(self.spec, "factory", called=True)
        if isinstance(factory, nn.Module):
            raise RetrofitError(
                f"{self.spec} is a network: name a function that returns it (def make(): ...)"
            )
        try:
            model = call_factory(self.spec, factory, self.arguments)
        except RetrofitError:
            raise
        except (Exception, SystemExit) as error:
            lacks = isinstance(error, TypeError) and "required" in str(error)
            hint = f" ({OPTION} gives a factory its arguments)" if lacks else ""
            raise RetrofitError(f"{self.spec}() failed: {said(error, self.spec)}{hint}") from error
        if not isinstance(model, nn.Module):
            raise RetrofitError(f"{self.spec} returned a {type(model).__name__}, not an nn.Module")
        return model

    @property
    def code(self) -> str:
        return f"{self.spec.rpartition(':')[2]}({in_words(self.arguments)})"

    def pretrained(self, weights: str) -> nn.Module:
        raise RetrofitError(
            f"{weights!r} is no {KINDS} file, and {self.spec} is no model that has weights by name"
        )


class Onnx(Source):
    """A file that brings its own weights."""

    random = False

    def __init__(self, spec: str, arguments: ModelArgs) -> None:
        self.path = Path(spec)
        if arguments:
            raise RetrofitError(f"{spec} holds a whole network, which takes no {OPTION}")

    def build(self) -> nn.Module:
        return module_from_onnx(self.path)

    @property
    def untold(self) -> Sequence[str]:
        return ("mean", "std") if picture_size(self.path) else ("crop", "mean", "std")

    @property
    def code(self) -> str:
        return f"retrofit.module_from_onnx({str(self.path)!r})"

    def pretrained(self, weights: str) -> nn.Module:
        raise RetrofitError(f"{self.path} has its own weights: leave out --weights {weights}")

    def transforms(self, model: nn.Module, weights: str | None) -> Transforms:
        size = picture_size(self.path)
        if size is None:
            return super().transforms(model, weights)
        usual = {"crop_size": max(size), "resize_size": round(max(size) * 8 / 7)}  # as 224 of 256

        def made(
            *,
            resize_size: int | None = None,
            crop_size: int | None = None,
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
        ) -> Transform:
            given = {"resize_size": resize_size, "crop_size": crop_size, "mean": mean, "std": std}
            changes = {name: value for name, value in given.items() if value is not None}
            transform: Any = PRESET(**{**usual, **changes})
            if crop_size is None:  # which its argument could make a square of, only
                transform.crop_size = list(size)
            return cast("Transform", transform)

        return made
