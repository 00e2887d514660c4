"""A training step of a recipe's model on our kernels, on stock torch.nn modules and on the reference, paired.

Runs in a process of its own (:func:`_timing.run_tuned`), which reads the recipe and one batch from a file.
"""

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import torch

from cnnrnn_ext import _conditions, _files, _timing, backend, trace, unfuse_
from cnnrnn_ext.recipes import checkpoints
from cnnrnn_ext.recipes.base import Batch, RecipeError
from cnnrnn_ext.recipes.draws import Draws, order, seed_torch

OURS, STOCK, CHANNELS_LAST, REFERENCE = "cnnrnn_ext", "stock", "stock channels_last", "reference"


def measure_in_fresh_process(recipe, data, folder, size):
    """The comparison on the first training batch of ``size`` samples: step_ms {name: median}; ratios {name:
    {median, p25, p75}} of that contender's time over ours, paired; control (stock over itself); valid; losses
    {name: of that batch}; conditions. Leaves nothing in ``folder`` but what this returns."""
    seed, split = recipe.settings.seed, data.splits["train"]
    rows = order(len(split), seed, 0)[:size]
    batch = recipe.batch(split, rows, Draws(seed, 0, rows))
    path, result = folder / "comparison.pt", folder / "comparison.part.json"
    content = {**checkpoints.identity(recipe, data.facts), "batch": tuple(batch)}
    _files.replace(path, lambda file: torch.save(content, file))
    try:
        status = _timing.run_tuned(
            "cnnrnn_ext.recipes.comparison", path, result, "--threads", torch.get_num_threads()
        )
        if status:
            raise RecipeError(f"the comparison ended with exit status {status}")
        return _files.read_json(result)
    finally:
        path.unlink()
        result.unlink(missing_ok=True)


def measure(recipe, facts, batch):
    """See :func:`measure_in_fresh_process`."""
    steps, losses = {}, {}
    for name, model in contenders(recipe, facts).items():
        steps[name] = _step(recipe, model, batch, "reference" if name == REFERENCE else "auto")
        seed_torch(recipe.settings.seed)  # the same dropout
        losses[name] = steps[name]()
    with trace() as log:
        steps[OURS]()
    quick = {"turn_s": 0.01, "warmup": 1} if recipe.settings.quick else {"turn_s": 0.15}
    timings = _timing.paired(steps, 2 if recipe.settings.quick else 11, control=STOCK, **quick)
    return {
        "step_ms": {name: timings.median_ms(name) for name in steps},
        "ratios": {name: asdict(timings.ratio(name, OURS)) for name in steps if name != OURS},
        "control": asdict(timings.control),
        "valid": timings.valid,
        "losses": losses,
        "conditions": {
            **_conditions.conditions(),
            "kernels": _conditions.kernels(log),
            "step": f"forward, loss, backward, Adam on {_samples(batch)} samples, float32",
        },
    }


def contenders(recipe, facts):
    """{name: model} of the same weights. channels_last is there for networks with two-dimensional
    convolutions, some of which stock torch computes faster in that layout."""
    ours = checkpoints.build(recipe, facts)
    models = {OURS: ours, STOCK: copy.deepcopy(ours), REFERENCE: copy.deepcopy(ours)}
    unfuse_(models[STOCK])
    if any(isinstance(module, torch.nn.Conv2d) for module in models[STOCK].modules()):
        models[CHANNELS_LAST] = copy.deepcopy(models[STOCK]).to(memory_format=torch.channels_last)
    return models


def _step(recipe, model, batch, mode):
    """A function that does one training step and returns its loss; the learning rate is 0, so that each call
    does the same work on the same weights."""
    model.train()
    optimizer = torch.optim.Adam((w for w in model.parameters() if w.requires_grad), lr=0.0, fused=True)

    def step():
        with backend(mode):
            optimizer.zero_grad()
            total, count = recipe.loss(recipe.forward(model, batch), batch)
            loss = total / count
            loss.backward()
            optimizer.step()
        return loss.item()

    return step


def _samples(batch):
    first = batch.inputs
    while not isinstance(first, torch.Tensor):
        first = next(iter(first.values() if isinstance(first, dict) else first))
    return len(first)


def rows(compared):
    """Lines (name, value, remark) of the table that the command prints."""
    valid = "" if compared["valid"] else "VOID: the machine was busy; --compare-only measures again"
    for name, value in compared["step_ms"].items():
        ratio = compared["ratios"].get(name)
        told = f"{ratio['median']:.2f}× ours ({ratio['p25']:.2f} … {ratio['p75']:.2f})" if ratio else ""
        yield f"step, {name}", f"{value:.1f} ms", told
    yield "stock over itself", f"{compared['control']['median']:.2f}×", valid


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the file of measure_in_fresh_process")
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    content = _files.read_torch(arguments.path)
    recipe = checkpoints.recipe_of(content["name"], {**content["settings"], "modules": "ours"})
    result = measure(recipe, content["facts"], Batch(*content["batch"]))
    _files.replace_json(arguments.result, result)


if __name__ == "__main__":
    main()
