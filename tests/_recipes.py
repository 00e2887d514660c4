"""How tests call recipes: by the command line, or directly with the settings that ``train`` would make.

A test module that imports this one is skipped where a package is missing that all recipes need.
"""

import argparse
from types import SimpleNamespace

import pytest

from cnnrnn_ext import __main__ as command
from cnnrnn_ext.recipes import cli


def require(*recipes):
    """Skips the test module where a package is missing that one of these recipes needs."""
    for module in (*cli.NEEDED, *(module for recipe in recipes for module in recipe.needs)):
        pytest.importorskip(module)


require()


def run(*options):
    """The exit status of ``python -m cnnrnn_ext`` with these options, in this process."""
    return command.main([str(option) for option in options])


def settings_of(recipe, **changes):
    """The defaults of the recipe's own options and of the harness's, with ``changes``."""
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    common = {
        "seed": 0, "epochs": 1, "batch_size": recipe.batch_size, "rate": recipe.rate, "patience": 5,
        "quick": True, "data": None, "bad_files": "refuse", "backend": "auto", "modules": "ours",
    }  # fmt: skip
    return SimpleNamespace(**{**common, **vars(parser.parse_args([])), **changes})
