"""What can be typed after `retrofit`, and the request that it makes.

Nothing here imports torch: help, and what is said of a mistake, need not wait for it.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from retrofit.cli import requests
from retrofit.cli.requests import BATCH_SIZE, DRIFT_IMAGES, TEST_IMAGES, default_workers
from retrofit.cli.terminal import Terminal
from retrofit.errors import RetrofitError
from retrofit.files.model_args import OPTION, parse_argument
from retrofit.files.suffixes import KINDS, SUFFIXES
from retrofit.pictures.preparation import MOST_PIXELS
from retrofit.plans import LAYOUTS, PLACEMENTS
from retrofit.sample_sizes import RECALIBRATION_IMAGES, TOLERANCE
from retrofit.version import __version__

MODEL = (
    "torchvision name (vgg16), timm:NAME, timm-reparameterized:NAME (BatchNorm merged), "
    "ultralytics:NAME (ultralytics:yolo11n), "
    "package.module:factory, path/to/file.py:factory, or path/to/file.onnx"
)
DATA = (
    "folder of pictures or of tar shards, train-{000..012}.tar, or .npy or .npz, NHWC or NHW, of "
    "uint8, uint16, or floats from 0 to 1; or your own code, path/to/file.py:loader or "
    "package.module:loader: a torch Dataset of inputs, an iterable of batches as the model takes "
    "them, or a function that returns one of them"
)
FILE = f"{KINDS} file, the .index.json of several, or a folder with these as on Hugging Face's hub"
OUTPUT = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
TOLERANCE_HELP = (
    "stop when the standard errors of 99 %% of the channels are below T of their sigma; default: "
    f"{TOLERANCE:g}, and with --images 0, which uses all"
)
NEAR = 0.75  # of two words: the share of letters in common, from which one may stand for the other
DEBUG = "show where an error came from"
QUIET = "print nothing but warnings and errors"
JSON = "print one JSON object, in place of tables and lines; it has all that they say"

R = TypeVar("R")


def parse(argv: Sequence[str] | None = None) -> tuple[requests.Request, requests.Telling]:
    """Parse the words after `retrofit`: a request, and how its result is told.

    Exits with 2 and one line for what cannot be parsed, and without words with the help.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    if not words:
        parser.print_help()
        parser.exit()
    try:
        found = _parsed(parser, words)
        return _made(found.request, found), _made(requests.Telling, found)
    except (_Mistake, RetrofitError) as mistake:
        first = words[_place_of_command(words)]
        command = f" {first}" if first in COMMANDS else ""
        Terminal(as_json="--json" in words).fail(f"{mistake} (see retrofit{command} --help)", 2)
        sys.exit(2)


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    for before, word in itertools.pairwise(["retrofit", *words]):
        if not word or (word.startswith("--") and word.endswith("=")):
            parser.error(
                f"an argument is empty, after {word or before} (a variable without value?)"
            )
    # argparse would speak first of what is missing, also where that is only misspelt.
    command, place = None, _place_of_command(words)
    for i, word in enumerate(words):
        if word in ("-h", "--help", "--version"):
            break  # whatever follows
        if i == place:
            command = _command(word)
        name, options = word.partition("=")[0], _options(parser, command)
        if word == "--":
            break
        if name[:2] == "--" and name not in options:
            hint = _without_dashes(parser, command, name) or _nearest(name, options)
            raise _Mistake(f"unrecognized arguments: {word}{hint}")
    return parser.parse_args(words)


def _place_of_command(words: Sequence[str]) -> int:
    """Find the first word that is no option; -1 where there is none."""
    return next((i for i, word in enumerate(words) if word[:1] != "-"), -1)


def _command(word: str) -> str:
    if word in COMMANDS:
        return word
    near = difflib.get_close_matches(word.lower(), COMMANDS, n=1, cutoff=NEAR)
    known = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    shown = word if word.isprintable() and word == word.strip() else repr(word)
    raise _Mistake(f"{shown} is no command: {known}")


