"""Keyword arguments of the function that builds a model, as `--model-args` and files have them.

Nothing here imports torch: what is wrong with a word that was typed is said before that.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

from retrofit.errors import RetrofitError

OPTION = "--model-args"
ModelArgs = Mapping[str, Any]
CONSTANTS = ("true", "false", "none")  # of Python, in small letters
NO_ARGS: ModelArgs = MappingProxyType({})
# What `DEFAULT`, a file and no weights decide, in torchvision and timm.
OF_WEIGHTS = (
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_backbone",
    "checkpoint_path",
    "progress",
)


def parse_argument(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE: the value is a literal of Python, else a text.

    Raises ValueError for what is neither, or what no file could hold.
    """
    key, equals, written = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(
            f"{text} is not KEY=VALUE, as num_classes=10 (a model or file goes before such an "
            "option)"
        )
    if not written:
        raise ValueError(f"{text} has no value")
    if written.lower() in CONSTANTS and written.title() != written:
        raise ValueError(f"{text} would be a text: Python writes {key}={written.title()}")
    value = _literal(written)
    if not is_plain(value):
        raise ValueError(
            f"{text}: the value must be a number, a text, True, False, None, or a list"
        )
    return key, value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def is_plain(value: Any) -> bool:
    """Tell whether JSON can hold this argument: a scalar, None, or a list of scalars."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_scalar, value))
    return value is None or _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return type(value) in (bool, int, float, str) and finite


def in_words(arguments: ModelArgs) -> str:
    """Write the arguments as they stand in a call: num_classes=10, aux_logits=False."""
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def as_option(arguments: ModelArgs) -> str:
    """Write the arguments as they are typed in a shell: --model-args num_classes=10."""
    typed = (f"{key}={_typed(value)}" for key, value in arguments.items())
    return " ".join([OPTION, *map(shlex.quote, typed)])


def _typed(value: Any) -> str:
    is_text = isinstance(value, str) and value and _literal(value) == value
    is_text = is_text and value.isprintable() and value.lower() not in CONSTANTS
    return value if is_text else repr(value)


def check_model_args(arguments: object) -> dict[str, Any]:
    """Return a copy of arguments that a file can hold; RetrofitError for anything else."""
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise RetrofitError(f"model_args must be a dict such as {{'num_classes': 10}}, not {kind}")
    for key, value in arguments.items():
        if not isinstance(key, str) or not key.isidentifier() or not is_plain(value):
            raise RetrofitError(
                f"model_args cannot have {key!r}: {value!r}: a keyword, and a number, a text, "
                "True, False, None or a list of these"
            )
    return dict(arguments)


def refuse_weights(what: str, arguments: ModelArgs) -> None:
    """Raise RetrofitError for arguments by which a factory would load weights on its own."""
    if taken := [key for key in OF_WEIGHTS if key in arguments]:
        raise RetrofitError(
            f"{OPTION} {taken[0]} is not for {what}: --weights says which weights it gets"
        )


def call_factory(
    what: str,
    factory: Callable[..., Any],
    arguments: ModelArgs,
    module: ModuleType | None = None,
    **fixed: Any,
) -> Any:
    """Call the function that builds a model; RetrofitError for arguments that it refuses.

    Args:
        what: the model, for messages.
        factory: builds it.
        arguments: as they were given.
        module: has the class of the model, where the factory passes its arguments on.
        fixed: what the factory gets where the arguments do not say otherwise.
    """
    if (names := _keywords(factory)) is not None:
        for key in arguments:
            if key not in names:
                raise _unknown(what, key, names)
    try:
        return factory(**{**fixed, **arguments})
    except Exception as error:
        if not arguments:
            raise
        text = " ".join(str(error).split())
        refused = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
        if refused and refused[2] in arguments:
            names = _keywords(getattr(module, refused[1], None), optional=True)
            raise _unknown(what, refused[2], names or []) from error
        raise RetrofitError(
            f"{what} cannot be built with {in_words(arguments)} ({OPTION}): "
            f"{type(error).__name__}: {text}"
        ) from error


def _keywords(function: Any, *, optional: bool = False) -> list[str] | None:
    """List what a function or class takes by name; None where it takes any, or does not tell.

    `optional` lists only what has a default, beside which there may be any.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    if not optional and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in by_name if not (optional and p.default is p.empty)]


def _unknown(what: str, key: str, known: Sequence[str]) -> RetrofitError:
    takes = "which its documentation lists" if not known else ", ".join(known[:12])
    more = f" and {len(known) - 12} others" if len(known) > 12 else ""
    return RetrofitError(f"{what} takes no argument {key!r} ({OPTION}), but {takes}{more}")
