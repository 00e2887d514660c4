"""A digit seen and spoken: real handwritten digits that move under heavy noise, synthetic speech under heavy
noise.

Both are made so poor that neither is enough: how noisy the picture is and how noisy the sound varies from row
to row, so that often one of them is clear where the other is not. And half of the rows lack one of the two.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from cnnrnn_ext.recipes.data import clips, moving_digits, spectrogram, speech
from cnnrnn_ext.recipes.draws import Draws

MODALITIES = ("video", "audio")
VIDEO_NOISE = (0.3, 1.1)  # standard deviation of a pixel's noise, of pixels in 0 … 1: least and most
AUDIO_NOISE = (-18.0, 6.0)  # dB, signal over noise
MISSING = 0.25  # share of the rows that lack the video; as many lack the audio
EVALUATION = moving_digits.EVALUATION + 1  # the clips themselves draw evaluation's numbers for that one
PIXELS = moving_digits.FRAME**2


@dataclass(frozen=True)
class SeenAndHeard:
    """Rows: those of ``video``; each is heard in one of the ``audio`` recordings of its digit.

    video: a :class:`moving_digits.MovingDigits`; audio: a :class:`speech.Recordings` of single words; seed:
    of what evaluation draws; present: {"video", "audio": bool} for all rows, or None: each row has both or
    lacks one.
    """

    video: moving_digits.MovingDigits
    audio: speech.Recordings
    seed: int
    present: dict | None = None

    def __len__(self):
        return len(self.video)

    def sample(self, rows, draws=None):
        """(inputs {"video": (frames [N, T, 1, 28, 28], lengths [N]), "audio": (spectrograms [N, T', MELS],
        lengths [N])}, present {"video", "audio": [N] bool}, digit [N]). draws: of a training step."""
        training = draws is not None
        own = draws if training else Draws(self.seed, EVALUATION, rows)
        digit = self.video.scans.digit[torch.as_tensor(rows) // self.video.repeats]
        missing, choice, level, start = own.uniform(4).unbind(1)
        recordings = [self._recordings[d] for d in digit.tolist()]
        heard = [at[int(c * len(at))] for at, c in zip(recordings, choice.tolist(), strict=True)]
        sounds = spectrogram.add_noise(self.audio.sounds(heard), own, AUDIO_NOISE)
        features = [spectrogram.log_mel(sound) for sound in sounds]
        if training:
            features = spectrogram.distort(features, own)
        # The clips come last: they draw as many numbers as the batch's longest has frames.
        frames, lengths, _ = self.video.clips(rows, draws)
        frames = _under_static(frames, lengths, level, start)
        inputs = {"video": (frames, lengths), "audio": _padded(features)}
        return inputs, self._presence(missing), digit

    def _presence(self, missing):
        if self.present is not None:
            return {name: torch.full(missing.shape, self.present[name]) for name in MODALITIES}
        return {"video": missing >= MISSING, "audio": missing < 1 - MISSING}

    @functools.cached_property
    def _recordings(self):
        """For each digit the rows of its recordings."""
        return [
            [row for row, said in enumerate(self.audio.words) if said == (word,)] for word in speech.DIGITS
        ]


@dataclass(frozen=True)
class Files:
    """The user's clips and recordings, pairs in order; either may be None. Nothing is known of their
    digits."""

    video: clips.Clips | None
    audio: speech.Recordings | None

    def __len__(self):
        return len(self.video if self.video is not None else self.audio)

    def sample(self, rows, draws=None):
        """As :meth:`SeenAndHeard.sample`; a modality that was not given is absent, and there is no digit."""
        inputs, present = {}, {}
        if self.video is not None:
            inputs["video"] = self.video.clips(rows)[:2]
        if self.audio is not None:
            inputs["audio"] = _padded([spectrogram.log_mel(sound) for sound in self.audio.sounds(rows)])
        for name in inputs:
            present[name] = torch.ones(len(rows), dtype=torch.bool)
        return inputs, present, None


def _padded(features):
    return pad_sequence(features, batch_first=True), torch.tensor([len(x) for x in features])


def _under_static(frames, lengths, level, start):
    """Frames with noise on every pixel, between the least and the most of VIDEO_NOISE as ``level`` [N] in 0 …
    1 says; behind a row's end they stay black. start [N] in 0 … 1: where the noise is read."""
    low, high = VIDEO_NOISE
    count, steps = frames.shape[:2]
    tape = _static()
    # As if the batch had the longest clip, whatever it has: a row's noise is its own.
    places = (start * (len(tape) - moving_digits.LONGEST * PIXELS)).long().tolist()
    noise = torch.stack([tape[place : place + steps * PIXELS] for place in places]).view_as(frames)
    noisy = frames + (low + (high - low) * level).view(count, 1, 1, 1, 1) * noise
    return noisy.masked_fill_((torch.arange(steps) >= lengths[:, None]).view(count, steps, 1, 1, 1), 0.0)


@functools.cache
def _static():
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