def _parser_of(parser: argparse.ArgumentParser, command: str | None) -> argparse.ArgumentParser:
    if command is None:
        return parser
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices[command]
    return found


def _options(parser: argparse.ArgumentParser, command: str | None) -> list[str]:
    """List the options of a command, or those that may stand before it."""
    return list(_parser_of(parser, command)._option_string_actions)


def _without_dashes(parser: argparse.ArgumentParser, command: str | None, name: str) -> str:
    """Say how an argument is given that is none of the options; "" for what is no argument."""
    arguments = (a for a in _parser_of(parser, command)._actions if not a.option_strings)
    for argument in arguments:
        shown = str(argument.metavar or argument.dest)
        if command and name in (f"--{argument.dest}", f"--{shown.lower()}"):
            return f": it has no name, and stands by itself: retrofit {command} {shown.upper()} ..."
    return ""


def _nearest(name: str, options: Sequence[str]) -> str:
    """Ask whether an option was meant by one that there is not."""
    known = [option.removeprefix("--") for option in options]
    typed = name.removeprefix("--").lower()
    near = [option for option in known if option.startswith(typed)]
    near = near or difflib.get_close_matches(typed, known, n=1, cutoff=NEAR)
    return f": did you mean {' or '.join(f'--{option}' for option in near)}?" if near else ""


def _made(kind: type[R], found: argparse.Namespace) -> R:
    """Fill a dataclass, and those in it, with the values of options of the same names."""
    values: dict[str, Any] = {}
    types = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(types[field.name]):
            values[field.name] = _made(types[field.name], found)
        elif field.default is MISSING or hasattr(found, field.name):
            values[field.name] = getattr(found, field.name)
    return kind(**values)


