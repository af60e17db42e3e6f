"""A figure of what corruptions cost, and what adapting gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def draw_dots(
    accuracy: Callable[[str, int, str], float],
    corruptions: Iterable[str],
    severities: Sequence[int],
    ways: Sequence[str],
    clean: float,
    title: str,
    file: Path,
) -> None:
    """Draw a panel for each severity, with a line for each corruption and a dot for each way.

    Args:
        accuracy: of a corruption, a severity and a way, in per cent.
        corruptions: drawn in the order of what the hardest severity leaves of the first way.
        ways: the network as it is, and adapted.
        clean: accuracy on uncorrupted pictures, in per cent.
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415

    names = sorted(corruptions, key=lambda n: accuracy(n, severities[-1], ways[0]), reverse=True)
    plt.style.use("retrofit.plots")
    figure, panels = plt.subplots(
        1, len(severities), sharex=True, sharey=True, squeeze=False, figsize=(8, 4.4)
    )
    for axes, severity in zip(panels[0], severities, strict=True):
        for way in ways:
            found = [accuracy(name, severity, way) for name in names]
            axes.plot(found, names, linestyle="", markersize=6, label=way)
        axes.axvline(clean, color="black", linewidth=1, label="plain, uncorrupted")
        axes.set(xlabel="accuracy (%)", title=f"severity {severity}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
