"""The video recipe's pictures: strips of frames, with what the model says of them or what decided it."""

import torch

from cnnrnn_ext.recipes import drawing
from cnnrnn_ext.recipes.drawing import INK, MARGIN, OURS, QUIET, RIGHT

SHOWN = 8  # frames of a strip
CELL, GAP, SIDE = 0.86, 0.1, 3.1  # inches: a frame, between strips, the words beside one


def clips(path, title, subtitle, rows):
    """One strip for each of ``rows``: (frames [T, C, H, W] in 0 … 1, text, right: True, False or None)."""
    with drawing.styled():
        figure, place = _page(title, subtitle, len(rows))
        for number, (frames, text, right) in enumerate(rows):
            for column, frame in enumerate(_evenly(frames)):
                _show(place(number, column), frame)
            color = INK if right is None else RIGHT if right else OURS
            _words(figure, number, len(rows), text, color)
        drawing.save(figure, path)


def explanation(path, title, subtitle, frames, heat):
    """The clip, and below it, for each head, the frames with what counted for the answer.

    heat: {text: [T, H, W]}, above 0 for what spoke for the answer, below for what spoke against it.
    """
    rows = 1 + len(heat)
    with drawing.styled():
        figure, place = _page(title, subtitle, rows)
        picked = _evenly(list(range(len(frames))))
        for column, step in enumerate(picked):
            axes = place(0, column)
            _show(axes, frames[step])
            axes.set_title(f"frame {step + 1}", size=8, color=QUIET, pad=3)
        _words(figure, 0, rows, "the clip", INK)
        for number, (text, values) in enumerate(heat.items(), 1):
            limit = values.abs().flatten().quantile(0.995).clamp_min(1e-12).item()
            for column, step in enumerate(picked):
                axes = place(number, column)
                _show(axes, 0.35 * frames[step])
                shade = values[step].numpy() / limit
                axes.imshow(shade, cmap="RdBu_r", vmin=-1, vmax=1, alpha=abs(shade).clip(0, 1))
            _words(figure, number, rows, text, INK)
        drawing.save(figure, path)


def _evenly(items):
    if len(items) <= SHOWN:
        return items
    return [items[round(i * (len(items) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _page(title, subtitle, rows):
    """(figure, function (row, column) → axes)."""
    top = 1.55
    width = 2 * MARGIN + SHOWN * CELL + SIDE
    height = top + MARGIN + rows * (CELL + GAP)
    figure = drawing.page(width, height, title, subtitle)

    def place(row, column):
        y = height - top - (row + 1) * (CELL + GAP) + GAP
        side = CELL - 0.04
        return figure.add_axes(((MARGIN + column * CELL) / width, y / height, side / width, side / height))

    return figure, place


def _show(axes, frame):
    picture = frame.clamp(0, 1).permute(1, 2, 0).numpy()
    gray = picture.shape[2] == 1
    axes.imshow(picture[:, :, 0] if gray else picture, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def _words(figure, row, rows, text, color):
    width, height = figure.get_size_inches()
    y = MARGIN + (rows - row) * (CELL + GAP) - GAP - CELL / 2
    x = width - SIDE + 0.1
    figure.text(x / width, y / height, text, size=9, color=color, va="center", linespacing=1.5)


def plain(frames, facts):
    """Normalised frames [..., C, H, W] as they were, in 0 … 1."""
    mean, deviation = (torch.tensor(facts[name]).view(-1, 1, 1) for name in ("mean", "deviation"))
    return frames * deviation + mean
