"""Pictures of translations: a table of examples, and where the decoder looked. Lengths are in inches."""

import numpy as np

from cnnrnn_ext.recipes import drawing
from cnnrnn_ext.recipes.drawing import INK, MARGIN, OURS, QUIET, RIGHT, area, caption, page, save, styled


def examples(path, title, subtitle, rows):
    """A table. rows: [(language, source, what the model said, what is right or None)]."""
    known = any(truth is not None for *_, truth in rows)
    named = any(language for language, *_ in rows)
    columns = [("to", 0.7)] * named + [("source", 3.6), ("the model", 3.8)] + [("right is", 3.8)] * known
    table = []
    for language, source, said, truth in rows:
        color = INK if truth is None else RIGHT if said == truth else OURS
        right = "" if truth in (None, said) else truth
        cells = [(language, QUIET)] * named + [(source, INK), (said, color)] + [(right, INK)] * known
        table.append(cells)
    drawing.table(path, title, subtitle, columns, table)


def attention(path, title, sources, targets, weights, note):
    """Which source tokens each target token was made from.

    sources, targets: texts of the tokens, S and T of them; weights [T, S]; note: the small print.
    """
    cell = 0.24
    width = max(6.5, 1.2 + cell * len(sources) + MARGIN)
    height = 2.6 + cell * len(targets)
    with styled():
        figure = page(width, height, title, "Rows: what was written, top to bottom. Columns: what was read.")
        side = len(sources) * cell
        axes = area(figure, 0.9, 1.0, width - 0.9 - side, 1.6)
        axes.imshow(np.asarray(weights), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(sources)), sources, size=9, parse_math=False)
        axes.set_yticks(range(len(targets)), targets, size=9, parse_math=False)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        caption(figure, note)
        save(figure, path)
