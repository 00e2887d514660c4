"""The training on Lightning. Importing this module imports Lightning, which takes seconds.

What keeps a step cheap: nothing is logged within an epoch, nothing waits for the device (the losses are
stacked at the epoch's end), and there are no loggers, sanity runs or summaries.

A run can be stopped anywhere and goes on from the last whole epoch as if it had not been: the order of the
samples and what they look like follow from the seed, the epoch and the row, the learning rate from the step,
dropout from the seed, the epoch and the process.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from tqdm import tqdm

from cnnrnn_ext import _files
from cnnrnn_ext.models import MultiModal
from cnnrnn_ext.recipes import checkpoints
from cnnrnn_ext.recipes.base import Batch, RecipeError, move
from cnnrnn_ext.recipes.draws import Draws, order, seed_torch
from cnnrnn_ext.recipes.schedule import rate_at

EPOCH = 1  # what torch's generator is seeded for (checkpoints.INITIAL is the other)
EVALUATION_BATCH = 64
FEWEST, STEPS = 4, 16  # samples of a step; steps of an epoch: of a small set, where the user says neither
CLIP = 5.0  # the gradient's norm, at most: a recurrent network's can explode in a single step


@dataclass
class History:
    """What happened so far. losses: one a step; validation: one a whole epoch; best: the best one's number
    (from 1), of equal ones the last; step_ms: of the last epoch's steps, data included; seconds: of training
    and validation."""

    losses: list = field(default_factory=list)
    validation: list = field(default_factory=list)
    best: int = 0
    step_ms: list = field(default_factory=list)
    seconds: float = 0.0


class TrainingBatches:
    """The batches of the current epoch, this process's share of each: an iterable that Lightning takes.

    epoch: a function that tells the epoch's number when it begins.
    """

    def __init__(self, recipe, split, size, epoch, rank, world):
        self.recipe, self.split, self.size, self.epoch = recipe, split, size, epoch
        self.rank, self.world = rank, world

    def __len__(self):
        return len(self.split) // self.size

    def __iter__(self):
        epoch, seed = self.epoch(), self.recipe.settings.seed
        rows = order(len(self.split), seed, epoch)
        for start in range(0, len(self) * self.size, self.size):
            part = rows[start + self.rank : start + self.size : self.world]
            yield self.recipe.batch(self.split, part, Draws(seed, epoch, part))


class EvaluationBatches:
    """Every row of a split once, shared by the processes."""

    def __init__(self, recipe, split, rank, world):
        self.recipe, self.split, self.rank, self.world = recipe, split, rank, world

    def __len__(self):
        return math.ceil(len(range(self.rank, len(self.split), self.world)) / EVALUATION_BATCH)

    def __iter__(self):
        rows = list(range(self.rank, len(self.split), self.world))
        for start in range(0, len(rows), EVALUATION_BATCH):
            yield self.recipe.batch(self.split, rows[start : start + EVALUATION_BATCH])


class Learner(lightning.LightningModule):
    """A recipe's model as Lightning wants it."""

    def __init__(self, recipe, data, model, batch_size):
        super().__init__()
        self.recipe, self.data, self.model, self.batch_size = recipe, data, model, batch_size
        self.measures = torch.nn.ModuleDict(recipe.metrics(data.facts))
        self.history = History()
        self._losses, self._times = [], []

    # ---- data ----

    def train_dataloader(self):
        return TrainingBatches(
            self.recipe, self.data.splits["train"], self.batch_size, lambda: self.current_epoch,
            self.global_rank, self.trainer.world_size,
        )  # fmt: skip

    def val_dataloader(self):
        split = self.data.splits["validation"]
        return EvaluationBatches(self.recipe, split, self.global_rank, self.trainer.world_size)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return move(batch, device)

    # ---- a step ----

    def configure_optimizers(self):
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        # In mixed precision Lightning clips what it has unscaled itself, which the fused one does not allow.
        fused = "mixed" not in self.recipe.settings.precision
        return torch.optim.Adam(trained, lr=self.recipe.settings.rate, fused=fused)

    def on_train_start(self):
        # On SIGTERM Lightning would talk to the other processes, which may be gone: it would wait for ever.
        if self.trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_epoch_start(self):
        seed_torch(self.recipe.settings.seed, EPOCH, self.current_epoch, self.global_rank)
        self._losses, self._times = [], [time.perf_counter()]

    def on_train_batch_start(self, batch, batch_idx):
        settings = self.recipe.settings
        rate = rate_at(self.global_step, settings.epochs * self.trainer.num_training_batches, settings.rate)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch, batch_idx):
        batch = Batch(*batch)
        total, count = self.recipe.loss(self.recipe.forward(self.model, batch), batch)
        world = self.trainer.world_size
        if world > 1:  # DDP takes the mean of the processes' gradients: each gives its part of the whole mean
            count = torch.as_tensor(count, dtype=torch.float32, device=self.device).clone()
            torch.distributed.all_reduce(count)
            count = count / world
        loss = total / count
        self._losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._times.append(time.perf_counter())

    # ---- an epoch ----

    def on_validation_epoch_start(self):
        for metric in self.measures.values():
            metric.reset()

    def validation_step(self, batch, batch_idx):
        batch = Batch(*batch)
        self.recipe.update(self.measures, self.model, self.recipe.forward(self.model, batch), batch)

    def on_validation_epoch_end(self):
        """Closes the epoch's account: its losses, its score."""
        results = self.recipe.results(self.measures)
        results = {name: value for name, value in results.items() if isinstance(value, (int, float))}
        losses = torch.stack(self._losses).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(losses)
            losses /= self.trainer.world_size
        self.history.losses += losses.tolist()
        self.history.validation.append(results)
        scores = [entry[self.recipe.score] for entry in self.history.validation]
        if not math.isfinite(self.history.losses[-1]):
            raise RecipeError(f"the loss became {self.history.losses[-1]}: try a smaller --rate")
        self.history.best = len(scores) - scores[::-1].index(max(scores))
        self.history.step_ms = [1e3 * (b - a) for a, b in zip(self._times, self._times[1:], strict=False)]
        self.log(self.recipe.score, results[self.recipe.score])

    def latest_loss(self):
        """The mean of the epoch's last steps, for the progress bar."""
        recent = self._losses[-20:]
        return torch.stack(recent).mean().item() if recent else float("nan")

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint):
        checkpoint["run"] = {
            **checkpoints.identity(self.recipe, self.data.facts),
            "history": asdict(self.history),
        }

    def on_load_checkpoint(self, checkpoint):
        self.history = History(**checkpoint["run"]["history"])


