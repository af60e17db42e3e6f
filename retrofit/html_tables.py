"""Results as HTML for a notebook: tables, with bars beside their numbers.

They need no script and nothing from elsewhere, and take the colours of the page, light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from retrofit.tables import shortened

SHOWN = 10  # rows of a long table; the others fold
LONGEST = 80  # characters of a name or reason; longer ones lose their middle

# Greys that are half transparent stand out from a light page and from a dark one. The class stands
# twice where a rule of Jupyter's own, which has two, would else win.
STYLE = """\
<style>
.retrofit-view { max-width: 100%; overflow-x: auto; }
.retrofit-view p { margin: 0 0 .6em; }
.retrofit-view table {
  border-collapse: collapse; margin: 0 0 1em; table-layout: auto; min-width: min(100%, 32em);
}
.retrofit-view.retrofit-view table { font-size: inherit; }
.retrofit-view caption {
  caption-side: top; padding: .4em 0; text-align: left; color: inherit;
}
.retrofit-view.retrofit-view th, .retrofit-view.retrofit-view td {
  padding: .25em 1em .25em 0; border: 0; border-bottom: 1px solid rgb(128 128 128 / .4);
  text-align: left; vertical-align: baseline; overflow-wrap: break-word;
}
.retrofit-view.retrofit-view tbody th { font-weight: normal; }
.retrofit-view.retrofit-view .number {
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
}
.retrofit-view .bar {
  display: inline-block; width: 6em; height: .7em; margin-left: .7em;
  border: 1px solid rgb(128 128 128 / .7);
}
.retrofit-view .bar span { display: block; height: 100%; background: currentColor; opacity: .55; }
.retrofit-view summary { cursor: pointer; padding: .2em 0; }
</style>
"""


class Bar(NamedTuple):
    """A number with a bar beside it.

    Attributes:
        text: the number.
        share: of the bar that is filled, from 0 to 1.
    """

    text: str
    share: float


def view(*parts: str) -> str:
    """Put the parts together to what `_repr_html_` returns."""
    return f'<div class="retrofit-view">\n{STYLE}{"".join(parts)}</div>'


def paragraph(text: str) -> str:
    """Write a sentence."""
    return f"<p>{_escaped(text, 4 * LONGEST)}</p>\n"


def html_table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Bar]],
    right: Sequence[str] = (),
) -> str:
    """Write a table; of one that is long the first rows, and the others to unfold.

    Args:
        caption: what it shows.
        header: heads of the columns; none for a table of facts, each with its name before it.
        rows: cells, the first of which heads its row.
        right: heads of the columns that are flush right, as those of bars are.
    """
    head = [h in right or any(isinstance(r[i], Bar) for r in rows) for i, h in enumerate(header)]
    numbers = head or [False] * max(map(len, rows), default=0)
    if len(rows) <= SHOWN + 2:  # to unfold two takes as much room as they do
        return _one_table(caption, header, rows, numbers)
    rest = f"rows {SHOWN + 1} to {len(rows)}"
    return (
        _one_table(caption, header, rows[:SHOWN], numbers)
        + f"<details>\n<summary>{len(rows) - SHOWN:,} more rows</summary>\n"
        + _one_table(rest, header, rows[SHOWN:], numbers)
        + "</details>\n"
    )


def unfolding_list(summary: str, names: Sequence[str]) -> str:
    """Write names, numbered from 1, that are to be seen only by those who unfold the summary."""
    items = "".join(f"<li>{_breakable(_escaped(name, LONGEST))}</li>\n" for name in names)
    head = f"<summary>{_escaped(summary, 4 * LONGEST)}</summary>\n"
    return f"<details>\n{head}<ol>\n{items}</ol>\n</details>\n"


def of_largest(value: float, values: Sequence[float]) -> float:
    """Return the share that a value has of the largest, for a bar."""
    largest = max(values, default=0.0)
    return 1.0 if math.isinf(value) else value / largest if largest > 0 else 0.0


def _one_table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Bar]],
    numbers: Sequence[bool],
) -> str:
    lines = [f"<table>\n<caption>{_escaped(caption, 4 * LONGEST)}</caption>\n"]
    if header:
        cells = (_cell(*one, scope="col") for one in zip(header, numbers, strict=True))
        lines.append(f"<thead><tr>{''.join(cells)}</tr></thead>\n")
    lines.append("<tbody>\n")
    for first, *others in rows:
        cells = (_cell(*one) for one in zip(others, numbers[1:], strict=True))
        lines.append(f"<tr>{_cell(first, numbers[0], scope='row')}{''.join(cells)}</tr>\n")
    return "".join([*lines, "</tbody>\n</table>\n"])


def _cell(value: str | Bar, number: bool, scope: str = "") -> str:
    tag = f'th scope="{scope}"' if scope else "td"
    kind = ' class="number"' if number else ""
    text = _escaped(value.text if isinstance(value, Bar) else value, LONGEST)
    if not number:
        text = _breakable(text)
    bar = _drawn(value.share) if isinstance(value, Bar) else ""
    return f"<{tag}{kind}>{text}{bar}</{tag[:2]}>"


def _drawn(share: float) -> str:
    filled = 100 * min(max(share, 0.0), 1.0) if share == share else 0.0  # noqa: PLR0124 - NaN
    return f'<span class="bar" aria-hidden="true"><span style="width: {filled:.1f}%"></span></span>'


def _breakable(path: str) -> str:
    return path.replace(".", ".<wbr>")


def _escaped(text: str, most: int) -> str:
    return escape(shortened(text, most))
