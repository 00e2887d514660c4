"""Several processes train as one, for every recipe; when one is killed, nothing is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _recipes import require, run
from _toy_recipe import Toy, toy
from _train_share import STEPS, losses

import cnnrnn_ext
from cnnrnn_ext.recipes import RECIPES, checkpoints, harness, recipe_class
from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.video import Video

require(*map(recipe_class, RECIPES))
ROOT = Path(cnnrnn_ext.__file__).parents[1]


# ---- shares ----


def test_shares_of_a_batch_make_the_batch():
    recipe = toy()
    split = recipe.load().splits["train"]
    alone = list(harness.TrainingBatches(recipe, split, 8, lambda: 1, 0, 1))
    shares = [list(harness.TrainingBatches(recipe, split, 8, lambda: 1, rank, 2)) for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 5
    for whole, first, second in zip(alone, *shares, strict=True):
        assert torch.equal(whole.inputs[0][::2], first.inputs[0])
        assert torch.equal(whole.inputs[0][1::2], second.inputs[0])
    rows = [harness.EvaluationBatches(recipe, range(77), rank, 3) for rank in range(3)]
    seen = sorted(row for part in rows for batch in part for row in batch.targets["label"].tolist())
    assert len(seen) == 77
    assert [len(part) for part in rows] == [1, 1, 1]


def test_batch_size_is_shared_or_refused():
    def size(wanted, rows, world, **changes):
        return harness.batch_size(toy(batch_size=wanted, **changes), rows, world)

    assert size(32, 100, 2) == 32
    assert size(32, 21, 2) == 20
    assert size(None, 1000, 2) == Toy.batch_size == 8
    assert size(None, 100, 1) == 6  # 16 steps
    assert size(None, 10, 1) == size(None, 10, 2) == 4
    assert size(None, 100, 4) == 4
    assert size(None, 100, 1, quick=True) == 8
    assert size(None, 3, 1) == 3
    with pytest.raises(RecipeError, match="--batch-size 33"):
        size(33, 100, 2)
    with pytest.raises(RecipeError, match="too few"):
        size(32, 1, 2)


# ---- two processes ----

TRAINED = ("video", "text", "words", "strings", "translation", "multimodal")


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """{recipe: the losses of two processes}, over gloo; both train all recipes one after the other."""
    folder = tmp_path_factory.mktemp("shared")
    world = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }  # fmt: skip
    named = [f"{name}:{port}" for name, port in zip(TRAINED, free_ports(len(TRAINED)), strict=True)]
    command = [sys.executable, str(Path(__file__).with_name("_train_share.py")), str(folder), *named]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in TRAINED}


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_lose_what_one_does(name, shared, tmp_path):
    """The loss of each step, in float64: the same but for the order in which gradients are added up. Of
    multimodal, steps in which a process has no row with one of the inputs are among them."""
    alone = losses(name, tmp_path)
    assert len(alone) == len(shared[name]) == STEPS
    assert len(set(alone)) == STEPS
    torch.testing.assert_close(torch.tensor(shared[name]), torch.tensor(alone), rtol=1e-5, atol=0)


def _children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers in /proc")
def test_two_processes_train_as_one_and_a_killed_worker_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    options = ["train", "video", "--quick", "--epochs", "40", "--hidden-size", "16", "--threads", "1"]
    both = tmp_path / "both"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "cnnrnn_ext"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*launcher, *options, "--output", both], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        began = time.monotonic()
        while not (both / "last.ckpt").exists() and process.poll() is None:
            assert time.monotonic() - began < 120
            time.sleep(0.05)
        os.kill(_children(process.pid)[-1], signal.SIGKILL)
        told = process.communicate(timeout=120)[0]
        assert process.returncode != 0
    assert "SIGKILL" in told or "another process of this training ended" in told
    content = checkpoints.read(both / "last.ckpt", "video")
    losses = content["run"]["history"]["losses"]
    epochs = len(losses) // 4
    assert epochs >= 1
    assert len(losses) == 4 * epochs < 160
    assert not (both / "metrics.json").exists()

    # One process alone, and one that goes on where the two were killed, both stopped an epoch later.
    batch = Video.batch
    left, allowed = [], []

    def stopping(self, split, rows, draws=None):
        if draws is not None:
            left.append(rows)
            if len(left) > allowed[0]:
                raise KeyboardInterrupt
        return batch(self, split, rows, draws)

    monkeypatch.setattr(Video, "batch", stopping)
    found = {}
    for folder, steps in ((tmp_path / "one", 4 * (epochs + 1)), (both, 4)):
        left.clear()
        allowed[:] = [steps]
        assert run(*options, "--output", folder) == 130
        history = checkpoints.read(folder / "last.ckpt", "video")["run"]["history"]
        assert len(history["losses"]) == 4 * (epochs + 1)
        found[folder] = history["losses"]
    # 64 samples' gradients added up in another order
    torch.testing.assert_close(
        torch.tensor(found[both]), torch.tensor(found[tmp_path / "one"]), rtol=0, atol=2e-4
    )
    assert losses == found[both][: 4 * epochs]