class WholeFiles(CheckpointIO):
    """Checkpoints that are whole or not there."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        _files.replace(path, lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return _files.read_torch(path)

    def remove_checkpoint(self, path):
        os.remove(path)


class Keeper(Checkpoint):
    """Writes the checkpoints when an epoch ends; removes the folder's former run when another begins."""

    def __init__(self, folder, seconds):
        self.folder, self.before = folder, seconds
        self.started = time.perf_counter()

    def on_train_start(self, trainer, learner):
        self.started = time.perf_counter()
        if trainer.is_global_zero:
            stale = ("metrics.json", *(() if trainer.current_epoch else (checkpoints.LAST, checkpoints.BEST)))
            for name in stale:
                (self.folder / name).unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer, learner):
        history = learner.history
        history.seconds = self.before + time.perf_counter() - self.started
        # The best one first: a run that is stopped between the two repeats this epoch and writes both anew.
        if history.best == len(history.validation):
            trainer.save_checkpoint(self.folder / checkpoints.BEST, weights_only=True)
        trainer.save_checkpoint(self.folder / checkpoints.LAST, weights_only=False)


class Bar(Callback):
    """A line on stderr: epoch, loss, the last score, time left."""

    def __init__(self, epochs):
        self.epochs, self.bar = epochs, None

    def on_train_start(self, trainer, learner):
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=self.epochs * trainer.num_training_batches, initial=trainer.global_step, unit="step",
                desc="training", file=sys.stderr, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 10.0,
            )  # fmt: skip

    def on_train_batch_end(self, trainer, learner, outputs, batch, batch_idx):
        if self.bar is not None and self.bar.update():  # true when the line was written
            score, history = learner.recipe.score, learner.history
            told = f", {score} {history.validation[-1][score]:.3f}" if history.validation else ""
            epoch = f"epoch {trainer.current_epoch + 1}/{self.epochs}"
            self.bar.set_postfix_str(f"{epoch}, loss {learner.latest_loss():.3f}{told}", refresh=False)

    def on_train_end(self, trainer, learner):
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer, learner, exception):
        self.on_train_end(trainer, learner)


