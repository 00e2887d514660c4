"""The demo's network against the same one built from stock torch.nn modules: losses and step times.

Runs in a process of its own (:func:`_timing.run_tuned`).
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cnnrnn_ext import _conditions, _timing, backend, trace, unfuse_
from cnnrnn_ext.demo import DemoError, training
from cnnrnn_ext.recipes.data import digits

FUSED = "cnnrnn_ext"
NCHW = "stock NCHW"
CHANNELS_LAST = "stock channels_last"
STOCK = (NCHW, CHANNELS_LAST)
# Training magnifies rounding a millionfold while it leaves its first plateau, so two float32 runs coincide
# for some dozens of steps only. How many is measured on stock itself: its two layouts compute the same
# function, and as long as their losses agree to this much, so must ours. In float64 the same magnification
# begins nine digits lower: there the curves show whether the two networks are one function.
REPRODUCIBLE = 1e-3


@dataclass(frozen=True)
class Plan:
    """How much is compared: epochs trained side by side, then steps in float64; rounds of the timing, and
    tries to get a quiet one.

    turn_s, warmup: see :func:`_timing.paired`.
    """

    epochs: int = 5
    exact_steps: int = 72
    rounds: int = 11
    attempts: int = 3
    turn_s: float = 0.15
    warmup: int = 5


def channels_last(module, inputs):
    """A forward pre-hook that lays out a convolution's input channels_last."""
    (input,) = inputs
    _, channels, height, width = input.shape
    if channels == 1:
        # Either layout stores one channel alike, and torch takes such a tensor for NCHW unless its strides
        # spell out the other.
        input = input.contiguous().as_strided(input.shape, (height * width, 1, width, 1))
    return input.contiguous(memory_format=torch.channels_last)


def build_all(seed):
    """{name: model}, all with the weights that ``training.build(seed)`` draws."""
    models = {name: training.build(seed) for name in (FUSED, *STOCK)}
    for name in STOCK:
        unfuse_(models[name])
    models[CHANNELS_LAST].to(memory_format=torch.channels_last)
    for module in models[CHANNELS_LAST].modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(channels_last)
    return models


def measure(recipe, plan, show_progress=True):
    """Trains the three networks on the same batches, then times a step of each in turns; see ``Returns``.

    Returns a dict: losses {name: one a step}, and losses_float64; apart: :func:`compare_losses`; step_ms
    {name: median}; best_stock; speedup {median, p25, p75} of FUSED over best_stock; control (NCHW over
    itself); valid; conditions.
    """
    scans = training.load_scans(recipe)
    models = build_all(recipe.seed)
    exact = {name: model.double() for name, model in build_all(recipe.seed).items() if name in (FUSED, NCHW)}
    steps = plan.epochs * recipe.steps_per_epoch(scans)
    optimizers, losses = train_side_by_side(models, scans, recipe, steps, show_progress)
    _, exact_losses = train_side_by_side(exact, scans, recipe, plan.exact_steps, show_progress)

    clips = digits.training_batch(scans["train"], recipe.batch, recipe.seed, 0)
    timings = time_steps(models, optimizers, clips, plan)
    step_ms = {name: timings.median_ms(name) for name in models}
    best_stock = min(STOCK, key=step_ms.get)
    return {
        "losses": losses,
        "losses_float64": exact_losses,
        "apart": compare_losses(losses, exact_losses),
        "step_ms": step_ms,
        "best_stock": best_stock,
        "speedup": asdict(timings.ratio(best_stock, FUSED)),
        "control": asdict(timings.control),
        "valid": timings.valid,
        "conditions": conditions(recipe, models[FUSED], clips),
    }