class _Mistake(Exception):  # noqa: N818 - of the user
    """What was typed cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # Options are typed whole: --model would else be taken as --model-args, and a script's
        # --tol would be ambiguous as soon as another option begins with it.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> Any:
        """Raise what `parse` tells as every other bad request."""
        raise _Mistake(message)


def _parser() -> argparse.ArgumentParser:
    whole = _Parser(
        prog="retrofit",
        description="Add BatchNorm to a trained network; its outputs stay exactly as they were.",
    )
    whole.add_argument("--version", action="version", version=f"retrofit {__version__}")
    _add_telling(whole)
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (request, text, describe, more) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text + more)
        _add_telling(one, default=argparse.SUPPRESS)  # what stands before the command counts
        one.set_defaults(request=request)
        describe(one)
    return whole


def _describe_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    _add_model_args(parser)
    _add_plan(parser)
    text = f"{DATA}; two are run: some reasons (single pixels) only an example shows"
    parser.add_argument("--data", type=Path, help=text)
    _add_pictures(parser)


def _describe_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=MODEL)
    _add_model_args(parser)
    _add_output(parser, f"{OUTPUT}, or .onnx if MODEL is one")
    add("--device", help="for the calibration and the drift; default: cpu")
    add("--tolerance", type=_fraction, metavar="T", help=TOLERANCE_HELP)
    text = "kept while calibrating; a killed run goes on from it"
    add("--state", type=Path, metavar="FILE", help=text)
    text = "leave out layers that no picture reaches, rather than refuse"
    add("--skip-unused", action="store_true", help=text)
    text = "a page about the conversion; also measures what batch statistics change"
    add("--report", type=Path, metavar="FILE.html", help=text)
    _add_plan(parser)
    _add_weights(parser)
    _add_data(parser, images=None, default="as many as --tolerance takes")


def _describe_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what convert wrote")
    _add_model(parser)
    text = "largest difference allowed, of the root mean square; default: 0, bit for bit"
    parser.add_argument("--tolerance", type=_number, default=0.0, help=text)
    _add_weights(parser)
    _add_data(parser, images=TEST_IMAGES, default=str(TEST_IMAGES))


def _describe_fold(parser: argparse.ArgumentParser) -> None:
    _add_file_to_file(parser)
    text = f"{DATA}; two are run through a network without plan that torch.fx cannot trace"
    parser.add_argument("--data", type=Path, help=text)
    _add_pictures(parser)


def _add_file_to_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="what convert or a training run wrote")
    _add_output(parser, OUTPUT)
    _add_model(parser)
    _add_weights_key(parser, "FILE")


def _describe_adapt(parser: argparse.ArgumentParser) -> None:
    _add_file_to_file(parser)
    text = "let the old statistics count as N pictures, for a handful of new ones; default: 0"
    parser.add_argument("--prior", type=_number, metavar="N", default=0.0, help=text)
    parser.add_argument("--device", help="default: cpu")
    _add_data(parser, images=RECALIBRATION_IMAGES, default=str(RECALIBRATION_IMAGES))


def _describe_restore(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="ARCHITECTURE", help=f"the network before folding: {MODEL}")
    _add_model_args(parser)
    add("--weights", required=True, metavar="FILE", help=f"the folded network: {FILE}, or .onnx")
    _add_weights_key(parser, "FILE")
    _add_output(parser, OUTPUT)
    add("--device", help="for the calibration; default: cpu")
    add("--tolerance", type=_fraction, metavar="T", help=TOLERANCE_HELP)
    _add_data(parser, images=None, default="as many as --tolerance takes")


def _describe_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help=FILE)
    _add_weights_key(parser, "FILE")


def _describe_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help=FILE)
    _add_output(parser, ".html file")
    _add_model(parser)
    _add_weights(parser)
    _add_data(parser, images=DRIFT_IMAGES, default=f"{DRIFT_IMAGES}", required=False)


def _describe_demo(parser: argparse.ArgumentParser) -> None:
    default = Path("retrofit-demo")
    parser.add_argument("--output", type=Path, default=default, help="folder; default: %(default)s")


ADAPTED = (
    " of a new domain, layer by layer (what does not fit into a quarter of the memory is read once "
    "for each BatchNorm), prepared as convert had them"
)
# name: what it asks for, the help, what adds its options, and more of the description.
COMMANDS: dict[str, tuple[type[Any], str, Callable[[argparse.ArgumentParser], None], str]] = {
    "plan": (
        requests.PlanRequest,
        "show what happens to every convolution, and why",
        _describe_plan,
        "",
    ),
    "convert": (
        requests.ConvertRequest,
        "insert calibrated BatchNorms, verify, save",
        _describe_convert,
        "",
    ),
    "verify": (
        requests.VerifyRequest,
        "compare a converted file with the original weights",
        _describe_verify,
        "",
    ),
    "fold": (
        requests.FoldRequest,
        "absorb the BatchNorms of a file into its convolutions",
        _describe_fold,
        "",
    ),
    "adapt": (
        requests.AdaptRequest,
        "re-estimate the BatchNorm statistics of a file on unlabelled pictures",
        _describe_adapt,
        ADAPTED,
    ),
    "restore": (
        requests.RestoreRequest,
        "bring a network whose BatchNorm was folded away back into its own class",
        _describe_restore,
        "",
    ),
    "inspect": (
        requests.InspectRequest,
        "show where a file comes from and what its BatchNorms hold",
        _describe_inspect,
        "",
    ),
    "report": (
        requests.ReportRequest,
        "write a page about a file that convert wrote",
        _describe_report,
        "",
    ),
    "demo": (
        requests.DemoRequest,
        "the whole pipeline on a small VGG and pictures of CIFAR-10",
        _describe_demo,
        "",
    ),
}


def _add_telling(parser: argparse.ArgumentParser, **default: str) -> None:
    for name, text in (("json", JSON), ("quiet", QUIET), ("debug", DEBUG)):
        parser.add_argument(f"--{name}", action="store_true", help=text, **default)  # type: ignore[arg-type]


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--output", type=Path, required=True, help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _add_model(parser: argparse.ArgumentParser) -> None:
    text = f"{MODEL}; default: what the file says, if torchvision has it"
    parser.add_argument("--model", help=text)
    _add_model_args(parser)


def _add_model_args(parser: argparse.ArgumentParser) -> None:
    text = (
        "what the function that builds the model is called with (num_classes=10 "
        "aux_logits=False); may be repeated; default: none, or for torchvision's what FILE says"
    )
    parser.add_argument(
        OPTION, type=_argument, action=_Collected, nargs="+", metavar="KEY=VALUE", help=text,
        default={},
    )  # fmt: skip


class _Collected(argparse.Action):
    """Collects KEY=VALUE in a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        found = dict(getattr(namespace, self.dest))
        for key, value in values:
            if key in found:
                raise argparse.ArgumentError(self, f"{key} is given twice")
            found[key] = value
        setattr(namespace, self.dest, dict(sorted(found.items())))


