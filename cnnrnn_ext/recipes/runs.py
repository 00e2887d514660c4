"""What the four commands do, once their options are read."""

import math
import statistics

import torch

from cnnrnn_ext import _conditions, _files, backend, trace
from cnnrnn_ext.recipes import checkpoints
from cnnrnn_ext.recipes.base import RecipeError, move, outputs_of
from cnnrnn_ext.recipes.base import evaluate as measure

# ---- train ----


def train(name, settings, folder, *, resume=False, fresh=False, compare=False, devices=1):
    """The whole of ``train``; returns the exit status. settings: a dict; see base.Recipe."""
    recipe = checkpoints.recipe_of(name, settings)
    before = None if fresh else _to_resume(recipe, folder, resume)
    data = recipe.load()
    if before is not None and before["run"]["facts"] != data.facts:
        raise RecipeError(
            f"{folder / checkpoints.LAST}: the data are no longer those of this run; --fresh starts anew"
        )

    from cnnrnn_ext.recipes import harness  # Lightning: seconds, and not before the user's mistakes are told

    with backend(recipe.settings.backend):
        model = checkpoints.build(recipe, data.facts)
        size = harness.batch_size(recipe, len(data.splits["train"]), 1)
        _announce(recipe, data, model, size, before)
        history, first = harness.fit(recipe, data, model, folder, resume=before, devices=devices)
        if not first:
            return 0
        _, _, model, _ = checkpoints.restore(folder / checkpoints.BEST, name)
        _finish(recipe, data, model, folder, history, size, compare, harness.processes(devices))
    return 0


def _to_resume(recipe, folder, wanted):
    """The checkpoint to go on from, or None to start anew.

    Without --resume and --fresh an unfinished run goes on; a finished one (its metrics.json is there) is
    replaced.
    """
    path = folder / checkpoints.LAST
    if not path.exists():
        if wanted:
            raise RecipeError(f"{path}: there is no checkpoint to resume from")
        return None
    finished = (folder / "metrics.json").exists()
    if finished and not wanted:
        return None
    content = checkpoints.read(path, recipe.name)
    saved, now = content["run"]["settings"], vars(recipe.settings)
    changed = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    if changed:
        raise RecipeError(
            f"{path}: belongs to a run with another {', '.join(changed)}; give the same options again, or "
            "--fresh to replace it, or --output to write elsewhere"
        )
    return checkpoints.restore(path, recipe.name)[3]  # whether its weights fit is told here, not by Lightning


def _announce(recipe, data, model, size, before):
    sizes = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    weights = sum(weight.numel() for weight in model.parameters())
    told = f", from epoch {len(before['run']['history']['validation']) + 1}" if before else ""
    print(
        f"{recipe.name}: {sizes}; {weights} parameters; at most {recipe.settings.epochs} epochs of "
        f"{len(data.splits['train']) // size} steps of {size}; {torch.get_num_threads()} thread(s){told}",
        flush=True,
    )


def _finish(recipe, data, model, folder, history, size, compare, processes):
    """Evaluates the best epoch, draws, writes metrics.json last: it says that the run is complete."""
    from cnnrnn_ext.recipes import comparison, drawing

    results = measure(recipe, model, [data.splits["test"]], data.facts)
    figures = recipe.further_figures(model, data)
    pictures = [folder / "training.png", *recipe.pictures(folder, model, data, results)]
    score = recipe.score
    title = f"{_written(results[score])} {score.replace('_', ' ')} on the test split"
    drawing.curve(pictures[0], history, score, title)
    compared = comparison.measure_in_fresh_process(recipe, data, folder, size) if compare else None
    metrics = {
        "recipe": recipe.name,
        "test": results,
        "test_samples": len(data.splits["test"]),
        "figures": figures,
        "best_epoch": history.best,
        "validation": history.validation,
        "epoch_losses": _epoch_means(history),
        "train_steps": len(history.losses),
        "train_seconds": history.seconds,
        "step_ms": statistics.median(history.step_ms),
        "data": data.report,
        "settings": vars(recipe.settings),
        "conditions": {
            **_conditions.conditions(),
            "backend": recipe.settings.backend,
            "modules": recipe.settings.modules,
            "precision": recipe.settings.precision,
            "processes": math.prod(processes),
            "kernels": _kernels(recipe, model, data),
        },
        **({"comparison": compared} if compared else {}),
    }
    _files.replace_json(folder / "metrics.json", metrics)
    lines = [
        *_rows(results),
        *((name, _written(value), "") for name, value in _flat(figures)),
        ("training", f"{history.seconds:.1f} s", f"{len(history.losses)} steps, best epoch {history.best}"),
        *(comparison.rows(compared) if compared else ()),
    ]
    _print_table(lines)
    _print_grids(figures)
    print(f"\nMetrics, checkpoints, {', '.join(path.name for path in pictures)}: {folder}")


