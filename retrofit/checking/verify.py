"""Two models compared on data, at every site and at the end: the proof of a conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.errors import NeitherTrueNorFalse, RetrofitError
from retrofit.html_tables import html_table, view
from retrofit.numerics.comparison import Comparison, Difference, Top1, refuse_other_structure
from retrofit.option_checks import check_flags, check_forward_fn, check_models, check_number
from retrofit.plans import Plan, Site
from retrofit.running.batch_checks import check_data, nothing_in
from retrofit.running.call_arguments import ForwardFn, call_model, images_in
from retrofit.running.modes import eager, evaluating
from retrofit.running.nested import tensors
from retrofit.running.progress import images_bar
from retrofit.surgery.native import find_site
from retrofit.surgery.record import record_of
from retrofit.tables import Part, Table, counted, in_short, printed, shortened


@dataclass(frozen=True)
class Verification(NeitherTrueNorFalse):
    """What `verify` found: whether two models compute the same.

    Its truth is ambiguous, and `if verify(...)` raises RetrofitError: ask for `exact`, or for
    `passed(tolerance)`.

    Attributes:
        images: how many they were compared on.
        outputs: one entry for each tensor in the output.
        sites: one for each site of the converted model's plan, in order; what the convolution (or,
            in post-activation placement, the activation) gives in the original against what its
            BatchNorm gives. Functions have none: they count by the outputs alone.
        top1: share of images with the same largest output, where an output of shape (N, classes)
            comes first; else None.
    """

    images: int
    outputs: tuple[Difference, ...]
    sites: tuple[Difference, ...]
    top1: float | None
    ask_for = "report.exact (bit for bit) or report.passed(tolerance)"

    @property
    def exact(self) -> bool:
        """Whether all outputs and sites are equal bit for bit; 0 equals -0, and NaN equals NaN."""
        return all(d.exact for d in (*self.outputs, *self.sites))

    @property
    def worst(self) -> Difference:
        """The largest difference, relative to the original's root mean square."""
        return max((*self.sites, *self.outputs), key=lambda d: d.relative)

    def passed(self, tolerance: float = 0.0) -> bool:
        """Tell whether nothing differs by more than `tolerance` of its root mean square."""
        check_number("tolerance", tolerance, "be a number from 0 up", lambda t: t >= 0)
        return all(d.relative <= tolerance for d in (*self.outputs, *self.sites))

    def summary(self) -> dict[str, Any]:
        """Summarise the figures as plain values, for a file's metadata."""
        return {
            "exact": self.exact,
            "images": self.images,
            "max_abs": max(d.max_abs for d in self.outputs),
            "worst_relative": self.worst.relative,
            "top1_agreement": self.top1,
        }

    def __str__(self) -> str:
        return printed(self._parts())

    def _parts(self) -> tuple[Part, ...]:
        """Return what `print` shows."""
        return self._table(), self._verdict()

    def __repr__(self) -> str:
        found = f"{counted(len(self.sites), 'layer')} and {counted(len(self.outputs), 'output')}"
        if not self.exact:
            all_of_them = (*self.sites, *self.outputs)
            unlike = f"{sum(not d.exact for d in all_of_them)} of {len(all_of_them)} tensors differ"
            most = f"{shortened(self.worst.name)} by {self.worst.relative:.3g} of its rms"
            found = f"{unlike}, most {most}"
        return in_short(self, f"{self._verdict()}; {found}; print it for all")

    def _repr_html_(self) -> str:
        """Show itself in a notebook: the verdict, and each tensor."""
        table = self._table()
        caption = f"Verification: {self._verdict()}"
        return view(html_table(caption, table.header, table.rows, table.right))

    def _verdict(self) -> str:
        top1 = "" if self.top1 is None else f", top-1 agreement {self.top1:.2%}"
        verdict = "equal bit for bit" if self.exact else "NOT equal bit for bit"
        return f"{verdict} on {self.images} images{top1}"

    def _table(self) -> Table:
        head = ("tensor", "exact", "max abs", "relative")
        rows = [
            (d.name, "yes" if d.exact else "no", f"{d.max_abs:.3g}", f"{d.relative:.3g}")
            for d in (*self.sites, *self.outputs)
        ]
        return Table(head, rows, right=head[2:], paths=head[:1])


