"""Pictures of digits seen and heard. Lengths are in inches."""

import numpy as np

from cnnrnn_ext.recipes.drawing import INK, MARGIN, OURS, QUIET, RIGHT, area, page, save, styled
from cnnrnn_ext.recipes.drawing_speech import spectrogram

SHOWN, CELL = 6, 0.9  # frames of a strip; their side
SOUND = 2.6  # width of a spectrogram
ROW = 1.15


def examples(path, title, subtitle, samples):
    """samples: [(frames [T, 1, H, W], spectrogram [T', MELS], what it is, {condition: what the model
    says})]."""
    width, height = MARGIN + SHOWN * CELL + 0.6 + SOUND + 2.6, 1.5 + ROW * len(samples)
    with styled():
        figure = page(width, height, title, subtitle)
        for row, (frames, sound, truth, said) in enumerate(samples):
            top = 1.3 + row * ROW
            _strip(figure, frames, top)
            spectrogram(_place(figure, MARGIN + SHOWN * CELL + 0.6, top, SOUND, CELL), sound)
            for line, (condition, told) in enumerate({"truth": truth, **said}.items()):
                color = INK if condition == "truth" else RIGHT if told == truth else OURS
                figure.text(
                    1 - 2.35 / width, 1 - (top + 0.12 + 0.24 * line) / height,
                    f"{condition.replace('_', ' ')}: {told}", size=9, color=color, va="center",
                )  # fmt: skip
        save(figure, path)


def explanation(path, title, subtitle, shown):
    """shown: {"video": (frames [T, 1, H, W], relevance alike), "audio": (spectrogram [T', MELS], relevance
    alike)}, one of which may be missing."""
    width, height = 2 * MARGIN + SHOWN * CELL + 0.6 + SOUND + 0.2, 1.5 + 2 * ROW + 0.3
    with styled():
        figure = page(width, height, title, f"{subtitle} Red: what speaks for the answer; blue: against it.")
        if "video" in shown:
            frames, relevance = shown["video"]
            _strip(figure, frames, 1.35)
            _strip(figure, relevance, 1.35 + ROW, cmap="RdBu_r", **_limits(relevance))
        if "audio" in shown:
            sound, relevance = shown["audio"]
            left = MARGIN + SHOWN * CELL + 0.6
            spectrogram(_place(figure, left, 1.35, SOUND, CELL), sound)
            axes = _place(figure, left, 1.35 + ROW, SOUND, CELL)
            spectrogram(axes, relevance, cmap="RdBu_r", **_limits(relevance))
            axes.set_xlabel("seconds", size=8, color=QUIET)
        save(figure, path)


def _limits(relevance):
    """A scale that is the same for both signs, and that a few extreme points do not set."""
    bound = max(float(np.quantile(np.abs(np.asarray(relevance)), 0.995)), 1e-12)
    return {"vmin": -bound, "vmax": bound}


def _strip(figure, frames, top, **colours):
    """Evenly spaced frames, side by side."""
    colours = {"cmap": "gray", "vmin": -0.5, "vmax": 1.5, **colours}
    for column, frame in enumerate(np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)):
        axes = _place(figure, MARGIN + column * CELL, top, CELL - 0.06, CELL - 0.06)
        axes.imshow(np.asarray(frames[frame, 0]), **colours)
        axes.axis("off")


def _place(figure, left, top, wide, high):
    """Axes of this size, so far from the page's left and upper edge."""
    width, height = figure.get_size_inches()
    return area(figure, left, height - top - high, width - left - wide, top)
