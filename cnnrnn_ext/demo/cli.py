"""``python -m cnnrnn_ext demo``: trains, compares, draws, and prints a short table."""

import json
import sys
from dataclasses import asdict

from cnnrnn_ext.demo import DemoError
from cnnrnn_ext.recipes.options import STOPPED, add_place, add_training, guarded, positive, prepare

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # module: package


def add_arguments(parser):
    add_place(parser, "out/demo")
    parser.add_argument("--epochs", type=positive, help="length of the training (default: the recipe's)")
    add_training(parser)


def run(arguments):
    """The whole demo; returns the exit status. ``arguments``: what add_arguments' parser gave."""
    return guarded(
        lambda: _run(arguments), what="demo", needed=NEEDED, extra="demo",
        stopped="The same command goes on from the last checkpoint.",
    )  # fmt: skip


def _run(arguments):
    # Here and not above: `python -m cnnrnn_ext --help` needs none of these.
    import torch

    from cnnrnn_ext import backend
    from cnnrnn_ext.demo import comparison, pictures, training
    from cnnrnn_ext.recipes.data import digits

    output, checkpoint = arguments.output, arguments.output / "checkpoint.pt"
    prepare(arguments)
    recipe = _recipe(arguments)
    model, optimizer, progress = _start(arguments, recipe, checkpoint)
    scans = training.load_scans(recipe)

    print(
        f"Training a CNN → LSTM on clips of {len(scans['train'])} handwritten digits, "
        f"{recipe.epochs} epochs of {recipe.steps_per_epoch(scans)} steps, "
        f"{torch.get_num_threads()} thread(s)" + (f", from step {progress.step}" if progress.step else ""),
        flush=True,
    )
    with backend(arguments.backend):
        if not training.fit(recipe, scans, model, optimizer, progress, checkpoint):
            print(
                f"Stopped after step {progress.step}. The same command goes on from there.", file=sys.stderr
            )
            return STOPPED
        test = digits.evaluation_clips(scans["test"], recipe.seed)
        predicted = training.predict(model, test)
    accuracy = training.accuracy(predicted, test)

    compared = comparison.measure_in_fresh_process(
        recipe,
        _plan(arguments, recipe),
        output / "comparison.json",
        torch.get_num_threads(),
        arguments.backend,
    )
    pictures.clips(output / "clips.png", test, predicted, accuracy)
    pictures.losses(output / "losses.png", compared)
    pictures.step_times(output / "step_times.png", compared)
    metrics = _metrics(recipe, progress, accuracy, compared, test)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _print_table(metrics, output)
    return 0


def _recipe(arguments):
    from cnnrnn_ext.demo.training import Recipe

    options = {"seed": arguments.seed}
    if arguments.quick:
        options |= {"epochs": 2, "scans": 64, "validate_every": 1}
    if arguments.epochs:
        options["epochs"] = arguments.epochs
    return Recipe(**options)


def _plan(arguments, recipe):
    from cnnrnn_ext.demo.comparison import Plan

    if arguments.quick:
        return Plan(epochs=1, exact_steps=3, rounds=2, attempts=1, turn_s=0.01, warmup=1)
    return Plan(epochs=min(Plan.epochs, recipe.epochs))


def _start(arguments, recipe, checkpoint):
    """(model, optimizer, progress): of the checkpoint where the options and its content say so, or new ones.

    Without --resume and --fresh an unfinished run goes on and a finished one (its metrics.json is there)
    starts anew.
    """
    from cnnrnn_ext.demo import training

    if arguments.resume and not checkpoint.exists():
        raise DemoError(f"{checkpoint}: there is no checkpoint to resume from")
    if checkpoint.exists() and not arguments.fresh:
        saved, model, optimizer, progress = training.load(checkpoint)
        finished = (arguments.output / "metrics.json").exists()
        if saved == recipe and (arguments.resume or not finished):
            return model, optimizer, progress
        if saved != recipe and (arguments.resume or not finished):
            changed = [name for name in vars(recipe) if getattr(saved, name) != getattr(recipe, name)]
            raise DemoError(
                f"{checkpoint}: belongs to a run with another {', '.join(changed)}; give the same options "
                "again, or --fresh to replace it, or --output to write elsewhere"
            )
    (arguments.output / "metrics.json").unlink(missing_ok=True)
    model = training.build(recipe.seed)
    return model, training.optimizer_for(model, recipe), training.Progress()


