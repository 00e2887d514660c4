"""``python -m cnnrnn_ext train|evaluate|predict|explain <recipe>``."""

import json
from pathlib import Path

from cnnrnn_ext.recipes import RECIPES, recipe_class
from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.options import (
    MODES,
    add_place,
    add_training,
    guarded,
    natural,
    positive,
    positive_number,
    prepare,
)

NEEDED = {  # module: package, for every recipe
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "captum": "captum",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}
# Options of train that decide nothing about the run: all others are saved in its checkpoints and must be the
# same when it goes on.
FREE = {"command", "recipe", "run", "output", "resume", "fresh", "threads", "compare", "compare_only",
        "devices"}  # fmt: skip
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def add_commands(commands, argv):
    """Adds the four commands to argparse's subparsers. A recipe's own options are added only where
    ``argv`` names that recipe: --help of the rest imports nothing."""
    actions = {
        "train": (_train_options, _train, "train a recipe's model; figures and pictures in out/<recipe>"),
        "evaluate": (
            _evaluate_options,
            _evaluate,
            "a model's figures on the test split or on your data",
        ),
        "predict": (_predict_options, _predict, "what a model says about your files or texts"),
        "explain": (_explain_options, _explain, "a picture of what decided a prediction"),
    }
    for action, (options, run, told) in actions.items():
        recipes = commands.add_parser(action, help=told).add_subparsers(
            dest="recipe", required=True, metavar="recipe"
        )
        for name, (_, _, summary) in RECIPES.items():
            parser = recipes.add_parser(name, help=summary, description=f"{action}: {summary}")
            if list(argv[:2]) == [action, name]:
                options(parser, recipe_class(name))
            parser.set_defaults(run=lambda arguments, run=run: _guarded(run, arguments))


# ---- options ----


def _common(parser, recipe):
    add_place(parser, f"out/{recipe.name}")
    parser.add_argument(
        "--bad-files",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with data that cannot be used (default: refuse, and name them)",
    )


def _train_options(parser, recipe):
    _common(parser, recipe)
    parser.add_argument("--data", type=Path, help="your own data (default: the embedded set)")
    parser.add_argument("--epochs", type=positive, help=f"at most (default {recipe.epochs})")
    parser.add_argument(
        "--batch-size",
        type=positive,
        help=f"samples of a step, all processes together (default {recipe.batch_size}, fewer of a small set)",
    )
    parser.add_argument(
        "--rate", type=positive_number, help=f"learning rate of Adam at its peak (default {recipe.rate:g})"
    )
    parser.add_argument(
        "--patience",
        type=positive,
        help=f"epochs behind the best score that end a run (default {recipe.patience})",
    )
    add_training(parser)
    compare = parser.add_mutually_exclusive_group()
    compare.add_argument(
        "--compare",
        action="store_true",
        help="behind the training, measure a step against stock torch.nn and the reference",
    )
    compare.add_argument(
        "--compare-only",
        action="store_true",
        help="measure that and train nothing: comparison.json in the output folder",
    )
    parser.add_argument("--modules", choices=("ours", "stock"), default="ours", help="stock: torch.nn's own")
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="as Lightning names it")
    parser.add_argument(
        "--devices",
        type=positive,
        default=1,
        help="processes, one a device (default 1; torchrun decides by itself)",
    )
    recipe.add_arguments(parser)


def _trained(parser, recipe):
    _common(parser, recipe)
    parser.add_argument("--checkpoint", type=Path, help="the model (default: the best one of --output)")
    parser.add_argument("--backend", choices=MODES, help="as in train (default: the run's)")
    parser.add_argument("--modules", choices=("ours", "stock"), help="as in train (default: the run's)")


def _evaluate_options(parser, recipe):
    _trained(parser, recipe)
    parser.add_argument("--data", type=Path, help="other data than the run's; all of them are evaluated")


def _predict_options(parser, recipe):
    _trained(parser, recipe)
    recipe.add_inputs(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--draw", type=Path, metavar="PNG", help="a picture of the inputs and what was said")


def _explain_options(parser, recipe):
    _trained(parser, recipe)
    recipe.add_inputs(parser)
    parser.add_argument(
        "--sample",
        type=natural,
        default=0,
        help="number of a test sample, explained where nothing is named (default 0)",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="where to draw (default: explanation.png in --output)"
    )


# ---- the commands ----


def _guarded(run, arguments):
    train = arguments.command == "train"
    return guarded(
        lambda: run(arguments), what="recipe", needed={**NEEDED, **recipe_class(arguments.recipe).needs},
        extra="recipes", stopped="The same command goes on after the last whole epoch." if train else "",
    )  # fmt: skip


def _train(arguments):
    from cnnrnn_ext.recipes.runs import compare, train

    recipe = recipe_class(arguments.recipe)
    settings = {name: value for name, value in vars(arguments).items() if name not in FREE}
    defaults = {name: getattr(recipe, name) for name in ("epochs", "rate", "patience")}
    defaults |= recipe.quick if arguments.quick else {}
    settings |= {name: value for name, value in defaults.items() if settings[name] is None}
    settings["data"] = str(arguments.data.absolute()) if arguments.data else None
    prepare(arguments)
    if arguments.compare_only:
        return compare(recipe.name, settings, arguments.output)
    return train(
        recipe.name,
        settings,
        arguments.output,
        resume=arguments.resume,
        fresh=arguments.fresh,
        compare=arguments.compare,
        devices=arguments.devices,
    )


def _evaluate(arguments):
    from cnnrnn_ext.recipes.runs import evaluate

    changes = {"data": str(arguments.data.absolute())} if arguments.data else {}
    return evaluate(*_checkpoint(arguments, changes), arguments.output, own=arguments.data is not None)


def _predict(arguments):
    from cnnrnn_ext.recipes.runs import predict

    recipe, facts, model = _checkpoint(arguments)
    split, names, predictions = predict(recipe, facts, model, arguments)
    if arguments.json:
        found = [{"name": name, **said} for name, said in zip(names, predictions, strict=True)]
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for name, said in zip(names, predictions, strict=True):
            print(f"{name}: {recipe.describe(said)}")
    if arguments.draw:
        recipe.draw(arguments.draw, split, names, predictions, facts)
    return 0


def _explain(arguments):
    from cnnrnn_ext.recipes.runs import explain

    picture = arguments.picture or arguments.output / "explanation.png"
    print(f"{explain(*_checkpoint(arguments), arguments, picture)}\n{picture}")
    return 0


def _checkpoint(arguments, changes=None):
    """(recipe, facts, model) that the options name."""
    from cnnrnn_ext.recipes import checkpoints

    prepare(arguments)
    path = arguments.checkpoint or arguments.output / checkpoints.BEST
    if not path.exists():
        raise RecipeError(f"{path}: no such checkpoint; train first, or name one with --checkpoint")
    wanted = {name: getattr(arguments, name) for name in ("backend", "modules")}
    changes = {**(changes or {}), **{name: value for name, value in wanted.items() if value is not None}}
    return checkpoints.restore(path, arguments.recipe, **changes, bad_files=arguments.bad_files)[:3]
