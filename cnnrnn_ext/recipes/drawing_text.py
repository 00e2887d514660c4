"""Pictures of texts: a table of examples, and the tokens shaded by what they did for an answer."""

from matplotlib.colors import TwoSlopeNorm

from cnnrnn_ext.recipes import drawing
from cnnrnn_ext.recipes.drawing import INK, MARGIN, OURS, RIGHT

CELL, LINE, SIDE = 0.3, 0.62, 2.0  # inches: a character, between lines, the words at the left
ACROSS = 34  # characters of a line


def examples(path, title, subtitle, rows):
    """A table. rows: [(text, what the model said, what is right: None if unknown, "" if just that)]."""
    known = any(truth is not None for *_, truth in rows)
    columns = [("text", 6.0), ("the model", 3.4)] + [("right is", 1.9)] * known
    table = []
    for text, said, truth in rows:
        color = INK if truth is None else OURS if truth else RIGHT
        table.append([(text, INK), (said, color), *[(truth, INK)] * known])
    drawing.table(path, title, subtitle, columns, table)


def explanation(path, title, tokens, heat):
    """The tokens once for each answer.

    tokens: [(text, whether the model knows it)]; heat: {answer: a number for each token, above 0: it spoke
    for it, below: against it}.
    """
    tokens, known = zip(*tokens, strict=True)
    lines = _lines(tokens)
    longest = max(sum(_width(tokens[number]) for number in line) for line in lines)
    note = "" if all(known) else "\nStruck out: unknown to the model."
    width = 2 * MARGIN + SIDE + max(longest, 6.0)
    top = 1.35
    height = top + MARGIN + len(heat) * (len(lines) * LINE + 0.25)
    with drawing.styled():
        figure = drawing.page(
            width, height, title,
            f"Integrated gradients: red spoke for the answer, blue against it. ⊢ and ⊣: begin and end.{note}",
        )  # fmt: skip
        y = height - top
        for answer, values in heat.items():
            norm = TwoSlopeNorm(0, -(limit := max(map(abs, values)) or 1.0), limit)
            figure.text(MARGIN / width, (y - LINE / 2) / height, answer, va="center", weight="bold")
            for line in lines:
                x = MARGIN + SIDE
                for number in line:
                    x = _token(figure, x, y, tokens[number], known[number], values[number], norm)
                y -= LINE
            y -= 0.25
        drawing.save(figure, path)


def _width(token):
    return CELL * max(1.0, 0.45 * len(token))


def _lines(tokens):
    """Lists of token numbers that fit into the page's width."""
    lines, used = [[]], 0.0
    for number, token in enumerate(tokens):
        if used + _width(token) > ACROSS * CELL and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append(number)
        used += _width(token)
    return lines


def _token(figure, x, y, token, known, value, norm):
    """Draws a token at (x, y), its upper left corner; returns where the next one begins."""
    import matplotlib

    width, height = figure.get_size_inches()
    side = _width(token)
    axes = figure.add_axes((x / width, (y - LINE + 0.12) / height, side / width, (LINE - 0.16) / height))
    axes.set_facecolor(matplotlib.colormaps["RdBu_r"](norm(value)))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    dark = abs(norm(value) - 0.5) > 0.35
    color = "white" if dark else INK
    axes.text(0.5, 0.5, token, ha="center", va="center", size=13, color=color, parse_math=False)
    if not known:
        axes.axhline(0.5, 0.1, 0.9, color=color, linewidth=0.8)
    return x + side
