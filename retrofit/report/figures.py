"""The report's figures, as inline SVG with a title and a description.

They are as wide as a phone, so that their text is never smaller than the page's, and differ in
lightness and shape, never in colour alone. Layers have numbers, not names: those of the page's
table. (So no text from a file gets here, where matplotlib would read formulas in it.)
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from retrofit.calibration.sample_errors import TOLERANCES, Calibration
from retrofit.checking.drift import BatchDrift
from retrofit.numerics.batchnorm_summary import NEAR_CONSTANT, BatchNormSummary

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
MANY = 2000  # dots; more are drawn as a picture within the figure
ERROR = "standard error (% of \N{GREEK SMALL LETTER SIGMA})"
BLUE, RED, DARK, GREY = "#0072b2", "#b8400a", "#1d1d1d", "#8a8a8a"

Layers = Sequence[tuple[int, BatchNormSummary]]


@contextmanager
def _figure(name: str, title: str, description: str) -> Iterator[tuple[Axes, list[str]]]:
    """Give axes to draw on; afterwards the list holds the SVG."""
    svg: list[str] = []
    of_one_size = {"savefig.bbox": None, "font.size": 9.5}
    with matplotlib.style.context(["retrofit.plots", of_one_size]):
        figure = Figure(figsize=(4.7, 3.1))
        yield figure.subplots(), svg
        drawn = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", dpi=220, metadata=metadata)
    svg.append(_inline(drawn.getvalue(), name, title, description))


def means(layers: Layers) -> str:
    """Draw the mean of each channel over the number of its layer."""
    title = "Mean of each channel, by layer"
    lowest = min(float(c.mean.min()) for _, c in layers)
    highest = max(float(c.mean.max()) for _, c in layers)
    description = (
        f"{_count(layers):,} dots, one for each channel, over the number of its layer; the means "
        f"lie between {lowest:.3g} and {highest:.3g}."
    )
    with _figure("means", title, description) as (axes, svg):
        axes.axhline(0, color=GREY, linewidth=0.8)
        _dots(axes, [(n, c.mean) for n, c in layers], BLUE, "o")
        _medians(axes, [(n, float(np.median(c.mean))) for n, c in layers])
        axes.set_ylabel("mean")
        _by_layer(axes, [n for n, _ in layers])
    return svg[0]


def deviations(layers: Layers) -> str:
    """Draw the standard deviation of each channel over the number of its layer.

    Constant channels have no place on the logarithmic axis: they are drawn at its foot.
    """
    title = "Standard deviation of each channel, by layer"
    constant = sum(int(c.constant.sum()) for _, c in layers)
    near = sum(int(c.near.sum()) for _, c in layers)
    description = (
        f"{_count(layers):,} channels over the number of their layer, on a logarithmic axis. "
        f"{constant:,} are constant, {near:,} near-constant."
    )
    usual = {n: float(np.median(c.std[~c.constant])) for n, c in layers if not c.constant.all()}
    with _figure("deviations", title, description) as (axes, svg):
        axes.set_yscale("log")
        live = [(n, c.std[~c.constant & ~c.near]) for n, c in layers]
        _dots(axes, live, BLUE, "o", label="channels")
        _medians(axes, list(usual.items()))
        limits = [(n, NEAR_CONSTANT * median) for n, median in usual.items()]
        _medians(axes, limits, color=RED, linestyle=(0, (1.5, 1)), label="1 % of the median")
        if near:
            few = [(n, c.std[c.near]) for n, c in layers]
            _dots(axes, few, RED, "D", label="near-constant", faint=False)
        if constant:
            foot = 10 ** math.floor(math.log10(axes.get_ylim()[0]) - 0.3)
            axes.set_ylim(bottom=foot / 1.6)
            dead = [(n, np.full(int(c.constant.sum()), foot)) for n, c in layers]
            _dots(axes, dead, DARK, "x", label="constant (at the foot)", faint=False)
        axes.set_ylabel("standard deviation")
        _legend(axes)
        _by_layer(axes, [n for n, _ in layers])
    return svg[0]


def quiet_channels(layers: Layers) -> str:
    """Draw the share of dead channels, where there are any."""
    title = "Constant and near-constant channels, by layer"
    parts = [(n, int(c.constant.sum()), int(c.near.sum())) for n, c in layers]
    told = [f"layer {n}: {dead} constant, {near} near" for n, dead, near in parts if dead + near]
    description = f"Bars of their share among all channels. {'; '.join(told)}."
    shares = np.array([(c.constant.mean(), c.near.mean()) for _, c in layers]) * 100
    numbers = [n for n, _ in layers]
    with _figure("quiet", title, description) as (axes, svg):
        axes.bar(numbers, shares[:, 0], color=DARK, label="constant")
        some = np.flatnonzero(shares[:, 1])
        axes.bar(
            np.array(numbers)[some], shares[some, 1], bottom=shares[some, 0], color="white",
            edgecolor=RED, hatch="////", label="near-constant",
        )  # fmt: skip
        axes.set_ylabel("share of channels (%)")
        axes.set_ylim(bottom=0)
        _legend(axes)
        _by_layer(axes, numbers)
    return svg[0]


def by_images(calibration: Calibration) -> str:
    """Draw the standard error over the number of images."""
    title = "Standard error by number of images"
    images, error = calibration.images, calibration.standard_error
    needed = {t: calibration.images_needed(t) for t in TOLERANCES}
    marks = ", ".join(f"{t:.0%} at about {n:,}" for t, n in needed.items())
    description = f"{error:.2%} at {images:,} images; by the square-root law {marks}."
    span = np.array([min(images, *needed.values()) / 2, max(images, *needed.values()) * 2])
    with _figure("by-images", title, description) as (axes, svg):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.plot(
            span, error * np.sqrt(images / span) * 100, "--", color=BLUE, marker="",
            label="square-root law from there, not measured",
        )  # fmt: skip
        axes.plot(images, error * 100, "o", color=DARK, markersize=7, label="reached", zorder=3)
        for tolerance, count in needed.items():
            axes.plot(count, tolerance * 100, "|", color=BLUE, markersize=11, mew=1.4)
            axes.annotate(
                f"{tolerance * 100:.0f} %: {count:,}", (count, tolerance * 100), (7, 3),
                textcoords="offset points", fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        axes.margins(x=0.12)
        axes.set_xlabel("images")
        axes.set_ylabel(ERROR)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=2, fontsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return svg[0]


def by_layer(calibration: Calibration, numbers: Sequence[int]) -> str:
    """Draw the standard errors of each layer over its number."""
    title = "Standard error of mean and standard deviation, by layer"
    sites = calibration.sites
    worst = max(range(len(sites)), key=lambda i: sites[i].error)
    largest = sites[worst].error
    description = f"Largest at layer {numbers[worst]}: {largest:.2%} of a standard deviation."
    with _figure("by-layer", title, description) as (axes, svg):
        lines = ("mean_error", "mean", "o", BLUE), ("std_error", "standard deviation", "s", RED)
        for attribute, label, marker, colour in lines:
            values = [getattr(site, attribute) * 100 for site in sites]
            filled = colour if marker == "o" else "white"
            axes.plot(
                numbers, values, marker=marker, linestyle="-" if marker == "o" else "--",
                color=colour, markerfacecolor=filled, linewidth=0.9, label=f"of the {label}",
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_ylabel(ERROR)
        _legend(axes)
        _by_layer(axes, numbers)
    return svg[0]


def by_batch_size(rows: Sequence[BatchDrift]) -> str:
    """Draw the drift over the batch size."""
    title = "Drift of the outputs under batch statistics, by batch size"
    description = "; ".join(f"batches of {r.batch_size}: {r.error:.3f}" for r in rows) + "."
    with _figure("drift", title, description) as (axes, svg):
        sizes, errors = [r.batch_size for r in rows], [r.error for r in rows]
        axes.set_xscale("log", base=2)
        axes.plot(sizes, errors, "o-", color=BLUE, markersize=6)
        for row in rows:
            text = "" if row.top1 is None else f"{row.top1 * 100:.1f} % same top-1"
            axes.annotate(
                text, (row.batch_size, row.error), (7, 4), textcoords="offset points",
                fontsize=8.5,
            )  # fmt: skip
        axes.set_ylim(0, max(errors) * 1.25 or 1)
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 4)  # room for the last text
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("batch size")
        axes.set_ylabel("rms change / std of the outputs")
    return svg[0]


def _count(layers: Layers) -> int:
    return sum(len(channels) for _, channels in layers)


def _dots(
    axes: Axes,
    columns: Sequence[tuple[int, NDArray[np.float64]]],
    colour: str,
    marker: str,
    *,
    label: str = "",
    faint: bool = True,
) -> None:
    """Draw a column of dots for each layer, spread to the sides so that they do not hide."""
    x = np.concatenate([n + _spread(len(values)) for n, values in columns])
    y = np.concatenate([values for _, values in columns])
    axes.plot(
        x, y, marker, color=colour, markersize=2.6 if faint else 4, alpha=0.45 if faint else 1,
        markeredgewidth=0 if faint else 1, markerfacecolor="none" if marker == "D" else colour,
        rasterized=len(x) > MANY, label=label or None,
    )  # fmt: skip


def _spread(count: int) -> NDArray[np.floating]:
    """Spread within 0.3 to the sides, evenly in no visible order: the golden ratio's sequence."""
    return 0.6 * ((np.arange(count) * 0.6180339887 + 0.5) % 1 - 0.5)


