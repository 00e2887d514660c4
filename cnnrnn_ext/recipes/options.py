"""What the commands of the recipes and the demo share: options, their types, and how a command ends."""

import importlib.util
import sys
from pathlib import Path

STOPPED = 130  # exit status of a program that Ctrl-C ended
MODES = ("auto", "compiled", "reference")


class UserError(Exception):
    """Something the user can put right; the message says what, and is all they need to see."""


# ---- types, for argparse: each raises ValueError for what it does not take ----


def positive(text):
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def natural(text):
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def positive_number(text):
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


# ---- options ----


def add_place(parser, folder):
    """Where to write, and on how many threads to run: see :func:`prepare`."""
    parser.add_argument("--output", type=Path, default=Path(folder), help=f"folder (default {folder})")
    parser.add_argument("--threads", type=positive, help="of torch (default: torch's choice)")


def add_training(parser):
    """What all trainings take."""
    parser.add_argument("--seed", type=natural, default=0, help="of data, weights and batches (default 0)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue the output folder's run, or fail")
    start.add_argument("--fresh", action="store_true", help="start anew, whatever the output folder holds")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows that everything works")
    parser.add_argument(
        "--backend", choices=MODES, default="auto",
        help="what our modules run on: compiled kernels where there are any, only those, or plain PyTorch",
    )  # fmt: skip


# ---- commands ----


def prepare(arguments):
    """Sets torch's threads and makes the output folder."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{arguments.output}: cannot be made a folder: {error.strerror}") from error


def guarded(run, *, what, needed, extra, stopped):
    """The exit status of ``run()``, a command of ``what``; mistakes of the user's end in one line on stderr.

    needed: {module: package}, all of them in the extra named ``extra``; stopped: what to say after Ctrl-C.
    """
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _failed(f"the {what} needs {', '.join(missing)}: pip install cnnrnn_ext[{extra}]")
    try:
        return run()
    except UserError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print(f"\nStopped. {stopped}".rstrip(), file=sys.stderr)
        return STOPPED


def _failed(message):
    print(f"cnnrnn_ext: {message}", file=sys.stderr)
    return 1
