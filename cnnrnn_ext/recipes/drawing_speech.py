"""Pictures of spectrograms: examples with what the model hears, and what decided it. Lengths are in
inches."""

import numpy as np

from cnnrnn_ext.recipes.data.spectrogram import HOP, LOWEST, MELS, SAMPLE_RATE, hertz_to_mel
from cnnrnn_ext.recipes.drawing import INK, MARGIN, OURS, QUIET, RIGHT, area, caption, page, save, styled

TICKS = (250, 1000, 4000)  # Hz
CELL, COLUMNS = (3.0, 1.5), 3  # size of an example; examples in a row


def spectrogram(axes, features, **colours):
    """features [T, MELS] over seconds and hertz."""
    seconds = len(features) * HOP / SAMPLE_RATE
    colours = {"cmap": "magma", "vmin": -2, "vmax": 3, **colours}
    image = axes.imshow(
        np.asarray(features).T, origin="lower", aspect="auto", extent=(0, seconds, 0, MELS), **colours
    )
    low, high = (float(hertz_to_mel(edge)) for edge in (LOWEST, SAMPLE_RATE / 2))
    places = [(float(hertz_to_mel(tick)) - low) / (high - low) * MELS for tick in TICKS]
    names = [f"{tick} Hz" if tick < 1000 else f"{tick // 1000} kHz" for tick in TICKS]
    axes.set_yticks(places, names, size=7)
    axes.tick_params(length=2, labelsize=7)
    axes.spines[:].set_visible(False)
    return image


def examples(path, title, subtitle, samples):
    """A page of spectrograms. samples: [(features [T, MELS], text, right)]; right: True, False or None, for
    unknown, which colours the text."""
    rows = -(-len(samples) // COLUMNS)
    width, height = COLUMNS * (CELL[0] + 0.55) + MARGIN, 1.25 + rows * (CELL[1] + 0.6)
    with styled():
        figure = page(width, height, title, subtitle)
        for number, (features, text, right) in enumerate(samples):
            row, column = divmod(number, COLUMNS)
            left, top = 0.55 + column * (CELL[0] + 0.55), 1.35 + row * (CELL[1] + 0.6)
            axes = area(figure, left, height - top - CELL[1], width - left - CELL[0], top)
            spectrogram(axes, features)
            color = {True: RIGHT, False: OURS, None: INK}[right]
            axes.set_title(text, size=8.5, loc="left", color=color, pad=3)
        save(figure, path)


def explanation(path, title, features, relevance, marks, note):
    """A spectrogram, and below it how much each point of it speaks for the answer (red) or against it (blue).

    features, relevance: [T, MELS]; marks: [(seconds, text)] to write over the picture; note: the small print.
    """
    with styled():
        figure = page(9, 6.2, title, "Above: what the model hears. Below: what in it decided.")
        axes = area(figure, 0.75, 3.55, MARGIN, 1.25)
        spectrogram(axes, features)
        for seconds, text in marks:
            axes.axvline(seconds, color="white", linewidth=0.8, linestyle=":")
            axes.text(seconds, MELS, f" {text}", size=9, color="white", va="top", weight="bold")
        axes = area(figure, 0.75, 1.3, MARGIN, 2.85)
        relevance = np.asarray(relevance)
        bound = max(float(np.quantile(np.abs(relevance), 0.995)), 1e-12)
        spectrogram(axes, relevance, cmap="RdBu_r", vmin=-bound, vmax=bound)
        axes.set_xlabel("seconds", size=8, color=QUIET)
        caption(figure, note)
        save(figure, path)
