"""A short training of a recipe in this process, alone or as one of several that the environment tells of.

``python _train_share.py FOLDER RECIPE:PORT...`` trains some in turn, with variables set as torchrun sets
them; the first process writes FOLDER/<recipe>.json, the loss of each step. Each training meets at its port.
"""

import json
import os
import sys
from pathlib import Path

import torch
from _recipes import settings_of

from cnnrnn_ext.recipes import checkpoints, harness, recipe_class

# Of few rows a step: so that a process meets steps in which all of its rows lack an input.
BATCH = {"multimodal": 4}
# By the built-in synthesiser: espeak-ng's sounds depend a little on what the process has said before.
SPOKEN = {"synthesiser": "builtin"}
TASKS = {
    "words": ("speech", {"task": "words", **SPOKEN}),
    "strings": ("speech", {"task": "strings", **SPOKEN}),
    "multimodal": ("multimodal", SPOKEN),
}
STEPS = 12


def losses(name, folder):
    """The loss of each step of an epoch of ``name``, a recipe or one of TASKS; None but in the first process.

    In float64, and without dropout, which every process draws for itself.
    """
    recipe, options = TASKS.get(name, (name, {}))
    size = BATCH.get(name, 8)
    settings = settings_of(recipe_class(recipe), batch_size=size, precision="64-true", **options)
    recipe = checkpoints.recipe_of(recipe, vars(settings))
    data = recipe.load()
    for split in ("train", "validation"):
        data.splits[split] = Few(data.splits[split], STEPS * size if split == "train" else 2)
    model = checkpoints.build(recipe, data.facts)
    for module in model.modules():
        for option in ("p", "dropout"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    history, first = harness.fit(recipe, data, model, Path(folder, name), progress=False)
    return history.losses if first else None


class Few:
    """The first rows of a split."""

    def __init__(self, split, count):
        self.split, self.count = split, min(count, len(split))

    def __len__(self):
        return self.count

    def __getattr__(self, name):
        return getattr(self.split, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    for name, port in (entry.split(":") for entry in names):
        os.environ["MASTER_PORT"] = port
        found = losses(name, folder)
        if found is not None:
            Path(folder, f"{name}.json").write_text(json.dumps(found))
