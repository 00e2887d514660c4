"""Speech-like sounds without espeak-ng: a small source and filter generator, for the digits alone.

A word is a row of phones. A phone is a duration, three formants, and how much of it is voice (a train of
pulses) and how much is breath (noise). Frames of 20 ms of that excitation pass through the formants'
resonances and are added with overlap. Speakers differ by the length of the vocal tract, pitch, speed and
breath. It is a stand-in that keeps the recipe running everywhere, not speech: a person recognises most of the
words with difficulty.

Formants of the vowels: rounded averages of men in G. E. Peterson and H. L. Barney, "Control methods used in a
study of the vowels", J. Acoust. Soc. Am. 24 (1952), table II; those of the consonants are set by ear.
"""

import numpy as np

SAMPLE_RATE = 16000  # Hz
_HOP, _FRAME = 80, 320  # samples: 5 and 20 ms
_BANDWIDTHS = np.array([80.0, 110.0, 160.0])  # Hz of the three formants

# phone: (seconds, F1, F2, F3 in Hz, voice, breath)
PHONES = {
    "i": (0.10, 270, 2290, 3010, 1.0, 0.0),
    "I": (0.08, 390, 1990, 2550, 1.0, 0.0),
    "E": (0.10, 530, 1840, 2480, 1.0, 0.0),
    "V": (0.10, 640, 1190, 2390, 1.0, 0.0),
    "a": (0.11, 730, 1090, 2440, 1.0, 0.0),
    "o": (0.11, 570, 840, 2410, 1.0, 0.0),
    "U": (0.07, 440, 1020, 2240, 1.0, 0.0),
    "u": (0.11, 300, 870, 2240, 1.0, 0.0),
    "w": (0.06, 290, 610, 2150, 0.6, 0.0),
    "r": (0.06, 310, 1060, 1380, 0.6, 0.0),
    "n": (0.07, 250, 1500, 2500, 0.4, 0.0),
    "v": (0.06, 220, 1100, 2080, 0.3, 0.1),
    "z": (0.08, 240, 4200, 5200, 0.3, 0.3),
    "s": (0.11, 3500, 4800, 6000, 0.0, 0.5),
    "f": (0.09, 1400, 2900, 4700, 0.0, 0.2),
    "T": (0.08, 1500, 2600, 5600, 0.0, 0.15),
    "k": (0.03, 1600, 2200, 2800, 0.0, 0.6),
    "t": (0.03, 2500, 3800, 5000, 0.0, 0.6),
    ".": (0.04, 400, 1500, 2500, 0.0, 0.0),  # the closure before a stop
}
WORDS = {
    "zero": "zIroU", "one": "wVn", "two": ".tu", "three": "Tri", "four": "for", "five": "faIv",
    "six": "sI.ks", "seven": "sEvVn", "eight": "EI.t", "nine": "naIn",
}  # fmt: skip


class Formants:
    """The generator, with :class:`Espeak`'s attributes: ``name``, ``sample_rate`` in Hz, ``voices`` {split:
    names}."""

    name = "built-in formant generator"
    sample_rate = SAMPLE_RATE

    def __init__(self):
        names = tuple(f"speaker{i}" for i in range(80))
        self.voices = {"train": names[:56], "validation": names[56:64], "test": names[64:]}

    def begin(self, seed):
        """Nothing to do here: no utterance depends on another."""

    def say(self, words, voice, random):
        """The sound of ``words`` (digits, in English) in ``voice``: float32 [samples] in -1 … 1.

        ``random`` (a ``numpy.random.Generator``) draws what varies within a speaker: speed, pitch and pauses.
        Raises KeyError for a word that is no digit.
        """
        speaker = np.random.default_rng(int(voice.removeprefix("speaker")))
        tract = speaker.uniform(0.85, 1.25)  # shorter tract, higher formants
        pitch = 110 * tract**3 * speaker.uniform(0.85, 1.2)  # Hz
        breath = speaker.uniform(0.0, 0.06)
        colour = speaker.uniform(0.94, 1.06, 3)
        speed = random.uniform(0.7, 1.3)
        targets = []
        for word in words:
            for phone in WORDS[word]:
                seconds, *formants, voiced, noisy = PHONES[phone]
                frames = max(2, round(speed * random.uniform(0.85, 1.15) * seconds * SAMPLE_RATE / _HOP))
                targets += [(*formants, voiced, noisy + breath * voiced)] * frames
            targets += [(400, 1500, 2500, 0, 0)] * random.integers(4, 20)
        targets = _smooth(np.array(targets, dtype=np.float64))
        targets[:, :3] *= tract * colour
        return _resonate(targets, pitch * random.uniform(0.85, 1.15), random)


def _smooth(targets):
    """A phone glides into the next within some 25 ms: mouths do not jump."""
    window = np.hanning(7)[1:-1]
    padded = np.pad(targets, ((2, 2), (0, 0)), mode="edge")
    columns = [np.convolve(column, window / window.sum(), mode="valid") for column in padded.T]
    return np.stack(columns, axis=1)


def _resonate(targets, pitch, random):
    """targets [frames, 5] (three formants in Hz, voice, breath) → samples, float32."""
    count = (len(targets) - 1) * _HOP + _FRAME
    time = np.arange(count) / count
    drift = pitch * (1.1 - 0.25 * time + 0.02 * np.sin(2 * np.pi * 5 * count / SAMPLE_RATE * time))
    phase = np.cumsum(drift) / SAMPLE_RATE
    pulses = np.diff(np.floor(phase), prepend=0.0) * np.sqrt(SAMPLE_RATE / pitch)
    noise = random.standard_normal(count)
    frequency = np.fft.rfftfreq(2 * _FRAME, 1 / SAMPLE_RATE)
    window = np.hanning(_FRAME)
    sound = np.zeros(count + _FRAME)
    for frame, (*formants, voiced, noisy) in enumerate(targets):
        part = slice(frame * _HOP, frame * _HOP + _FRAME)
        source = window * (voiced * pulses[part] + noisy * noise[part])
        # A sum of resonances (formants in parallel); a voice falls by 6 dB an octave from 500 Hz on.
        distance = (frequency[:, None] - formants) / _BANDWIDTHS
        response = (1 / (1 + distance**2)).sum(1)
        tilt = np.where(voiced > noisy, 1 / np.sqrt(1 + (frequency / 500) ** 2), 1.0)
        filtered = np.fft.irfft(np.fft.rfft(source, 2 * _FRAME) * response * tilt)
        sound[frame * _HOP : frame * _HOP + 2 * _FRAME] += filtered
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)
