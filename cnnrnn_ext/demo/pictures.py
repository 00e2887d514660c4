"""The demo's pictures: a title says what was found, whatever it was; a caption, under which conditions."""

import math

import matplotlib
import torch

from cnnrnn_ext.demo.comparison import CHANNELS_LAST, FUSED, NCHW, REPRODUCIBLE, difference
from cnnrnn_ext.recipes.data import digits
from cnnrnn_ext.recipes.drawing import (
    DPI,
    INK,
    MARGIN,
    OURS,
    QUIET,
    RIGHT,
    STOCK,
    STOCK_TOO,
    STYLE,
    area,
    caption,
    page,
)

COLORS = {FUSED: OURS, NCHW: STOCK, CHANNELS_LAST: STOCK_TOO}
ARROWS = {"right": "→", "left": "←", "down": "↓", "up": "↑"}
PLAIN = 0.01  # smaller numbers are written with a power of ten


def clips(path, test, predicted, accuracy, count=6):
    """A strip of frames for some test clips, with what the network says of each, an error included."""
    chosen = _choose(test, predicted, count)
    shown = range(0, digits.FRAMES, 2)
    cell, gap, side, top, bottom = 0.86, 0.1, 2.5, 1.55, 0.75
    width = 2 * MARGIN + len(shown) * cell + side
    height = top + bottom + len(chosen) * (cell + gap)
    with matplotlib.rc_context(STYLE):
        figure = page(
            width,
            height,
            f"{accuracy['digit']:.1%} of digits and {accuracy['direction']:.1%} of directions are right",
            "Clips of handwritten digits that training never saw. The CNN reads every frame, the LSTM joins\n"
            "them: no single frame tells the direction. A digit that leaves on one side comes back.",
        )
        for row, clip in enumerate(chosen):
            y = height - top - (row + 1) * (cell + gap) + gap
            for column, frame in enumerate(shown):
                axes = figure.add_axes(
                    (
                        (MARGIN + column * cell) / width,
                        y / height,
                        (cell - 0.04) / width,
                        (cell - 0.04) / height,
                    )
                )
                axes.imshow(test.frames[clip, frame, 0].numpy(), cmap="gray", vmin=0, vmax=1)
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(f"frame {frame + 1}", size=8, color=QUIET, pad=3)
            _verdict(figure, test, predicted, clip, (width - side, y + cell / 2))
        caption(
            figure,
            f"Every second of {digits.FRAMES} frames. Accuracy over {len(test)} clips: each unseen digit "
            "in each of the four directions.",
        )
        figure.savefig(path, dpi=DPI)


def _choose(test, predicted, count):
    """Indices of ``count`` clips: different digits, directions in turn; a wrong one last if there is any."""
    right = torch.stack([predicted[head] == label for head, label in test.labels().items()]).all(0)
    wrong = (~right).nonzero().flatten().tolist()[:1]
    chosen = []
    for i in right.nonzero().flatten().tolist():
        in_turn = test.direction[i] == len(chosen) % len(digits.DIRECTIONS)
        if in_turn and test.digit[i] not in test.digit[chosen] and len(chosen) + len(wrong) < count:
            chosen.append(i)
    return chosen + wrong


def _verdict(figure, test, predicted, clip, place):
    width, height = figure.get_size_inches()
    x, y = place
    said = (int(predicted["digit"][clip]), digits.DIRECTIONS[predicted["direction"][clip]])
    true = (int(test.digit[clip]), digits.DIRECTIONS[test.direction[clip]])
    color = RIGHT if said == true else OURS
    figure.text(
        x / width,
        y / height,
        f"{said[0]} {ARROWS[said[1]]}",
        size=20,
        weight="bold",
        color=color,
        va="center",
    )
    words = "both right" if said == true else f"truth: {true[0]} {ARROWS[true[1]]}"
    figure.text(
        (x + 0.85) / width,
        y / height,
        f"{said[0]}, moving {said[1]}\n{words}",
        size=9,
        color=color,
        va="center",
        linespacing=1.5,
    )


def _number(value):
    """0.25 → 0.25, 0.00012 → 1.2×10⁻⁴ as matplotlib writes it."""
    if value == 0 or value >= PLAIN:
        return f"{value:.2g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}×10$^{{{int(exponent)}}}$"


def _positive(values):
    """What is equal to the last bit has no place on a logarithmic axis."""
    return [value or math.nan for value in values]


