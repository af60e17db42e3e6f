"""How far tensors are from those they should equal, pooled over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.errors import NeitherTrueNorFalse, RetrofitError
from retrofit.numerics.moments import Moments, pooled
from retrofit.tables import in_full, in_short, shortened

# Of the root mean square: more than a GPU's rounding, less than another branch of a model's code.
BRANCH_TOLERANCE = 1e-3
MOST = 1 << 20  # squares; of 200 million float32 loses a third


@dataclass(frozen=True)
class Difference(NeitherTrueNorFalse):
    """How one tensor of the converted model differs from that of the original.

    Attributes:
        name: module path of a site, or where the tensor stands in the model's output.
        exact: equal everywhere, where NaN equals NaN and 0 equals -0.
        max_abs: largest absolute difference; inf where one has a NaN and the other a number.
        relative: the same divided by the original's root mean square.
        finite: the original has no NaN or Inf there.
    """

    name: str
    exact: bool
    max_abs: float
    relative: float
    finite: bool = True
    ask_for = "its exact, max_abs or relative"

    def __repr__(self) -> str:
        found = f"max abs {self.max_abs:.3g}, relative {self.relative:.3g}"
        not_finite = "" if self.finite else "; NaN or Inf in the original"
        verdict = "equal bit for bit" if self.exact else found
        return in_short(self, f"{shortened(self.name)}: {verdict}{not_finite}")

    def __str__(self) -> str:
        return in_full(self)


class Comparison:
    """Differences between pairs of tensors, pooled over batches."""

    def __init__(self) -> None:
        self.exact = self.finite = True
        self.max_abs = 0.0
        self.count = 0
        self.squares = self.squared_errors = 0.0

    def add(self, expected: Tensor, actual: Tensor, name: str) -> bool:
        """Add a pair; return whether it is equal."""
        if expected.shape != actual.shape:
            raise RetrofitError(
                f"{name} has shape {tuple(expected.shape)} in the original and "
                f"{tuple(actual.shape)} in the converted model"
            )
        actual = actual.to(expected.device)
        if expected.is_complex() and actual.is_complex():
            expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
        self.count += expected.numel()
        wide = expected if expected.dtype == torch.float64 else expected.float()
        norm = _norm(wide)
        if not math.isfinite(norm):  # infinities, NaN, or an overflow
            finite = wide.isfinite()
            self.finite &= bool(finite.all())
            norm = _norm(wide[finite].double())
        self.squares += norm * norm  # which may be infinite, while ** would raise
        if torch.equal(expected, actual):
            return True
        equal = (expected == actual) | (expected.isnan() & actual.isnan())
        if bool(equal.all()):
            return True
        error = expected.double() - actual.double()
        error = error.masked_fill(equal, 0.0).nan_to_num(nan=math.inf).abs()
        self.exact = False
        self.max_abs = max(self.max_abs, float(error.max()))
        self.squared_errors += float(error.square().sum())
        return False

    def difference(self, name: str) -> Difference:
        """Summarise all pairs added."""
        rms = math.sqrt(self.squares / max(self.count, 1))
        known = 0 < rms < math.inf
        relative = 0.0 if self.max_abs == 0 else self.max_abs / rms if known else math.inf
        return Difference(name, self.exact, self.max_abs, relative, self.finite)


class Variation:
    """How much tensors vary about their mean, pooled over batches in float64."""

    def __init__(self) -> None:
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        self.moments = Moments(zero, zero, zero)

    def add(self, x: Tensor) -> None:
        """Add a tensor of any shape; a complex number counts as two."""
        wide = (torch.view_as_real(x) if x.is_complex() else x).to("cpu", torch.float64)
        if wide.numel():
            M2, mean = torch.var_mean(wide, correction=0)
            count = wide.new_tensor(float(wide.numel()))
            self.moments = pooled(self.moments, Moments(count, mean, M2 * count))


def rms_over_std(errors: Iterable[Comparison], expected: Iterable[Variation]) -> float:
    """Divide the root mean square of the errors by the standard deviation expected.

    Of several tensors each varies about a mean of its own. Infinity where nothing varies, yet
    something differs.
    """
    squares = sum(error.squared_errors for error in errors)
    M2 = sum(float(one.moments.M2) for one in expected)
    if squares == 0:
        return 0.0
    return math.sqrt(squares / M2) if M2 > 0 else math.inf


def _norm(x: Tensor) -> float:
    """Compute the Euclidean norm; float32 adds up no more than a million squares, or a sample."""
    rows = x.split(max(1, MOST * len(x) // max(1, x.numel()))) if x.dim() else (x,)
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in rows))


def refuse_other_structure(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    """Raise RetrofitError where two outputs do not have the same tensors."""
    if expected.keys() != actual.keys():
        names = (", ".join(one) or "no tensor" for one in (expected, actual))
        raise RetrofitError(f"the outputs differ in structure: {' against '.join(names)}")


class Top1:
    """How often the largest output is the same, where the first output is (images, classes)."""

    def __init__(self) -> None:
        self.same = self.ranked = 0

    def add(self, expected: dict[str, Tensor], actual: dict[str, Tensor], images: int) -> None:
        """Add the outputs for one batch; other outputs than (images, classes) do not count."""
        name, first = next(iter(expected.items()), ("", None))
        nested = name.count("[") + name.count(".") > 1  # such as a detector's boxes
        if first is None or nested or first.is_complex():
            return
        if first.dim() == 2 and len(first) == images:
            other = actual[name].to(first.device)
            self.same += int((first.argmax(1) == other.argmax(1)).sum())
            self.ranked += len(first)

    @property
    def share(self) -> float | None:
        """Share of equal answers; None where there were none."""
        return self.same / self.ranked if self.ranked else None