def _medians(
    axes: Axes,
    marks: Sequence[tuple[int, float]],
    *,
    color: str = DARK,
    linestyle: Any = "-",
    label: str = "median of the layer",
) -> None:
    x, y = np.array(marks).reshape(-1, 2).T
    axes.hlines(y, x - 0.4, x + 0.4, colors=color, linestyles=linestyle, lw=1.4, label=label)


def _legend(axes: Axes) -> None:
    """Put a legend above the axes, where it can hide nothing."""
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.12, 1.0), ncols=3, fontsize=8, columnspacing=1.2,
        handletextpad=0.4, borderaxespad=0.2, handlelength=1.4,
    )  # fmt: skip
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def _by_layer(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xlabel("layer (its number in the table)")
    axes.set_xlim(min(numbers) - 0.7, max(numbers) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True))
    axes.grid(axis="x", visible=False)


def _inline(svg: bytes, name: str, title: str, description: str) -> str:
    """Make `svg` an image with a name, and ids that no other figure on the page has."""
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)  # noqa: S314 - just made by matplotlib
    href = f"{{{XLINK}}}href"
    texts = [value for element in root.iter() for value in element.attrib.values()]
    for element in root.iter():
        own = element.get("id")
        if own is None:
            continue
        if any(f"#{own})" in text or text == f"#{own}" for text in texts):
            element.set("id", f"{name}-{own}")
        else:
            del element.attrib["id"]
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == href and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(position, element)
    return ET.tostring(root, encoding="unicode")
