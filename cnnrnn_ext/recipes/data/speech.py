"""Spoken words: synthetic digits, one by one and in strings.

The embedded data is synthetic: espeak-ng says the digits where its library is installed, else the built-in
generator of :mod:`formants`. Voices of validation and test never speak in training.
"""

import json
import os
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cnnrnn_ext import _files
from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.data.espeak import EspeakUnavailable, espeak
from cnnrnn_ext.recipes.data.files import split_rows, unambiguous
from cnnrnn_ext.recipes.data.formants import Formants
from cnnrnn_ext.recipes.data.spectrogram import SAMPLE_RATE
from cnnrnn_ext.recipes.data.tables import read_rows

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOISE = (10.0, 30.0)  # dB, signal over noise in validation and test of the synthetic recordings
STRING = (2, 5)  # digits in a string, at least and at most
SHORTEST, LONGEST = 0.025, 60.0  # seconds of a recording: one window of the spectrogram; what memory bears
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
COUNTS = {  # recordings of the embedded sets
    "words": {"train": 3000, "validation": 400, "test": 800},
    "strings": {"train": 2400, "validation": 240, "test": 480},
}
FEW = {"train": 192, "validation": 32, "test": 32}  # of --quick
FORMAT = 1  # of the cached file; goes up when what is synthesised changes


@dataclass(frozen=True)
class Recordings:
    """Sounds with what is said in them.

    waves: one int16 array [samples] each, at ``SAMPLE_RATE``; words: a tuple of words each; voices: who
    speaks each; files: where each comes from ("" if synthetic); labels: None, or a list of class numbers
    each; noise: None, or the signal-to-noise ratios (least, most), in dB, at which the recordings are heard
    in evaluation.
    """

    waves: list
    words: list
    voices: list
    files: list
    labels: list | None = None
    noise: tuple | None = None

    def __len__(self):
        return len(self.waves)

    def subset(self, rows):
        return replace(
            self,
            **{
                name: [column[row] for row in rows]
                for name, column in vars(self).items()
                if isinstance(column, list)
            },
        )

    def sounds(self, rows):
        """Recordings ``rows``, a list of [S] float32 in -1 … 1."""
        return [torch.from_numpy(self.waves[row]).float() / 32768 for row in rows]


