"""Recipes: from real data to a trained network and its predictions, one command each.

``python -m cnnrnn_ext train|evaluate|predict|explain <recipe>``; they need the packages of the ``recipes``
extra. :mod:`cnnrnn_ext.recipes.base` says what a recipe provides; the rest is the same for all of them.
"""

import importlib

# name: (module, class, one line for --help). A recipe's module is imported when the recipe is asked for.
RECIPES = {
    "video": ("cnnrnn_ext.recipes.video", "Video", "moving handwritten digits, or your clips: CNN → RNN"),
    "text": ("cnnrnn_ext.recipes.text", "Text", "the language of a name, or your labelled texts: RNN → CNN"),
    "speech": ("cnnrnn_ext.recipes.speech", "Speech", "spoken digits, or your recordings: CNN ∥ RNN"),
    "translation": (
        "cnnrnn_ext.recipes.translation",
        "Translation",
        "names into other languages: RNN → RNN with attention",
    ),
    "multimodal": (
        "cnnrnn_ext.recipes.multimodal",
        "Multimodal",
        "a digit seen and heard, either may be missing",
    ),
}


def recipe_class(name):
    """The :class:`base.Recipe` of this name."""
    module, attribute, _ = RECIPES[name]
    return getattr(importlib.import_module(module), attribute)
