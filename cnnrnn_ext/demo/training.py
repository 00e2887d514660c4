"""The training: one network, one recipe, a checkpoint that a stopped run continues from bit by bit.

A plain loop on purpose: whatever step ``n`` needs (its batch, its learning rate) follows from the seed
and ``n`` alone, so a run that was stopped anywhere, within an epoch too, goes on as if it never had been.
Lightning was tried and left out: with a progress bar and three logged values it took 2 ms of processor time
a step where this loop takes 0.1 ms (the network's own step is a few tens of ms on two cores), it more than
triples the time to import torch, and it brings fourteen packages.
"""

import contextlib
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field

import torch
from torch.nn import functional as F

from cnnrnn_ext import _files
from cnnrnn_ext.demo import DemoError
from cnnrnn_ext.models import CNNRNN
from cnnrnn_ext.recipes import schedule
from cnnrnn_ext.recipes.data import digits

FORMAT = "cnnrnn_ext demo checkpoint 1"
EVALUATION_BATCH = 64  # clips


@dataclass(frozen=True)
class Recipe:
    """What determines a training run; two runs of the same recipe go through the same steps."""

    seed: int = 0
    epochs: int = 30
    batch: int = 32
    rate: float = 2e-3  # Adam's, at its peak
    warmup: float = 0.05  # part of the steps in which the rate rises from 0; then it falls as a cosine
    validate_every: int = 5  # epochs
    scans: int | None = None  # in training, and a quarter of it in validation and test; None for all

    def steps_per_epoch(self, scans):
        return len(scans["train"]) // self.batch

    def rate_at(self, step, steps):
        return schedule.rate_at(step, steps, self.rate, self.warmup)


@dataclass
class Progress:
    """How far a run has come. losses, correct: one entry a step; validation: one a measured epoch."""

    step: int = 0
    seconds: float = 0.0
    losses: list = field(default_factory=list)
    validation: list = field(default_factory=list)


def load_scans(recipe):
    """The splits of :func:`digits.load_scans`, cut to the size that the recipe wants."""
    scans = digits.load_scans(recipe.seed)
    if recipe.scans is None:
        return scans
    random = digits.generator(recipe.seed, digits.SUBSET)
    return {
        name: part.subset(recipe.scans if name == "train" else recipe.scans // 4, random)
        for name, part in scans.items()
    }


def build(seed):
    """The network, its weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CNNRNN(digits.HEADS, frame_size=(digits.FRAME_SIZE, digits.FRAME_SIZE))


def optimizer_for(model, recipe):
    return torch.optim.Adam(model.parameters(), lr=recipe.rate, fused=True)


def train_step(model, optimizer, clips):
    """One step of Adam on the sum of both heads' cross-entropies; returns (loss, logits)."""
    optimizer.zero_grad()
    logits = model(clips.frames)
    loss = sum(F.cross_entropy(logits[head], label) for head, label in clips.labels().items())
    loss.backward()
    optimizer.step()
    return loss.detach(), logits


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def predict(model, clips):
    """{"digit": [N], "direction": [N]}: the classes the model chooses."""
    model.eval()
    with torch.no_grad():
        parts = [model(frames) for frames in clips.frames.split(EVALUATION_BATCH)]
    model.train()
    return {head: torch.cat([part[head] for part in parts]).argmax(1) for head in digits.HEADS}


def accuracy(predicted, clips):
    return {head: (predicted[head] == label).double().mean().item() for head, label in clips.labels().items()}


# ---- the loop ----


def fit(recipe, scans, model, optimizer, progress, checkpoint, show_progress=True):
    """Trains from ``progress.step`` to the end; True when done, False when stopped by Ctrl-C.

    Writes ``checkpoint`` after each validation and when stopped. The first Ctrl-C ends the run after the
    step under way; a second one at once, without a checkpoint.
    """
    from tqdm import tqdm

    per_epoch = recipe.steps_per_epoch(scans)
    steps = recipe.epochs * per_epoch
    validation = digits.evaluation_clips(scans["validation"], recipe.seed)
    recent = {"loss": 0.0, "digit": 0.0, "direction": 0.0}
    seen, started, before = 0, time.perf_counter(), progress.seconds
    bar = tqdm(
        total=steps, initial=progress.step, desc="training", unit="step", disable=not show_progress,
        file=sys.stderr, mininterval=0.5, dynamic_ncols=True,
    )  # fmt: skip
    with bar, _stop_on_interrupt() as stop:
        while progress.step < steps and not stop.requested:
            clips = digits.training_batch(scans["train"], recipe.batch, recipe.seed, progress.step)
            set_rate(optimizer, recipe.rate_at(progress.step, steps))
            loss, logits = train_step(model, optimizer, clips)
            progress.step += 1
            progress.losses.append(loss.item())

            correct = accuracy({head: value.argmax(1) for head, value in logits.items()}, clips)
            seen += 1
            for name, value in {"loss": progress.losses[-1], **correct}.items():
                recent[name] += (value - recent[name]) / min(seen, per_epoch)
            bar.set_postfix_str(
                f"loss {recent['loss']:.3f}, digit {recent['digit']:.1%}, "
                f"direction {recent['direction']:.1%}",
                refresh=False,
            )
            bar.update()

            epoch, rest = divmod(progress.step, per_epoch)
            if rest == 0 and (epoch % recipe.validate_every == 0 or epoch == recipe.epochs):
                measured = accuracy(predict(model, validation), validation)
                progress.validation.append({"step": progress.step, **measured})
                progress.seconds = before + time.perf_counter() - started
                save(checkpoint, recipe, model, optimizer, progress)
        progress.seconds = before + time.perf_counter() - started
    if progress.step < steps:
        save(checkpoint, recipe, model, optimizer, progress)
    return progress.step == steps


class _Stop:
    requested = False


@contextlib.contextmanager
def _stop_on_interrupt():
    """A flag that the first SIGINT sets; the second one raises KeyboardInterrupt."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():  # Python takes handlers in that one only
        yield stop
        return

    def handler(number, frame):
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# ---- the checkpoint ----


def save(path, recipe, model, optimizer, progress):
    """Writes the checkpoint beside ``path`` and then puts it in its place: never half a file."""
    content = {
        "format": FORMAT,
        "recipe": asdict(recipe),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    _files.replace(path, lambda file: torch.save(content, file))


def load(path):
    """The content of the checkpoint at ``path``; never writes to it.

    Raises DemoError, which names the file, if it is damaged or not one of this demo's.
    """

    def refuse(reason):
        hint = "the file was left as it is; --fresh replaces it, --output writes elsewhere"
        return DemoError(f"{path}: {reason} ({hint})")

    try:
        content = _files.read_torch(path)
    except _files.DamagedFile as error:
        raise refuse(str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise refuse("not a checkpoint of this demo, or of another version of it")
    try:
        recipe, progress = Recipe(**content["recipe"]), Progress(**content["progress"])
        model = build(recipe.seed)
        optimizer = optimizer_for(model, recipe)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise refuse(f"its content does not fit: {str(error).splitlines()[0]}") from error
    return recipe, model, optimizer, progress
