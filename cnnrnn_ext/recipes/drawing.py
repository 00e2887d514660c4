"""The pictures' look, and the pictures that all recipes share. Lengths are in inches."""

import textwrap

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

OURS, STOCK, STOCK_TOO = "#d1495b", "#2e4057", "#8d99ae"
INK, QUIET, RIGHT = "#22262e", "#6b7280", "#2a7f62"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}
DPI = 160
MARGIN = 0.35  # around every picture
MANY = 20  # classes: above, the confusion matrix's cells carry no numbers


def page(width, height, title, subtitle):
    """A figure with its two headings; a title that is too long for the page ends in an ellipsis."""
    figure = Figure(figsize=(width, height), facecolor="white")
    longest = int((width - 2 * MARGIN) * 8)
    title = title if len(title) <= longest else title[: longest - 1] + "…"
    figure.text(MARGIN / width, 1 - 0.3 / height, title, size=15, weight="bold", va="top")
    figure.text(MARGIN / width, 1 - 0.66 / height, subtitle, size=10, color=QUIET, va="top", linespacing=1.4)
    return figure


def caption(figure, text):
    """Small print at the page's foot."""
    width, height = figure.get_size_inches()
    lines = textwrap.fill(text, int((width - 2 * MARGIN) * 17))
    figure.text(
        MARGIN / width, MARGIN * 0.7 / height, lines, size=8.5, color=QUIET, va="bottom", linespacing=1.5
    )


def area(figure, left, bottom, right, top):
    """Axes that keep these distances from the page's edges."""
    width, height = figure.get_size_inches()
    return figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )


def styled():
    """The context in which figures are made and saved."""
    return matplotlib.rc_context(STYLE)


def save(figure, path):
    figure.savefig(path, dpi=DPI)


def curve(path, history, score, title, chance=None):
    """The loss of each step and the validation score of each epoch.

    history: :class:`harness.History`; score: the score's name; chance: what guessing scores, or None.
    """
    with styled():
        figure = page(
            10, 4.6, title, f"{len(history.losses)} steps in {history.seconds:.0f} seconds of training."
        )
        axes = area(figure, 0.85, 0.75, 5.35, 1.35)
        losses = np.asarray(history.losses)
        steps = np.arange(1, len(losses) + 1)
        axes.plot(steps, losses, color=STOCK_TOO, linewidth=0.8, alpha=0.7, label="of the step")
        width = max(1, len(losses) // 50)
        if len(losses) > 2 * width > 2:
            smooth = np.convolve(losses, np.ones(width) / width, "valid")
            axes.plot(steps[width - 1 :], smooth, color=OURS, linewidth=1.8, label=f"mean of {width}")
        axes.set_title("Training loss", size=10, loc="left")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

        axes = area(figure, 5.65, 0.75, MARGIN, 1.35)
        epochs = np.arange(1, len(history.validation) + 1)
        values = [entry[score] for entry in history.validation]
        axes.plot(epochs, values, color=OURS, linewidth=1.8, marker="o", markersize=3)
        if chance is not None:
            axes.axhline(chance, color=QUIET, linewidth=0.8, linestyle=":")
            axes.text(1, chance, " guessing", size=8, color=QUIET, va="bottom")
        axes.set_title(f"Validation: {score.replace('_', ' ')}", size=10, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        save(figure, path)


def table(path, title, subtitle, columns, rows):
    """A table of texts. columns: [(heading, width)]; rows: [[(text, color) for each column]]."""
    line, width = 0.27, 2 * MARGIN + sum(wide for _, wide in columns)
    height = 1.6 + line * len(rows)
    headings = [(heading, QUIET) for heading, _ in columns]
    with styled():
        figure = page(width, height, title, subtitle)
        for number, cells in enumerate([headings, *rows]):
            left = MARGIN
            for (text, color), (_, wide) in zip(cells, columns, strict=True):
                most = int(wide * 13)
                text = text if len(text) <= most else text[: most - 1] + "…"
                figure.text(
                    left / width, 1 - (1.3 + line * number) / height, text, size=9, color=color,
                    va="center", parse_math=False,
                )  # fmt: skip
                left += wide
        save(figure, path)


def confusion(path, counts, names, head):
    """A confusion matrix [true][predicted] of counts: shades are shares of the true class."""
    counts = np.asarray(counts, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.trace(counts) / max(counts.sum(), 1)
    side = max(3.0, min(9.0, 0.42 * len(names)))
    left = 0.6 + 0.085 * max(len(str(name)) for name in names)
    width, height = max(left + side + MARGIN, 6.2), side + left + 1.3
    with styled():
        figure = page(
            width,
            height,
            f"{right:.1%} right" + ("" if head == "label" else f": {head}"),
            f"{int(counts.sum())} samples of the test split; rows are the truth.",
        )
        axes = figure.add_axes((left / width, left / height, side / width, side / height))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks = range(len(names))
        size = 9 if len(names) <= MANY else 6
        axes.set_xticks(ticks, names, rotation=90, size=size)
        axes.set_yticks(ticks, names, size=size)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted")
        if len(names) <= MANY:
            for row, column in np.argwhere(counts > 0):
                color = "white" if shares[row, column] > 0.5 else INK
                axes.text(
                    column, row, int(counts[row, column]), ha="center", va="center", size=8, color=color
                )
        save(figure, path)
