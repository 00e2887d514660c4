"""From sound to pictures of it: log-mel spectrograms, and the noise that training adds."""

import functools

import torch

SAMPLE_RATE = 16000  # Hz, of everything that reaches the model
MELS = 40  # bands
FFT, WINDOW, HOP = 512, 400, 160  # samples: the transform's length; 25 ms; 10 ms
LOWEST = 60.0  # Hz, the lower edge of the first band
FLOOR = 1e-6  # added to the energies before the logarithm
TAPE = 1 << 20  # samples of noise: 65 s


def hertz_to_mel(hertz):
    """mel(f) = 2595 · log10(1 + f / 700), f in Hz: D. O'Shaughnessy, "Speech Communication" (1987)."""
    return 2595 * torch.log10(1 + torch.as_tensor(hertz, dtype=torch.float64) / 700)


def mel_to_hertz(mel):
    """The inverse of :func:`hertz_to_mel`."""
    return 700 * (10 ** (torch.as_tensor(mel, dtype=torch.float64) / 2595) - 1)


@functools.cache
def mel_filters(sample_rate=SAMPLE_RATE, bands=MELS, fft=FFT, lowest=LOWEST):
    """Triangles [fft // 2 + 1, bands], float32: energies per FFT bin × this = energies per mel band.

    Band ``m`` rises from 0 at edge ``m`` to 1 at edge ``m + 1`` and falls to 0 at edge ``m + 2``, linearly in
    hertz; the ``bands + 2`` edges are equally far apart in mel, from ``lowest`` to half the ``sample_rate``
    (both in Hz). After S. Davis and P. Mermelstein, "Comparison of parametric representations for
    monosyllabic word recognition in continuously spoken sentences", IEEE Trans. ASSP 28 (1980).
    """
    low, high = hertz_to_mel(lowest), hertz_to_mel(sample_rate / 2)
    edges = mel_to_hertz(torch.linspace(float(low), float(high), bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, sample_rate / 2, fft // 2 + 1, dtype=torch.float64)[:, None]
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()


def frames_of(samples):
    """How many frames :func:`log_mel` makes of a recording of ``samples`` samples."""
    return max(samples - FFT, 0) // HOP + 1


def log_mel(wave):
    """The log-mel spectrogram [T, MELS] of a recording [S] at ``SAMPLE_RATE``, float32.

    Frame ``t`` is the energy spectrum of the samples from ``t · HOP`` on, ``FFT`` of them, with a Hann window
    of ``WINDOW`` samples over their middle, summed into mel bands; of it (plus ``FLOOR``) the natural
    logarithm. Then the whole is shifted and scaled to mean 0 and standard deviation 1, so that loudness does
    not matter. A recording shorter than ``FFT`` makes one frame, its rest being silence.
    """
    wave = torch.nn.functional.pad(wave, (0, max(FFT - len(wave), 0)))
    spectrum = torch.stft(wave, FFT, HOP, WINDOW, _hann(), center=False, return_complex=True)
    energy = spectrum.real.square() + spectrum.imag.square()  # [FFT // 2 + 1, T]
    features = torch.log(energy.t() @ mel_filters() + FLOOR)
    deviation, mean = torch.std_mean(features, correction=0)
    return (features - mean) / (deviation + 1e-3)


@functools.cache
def _hann():
    return torch.hann_window(WINDOW)


@functools.cache
def _tapes():
    """[2, TAPE] float32 of energy 1 a sample: hiss (white), and rumble whose energy falls as 1 / f above 60
    Hz."""
    random = torch.Generator().manual_seed(0)
    spectrum = torch.fft.rfft(torch.randn(2, TAPE, generator=random))
    frequency = torch.arange(spectrum.shape[1]).clamp(min=TAPE * 60 // SAMPLE_RATE)
    spectrum[1] *= frequency**-0.5
    noise = torch.fft.irfft(spectrum, n=TAPE)
    return noise / noise.square().mean(1, keepdim=True).sqrt()


def add_noise(waves, draws, snr_db, gain_db=(-12.0, 6.0)):
    """Recordings, a list of [S] float32, with noise under them, louder or softer: as recordings do differ.

    Each gets a piece of hiss and one of rumble, in shares that vary, at a signal-to-noise ratio between
    ``snr_db`` (low, high), and a gain between ``gain_db``, both in dB. ``draws``: the :class:`draws.Draws` of
    the rows. None may be longer than ``TAPE``.
    """
    hiss, rumble = _tapes()
    shares, starts = draws.uniform(3).tolist(), draws.uniform(2).tolist()
    noisy = []
    for wave, (mixture, snr, gain), places in zip(waves, shares, starts, strict=True):
        first, second = (int(place * (TAPE - len(wave))) for place in places)
        angle = torch.tensor(0.5 * torch.pi * mixture)
        one, other = hiss[first : first + len(wave)], rumble[second : second + len(wave)]
        noise = angle.cos() * one + angle.sin() * other
        ratio = (wave.square().mean() / noise.square().mean()).sqrt() / _amplitude(snr, *snr_db)
        noisy.append((wave + ratio * noise) * _amplitude(gain, *gain_db))
    return noisy


def _amplitude(share, low, high):
    """The amplitude of a level that lies ``share`` of the way from ``low`` to ``high``, in dB."""
    return 10 ** ((low + (high - low) * share) / 20)


def distort(features, draws, tract=0.12, speed=0.15, bands=8, frames=0.12):
    """Spectrograms, a list of [T, MELS], as of other speakers: stretched along both axes, with gaps.

    Frequencies are scaled by 1 ± ``tract`` (another length of the vocal tract: N. Jaitly and G. Hinton,
    "Vocal tract length perturbation", 2013; here on the mel axis), time by 1 ± ``speed``. Then up to
    ``bands`` neighbouring bands and up to the part ``frames`` of the frames, in one piece each, are replaced
    by 0, the mean (D. Park et al., "SpecAugment", 2019). ``draws``: the :class:`draws.Draws` of the rows.
    """
    numbers = draws.uniform(6).tolist()
    distorted = []
    for x, (scale, rate, wide, low, long, start) in zip(features, numbers, strict=True):
        x = _stretch(x, 1 + tract * (2 * scale - 1), x.shape[1])
        x = _stretch(x.t(), 1.0, max(1, round(len(x) * (1 + speed * (2 * rate - 1))))).t().contiguous()
        wide, long = round(wide * bands), round(long * frames * len(x))
        low, start = round(low * (x.shape[1] - wide)), round(start * (len(x) - long))
        x[:, low : low + wide] = 0
        x[start : start + long] = 0
        distorted.append(x)
    return distorted


def _stretch(x, scale, size):
    """x [A, B] read at ``size`` places of its last axis, from 0 to B - 1 times ``scale``, linearly in
    between; past the end its last value."""
    last = x.shape[1] - 1
    places = (torch.linspace(0, last, size) * scale).clamp(max=last)
    left = places.floor().long().clamp(max=max(last - 1, 0))
    share = places - left
    return x[:, left] * (1 - share) + x[:, (left + 1).clamp(max=last)] * share
