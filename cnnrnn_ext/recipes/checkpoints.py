"""The checkpoints of a recipe's run, and the run's recipe and model made anew from one."""

from types import SimpleNamespace

from cnnrnn_ext import _files, unfuse_
from cnnrnn_ext.recipes import RECIPES, recipe_class
from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.draws import seed_torch

FORMAT = "cnnrnn_ext recipe checkpoint 1"
BEST, LAST = "best.ckpt", "last.ckpt"  # weights alone of the best epoch; all that a resumed run needs
PREFIX = "model."  # of the model's parameters among those of the Lightning module
HINT = "the file was left as it is; --fresh replaces it, --output writes elsewhere"
INITIAL = 0  # what torch's generator is seeded for: the weights (harness.py has the others)


def identity(recipe, facts):
    """What a checkpoint tells about its run."""
    return {"format": FORMAT, "name": recipe.name, "settings": vars(recipe.settings), "facts": facts}


def read(path, name):
    """The content of the checkpoint at ``path``, of the recipe ``name``; never writes to it.

    Raises RecipeError, which names the file, if it is damaged or not of this recipe.
    """
    try:
        content = _files.read_torch(path)
    except _files.DamagedFile as error:
        raise RecipeError(f"{path}: {error} ({HINT})") from error
    run = content.get("run") if isinstance(content, dict) else None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise RecipeError(f"{path}: not a checkpoint of a recipe, or of another version ({HINT})")
    if run.get("name") != name:
        known = run.get("name") if run.get("name") in RECIPES else "another"
        raise RecipeError(f"{path}: a checkpoint of the recipe {known}, not of {name}")
    lacking = {"settings", "facts", "history"} - run.keys() or {"state_dict"} - content.keys()
    if lacking:
        raise RecipeError(f"{path}: damaged checkpoint: {', '.join(sorted(lacking))} missing ({HINT})")
    return content


def recipe_of(name, settings):
    """The recipe ``name`` with these settings, a dict."""
    return recipe_class(name)(SimpleNamespace(**settings))


def build(recipe, facts):
    """The recipe's model with its initial weights; of stock modules if the settings say so."""
    seed_torch(recipe.settings.seed, INITIAL)
    model = recipe.build(facts)
    if recipe.settings.modules == "stock":
        unfuse_(model)
    return model


def restore(path, name, **changes):
    """(recipe, facts, model, content) of a checkpoint, the model in eval mode.

    changes: settings to replace (another ``data``, ``backend`` or ``modules``).
    """
    content = read(path, name)
    recipe = recipe_of(name, {**content["run"]["settings"], **changes})
    facts = content["run"]["facts"]
    weights = {
        key.removeprefix(PREFIX): value
        for key, value in content["state_dict"].items()
        if key.startswith(PREFIX)
    }
    try:
        model = build(recipe, facts)
        model.load_state_dict(weights)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{path}: its content does not fit: {str(error).splitlines()[0]} ({HINT})"
        ) from error
    return recipe, facts, model.eval(), content