def _argument(text: str) -> tuple[str, Any]:
    try:
        return parse_argument(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_plan(parser: argparse.ArgumentParser) -> None:
    for name, text in (("include", "only these, heads too"), ("exclude", "all but these")):
        parser.add_argument(
            f"--{name}",
            action="append",
            metavar="GLOB",
            help=f"{text}; of module paths, may be repeated",
        )
    add = parser.add_argument
    text = "native (default): the model's own class; graph: torch.fx's, also after functions"
    add("--layout", choices=LAYOUTS, default="native", help=text)
    text = "BatchNorm before the activation (default) or after it"
    add("--placement", choices=PLACEMENTS, default="pre_activation", help=text)
    add("--linear", action="store_true", help="after Linear layers too")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    text = f"name (DEFAULT), or {FILE}; default: those that the model's own factory loads"
    parser.add_argument("--weights", help=text)
    _add_weights_key(parser, "the file of --weights")


def _add_weights_key(parser: argparse.ArgumentParser, where: str) -> None:
    text = f"where the weights are in {where}, if that holds several (params_ema, model.ema)"
    parser.add_argument("--weights-key", metavar="KEY", help=text)


def _add_data(
    parser: argparse.ArgumentParser, *, images: int | None, default: str, required: bool = True
) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=required, help=DATA)
    text = f"use at most N; default: {default}"
    add("--images", type=_positive, metavar="N", default=images, help=text)
    add("--batch-size", type=_positive, help=f"default: {BATCH_SIZE}")
    text = f"processes that read pictures or samples; default: {default_workers()}"
    add("--workers", type=_whole, help=text)
    _add_pictures(parser)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=_whole, help="seed of the shuffle; default: 0")
    text = "shorter side, before the crop; default: as the model was trained, or as --crop"
    add("--resize", type=_pixels, metavar="PIXELS", help=text)
    text = "centre crop; default: as the model was trained"
    add("--crop", type=_pixels, metavar="PIXELS", help=text)
    text = (
        "of each channel, or one for all, of pixels in 0 to 1; default: as the model was trained, "
        "if it takes 3 channels"
    )
    add("--mean", type=_finite, nargs="+", action=_Tuple, metavar="M", help=text)
    add("--std", type=_finite, nargs="+", action=_Tuple, metavar="S", help=text)
    text = "leave out unreadable pictures, and what a damaged shard lacks, and list them"
    add("--skip-bad-images", action="store_true", help=text)


class _Tuple(argparse.Action):
    """Keeps several values as what they are, unchangeable."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def _whole(text: str, least: int = 0, most: int = 2**63 - 1) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from error
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
    return number


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _pixels(text: str) -> int:
    return _whole(text, least=1, most=MOST_PIXELS)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return number


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:  # of an option that takes as many as there are
        raise argparse.ArgumentTypeError(
            f"{text} is not a finite number (a model or file goes before such an option)"
        ) from error
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def _fraction(text: str) -> float:
    number = _number(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1 (0.02: 2 %)")
    return number