def verify(
    original: nn.Module,
    converted: nn.Module,
    data: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    progress: bool = False,
) -> Verification:
    """Compare a converted model with its original, at every site and every output.

    Both run in eval mode without gradients on each batch, where they are, and are left as they
    were.

    Args:
        original: the model without the BatchNorms.
        converted: the model with them. Sites are compared when it was made by this package; any
            other two models are compared by their outputs.
        data: batches, as for `calibrate`.
        forward_fn: `forward_fn(model, batch)`, as for `calibrate`; returns the output to compare.
        progress: show a bar over the images.

    Raises:
        RetrofitError: no data; outputs of different structure or shape; an original that is
            random, whose outputs differ between two runs on the same batch; or one that lacks a
            layer of the plan, or calls it another number of times.
    """
    check_models("verify", original, converted)
    check_data(data)
    check_forward_fn(forward_fn)
    check_flags(progress=progress)
    record = record_of(converted)
    points = _points(record.plan if record else None)
    at_sites = {point.site.path: Comparison() for point in points}
    at_outputs: dict[str, Comparison] = {}
    images, top1, repeats, any_data, any_values = 0, Top1(), False, False, False
    with (
        images_bar("verify", original, data, None, forward_fn, shown=progress) as bar,
        evaluating(original, converted),
        torch.no_grad(),
        eager(),
    ):
        for batch in data:
            any_data = True
            with _recorded(original, points) as seen:
                expected = tensors(call_model(original, batch, forward_fn), "output")
            try:
                with _compared(converted, points, seen, at_sites):
                    actual = tensors(call_model(converted, batch, forward_fn), "output")
                exact = _compare(expected, actual, at_outputs)
            except RetrofitError:  # other shapes, other calls: the original's fault, perhaps
                refuse_random(original, batch, forward_fn, expected)
                raise
            if not (exact or repeats):  # once is enough
                refuse_random(original, batch, forward_fn, expected)
                repeats = True
            any_values |= any(tensor.numel() for tensor in expected.values())
            count = images_in(original, batch, forward_fn)
            images += count
            top1.add(expected, actual, count)
            bar.update(count)
    if not at_outputs or not any_values:
        raise no_outputs(original, at_outputs) if any_data else RetrofitError(nothing_in(data))
    return Verification(
        images=images,
        outputs=tuple(c.difference(name) for name, c in at_outputs.items()),
        sites=tuple(c.difference(name) for name, c in at_sites.items()),
        top1=top1.share,
    )


def no_outputs(original: nn.Module, outputs: Collection[str]) -> RetrofitError:
    """Say that the model returns nothing that could be compared: no tensors, or empty ones."""
    name = type(original).__name__
    if outputs:
        return RetrofitError(
            f"all tensors that this {name} returns are empty, so that nothing can be compared: "
            "give images in which it finds something, or, in Python, a forward_fn that returns more"
        )
    return RetrofitError(f"there is no tensor in what this {name} returns to compare")


def _compare(
    expected: dict[str, Tensor], actual: dict[str, Tensor], pooled: dict[str, Comparison]
) -> bool:
    """Add the outputs for one batch to what is pooled; return whether these are equal."""
    refuse_other_structure(expected, actual)
    exact = True
    for name, tensor in expected.items():
        exact &= pooled.setdefault(name, Comparison()).add(tensor, actual[name], name)
    return exact


def refuse_random(
    original: nn.Module, batch: Any, forward_fn: ForwardFn | None, first: dict[str, Tensor]
) -> None:
    """Raise RetrofitError if the original does not even agree with itself."""
    second = tensors(call_model(original, batch, forward_fn), "output")
    try:
        repeats = _compare(first, second, {})
    except RetrofitError:
        repeats = False
    if not repeats:
        raise RetrofitError(
            f"this {type(original).__name__} is random in eval mode, or keeps state: its outputs "
            "differ between two runs on the same batch (a functional dropout without "
            "training=self.training, say), so there is nothing to compare with"
        )


@dataclass(frozen=True)
class _Point:
    """Where both models are compared.

    What `host` gives at its `number`-th call in the original, or at every call, against what `site`
    gives in the converted model.
    """

    site: Site
    host: str
    number: int | None


def _points(plan: Plan | None) -> list[_Point]:
    """List the sites that have a module to look at in the original.

    In the graph layout each call of a convolution has a site of its own; functions and, after a
    shared activation, the call that belongs to a site cannot be told by looking at modules.
    """
    if plan is None:
        return []
    if plan.layout == "native":
        return [_Point(site, site.host, None) for site in plan.inserted]
    return [
        _Point(site, site.layer, int(site.path.partition("@")[2] or 0))
        for site in plan.inserted
        if site.layer and plan.placement == "pre_activation"
    ]


@contextmanager
def _recorded(model: nn.Module, points: Iterable[_Point]) -> Iterator[dict[str, list[Tensor]]]:
    """Record what each host returns, call by call. Copies, since a ReLU may be in place."""
    seen: dict[str, list[Tensor]] = {point.host: [] for point in points}
    handles = []
    try:
        for path, outputs in seen.items():

            def keep(_m: nn.Module, _i: Any, y: Tensor, to: list[Tensor] = outputs) -> None:
                to.append(y.clone())

            try:
                host = model.get_submodule(path)
            except AttributeError as error:
                raise RetrofitError(
                    f"the original, a {type(model).__name__}, has no {path}: compare the converted "
                    "model with the one that it was made from"
                ) from error
            handles.append(host.register_forward_hook(keep))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _compared(
    model: nn.Module,
    points: Iterable[_Point],
    seen: dict[str, list[Tensor]],
    comparisons: dict[str, Comparison],
) -> Iterator[None]:
    """Compare what each BatchNorm returns with what was seen."""
    handles = []
    calls: Counter[str] = Counter()
    try:
        for point in points:

            def compare(_m: nn.Module, _i: Any, y: Tensor, point: _Point = point) -> None:
                path = point.site.path
                number = calls[path] if point.number is None else point.number
                calls[path] += 1
                if number >= len(seen[point.host]):
                    raise RetrofitError(
                        f"the converted model calls the BatchNorm of {path} more often than the "
                        f"original calls {path}"
                    )
                comparisons[path].add(seen[point.host][number], y, path)

            handles.append(find_site(model, point.site)[1].register_forward_hook(compare))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for point in points:
        expected = len(seen[point.host]) if point.number is None else 1
        if calls[point.site.path] < expected:
            raise RetrofitError(
                f"the converted model calls the BatchNorm of {point.site.path} "
                f"{calls[point.site.path]} times, not {expected}"
            )
