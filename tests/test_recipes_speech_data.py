"""The speech recipe's data: spectrograms against formulas, noise, synthetic voices, own recordings."""

import math

import numpy as np
import pytest
import torch

from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.data import espeak, formants, spectrogram, speech
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.draws import Draws

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("scipy")

COUNTS = {"train": 40, "validation": 10, "test": 20}


def sine(hertz, seconds=0.3, rate=spectrogram.SAMPLE_RATE):
    return torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).float()


# ---- spectrograms ----


def test_mel_filters_are_the_formula():
    """Every entry computed on its own, with math alone."""
    rate, bands, fft, lowest = 16000, 7, 64, 100.0
    mel = lambda f: 2595 * math.log10(1 + f / 700)  # noqa: E731
    hertz = lambda m: 700 * (10 ** (m / 2595) - 1)  # noqa: E731
    step = (mel(rate / 2) - mel(lowest)) / (bands + 1)
    edges = [hertz(mel(lowest) + i * step) for i in range(bands + 2)]
    filters = spectrogram.mel_filters(rate, bands, fft, lowest)
    assert filters.shape == (fft // 2 + 1, bands)
    for place in range(fft // 2 + 1):
        f = place * rate / fft
        for band in range(bands):
            left, middle, right = edges[band : band + 3]
            if left < f <= middle:
                expected = (f - left) / (middle - left)
            elif middle < f < right:
                expected = (right - f) / (right - middle)
            else:
                expected = 0.0
            assert filters[place, band].item() == pytest.approx(expected, abs=1e-5)


def test_log_mel_is_the_direct_computation():
    """Against sums over samples in float64: windowed frames, discrete Fourier transform, bands, logarithm."""
    wave = torch.randn(2000)
    size, hop, window = spectrogram.FFT, spectrogram.HOP, spectrogram.WINDOW
    hann = np.zeros(size)
    start = (size - window) // 2
    hann[start : start + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    transform = np.exp(-2j * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(size)) / size)
    frames = spectrogram.frames_of(len(wave))
    assert frames == (2000 - size) // hop + 1
    parts = np.stack([wave.double().numpy()[t * hop : t * hop + size] * hann for t in range(frames)])
    energy = np.abs(parts @ transform.T) ** 2
    expected = np.log(energy @ spectrogram.mel_filters().double().numpy() + spectrogram.FLOOR)
    expected = (expected - expected.mean()) / (expected.std() + 1e-3)
    torch.testing.assert_close(
        spectrogram.log_mel(wave), torch.from_numpy(expected).float(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("hertz", [300, 1000, 4000])
def test_a_sine_is_loudest_in_its_own_band(hertz):
    band = spectrogram.log_mel(sine(hertz)).mean(0).argmax()
    edges = torch.linspace(
        *(float(spectrogram.hertz_to_mel(f)) for f in (spectrogram.LOWEST, 8000)), spectrogram.MELS + 2
    )
    low, high = spectrogram.mel_to_hertz(edges[band]), spectrogram.mel_to_hertz(edges[band + 2])
    assert low < hertz < high


def test_loudness_does_not_matter_to_log_mel():
    wave = torch.randn(8000)
    torch.testing.assert_close(spectrogram.log_mel(wave), spectrogram.log_mel(0.3 * wave), atol=1e-3, rtol=0)


def test_a_recording_of_few_samples_makes_one_frame():
    assert spectrogram.log_mel(sine(500, seconds=0.01)).shape == (
        spectrogram.frames_of(160),
        spectrogram.MELS,
    )
    assert spectrogram.frames_of(160) == 1


def test_noise_has_the_wanted_level_and_depends_on_its_row_alone():
    waves = [sine(440 + 100 * i, 0.5 + 0.1 * i) for i in range(4)]
    noisy = spectrogram.add_noise(waves, Draws(3, 1, range(4)), (7.0, 7.0), gain_db=(0.0, 0.0))
    for wave, heard in zip(waves, noisy, strict=True):
        ratio = wave.square().mean() / (heard - wave).square().mean()
        assert 10 * math.log10(ratio) == pytest.approx(7.0, abs=0.01)
    (alone,) = spectrogram.add_noise(waves[2:3], Draws(3, 1, [2]), (7.0, 7.0), gain_db=(0.0, 0.0))
    torch.testing.assert_close(alone, noisy[2], atol=0, rtol=0)
    assert not torch.equal(noisy[2], spectrogram.add_noise(waves, Draws(3, 2, range(4)), (7.0, 7.0))[2])


def test_gain_is_in_decibels():
    wave = sine(440)
    (heard,) = spectrogram.add_noise([wave], Draws(0, 0, [0]), (200.0, 200.0), gain_db=(-20.0, -20.0))
    torch.testing.assert_close(heard, 0.1 * wave, atol=1e-6, rtol=1e-4)


def test_distortion_of_no_size_changes_nothing_and_else_moves_what_there_is():
    picture = torch.zeros(60, spectrogram.MELS)
    picture[30, 20] = 1.0
    (same,) = spectrogram.distort([picture], Draws(0, 0, [0]), tract=0.0, speed=0.0, bands=0, frames=0.0)
    torch.testing.assert_close(same, picture, atol=1e-5, rtol=0)
    lengths, places = set(), set()
    for row in range(12):
        (moved,) = spectrogram.distort(
            [picture], Draws(0, 0, [row]), tract=0.2, speed=0.2, bands=0, frames=0.0
        )
        lengths.add(len(moved))
        places.add(int(moved.amax(0).argmax()))
        assert 0.8 * 60 <= len(moved) <= 1.2 * 60
    assert len(lengths) > 5
    assert len(places) > 3
    (masked,) = spectrogram.distort(
        [torch.ones(60, spectrogram.MELS)], Draws(0, 0, [5]), tract=0.0, speed=0.0, bands=20, frames=0.5
    )
    assert (masked == 0).any(1).any()
    assert (masked == 1).any()


# ---- synthetic speech ----


@pytest.fixture(params=["espeak", "builtin"])
def speaker(request):
    if request.param == "builtin":
        return speech.engine("builtin")
    try:
        return espeak.espeak()
    except espeak.EspeakUnavailable as error:
        pytest.skip(str(error))


def test_voices_of_the_splits_are_disjoint(speaker):
    parts = speech.synthesise(speaker, COUNTS, False, 0)
    heard = {split: set(part.voices) for split, part in parts.items()}
    assert not heard["train"] & heard["test"]
    assert not heard["train"] & heard["validation"]
    assert not heard["validation"] & heard["test"]
    for split, part in parts.items():
        assert set(part.voices) <= set(speaker.voices[split])
        assert len(part) == COUNTS[split]
    assert {words for (words,) in parts["test"].words} == set(speech.DIGITS)
    assert parts["train"].noise is None
    assert parts["test"].noise == speech.NOISE


def test_speech_is_the_seeds(speaker):
    one, same, other = (speech.synthesise(speaker, {"train": 3}, True, seed)["train"] for seed in (1, 1, 2))
    assert one.words == same.words != other.words
    assert one.voices == same.voices
    assert all(2 <= len(words) <= 5 for words in one.words)
    # espeak-ng's oscillators go on from utterance to utterance, so a repetition is only nearly as long.
    allowed = 0 if speaker.name.startswith("built-in") else 0.05
    for a, b in zip(one.waves, same.waves, strict=True):
        assert abs(len(a) - len(b)) <= allowed * len(a)
        assert allowed or np.array_equal(a, b)


def test_words_sound_as_they_should(speaker):
    """six is hissed at both ends, one nowhere: the share of the energy above 3 kHz tells them apart."""

    def hiss(word, voice):
        sound = np.asarray(speaker.say((word,), voice, np.random.default_rng(0)))
        energy = np.abs(np.fft.rfft(sound)) ** 2
        return energy[np.fft.rfftfreq(len(sound), 1 / speaker.sample_rate) > 3000].sum() / energy.sum()

    voices = speaker.voices["test"]
    assert sum(hiss("six", voice) > 2 * hiss("one", voice) for voice in voices) >= 0.9 * len(voices)


def test_the_builtin_generator_says_digits_only():
    with pytest.raises(KeyError):
        formants.Formants().say(("ten",), "speaker0", np.random.default_rng(0))


def test_asking_for_espeak_where_it_is_not(monkeypatch):
    def missing():
        raise espeak.EspeakUnavailable("not here")

    monkeypatch.setattr(speech, "espeak", missing)
    assert speech.engine("auto").name == "built-in formant generator"
    with pytest.raises(espeak.EspeakUnavailable):
        speech.engine("espeak")


def test_the_cache_is_used_and_replaced_when_stale_or_damaged(tmp_path, monkeypatch, capsys):
    speaker, path = speech.engine("builtin"), tmp_path / "kept" / "speech.npz"
    made = speech.cached(path, speaker, COUNTS, False, 0)
    assert [file.name for file in path.parent.iterdir()] == ["speech.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(speech, "synthesise", None)  # whoever calls it fails
        read = speech.cached(path, speaker, COUNTS, False, 0)
    for split, part in made.items():
        assert (read[split].words, read[split].voices, read[split].noise) == (
            part.words,
            part.voices,
            part.noise,
        )
        assert all(np.array_equal(a, b) for a, b in zip(read[split].waves, part.waves, strict=True))
    other = speech.cached(path, speaker, {"train": 5}, False, 0)
    assert len(other["train"]) == 5
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content[:-100])
    again = speech.cached(path, speaker, {"train": 5}, False, 0)
    assert "damaged" in capsys.readouterr().err
    assert np.array_equal(again["train"].waves[0], other["train"].waves[0])
    assert speech.cached(path, speaker, {"train": 5}, False, 0)["train"].words == other["train"].words
    assert capsys.readouterr().err == ""


# ---- the user's own recordings ----


def write(path, wave, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(wave), rate)
    return path


def test_a_recording_of_another_rate_and_two_channels(tmp_path):
    wave = sine(700, 0.5, 44100)
    path = write(tmp_path / "a.wav", torch.stack([wave, 0.5 * wave], 1), 44100)
    read = speech.read_wav(path)
    assert read.dtype == np.int16
    assert len(read) == 8000
    spectrum = np.abs(np.fft.rfft(read / 32768))
    assert np.fft.rfftfreq(len(read), 1 / 16000)[spectrum.argmax()] == pytest.approx(700, abs=2)
    assert np.abs(read[1000:-1000]).max() / 32768 == pytest.approx(0.75, abs=0.01)


def bad_wav(path, kind):
    good = write(path, sine(300))
    content = good.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"these are no samples" * 50)
    elif kind == "silent":
        write(path, torch.zeros(8000))
    elif kind == "short":
        write(path, sine(300, 0.02))
    elif kind == "long":
        write(path, torch.full((61 * 2000,), 0.1), 2000)
    elif kind == "nan":
        soundfile.write(path, np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    return path


BAD = {
    "truncated": "truncated", "empty": "an empty file", "text": "cannot be read", "silent": "silent",
    "short": "0.02 s long", "long": "61 s long", "nan": "no finite numbers",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_recordings_are_refused_with_the_reason(tmp_path, kind):
    with pytest.raises(ValueError, match=BAD[kind]):
        speech.read_wav(bad_wav(tmp_path / "bad.wav", kind))


def test_a_folder_for_each_word(tmp_path, capsys):
    for word in ("ja", "nein"):
        for number in range(10):
            write(tmp_path / word / f"{number}.wav", sine(300 + 10 * number + 500 * (word == "ja")))
    (tmp_path / "leer").mkdir()
    (tmp_path / ".hidden").write_text("x")
    bad_wav(tmp_path / "nein" / "broken.wav", "truncated")
    bad = BadFiles("skip")
    found = speech.read_folder(tmp_path, bad)
    assert {name for name, _ in bad.found} == {str(tmp_path / "leer"), str(tmp_path / "nein" / "broken.wav")}
    assert found.words.count(("ja",)) == found.words.count(("nein",)) == 10
    splits = speech.split_voices(found, 0, by_word=True)
    files = [set(part.files) for part in splits.values()]
    assert sum(map(len, files)) == len(set.union(*files)) == 20
    assert all({words for words in part.words} == {("ja",), ("nein",)} for part in splits.values())
    bad.choice = "refuse"
    with pytest.raises(RecipeError, match=r"(?s)2 bad.*broken\.wav: truncated"):
        bad.settle()


def test_what_is_no_recording_a_copy_or_mislabelled_is_named(tmp_path):
    for word, hertz in (("ja", 300), ("nein", 900)):
        for number in range(3):
            write(tmp_path / word / f"{number}.wav", sine(hertz + number))
    samples, rate = soundfile.read(tmp_path / "ja" / "0.wav", dtype="int16")
    write(tmp_path / "ja" / "again.flac", samples, rate)  # the same recording in another format
    write(tmp_path / "nein" / "wrong.wav", sine(301))
    (tmp_path / "ja" / "voice.m4a").write_bytes(b"x")
    write(tmp_path / "beside.wav", sine(500))
    bad = BadFiles("skip")
    found = speech.read_folder(tmp_path, bad)
    kept = {file.removeprefix(f"{tmp_path}/") for file in found.files}
    assert kept == {"ja/0.wav", "ja/2.wav", "nein/0.wav", "nein/1.wav", "nein/2.wav"}
    reasons = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in bad.found}
    assert "not a recording" in reasons.pop("ja/voice.m4a")
    assert "lies beside" in reasons.pop("beside.wav")
    for here, there in (("ja/1.wav", "nein/wrong.wav"), ("nein/wrong.wav", "ja/1.wav")):
        told = reasons.pop(here)
        assert "mislabelled" in told
        assert "'ja', 'nein'" in told
        assert there in told
    assert reasons == {"ja/again.flac": f"a copy of {tmp_path}/ja/0.wav"}


def test_transcripts_and_speakers(tmp_path):
    for number in range(8):
        write(tmp_path / "wav" / f"{number}.wav", sine(300 + number))
    lines = [f"wav/{n}.wav\tone two\tspeaker{n % 4}" for n in range(8)]
    lines += ["# a remark", "", "wav/9.wav\tthree", "wav/1.wav", "wav/1.wav\t", "a\tb\tc\td"]
    table = tmp_path / "all.tsv"
    table.write_bytes("\n".join(lines).encode() + b"\nwav/1.wav\t\xff\xfe\n")
    bad = BadFiles("skip")
    found = speech.read_transcripts(table, bad)
    assert len(found) == 8
    assert found.words[0] == ("one", "two")
    reasons = {name.rsplit("/", 1)[-1]: reason for name, reason in bad.found}
    assert reasons["9.wav"] == "there is no such file"
    assert "1 column(s)" in reasons["all.tsv, line 12"]
    assert reasons["all.tsv, line 13"] == "no transcript"
    assert "4 column(s)" in reasons["all.tsv, line 14"]
    assert reasons["all.tsv, line 15"] == "not UTF-8"
    parts = speech.split_voices(found, 0)
    voices = [set(part.voices) for part in parts.values()]
    assert sum(map(len, voices)) == 4
    assert sum(len(part) for part in parts.values()) == 8


def test_a_table_may_name_its_columns(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.wav", sine(300 + number))
    table = tmp_path / "all.tsv"
    table.write_text("client\tSpeaker\tTranscript\tpath\nx\tann\tone two\t0.wav\n\tbob\tthree\t1.wav\nx\ty\n")
    bad = BadFiles("skip")
    found = speech.read_transcripts(table, bad)
    assert found.words == [("one", "two"), ("three",)]
    assert found.voices == ["ann", "bob"]
    assert [file.removeprefix(f"{tmp_path}/") for file in found.files] == ["0.wav", "1.wav"]
    ((place, reason),) = bad.found
    assert place.endswith("line 4")
    assert "2 column(s)" in reason


def test_a_transcript_that_another_line_contradicts_is_mislabelled(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.wav", sine(300 + number))
    (tmp_path / "all.tsv").write_text("0.wav\tone\n1.wav\ttwo\n1.wav\tthree four\n")
    bad = BadFiles("skip")
    found = speech.read_transcripts(tmp_path / "all.tsv", bad)
    assert found.words == [("one",)]
    told = "mislabelled: the same recording has the labels 'three four', 'two'"
    assert bad.found == [(str(tmp_path / "1.wav"), told)]


def test_speakers_in_the_files_names(tmp_path):
    for place, who in enumerate("abcdefghij"):
        for number in range(3):
            write(tmp_path / "word" / f"{who}_{number}.wav", sine(300 + 5 * place + number))
    found = speech.read_folder(tmp_path, BadFiles("refuse"))
    parts = speech.split_voices(found, 0, r"^([^_]+)_", by_word=True)
    speakers = [{file.rsplit("/", 1)[-1][0] for file in part.files} for part in parts.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 10
