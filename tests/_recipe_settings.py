"""Settings of a recipe as ``train`` would make them, for tests that use a recipe directly."""

import argparse
from types import SimpleNamespace


def settings_of(recipe, **changes):
    """The defaults of the recipe's own options and of the harness's, with ``changes``."""
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    common = {
        "seed": 0, "epochs": 1, "batch_size": recipe.batch_size, "rate": recipe.rate, "patience": 5,
        "quick": True, "data": None, "bad_files": "refuse", "backend": "auto", "modules": "ours",
    }  # fmt: skip
    return SimpleNamespace(**{**common, **vars(parser.parse_args([])), **changes})
