"""Synthetic speech from espeak-ng, through its C library and ctypes: nothing is recorded, nothing fetched.

The library is taken from the ``espeakng-loader`` package where that is installed, else from the system, where
the ``espeak-ng`` program brings it along. Declarations after espeak-ng's ``speak_lib.h``.
"""

import ctypes
import ctypes.util
import functools
from pathlib import Path

import numpy as np

# Values of speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2  # espeak_Synth returns when all of the sound has gone to the callback
_INITIALIZE_DONT_EXIT = 0x8000
_POS_CHARACTER, _CHARS_UTF8 = 1, 1
_RATE, _PITCH, _RANGE = 1, 3, 4

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc")

# Voices that sound alike (Gene and Gene2, the m's of one design) stay in one split. Left out: those that are
# meant not to sound like people (robots, demons, whispers).
SPEAKERS = {
    "train": (
        "Alex", "Alicia", "Andrea", "Andy", "Annie", "AnxiousAndy", "Denis", "Diogo", "Gene", "Gene2",
        "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "mike2", "Nguyen",
        "RicishayMax", "RicishayMax2", "RicishayMax3", "adam", "anika", "antonio", "aunty", "benjamin",
        "boris", "caleb", "david", "ed", "f1", "f3", "f5", "iven", "iven2", "iven3", "iven4", "john", "klatt",
        "klatt2", "klatt3", "klatt4", "linda", "m1", "m2", "m4", "m6", "m7", "marcelo", "max", "michel",
        "norbert", "pablo", "pedro", "quincy", "sandro", "shelby", "zac",
    ),
    "validation": ("Storm", "edward", "edward2", "f4", "gustave", "kaukovalta", "m3", "victor"),
    "test": (
        "Reed", "belinda", "f2", "grandma", "grandpa", "ian", "m5", "m8", "miguel", "paul", "rob", "robert",
        "steph", "steph2", "steph3", "travis",
    ),
}  # fmt: skip


class EspeakUnavailable(Exception):
    """espeak-ng's library is not there, or does not start; the message says which."""


class Espeak:
    """espeak-ng's English: ``name`` with its version, ``sample_rate`` in Hz, ``voices`` {split: names}.

    Raises:
        EspeakUnavailable: no library, no voices, or it does not start.
    """

    def __init__(self):
        path, data = _find()
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise EspeakUnavailable(f"{path}: {error}") from error
        where = data.encode() if data else None
        self.sample_rate = library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, where, _INITIALIZE_DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise EspeakUnavailable(f"{path}: espeak_Initialize returned {self.sample_rate}")
        self._library, self._parts = library, []
        self._callback = _CALLBACK(self._receive)  # kept: the library calls it as long as it lives
        library.espeak_SetSynthCallback(self._callback)
        library.espeak_Info.restype = ctypes.c_char_p
        folder = ctypes.c_char_p()
        self.name = f"espeak-ng {library.espeak_Info(ctypes.byref(folder)).decode()}"
        # An unknown variant falls back on the plain voice without a word, so the files decide what there is.
        there = {file.name for file in Path(folder.value.decode(), "voices", "!v").glob("*")}
        self.voices = {split: tuple(v for v in names if v in there) for split, names in SPEAKERS.items()}
        if not all(self.voices.values()):
            raise EspeakUnavailable(f"{folder.value.decode()}: its voices are missing")

    def begin(self, seed):
        """Seeds the library's own random numbers: the first calls of :meth:`say` in a process then always
        give the same samples. Later ones differ a little, as oscillators and echoes go on from utterance to
        utterance; before espeak-ng 1.52, which takes no seed, all do."""
        if hasattr(self._library, "espeak_ng_SetRandSeed"):
            self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def _receive(self, samples, count, events):
        if samples and count > 0:
            self._parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, words, voice, random):
        """The sound of ``words`` in ``voice``: float32 [samples] in -1 … 1.

        ``random`` (a ``numpy.random.Generator``) draws the accent, the speed (130 … 230 words a minute), the
        pitch and how far it moves, and whether the words are said one by one or in one breath.
        """
        accent = ACCENTS[random.integers(len(ACCENTS))]
        if self._library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()):
            raise EspeakUnavailable(f"voice: espeak-ng has no {accent}+{voice}")
        for parameter, low, high in ((_RATE, 130, 230), (_PITCH, 25, 75), (_RANGE, 20, 80)):
            self._library.espeak_SetParameter(parameter, int(random.integers(low, high + 1)), 0)
        text = (", " if random.random() < 0.2 else " ").join(words).encode()
        self._parts.clear()
        failed = self._library.espeak_Synth(
            text, ctypes.c_size_t(len(text) + 1), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if failed or not self._parts:
            raise EspeakUnavailable(f"espeak_Synth returned {failed} and {len(self._parts)} blocks of sound")
        return np.concatenate(self._parts).astype(np.float32) / 32768


@functools.cache
def espeak():
    """The one :class:`Espeak` of the process: the library keeps its state in globals. Raises
    EspeakUnavailable."""
    return Espeak()


def _find():
    """(library, folder of its data or None for the library's own)."""
    try:
        import espeakng_loader
    except ImportError:
        path = ctypes.util.find_library("espeak-ng")
        if path is None:
            raise EspeakUnavailable(
                "neither the package espeakng-loader nor the program espeak-ng is installed"
            ) from None
        return path, None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