def resample(samples, rate):
    """``samples`` [S] at ``rate`` Hz → at ``SAMPLE_RATE``, int16, clipped: as :class:`Recordings` keeps
    them."""
    from scipy.signal import resample_poly

    if rate != SAMPLE_RATE:
        samples = resample_poly(samples, *(n // np.gcd(SAMPLE_RATE, rate) for n in (SAMPLE_RATE, rate)))
    return np.clip(np.round(samples * 32767), -32768, 32767).astype(np.int16)


def engine(name="auto"):
    """The synthesiser: "espeak" (raises EspeakUnavailable where it is not installed), "builtin", or "auto":
    the first that works of these two."""
    if name == "builtin":
        return Formants()
    try:
        return espeak()
    except EspeakUnavailable:
        if name == "espeak":
            raise
        return Formants()


def synthesise(speaker, counts, strings, seed):
    """{split: Recordings} by the synthesiser ``speaker``; ``counts`` {split: number of recordings}.

    One word each, every digit equally often, or with ``strings`` 2 … 5 digits each, drawn at random. The
    voices of a split take turns.
    """
    parts = {}
    speaker.begin(seed)
    for number, (split, count) in enumerate(counts.items()):
        random = np.random.default_rng((seed, number, strings))
        voices = speaker.voices[split]
        waves, words, spoken_by = [], [], []
        for row in range(count):
            if strings:
                digits = random.integers(len(DIGITS), size=random.integers(STRING[0], STRING[1] + 1))
            else:
                digits = (row % len(DIGITS),)
            said = tuple(DIGITS[d] for d in digits)
            voice = voices[row // (1 if strings else len(DIGITS)) % len(voices)]
            waves.append(resample(speaker.say(said, voice, random), speaker.sample_rate))
            words.append(said)
            spoken_by.append(voice)
        parts[split] = _synthetic(split, waves, words, spoken_by)
    return parts


def _synthetic(split, waves, words, voices):
    return Recordings(waves, words, voices, [""] * len(waves), noise=None if split == "train" else NOISE)


def cached(path, speaker, counts, strings, seed):
    """:func:`synthesise`, once: {split: Recordings} from the .npz at ``path`` if that holds just these, else
    made and written there, whole or not at all. A damaged file is replaced, and said so on stderr."""
    about = json.dumps([FORMAT, speaker.name, speaker.voices, counts, strings, seed])
    if path.exists():
        try:
            with np.load(path) as arrays:
                if str(arrays["about"]) == about:
                    return {split: _unpack(arrays, split) for split in counts}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            print(f"{path}: damaged ({error}); the speech is synthesised again", file=sys.stderr)
    parts = synthesise(speaker, counts, strings, seed)
    arrays = {"about": np.array(about)}
    for split, part in parts.items():
        arrays[f"{split}/samples"] = np.concatenate(part.waves)
        arrays[f"{split}/lengths"] = np.array([len(wave) for wave in part.waves])
        arrays[f"{split}/words"] = np.array([" ".join(words) for words in part.words])
        arrays[f"{split}/voices"] = np.array(part.voices)
    own = path.with_name(f"{path.name}.{os.getpid()}")  # several processes may come at once
    _files.replace(own, lambda file: np.savez(file, **arrays))
    os.replace(own, path)
    return parts


def _unpack(arrays, split):
    ends = np.cumsum(arrays[f"{split}/lengths"])
    waves = np.split(arrays[f"{split}/samples"], ends[:-1])
    words = [tuple(words.split()) for words in arrays[f"{split}/words"].tolist()]
    return _synthetic(split, waves, words, arrays[f"{split}/voices"].tolist())


def embedded(settings, task):
    """({split: Recordings} of synthetic speech, how it was made); task: "words" or "strings".

    settings: has what :func:`add_arguments` adds, ``seed`` and ``quick``. Raises RecipeError without
    espeak-ng if that was asked for.
    """
    try:
        speaker = engine(settings.synthesiser)
    except EspeakUnavailable as error:
        raise RecipeError(f"--synthesiser {settings.synthesiser}: {error}") from error
    source, strings = f"synthetic, by {speaker.name}", task == "strings"
    if settings.quick:
        return synthesise(speaker, FEW, strings, settings.seed), source
    path = Path(settings.cache, f"speech-{task}-{settings.seed}.npz")
    return cached(path, speaker, COUNTS[task], strings, settings.seed), source


def add_arguments(parser):
    """Options of ``train`` that say how the embedded recordings are made and kept."""
    parser.add_argument(
        "--synthesiser",
        choices=("auto", "espeak", "builtin"),
        default="auto",
        help="who says the embedded set: espeak-ng, or a much poorer generator that is "
        "always there (default auto: espeak-ng if it is installed)",
    )
    parser.add_argument("--cache", default="out/cache", metavar="FOLDER",
                        help="where the synthesised recordings are kept (default out/cache)")  # fmt: skip


# ---- the user's own recordings ----


def read_files(paths, bad):
    """Recordings of single files, nothing known of their words; what cannot be used goes to ``bad``."""
    found = Recordings([], [], [], [])
    for path in paths:
        _add(found, path, (), bad)
    return found


def read_wav(path):
    """The recording at ``path``, at ``SAMPLE_RATE``, channels averaged: int16 [samples].

    Any format that libsndfile reads (.wav, .flac, .ogg, .mp3). Raises ValueError, with the reason, for what
    is no such file, is cut short, is silent, shorter than ``SHORTEST`` or longer than ``LONGEST`` seconds,
    or holds no finite numbers.
    """
    import soundfile

    if not os.path.isfile(path):
        raise ValueError("there is no such file")
    if not os.path.getsize(path):
        raise ValueError("an empty file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, announced = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot be read: {error.error_string}") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if len(samples) < announced or _cut_short(path):
        raise ValueError(f"truncated: it ends after {len(samples)} samples")
    if not SHORTEST <= len(samples) / rate <= LONGEST:
        raise ValueError(f"{len(samples) / rate:.3g} s long, expected {SHORTEST} to {LONGEST} s")
    if not np.isfinite(samples).all():
        raise ValueError("holds samples that are no finite numbers")
    samples = samples.mean(1)
    if not samples.any():
        raise ValueError("silent: every sample is 0")
    return resample(samples, rate)


def _cut_short(path):
    """Whether a RIFF file says that it is longer than it is; libsndfile reads what there is, without a
    word."""
    with open(path, "rb") as file:
        header = file.read(8)
    said = int.from_bytes(header[4:8], "little")
    unknown = (0, 0xFFFFFFFF)  # what programs write that do not know the length yet
    return header[:4] == b"RIFF" and said not in unknown and said + 8 > path.stat().st_size


def read_folder(folder, bad):
    """Recordings of a folder per word, ``folder/<word>/*.wav``.

    What cannot be used goes to ``bad`` (:class:`files.BadFiles`): files that are no recordings or that
    :func:`read_wav` refuses, words without any file, copies. Hidden files are ignored. Voices are the files'
    paths.
    """
    found = Recordings([], [], [], [])
    for word in _visible(folder):
        if not word.is_dir():
            bad.add(word, "lies beside the words' folders, not in one of them")
            continue
        files = _visible(word)
        if not files:
            bad.add(word, "an empty folder")
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                _add(found, file, (word.name,), bad)
            else:
                bad.add(file, f"not a recording ({', '.join(SUFFIXES)})")
    return _without_copies(found, bad)


def _visible(folder):
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _without_copies(found, bad):
    said = [" ".join(words) for words in found.words]
    rows = unambiguous(found.files, said, [wave.tobytes() for wave in found.waves], "recording", bad)
    return found.subset(rows)


def read_transcripts(table, bad):
    """Recordings of a table, one line each: ``path<TAB>transcript``, UTF-8, paths relative to the table's
    folder.

    A third column may name the speaker: a speaker's recordings stay in one split. A first line with the
    columns' names (path, transcript, speaker) lets them stand in any order. Empty lines and lines that start
    with # are left out; what cannot be used, copies too, goes to ``bad``.
    """
    found = Recordings([], [], [], [])
    for _, (file, transcript, speaker) in read_rows(table, bad, ("path", "transcript"), ("speaker",)):
        _add(found, table.parent / file, tuple(transcript.split()), bad, speaker)
    return _without_copies(found, bad)


def _add(recordings, file, words, bad, speaker=None):
    try:
        wave = read_wav(file)
    except ValueError as error:
        bad.add(file, str(error))
        return
    recordings.waves.append(wave)
    recordings.words.append(words)
    recordings.voices.append(speaker or str(file))
    recordings.files.append(str(file))


def split_voices(recordings, seed, pattern=None, by_word=False):
    """{split: Recordings}: every voice in one split only.

    pattern: a regular expression whose first group, searched in the file's name, is the voice, for sets that
    name their speakers there (``"^([^_]+)_"``). Without it, and without a speaker column, each file is a
    voice of its own; ``by_word`` then gives every word its share of each split.
    """
    voices = recordings.voices
    if pattern is not None:
        if not re.compile(pattern).groups:
            raise ValueError("no group in it")
        found = [re.search(pattern, Path(file).name) for file in recordings.files]
        voices = [match.group(1) if match else voice for match, voice in zip(found, voices, strict=True)]
    unique = list(dict.fromkeys(voices))
    if len(unique) == len(voices):
        rows = split_rows(recordings.words if by_word else [0] * len(voices), seed)
    else:
        chosen = split_rows([0] * len(unique), seed)
        split_of = {unique[i]: split for split, part in chosen.items() for i in part}
        rows = {split: [r for r, voice in enumerate(voices) if split_of[voice] == split] for split in chosen}
    return {split: recordings.subset(part) for split, part in rows.items()}