def _metrics(recipe, progress, accuracy, compared, test):
    from cnnrnn_ext.demo import comparison

    apart = compared["apart"]
    return {
        "test_accuracy_digit": accuracy["digit"],
        "test_accuracy_direction": accuracy["direction"],
        "test_clips": len(test),
        "train_seconds": progress.seconds,
        "train_steps": progress.step,
        "step_ms_fused": compared["step_ms"][comparison.FUSED],
        "step_ms_stock": compared["step_ms"][compared["best_stock"]],
        "step_ms": compared["step_ms"],
        "best_stock": compared["best_stock"],
        "speedup": compared["speedup"],
        "control": compared["control"],
        "timing_valid": compared["valid"],
        "loss_curve_max_abs_diff": apart["ours"],
        "loss_curve_steps": apart["steps"],
        "loss_curve_max_abs_diff_stock_layouts": apart["stock"],
        "loss_curve_all_steps": {
            "steps": apart["all_steps"],
            "max_abs_diff": apart["ours_all"],
            "max_abs_diff_stock_layouts": apart["stock_all"],
        },
        "loss_curve_float64": {"steps": apart["exact_steps"], "max_abs_diff": apart["ours_exact"]},
        "validation": progress.validation,
        "recipe": asdict(recipe),
        "conditions": compared["conditions"],
    }


def _print_table(metrics, output):
    from cnnrnn_ext.demo.comparison import FUSED

    speedup, control, conditions = metrics["speedup"], metrics["control"], metrics["conditions"]
    step_ms, valid = metrics["step_ms"], metrics["timing_valid"]
    later, exact = metrics["loss_curve_all_steps"], metrics["loss_curve_float64"]
    kernels = "; ".join(conditions["kernels"])
    rows = [
        ("test accuracy, digit", f"{metrics['test_accuracy_digit']:.2%}", f"{metrics['test_clips']} clips"),
        ("test accuracy, direction", f"{metrics['test_accuracy_direction']:.2%}", "of unseen scans"),
        ("training", f"{metrics['train_seconds']:.1f} s", f"{metrics['train_steps']} steps"),
        *(
            (f"step, {name}", f"{ms:.1f} ms", kernels if name == FUSED else "")
            for name, ms in step_ms.items()
        ),
        (
            "speed-up",
            f"{speedup['median']:.2f}×",
            f"over {metrics['best_stock']}, quartiles {speedup['p25']:.2f} … {speedup['p75']:.2f}",
        ),
        ("stock against itself", f"{control['median']:.2f}×", "" if valid else "VOID: the machine was busy"),
        (
            "loss curves apart by",
            f"{metrics['loss_curve_max_abs_diff']:.1e}",
            f"in the first {metrics['loss_curve_steps']} steps (stock's own layouts: "
            f"{metrics['loss_curve_max_abs_diff_stock_layouts']:.1e})",
        ),
        (
            "",
            f"{later['max_abs_diff']:.1e}",
            f"in {later['steps']} steps, rounding magnified (stock's own layouts: "
            f"{later['max_abs_diff_stock_layouts']:.1e})",
        ),
        ("", f"{exact['max_abs_diff']:.1e}", f"in {exact['steps']} steps in float64"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    print()
    for name, value, remark in rows:
        print(f"{name:<{widths[0]}}  {value:>{widths[1]}}  {remark}")
    print(
        f"\n{conditions['cpu']}, {conditions['threads']} thread(s), torch {conditions['torch']}, "
        f"allocator: {conditions['allocator']}\nPictures and metrics: {output}"
    )