def losses(path, compared):
    """The loss curves of ours and stock, and how far apart they are."""
    ours, stock, other = (compared["losses"][name] for name in (FUSED, NCHW, CHANNELS_LAST))
    steps, apart = range(1, len(ours) + 1), compared["apart"]
    # Twice: two runs that both go their own way are not equally far from a third at each moment.
    as_stock = apart["ours"] <= 2 * REPRODUCIBLE and apart["ours_all"] <= 2 * max(
        apart["stock_all"], REPRODUCIBLE
    )
    with matplotlib.rc_context(STYLE):
        figure = page(
            10,
            5.1,
            "The losses follow torch.nn as closely as torch.nn follows itself"
            if as_stock
            else "The losses part from those of torch.nn",
            f"The same network on the same batches: at most {_number(apart['ours'])} apart in the first "
            f"{apart['steps']} steps, stock's two layouts {_number(apart['stock'])}.",
        )
        left, bottom, top = 0.85, 1.35, 1.25
        axes = area(figure, left, bottom, 5.45, top)
        axes.plot(
            steps, ours, color=OURS, linewidth=5, alpha=0.45, label="cnnrnn_ext", solid_capstyle="round"
        )
        axes.plot(steps, stock, color=STOCK, linewidth=1.2, label="stock torch.nn")
        axes.set_title("Loss: both heads' cross-entropy", size=10, loc="left")
        axes.set_xlabel("step")
        axes.legend(loc="lower left")
        axes.set_ylim(bottom=0, top=1.08 * max(ours + stock))

        axes = area(figure, 5.7, bottom, MARGIN, top)
        axes.axvspan(0, apart["steps"], color=RIGHT, alpha=0.1, linewidth=0)
        for values, color, label in (
            (other, STOCK_TOO, "stock's two layouts from each other"),
            (ours, OURS, "cnnrnn_ext from stock"),
        ):
            axes.semilogy(
                steps, _positive(difference(values, stock)), color=color, linewidth=1.4, label=label
            )
        exact = _positive(difference(*compared["losses_float64"].values()))
        axes.semilogy(
            range(1, len(exact) + 1), exact, color=OURS, linewidth=1.4, linestyle=":", label="both in float64"
        )
        axes.set_xlim(0, len(ours) + 1)
        axes.set_ylim(top=1e5)
        axes.set_title("How far the losses are apart", size=10, loc="left")
        axes.set_xlabel("step")
        axes.legend(loc="upper left")
        caption(
            figure,
            "Sums in another order round differently, and training magnifies that at each step until the "
            "runs go their own ways. Shaded: the steps in which stock's own two layouts still agree to "
            f"{_number(REPRODUCIBLE)}. Over all {len(ours)} steps ours is at most "
            f"{_number(apart['ours_all'])} from stock, stock's layouts {_number(apart['stock_all'])} from "
            f"each other. In float64 the networks stay within {_number(apart['ours_exact'])} over "
            f"{apart['exact_steps']} steps: they are one function.",
        )
        figure.savefig(path, dpi=DPI)


def step_times(path, compared):
    """Bars of the step times, with the conditions in the caption."""
    speedup, control, conditions = compared["speedup"], compared["control"], compared["conditions"]
    names = [FUSED, *sorted((NCHW, CHANNELS_LAST), key=compared["step_ms"].get)]
    best = compared["best_stock"]
    if not compared["valid"]:
        title = "The machine was too busy for a fair timing"
    elif speedup["median"] >= 1:
        title = f"Training steps run {speedup['median']:.1f}× as fast as with stock torch.nn"
    else:
        title = f"Training steps take {1 / speedup['median']:.1f}× as long as with stock torch.nn"
    with matplotlib.rc_context(STYLE):
        figure = page(10, 3.9, title, f"One step of the CNN → LSTM: {conditions['step']}. Shorter is better.")
        axes = area(figure, 2.0, 1.35, 1.0, 1.1)
        times = [compared["step_ms"][name] for name in names]
        axes.barh(names, times, color=[COLORS[name] for name in names], height=0.62)
        axes.invert_yaxis()
        for row, value in enumerate(times):
            axes.text(value, row, f"  {value:.1f} ms", va="center", weight="bold")
        axes.tick_params(axis="y", length=0, labelsize=11, labelcolor=INK)
        axes.xaxis.set_visible(False)
        axes.spines[["bottom", "left"]].set_visible(False)
        caption(
            figure,
            f"{conditions['cpu']}, {conditions['threads']} thread(s); torch {conditions['torch']}; "
            f"allocator: {conditions['allocator']}; {'; '.join(conditions['kernels'])}. Contenders took "
            f"turns in one process; the speed-up is the median of the paired ratios to {best} (quartiles "
            f"{speedup['p25']:.2f} to {speedup['p75']:.2f}). Control, stock against itself: "
            f"{control['median']:.2f}"
            + ("." if compared["valid"] else ", outside 1.00 ± 0.05: the figures are void."),
        )
        figure.savefig(path, dpi=DPI)
