"""Files that are whole or not there: written beside their place and then put into it; checked when read."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import torch


class DamagedFile(Exception):
    """A file that cannot be read or is not what it should be; the message says why, without the path."""


def replace(path, write):
    """Calls ``write(file)`` on a new binary file beside ``path`` and then puts that one in its place.

    Whatever stops it, a power cut included, leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def replace_json(path, content):
    """Writes ``content`` as JSON in place of ``path``."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_torch(path):
    """The content of a file of torch.save, on the CPU: tensors and plain values, nothing that runs code.

    Never writes to the file. Raises DamagedFile; the checksums are looked at, which torch does not do.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise DamagedFile("damaged, or not a checkpoint")
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise DamagedFile("damaged checkpoint: a checksum does not fit")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedFile(f"cannot be read: {error.strerror or error}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"damaged checkpoint: {str(error).splitlines()[0]}") from error
