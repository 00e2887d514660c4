"""Pictures of translations: a table of examples, and where the decoder looked. Lengths are in inches."""

import numpy as np

from cnnrnn_ext.recipes.drawing import INK, MARGIN, OURS, QUIET, RIGHT, area, caption, page, save, styled

LINE = 0.27  # height of a row of the table


def examples(path, title, subtitle, rows):
    """A table. rows: [(language, source, what the model said, what is right or None)]."""
    width, height = 12.0, 1.75 + LINE * len(rows)
    places = (0.0, 0.7, 4.3, 8.1)  # of the columns, in inches
    with styled():
        figure = page(width, height, title, subtitle)
        axes = area(figure, MARGIN, MARGIN, MARGIN, 1.2)
        axes.axis("off")
        axes.set(xlim=(0, width - 2 * MARGIN), ylim=(len(rows) + 0.5, -0.5))
        for place, text in zip(places, ("to", "source", "the model", "right is"), strict=True):
            axes.text(place, 0, text, size=9, color=QUIET, va="center")
        for number, (language, source, said, truth) in enumerate(rows, 1):
            color = INK if truth is None else RIGHT if said == truth else OURS
            shown = "" if truth in (None, said) else truth
            texts, tints = (language, source, said, shown), (QUIET, INK, color, INK)
            for place, text, tint in zip(places, texts, tints, strict=True):
                axes.text(place, number, text, size=9, color=tint, va="center", parse_math=False)
        save(figure, path)


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