def _epoch_means(history):
    steps = max(1, len(history.losses) // max(1, len(history.validation)))
    parts = [history.losses[i : i + steps] for i in range(0, len(history.losses), steps)]
    return [statistics.fmean(part) for part in parts]


def _kernels(recipe, model, data):
    """What one evaluation batch ran on."""
    with trace() as log:
        next(outputs_of(recipe, model, data.splits["test"], size=min(8, len(data.splits["test"]))))
    return _conditions.kernels(log) or ["torch.nn"]


# ---- the comparison alone ----


def compare(name, settings, folder):
    """Times a training step of the recipe's model and of its rivals; writes comparison.json, prints a table.
    Nothing else in ``folder`` is touched."""
    from cnnrnn_ext.recipes import comparison, harness

    recipe = checkpoints.recipe_of(name, settings)
    data = recipe.load()
    size = harness.batch_size(recipe, len(data.splits["train"]), 1)
    compared = comparison.measure_in_fresh_process(recipe, data, folder, size)
    _files.replace_json(folder / "comparison.json", compared)
    _print_table([*comparison.rows(compared), ("threads", str(compared["conditions"]["threads"]), "")])
    return 0


# ---- evaluate, predict, explain ----


def evaluate(recipe, facts, model, folder, own):
    """Prints and writes evaluation.json. own: whether the user named other data, all of which count then."""
    data = recipe.load(facts)
    splits = list(data.splits.values()) if own else [data.splits["test"]]
    with backend(recipe.settings.backend):
        measured = measure(recipe, model, splits, facts)
    count = sum(map(len, splits))
    _files.replace_json(
        folder / "evaluation.json", {"recipe": recipe.name, "samples": count, **measured, "data": data.report}
    )
    _print_table([*_rows(measured), ("samples", str(count), "")])
    return 0


def predict(recipe, facts, model, arguments):
    """(split, names, predictions) of what the command line names."""
    asked = recipe.read(arguments, facts)
    if asked is None:
        raise RecipeError("nothing to predict: name it on the command line (--help shows how)")
    split, names = asked
    predictions = []
    device = next(model.parameters()).device
    with torch.no_grad(), backend(recipe.settings.backend):
        for start in range(0, len(split), 64):
            batch = recipe.batch(split, list(range(start, min(start + 64, len(split)))))
            predictions += recipe.predict(model, move(batch, device), facts)
    return split, names, predictions


def explain(recipe, facts, model, arguments, picture):
    """The line that tells what ``picture`` shows: the first of the named inputs, or a test sample."""
    asked = recipe.read(arguments, facts)
    if asked is not None:
        (split, names), row = asked, 0
    else:
        split, row = recipe.load(facts).splits["test"], arguments.sample
        if row >= len(split):
            raise RecipeError(f"--sample {row}: the test split has {len(split)} samples")
        names = {row: f"test sample {row}"}
    picture.parent.mkdir(parents=True, exist_ok=True)
    with backend(recipe.settings.backend):
        return recipe.explain(picture, model, split, row, names[row], facts)


# ---- the table ----


def _rows(results):
    return [(name, _written(value), "") for name, value in _flat(results)]


def _flat(values, prefix=""):
    """(name, number) of the numbers in nested dicts but for grids (:func:`_is_grid`); tables and texts are
    for metrics.json alone."""
    for name, value in values.items():
        name = prefix + name.replace("_", " ")
        if isinstance(value, dict):
            if not _is_grid(value):
                yield from _flat(value, f"{name}, ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def _is_grid(value):
    """Whether this is {row: {column: number}}, with the same columns in each row."""
    rows = list(value.values()) if isinstance(value, dict) else []
    return bool(rows) and all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows)


def _written(value):
    if isinstance(value, int):
        return str(value)
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.3g}"


def _print_grids(figures):
    """A table for each grid among the figures."""
    for name, grid in figures.items():
        if _is_grid(grid):
            columns = [column.replace("_", " ") for column in next(iter(grid.values()))]
            cells = [(row, *map(_written, values.values())) for row, values in grid.items()]
            _print_columns([(name.replace("_", " "), *columns), *cells], numbers=len(columns))


def _print_table(rows):
    """rows: [(name, value, remark)]."""
    _print_columns(list(rows), numbers=1)


def _print_columns(rows, numbers):
    """rows: texts; those of ``numbers`` columns behind the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        cells = [
            f"{text:>{width}}" if 1 <= place <= numbers else f"{text:<{width}}"
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
