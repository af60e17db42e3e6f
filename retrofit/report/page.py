"""Facts to a page of HTML: a Jinja2 template, with every text escaped."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from retrofit.calibration.sample_errors import TOLERANCES
from retrofit.report import figures
from retrofit.report.facts import Facts, Layer
from retrofit.version import __version__

NOT_KNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Figure:
    """A figure on the page.

    Attributes:
        question: its heading.
        svg: the picture.
        caption: what to see.
    """

    question: str
    svg: Markup
    caption: str


def render(facts: Facts) -> str:
    """Make the whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retrofit.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, percent, span, count, count_of, breakable)
    environment.filters.update({function.__name__: function for function in filters})
    told, verification = facts.provenance, facts.provenance.verification
    layers = [layer for layer in facts.layers if layer.channels]
    channels = [layer.channels for layer in layers if layer.channels]
    return environment.get_template("page.html").render(
        facts=facts,
        told=told,
        name=told.model or facts.source,
        by_code=":" in (told.model or ":"),
        inserted=len(layers),
        left=len(facts.layers) - len(layers),
        channels=sum(map(len, channels)),
        constant=sum(int(c.constant.sum()) for c in channels),
        near=sum(int(c.near.sum()) for c in channels),
        identity=sum(c.identity for c in channels),
        needed=_needed(facts),
        channel_figures=_of_channels(facts),
        sample_figures=_of_sample(facts, layers),
        drift_figure=_of_drift(facts),
        sites_equal=sum(d.exact for d in verification.sites) if verification is not None else 0,
        provenance=_provenance(facts),
        version=__version__,
    )


def number(value: float) -> str:
    """Write three significant digits, with a true minus sign."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}").replace("inf", "∞")


def percent(value: float | None, digits: int = 2) -> str:
    """Write a share as a percentage, with a space that does not break."""
    if value is None:
        return NOT_KNOWN
    return "∞" if math.isinf(value) else f"{value * 100:.{digits}f}\N{NO-BREAK SPACE}%"


def span(values: object) -> str:
    """Write the lowest and the highest of an array."""
    low, high = (number(float(x)) for x in (values.min(), values.max()))  # type: ignore[attr-defined]
    return f"{low} to {high}"


def count(value: float | None) -> str:
    """Write a number with its thousands apart."""
    if value is None:
        return NOT_KNOWN
    return "∞" if math.isinf(value) else f"{value:,}"


def count_of(value: int) -> str:
    """Begin a sentence with a number: None of 960 channels is."""
    return "None" if value == 0 else f"{value:,}"


def breakable(path: str) -> Markup:
    """Let a long module path be broken after its dots."""
    return Markup(".<wbr>").join(path.split("."))


def _needed(facts: Facts) -> list[str]:
    """Say how many images each tolerance needs, the easiest first."""
    calibration = facts.provenance.calibration
    if calibration is None:
        return []
    easy_first = sorted(TOLERANCES, reverse=True)
    return [f"{count(calibration.images_needed(t))} for {percent(t, 0)}" for t in easy_first]


def _of_channels(facts: Facts) -> list[Figure]:
    layers = facts.inserted
    made = [
        Figure(
            "Where do the channels lie?",
            Markup(figures.means(layers)),  # noqa: S704 - our own SVG, of numbers alone
            "Each dot is the running mean of one channel, each bar the median of its layer: the "
            "further from zero, the more BatchNorm has to centre.",
        ),
        Figure(
            "How widely do they vary?",
            Markup(figures.deviations(layers)),  # noqa: S704
            "Running standard deviations on a logarithmic scale: channels below the dotted mark of "
            "their layer, 1 % of its median, are near-constant and contribute little.",
        ),
    ]
    if any(c.constant.any() or c.near.any() for _, c in layers):
        made.append(
            Figure(
                "Which layers have dead channels?",
                Markup(figures.quiet_channels(layers)),  # noqa: S704
                "The share of channels that are constant, or nearly so: the higher a bar, the more "
                "of its layer does nothing for images like these.",
            )
        )
    return made


def _of_sample(facts: Facts, layers: list[Layer]) -> list[Figure]:
    calibration = facts.provenance.calibration
    if calibration is None:
        return []
    made = []
    if 0 < calibration.standard_error < math.inf:
        made.append(
            Figure(
                "How many images were enough?",
                Markup(figures.by_images(calibration)),  # noqa: S704
                f"The dot is what {calibration.images:,} images reached; the line extends it by "
                "the square-root law (four times the images, half the error), with the images "
                "that 5 %, 2 % and 1 % would take.",
            )
        )
    numbers = {layer.path: layer.number for layer in layers}
    if calibration.sites and all(sample.site in numbers for sample in calibration.sites):
        of_sites = [numbers[sample.site] for sample in calibration.sites]
        made.append(
            Figure(
                "Which layer is the least certain?",
                Markup(figures.by_layer(calibration, of_sites)),  # noqa: S704
                "Standard errors that 99 % of the channels of a layer stay below: the highest "
                "point is the layer that decides how many images are needed.",
            )
        )
    return made


def _of_drift(facts: Facts) -> Figure | None:
    drift = facts.provenance.drift
    rows = drift.rows if drift else ()
    if not rows or not all(math.isfinite(row.error) for row in rows):
        return None
    return Figure(
        "How far do batch statistics move the outputs?",
        Markup(figures.by_batch_size(rows)),  # noqa: S704
        "In training, BatchNorm uses the statistics of its batch: the lower the curve, the closer "
        "fine-tuning starts to the original network, and the larger the batch should be where it "
        "is high.",
    )


def _provenance(facts: Facts) -> list[tuple[str, str]]:
    """List what is known, in order; what the file does not say is a dash."""
    told, plan = facts.provenance, facts.provenance.plan
    layout = f"{plan.layout}, {plan.placement.replace('_', '-')}" if plan else None
    rows = {
        "file": facts.source,
        "model": told.call,
        "weights": told.weights,
        "class": told.model_class,
        "calibrated on": told.data,
        "images": None if told.images is None else f"{told.images:,}",
        "measured anew": told.measured,
        "plan": layout,
        "eps": None if told.eps is None else f"{told.eps:g}",
        "momentum": None if told.momentum is None else f"{told.momentum:g}",
        "written": told.date,
        "retrofit": told.retrofit,
        "torch": told.torch,
        "torchvision": told.torchvision,
    }
    for seldom in ("weights", "measured anew"):
        if rows[seldom] is None:
            del rows[seldom]
    return [(what, fact or NOT_KNOWN) for what, fact in rows.items()]