def train_side_by_side(models, scans, recipe, steps, show_progress):
    """({name: optimizer}, {name: losses}) of training all models on the same batches, in their own dtype."""
    from tqdm import tqdm

    schedule = recipe.epochs * recipe.steps_per_epoch(scans)
    optimizers = {name: training.optimizer_for(model, recipe) for name, model in models.items()}
    losses = {name: [] for name in models}
    dtype = next(iter(models[FUSED].parameters())).dtype
    name_of_run = f"comparing in {str(dtype).removeprefix('torch.')}"
    with tqdm(total=steps, desc=name_of_run, unit="step", disable=not show_progress, mininterval=0.5) as bar:
        for step in range(steps):
            clips = digits.training_batch(scans["train"], recipe.batch, recipe.seed, step)
            clips = replace(clips, frames=clips.frames.to(dtype))
            for name, model in models.items():
                training.set_rate(optimizers[name], recipe.rate_at(step, schedule))
                loss, _ = training.train_step(model, optimizers[name], clips)
                losses[name].append(loss.item())
            bar.update()
    return optimizers, losses


def compare_losses(losses, exact_losses):
    """How far the loss curves are apart at most: FUSED from NCHW (ours), CHANNELS_LAST from NCHW (stock).

    Returns {"steps": the steps over which stock agrees with itself to REPRODUCIBLE, "ours", "stock": over
    these, "all_steps", "ours_all", "stock_all": over every step, "exact_steps", "ours_exact": in float64}.
    """
    ours, stock = (difference(losses[name], losses[NCHW]) for name in (FUSED, CHANNELS_LAST))
    steps = next((step for step, apart in enumerate(stock) if apart > REPRODUCIBLE), len(stock))
    return {
        "steps": steps,
        "ours": max(ours[:steps], default=0.0),
        "stock": max(stock[:steps], default=0.0),
        "all_steps": len(ours),
        "ours_all": max(ours),
        "stock_all": max(stock),
        "exact_steps": len(exact_losses[FUSED]),
        "ours_exact": max(difference(exact_losses[FUSED], exact_losses[NCHW])),
    }


def difference(left, right):
    """|left − right| at each step."""
    return [abs(a - b) for a, b in zip(left, right, strict=True)]


def time_steps(models, optimizers, clips, plan):
    """Paired times of a training step (forward, loss, backward, Adam) on one batch that lies ready."""

    def contender(name):
        model, optimizer = models[name], optimizers[name]
        training.set_rate(optimizer, 0.0)  # the same work, and the same weights, at each call
        return lambda: training.train_step(model, optimizer, clips)

    contenders = {name: contender(name) for name in models}
    return _timing.paired_until_valid(
        contenders, plan.rounds, plan.attempts, control=NCHW, turn_s=plan.turn_s, warmup=plan.warmup
    )


def conditions(recipe, model, clips):
    """What the figures depend on, in words."""
    with trace() as log:
        training.train_step(model, training.optimizer_for(model, recipe), clips)
    return {
        **_conditions.conditions(),
        "kernels": _conditions.kernels(log),
        "step": f"forward, loss, backward, Adam on {recipe.batch} clips of {digits.FRAMES} frames, float32",
    }


# ---- the fresh process ----


def measure_in_fresh_process(recipe, plan, path, threads, mode, show_progress=True):
    """:func:`measure` in a new Python under the tuned allocator; the result is also left at ``path``."""
    status = _timing.run_tuned(
        "cnnrnn_ext.demo.comparison", path, "--threads", threads, "--backend", mode,
        "--recipe", json.dumps(asdict(recipe)), "--plan", json.dumps(asdict(plan)),
        *([] if show_progress else ["--no-progress"]),
    )  # fmt: skip
    if status:
        raise DemoError(f"the comparison with stock modules ended with exit status {status}")
    return json.loads(Path(path).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the JSON file to write")
    parser.add_argument("--recipe", type=json.loads, default={}, help="fields of training.Recipe, as JSON")
    parser.add_argument("--plan", type=json.loads, default={}, help="fields of Plan, as JSON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", choices=("auto", "compiled", "reference"), default="auto")
    parser.add_argument("--no-progress", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with backend(arguments.backend):
        result = measure(
            training.Recipe(**arguments.recipe),
            Plan(**arguments.plan),
            show_progress=not arguments.no_progress,
        )
    arguments.path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