# ---- the run ----


def processes(devices):
    """(devices on this node, nodes): what torchrun says, or ``devices``."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices, 1
    local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return local, world // local


def fit(recipe, data, model, folder, *, resume=None, devices=1, progress=True):
    """Trains ``model`` to the end of the settings' epochs, or until its score stays behind for ``patience``.

    resume: a content of checkpoints.LAST in ``folder`` to go on from. Returns (history, whether this process
    is the first, which evaluates). Raises RecipeError, or KeyboardInterrupt when the user stopped it; then
    the last whole epoch is in checkpoints.LAST.
    """
    settings = recipe.settings
    local, nodes = processes(devices)
    world = local * nodes
    size = batch_size(recipe, len(data.splits["train"]), world)
    if not len(data.splits["validation"]):
        raise RecipeError("the validation split is empty: more samples are needed")
    learner = Learner(recipe, data, model, size)
    done = resume["run"]["history"] if resume else {"validation": (), "best": 0, "seconds": 0.0}
    # A run that had stopped early is at its end: what would follow is not what it was without the stop.
    ended = len(done["validation"]) - done["best"] >= settings.patience
    callbacks = [
        # As good is better here, too: in a small validation split many epochs score the same.
        EarlyStopping(recipe.score, mode="max", patience=settings.patience, min_delta=-1e-6),
        Keeper(folder, done["seconds"]),
        *([Bar(settings.epochs)] if progress else []),
    ]
    with _quiet(), _handlers_restored():
        trainer = lightning.Trainer(
            max_epochs=len(done["validation"]) if ended else settings.epochs,
            devices=local,
            num_nodes=nodes,
            strategy=_strategy(world, model),
            precision=settings.precision,
            gradient_clip_val=CLIP,
            callbacks=callbacks,
            plugins=[WholeFiles()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=True,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        try:
            trainer.fit(learner, ckpt_path=folder / checkpoints.LAST if resume else None)
        except SystemExit as error:  # Lightning's answer to Ctrl-C and to SIGTERM
            raise KeyboardInterrupt from error
        except RuntimeError as error:
            if world > 1 and _lost_connection(error):
                raise RecipeError(
                    "another process of this training ended; the last whole epoch is in "
                    f"{folder / checkpoints.LAST}, and the same command goes on from there"
                ) from error
            raise
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return learner.history, trainer.is_global_zero


def batch_size(recipe, rows, world):
    """Samples of a step, all processes together.

    What the settings say, or the whole of a set that has fewer. Where they say None the recipe's, or fewer,
    so that an epoch of a small set has some steps (not of ``quick``, whose sets are small on purpose).
    """
    wanted = recipe.settings.batch_size
    if wanted is None:
        wanted = recipe.batch_size
        if not recipe.settings.quick:
            wanted = min(wanted, max(FEWEST, rows // STEPS))
        wanted = max(1, wanted // world) * world
    if wanted % world:
        raise RecipeError(f"--batch-size {wanted}: cannot be shared equally by {world} processes")
    size = min(wanted, rows // world * world)
    if not size:
        raise RecipeError(f"the training split has {rows} sample(s): too few for {world} process(es)")
    return size


def _strategy(world, model):
    if world == 1:
        return "auto"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # A process whose rows all lack an input leaves that branch without a gradient, which DDP would wait for.
    unused = any(isinstance(module, MultiModal) for module in model.modules())
    return DDPStrategy(process_group_backend=backend, find_unused_parameters=unused)


def _lost_connection(error):
    text = str(error).lower()
    return any(word in text for word in ("connection closed", "connection reset", "broken pipe", "gloo"))


@contextlib.contextmanager
def _handlers_restored():
    """Lightning ignores Ctrl-C after the first; whoever called may want to be stopped later."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # not the main thread: nothing was set there either
                signal.signal(number, handler)


@contextlib.contextmanager
def _quiet():
    """Without Lightning's notes on devices, loggers and workers; its errors are exceptions."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
