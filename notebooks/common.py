"""The first import of every notebook: what is missing said clearly, one style, quick mode."""

import csv
import os
import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
    import scipy  # noqa: F401
    from IPython.display import Markdown

    import retrofit  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the notebooks need {error.name}, which this kernel does not have: run "
        "`pip install '.[notebooks]'` in the project's folder, then restart the kernel"
    ) from None

QUICK = os.environ.get("QUICK") == "1"  # fewer pictures and steps, as in `make notebooks`

plt.style.use("retrofit.plots")
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))  # for `import pictures`

from markdown_table import markdown_table


def table(head, rows, file):
    """Show a table, and write it to `file`.csv in the folder that RESULTS names, if it does."""
    if folder := os.environ.get("RESULTS"):
        with Path(folder, f"{file}.csv").open("w", newline="") as lines:
            plain = [[cell.strip("*") for cell in row] for row in (head, *rows)]
            csv.writer(lines, lineterminator="\n").writerows(plain)
    return Markdown(markdown_table(head, rows))
