"""Files, faults and numbers of the audio module that do not read as a story."""

import io
import math
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import fuzz_audio
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from audiomaepp import audio
from audiomaepp.audio import AudioError, load_audio, probe, resample, stream_audio, windows
from audiomaepp.config import Config
from audiomaepp.features import Fbank, LogMel, build_frontend, standardize_spec

RATE = 16_000
ORACLE = load_file(Path(__file__).parent / "fixtures" / "frontend_oracle.safetensors")


def run(code, timeout=120):
    "What `code` prints in a fresh interpreter."
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(path, samples=48_000, rate=RATE, channels=1, **kwargs):
    "A file of noise."
    noise = 0.1 * np.random.default_rng(0).standard_normal((samples, channels))
    soundfile.write(path, noise[:, 0] if channels == 1 else noise, rate, **kwargs)
    return path


def reason(source, **kwargs):
    "Why `load_audio` refuses `source`."
    with pytest.raises(AudioError) as caught:
        load_audio(source, **kwargs)
    return caught.value.reason


# ---- torchaudio without its extension

BREAK = """
import importlib.abc, sys
class Break(importlib.abc.MetaPathFinder):
    "The first import of the extension fails, as it does beside a foreign torch."
    tries = 0
    def find_spec(self, name, path, target=None):
        if name == "torchaudio._extension":
            Break.tries += 1
            raise {error}("versions do not match")
sys.meta_path.insert(0, Break())
"""


@pytest.mark.parametrize("error", ["OSError", "RuntimeError", "ImportError"])
def test_torchaudio_is_loaded_without_an_extension_that_fails(error):
    out = run(
        BREAK.format(error=error)
        + """
import torch, threading
from audiomaepp.audio import import_torchaudio, resample
from audiomaepp.features import Fbank, LogMel
found = []
threads = [threading.Thread(target=lambda: found.append(import_torchaudio())) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(found) == 8 and len(set(map(id, found))) == 1
import torchaudio
import torchaudio._extension.utils
import importlib.util
assert torchaudio is found[0] and Break.tries == 1
assert importlib.util.find_spec("torchaudio._extension") is not None
assert "versions do not match" in torchaudio._extension.reason
assert LogMel()(torch.randn(1, 32000)).isfinite().all() and Fbank(64)(torch.randn(1, 9999)).isfinite().all()
assert resample(torch.randn(4410), 44100, 16000).shape == (1600,)
try:
    torchaudio.functional.forced_align(torch.zeros(1, 4, 3), torch.ones(1, 2, dtype=torch.int32))
except RuntimeError as error:
    print(error)
"""
    )
    assert "compiled" in out and "versions do not match" in out


def test_a_torchaudio_that_imports_is_left_alone(monkeypatch):
    working = types.ModuleType("torchaudio")
    monkeypatch.setitem(sys.modules, "torchaudio", working)
    before = sys.modules.get("torchaudio._extension")
    assert audio.import_torchaudio() is working and sys.modules.get("torchaudio._extension") is before


def test_a_missing_torchaudio_says_so():
    out = run("""
        import sys, importlib.util
        from audiomaepp.features import LogMel
        sys.path = [p for p in sys.path if "site-packages" not in p]
        try: LogMel()
        except ModuleNotFoundError as error: print(error)
    """)
    assert "torchaudio" in out


def test_import_loads_nothing_heavy():
    run("""
        import sys, audiomaepp.audio
        assert not {"torchaudio", "soundfile", "scipy", "pandas", "matplotlib"} & set(sys.modules)
    """)


# ---- files that are fine


@pytest.mark.parametrize(
    "name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.opus", "a.aiff", "a.au", "a.caf", "a.w64", "a.rf64"]
)
@pytest.mark.parametrize("rate, channels", [(8_000, 1), (16_000, 2), (48_000, 1)])
def test_formats(tmp_path, name, rate, channels):
    special = {"a.opus": dict(format="OGG", subtype="OPUS"), "a.rf64": dict(format="RF64")}
    path = write(tmp_path / name, rate, rate, channels, **special.get(name, {}))
    wav = load_audio(path)
    assert wav.shape == (RATE,) and wav.dtype == torch.float32 and 0.01 < wav.std() < 0.2
    assert load_audio(path, mono=False).shape == (channels, RATE)
    assert torch.equal(load_audio(path.read_bytes()), wav)
    assert probe(path)[:3] == (1.0, rate, channels)
    assert path.suffix in audio.AUDIO_EXTENSIONS


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_a_part_is_the_part(tmp_path, name):
    path = write(tmp_path / name)
    part, whole = load_audio(path, start=1.25, seconds=0.5), load_audio(path)
    assert torch.allclose(part, whole[20_000:28_000], atol=1e-6)
    assert load_audio(path, start=2.9, seconds=5).shape == (1_600,) # a recording that ends before gives less
    assert load_audio(path, start=0.5).shape == (40_000,)
    assert "3.00 s" in reason(path, start=3)


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([[0.5, -0.25]] * 100), RATE, subtype="FLOAT")
    assert torch.allclose(load_audio(tmp_path / "a.wav"), torch.full((100,), 0.125))


def test_long_recordings_go_in_blocks(tmp_path):
    path = write(tmp_path / "a.flac", 300_000, channels=2)
    wanted = soundfile.read(path, dtype="float32")[0].T
    assert np.array_equal(load_audio(path, mono=False).numpy(), wanted)
    assert np.allclose(load_audio(path).numpy(), wanted.mean(0), atol=1e-7)


@pytest.mark.parametrize("name", ["a b.wav", "größe 鳥 🦉.flac", "-rf.wav", "a%20b#c?.ogg", "no_extension"])
def test_names(tmp_path, name):
    path = write(tmp_path / name, format=None if "." in name else "WAV")
    assert load_audio(path).shape == load_audio(str(path)).shape == (48_000,)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_names_that_are_no_utf8(tmp_path):
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"bad\xff.wav"))
    os.replace(write(tmp_path / "a.wav"), path)
    assert load_audio(path).shape == (48_000,)
    os.truncate(path, 0)
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    str(caught.value).encode() # can be printed


def test_links_are_followed(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "b.wav").symlink_to("a.wav")
    assert load_audio(tmp_path / "b.wav").shape == (48_000,)


def test_file_objects(tmp_path):
    path = write(tmp_path / "a.flac")

    class Stream(io.RawIOBase): # a pipe or a download: it cannot go back
        def __init__(self):
            self.rest = io.BytesIO(path.read_bytes())

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.rest.readinto(buffer)

    with open(path, "rb") as file:
        file.read(10)
        assert torch.equal(load_audio(file), load_audio(path))
    assert torch.equal(load_audio(Stream()), load_audio(path))
    assert torch.equal(load_audio(memoryview(path.read_bytes())), load_audio(path))
    with pytest.raises(TypeError, match="ndarray"):
        load_audio(np.zeros(100))


def test_one_sample_and_odd_rates(tmp_path):
    for rate in (RATE, 44_100, 44_101, 192_000):
        assert load_audio(write(tmp_path / "a.wav", 1, rate)).shape == (1,)
    assert load_audio(write(tmp_path / "b.wav", 44_101, 44_101)).shape == (RATE,)
    assert load_audio(write(tmp_path / "c.wav", 96_000, 192_000, channels=6)).shape == (8_000,)


# ---- files that are not


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.aiff", "a.au"])
@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_cut_off(tmp_path, name, kind):
    path = cut(write(tmp_path / name))
    why = reason(path if kind == "path" else path.read_bytes())
    there, promised = (int(word) for word in why.split() if word.isdigit())
    assert 24_000 < there < 30_000 and promised == 48_000, why
    assert load_audio(path, seconds=1).shape == (RATE,) # what is asked for is there
    assert "of 48000" in reason(path, start=1, seconds=1)


@pytest.mark.parametrize("how", [{}, dict(format="OGG", subtype="OPUS")])
@pytest.mark.parametrize("share", [0.999, 0.6, "page", "zeros"])
def test_an_ogg_file_that_is_cut_off(tmp_path, how, share):
    "Its header states no length: a copy that broke off would be a shorter recording, and pass as one."
    data = write(tmp_path / "a.ogg", 320_000, **how).read_bytes()
    assert load_audio(data).shape == (320_000,)
    assert load_audio(data + b"TAG" + bytes(125)).shape == (320_000,), "what another program put behind it is no harm"
    if share == "page":
        data = data[: data.rindex(b"OggS")]
    elif share == "zeros":
        data = data[: len(data) // 4] + bytes(len(data) * 3 // 4)
    else:
        data = data[: int(len(data) * share)]
    (tmp_path / "a.ogg").write_bytes(data)
    for source in (data, tmp_path / "a.ogg", io.BytesIO(data)):
        assert reason(source).startswith("is cut off: ")
    with pytest.raises(AudioError, match="is cut off"):
        list(stream_audio(data, seconds=1))
    assert load_audio(data, seconds=1).shape == (RATE,), "what is asked for is there"
    assert "is cut off" in reason(data, start=1) and "is cut off" in reason(data, start=19, seconds=5)


def test_cut_within_the_first_frame(tmp_path):
    assert "0 of 48000" in reason(cut(write(tmp_path / "a.flac"), 0.03))
    assert "not audio" in reason(cut(write(tmp_path / "a.flac"), 0.0002))
    for name in ("a.ogg", "a.mp3"):
        assert "not audio" in reason(cut(write(tmp_path / name), 0.03))


def test_damaged_in_the_middle(tmp_path):
    path = write(tmp_path / "a.flac")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3_000] = bytes(3_000)
    assert "of 48000 samples can be decoded" in reason(bytes(data))


def test_headers_without_a_length(tmp_path):
    data = bytearray(write(tmp_path / "a.wav").read_bytes())
    at = data.find(b"data") + 4
    for placeholder in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\xf0\xff\x7f"):
        data[at : at + 4] = placeholder
        assert load_audio(bytes(data)).shape == (48_000,)

    path = write(tmp_path / "a.flac") # as written through a pipe: the total is 0
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    whole = load_audio(path)
    path.write_bytes(data)
    assert torch.equal(load_audio(path), whole)
    assert torch.equal(load_audio(path, start=1, seconds=0.5), whole[16_000:24_000])
    assert probe(path) == (3.0, RATE, 1, 48_000, "FLAC")


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("first", ["loud", "quiet"])
def test_mp3_without_a_length_tag(tmp_path, mode, first):
    noise = 0.1 * np.random.default_rng(0).standard_normal(96_000) * (np.arange(96_000) < 48_000)
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise if first == "loud" else noise[::-1], RATE, bitrate_mode=mode)
    data = path.read_bytes()
    untagged = data[data.find(data[:2], 4) :]
    assert b"Xing" not in untagged[:200] and b"Info" not in untagged[:200]
    for source in (untagged, io.BytesIO(untagged)): # its length, guessed from its size, may be a quarter of it
        assert 96_000 <= len(load_audio(source)) < 99_000
    path.write_bytes(untagged)
    assert 96_000 <= len(load_audio(path)) < 99_000 and len(load_audio(path, start=3, seconds=1)) == RATE
    assert 6 <= probe(path).seconds < 6.2 and "decoded from start" in reason(path, start=20)
    assert 20_000 < len(load_audio(untagged[: len(untagged) * 6 // 10])) < 96_000 # nothing was promised

    picture = b"ID3\x04\0\0" + bytes([0, 0, 2, 0]) + bytes(256) + data
    assert load_audio(picture).shape == (96_000,)
    assert "of 96000" in reason(picture[: len(picture) * 6 // 10])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.wav", b"", "empty (0 bytes)"),
        ("a.wav", b"not a wave at all\n" * 9, "begins with b'not a wave at al'"),
        ("a.mp3", b"<html>" * 99, "begins with b'<html>"),
        ("a.flac", bytes(5_000), "not audio"),
        ("a.raw", b"ab" * 999, "no header"),
        ("a.wav", b"RIFF\x24\0\0\0WAVE", "not audio"),
    ],
)
def test_no_audio(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in reason(tmp_path / name)
    assert "not audio" in reason(content) or not content
    with pytest.raises(AudioError, match=name):
        probe(tmp_path / name)


def crc(data, polynomial, bits):
    "A checksum as FLAC has it."
    value, top = 0, 1 << bits - 1
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value & top else 0)) & (2 * top - 1)
    return value.to_bytes(bits // 8, "big")


def silent_flac(frames, rate, claimed=None):
    "A FLAC file of digital silence, 65,535 samples in a frame of some 14 bytes; perhaps with another length claimed."
    size = 65_535
    facts = rate << 44 | 15 << 36 | (frames * size if claimed is None else claimed)
    parts = [b"fLaC\x80\0\0\x22", size.to_bytes(2, "big") * 2, bytes(6), facts.to_bytes(8, "big"), bytes(16)]
    for n in range(frames):
        number = chr(n).encode("utf-8", "surrogatepass") # frames are numbered in what became UTF-8
        head = b"\xff\xf8\x70\x08" + number + (size - 1).to_bytes(2, "big")
        head += crc(head, 0x07, 8) + bytes(3)
        parts += [head, crc(head, 0x8005, 16)]
    return b"".join(parts)


def test_a_few_bytes_of_silence_are_counted_in_flat_memory(tmp_path):
    "12 kB of FLAC become 240 MB of samples, and a few MB what fills every memory."
    (tmp_path / "a.flac").write_bytes(silent_flac(900, RATE))
    out = run(f"""
        import resource, pandas as pd
        from audiomaepp.audio import probe, stream_audio
        from audiomaepp.data import Recordings, drop_unreadable
        path = {str(tmp_path / "a.flac")!r}
        sum(map(len, stream_audio({silent_flac(20, RATE)!r}))) # what is needed once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = drop_unreadable(Recordings(pd.DataFrame({{"path": [path]}})), quiet=True)
        print(found.table.seconds[0], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """)
    seconds, grown = map(float, out.split())
    assert seconds == 900 * 65_535 / RATE and grown < 40


@pytest.mark.parametrize("claimed", [None, 10**9, int(1.1e6 * RATE), 2**36 - 1])
def test_a_header_that_claims_more_than_the_file_holds(tmp_path, claimed):
    data = silent_flac(200 if claimed else 24_000, RATE if claimed else 1_425, claimed) # the first is what it claims
    words = f"of {claimed} samples" if claimed == 10**9 else "claims to last [0-9]+ s"
    for read in (load_audio, lambda data: list(stream_audio(data))):
        with pytest.raises(AudioError, match=words):
            read(data)
    assert load_audio(data, start=5, seconds=1).shape == (RATE,)


def test_samples_of_unknown_number_are_counted_in_flat_memory(tmp_path):
    out = run(f"""
        import resource
        from audiomaepp.audio import probe
        probe({silent_flac(20, RATE, 0)!r})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(probe({silent_flac(500, RATE, 0)!r}).frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    frames, grown = map(int, out.split())
    assert frames == 500 * 65_535 and grown < 40 * 1024


def test_nothing_in_it(tmp_path):
    assert reason(write(tmp_path / "a.wav", 0)) == "holds no samples"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(tmp_path, bad):
    samples = np.zeros((1_000, 2), "float32")
    samples[[3, 700], 1] = bad
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    assert reason(tmp_path / "a.wav") .startswith("samples must be finite, got NaN or infinity in 2 of 1000;")
    assert load_audio(tmp_path / "a.wav", start=0.001, seconds=0.02).shape == (320,) # the part without is fine


@pytest.mark.parametrize("rate", [8, 2**24, 2**31 - 1])
def test_absurd_rate(tmp_path, rate):
    "One byte of the header is wrong, and a recording would be an hour of nothing, or a single sample."
    path = write(tmp_path / "a.wav", 2_000, rate)
    assert f"sample rate of {rate} Hz" in reason(path)
    with pytest.raises(AudioError, match=f"{rate} Hz"):
        list(stream_audio(path, seconds=1))


def test_no_file(tmp_path):
    assert reason(tmp_path / "a.wav") == "does not exist"
    (tmp_path / "b.wav").symlink_to("gone.wav")
    assert reason(tmp_path / "b.wav") == "is a link to gone.wav, which does not exist"
    (tmp_path / "c.wav").symlink_to("c.wav")
    assert "cannot be opened" in reason(tmp_path / "c.wav")
    assert reason(tmp_path) == "is a folder, not a file"
    assert "cannot be opened" in reason("a\0b.wav")
    assert "cannot be opened" in reason(tmp_path / ("x" * 300))
    write(tmp_path / "d.wav")
    assert "cannot be opened" in reason(tmp_path / "d.wav" / "e.wav")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_what_would_hang(tmp_path):
    "Each is called by its name, also behind a link, and is never opened: a pipe waits for ever, a device has no end."
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to("folder.wav")
    wanted = {
        "pipe.wav": "is a pipe, not a regular file", "socket.wav": "is a socket, not a regular file",
        "/dev/zero": "is a device, not a regular file", "folder.wav": "is a folder, not a file",
        "zero.wav": "is a link to /dev/zero, which is a device, not a regular file",
        "link.wav": "is a link to folder.wav, which is a folder, not a file",
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.wav"))
        found = []
        for name, words in wanted.items():
            path = tmp_path / name
            thread = threading.Thread(target=lambda path=path: found.append(reason(path)), daemon=True)
            thread.start()
            thread.join(10)
            assert found.pop() == words


def test_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch: # root may read everything, so the refusal is played
        patch.setattr("builtins.open", refuse)
        assert reason(path) == "cannot be opened (Permission denied)"
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        assert reason(path) == "cannot be opened (Permission denied)"


def test_the_error_travels(tmp_path):
    with pytest.raises(ValueError) as caught:
        load_audio(tmp_path / "a.wav")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is AudioError and again.reason == "does not exist" and again.source == str(tmp_path / "a.wav")
    assert str(again) == str(caught.value) == f"{tmp_path / 'a.wav'}: does not exist"


@pytest.mark.parametrize("wrong", [dict(start=-1), dict(seconds=0), dict(seconds=-2.0), dict(sample_rate=0)])
def test_wrong_requests(tmp_path, wrong):
    with pytest.raises(ValueError) as caught:
        load_audio(write(tmp_path / "a.wav"), **wrong)
    assert not isinstance(caught.value, AudioError) # the request is at fault, not the recording


@pytest.mark.parametrize("first", [0, 50, 100])
def test_damaged_files_are_usable_or_refused(tmp_path, first):
    "One exception of another kind stops a night's work; python tests/fuzz_audio.py tries thousands."
    for seed in range(first, first + 50):
        fuzz_audio.check(fuzz_audio.mutated(seed, tmp_path))


@pytest.mark.parametrize("seed", [194, 2313, 5206, 9862])
def test_damaged_files_that_were_neither(tmp_path, seed):
    path = fuzz_audio.mutated(seed, tmp_path)
    data = path.read_bytes()
    assert fuzz_audio.mutated(seed, tmp_path).read_bytes() == data, "a seed is a file"
    fuzz_audio.check(path)


# ---- resampling and windows


@pytest.mark.parametrize("pair", [(44_100, 16_000), (8_000, 16_000), (48_000, 16_000), (11_025, 16_000), (3, 2)])
def test_both_ways_resample_alike(pair):
    wav = torch.randn(2, 3, 5_000, generator=torch.Generator().manual_seed(0))
    divisor = math.gcd(*pair)
    directly = audio._resample_directly(wav.flatten(0, 1), pair[0] // divisor, pair[1] // divisor, block=10_000)
    usual = resample(wav, *pair)
    assert usual.shape == (2, 3, math.ceil(5_000 * pair[1] / pair[0]))
    assert torch.allclose(directly.view_as(usual), usual, atol=1e-4)


@pytest.mark.parametrize("rate", [44_101, 15_999, 16_001, 96_001, 655_349])
def test_rates_without_a_common_divisor(rate):
    def tone(rate):
        return torch.sin(2 * math.pi * 440 * torch.arange(rate, dtype=torch.float64) / rate).float()

    out = resample(tone(rate), rate, RATE)
    assert out.shape == (RATE,) and torch.allclose(out[200:-200], tone(RATE)[200:-200], atol=1e-3)


@pytest.mark.parametrize("rate, seconds", [(8_000, 1_100), (44_100, 1_100)])
def test_no_sample_is_lost_at_the_end_of_a_long_recording(rate, seconds):
    "torchaudio counts in float32."
    wav = torch.arange(seconds * rate + 1) / (seconds * rate)
    found, end = resample(wav, rate, RATE), resample(wav[-10 * rate - 1 :], rate, RATE)
    assert len(found) == math.ceil(len(wav) * RATE / rate)
    assert torch.allclose(found[-9 * RATE :], end[-9 * RATE :], atol=1e-5)


def test_resampling_at_the_edges():
    wav = torch.randn(100)
    assert torch.equal(resample(wav, 8_000, 8_000), wav)
    assert resample(torch.zeros(2, 0), 44_100, 16_000).shape[0] == 2
    assert resample(wav.half(), 44_101, 16_000).dtype == torch.float32
    assert resample(wav, 8_000.0, 16_000).shape == (200,)
    for pair in ((0, 16_000), (44_100.5, 16_000), (16_000, -1)):
        with pytest.raises(ValueError, match="samples per second"):
            resample(wav, *pair)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 60))
def test_windows_hold_every_sample(samples, size, hop):
    wav = torch.arange(1.0, samples + 1)
    if hop > size:
        with pytest.raises(ValueError, match="hop"):
            windows(wav, size, hop)
        return
    clips, lengths = windows(wav, size, hop)
    assert clips.shape == (len(lengths), size) and (lengths > 0).all() and (lengths <= size).all()
    back = torch.zeros(samples)
    for i, (clip, length) in enumerate(zip(clips, lengths.tolist(), strict=True)):
        back[i * hop : i * hop + length] = clip[:length]
        assert not clip[length:].any()
    assert torch.equal(back, wav)
    assert len(clips) == 1 or (len(clips) - 2) * hop + size < samples # no window more than needed


def test_windows_need_a_recording():
    for wav in (torch.zeros(0), torch.zeros(2, 100)):
        with pytest.raises(ValueError, match="shape"):
            windows(wav, 10)


# ---- front ends


def lengths_of(wav):
    return torch.full((len(wav),), wav.shape[1])


def test_numbers_of_the_original():
    # Between the tones of the first clip lies what an FFT rounds off, which differs between processors: the power of a
    # band is right to 1e-7 (the loudest has 2e3), and so its logarithm to 1e-4 wherever the band sounds.
    wav, logmel, fbank = ORACLE["wav"], LogMel(), Fbank(198, 128)
    for ours, theirs, log in [
        (logmel.log_spectrum(wav, lengths_of(wav))[:, :200], ORACLE["logmel_raw"], ORACLE["logmel_raw"]),
        (logmel(wav)[:, 0], ORACLE["spec"], ORACLE["logmel_raw"]),
        (fbank.log_spectrum(wav, lengths_of(wav))[:, ::2], ORACLE["kaldi_fbank"], ORACLE["kaldi_fbank"]),
    ]:
        assert ((ours - theirs).abs() < 1e-4 + 1e-7 / log.exp()).all()


@pytest.mark.parametrize(
    "n_fft, win_length, hop, n_mels", [(400, 400, 160, 80), (512, 400, 200, 64), (640, 512, 320, 64)]
)
def test_logmel_is_torchaudios(n_fft, win_length, hop, n_mels):
    wav = torch.randn(3, 100 * hop, generator=torch.Generator().manual_seed(0))
    mel = audio.import_torchaudio().transforms.MelSpectrogram(
        RATE, n_fft=n_fft, win_length=win_length, hop_length=hop, f_min=20, f_max=7_000, n_mels=n_mels
    )
    wanted = (mel(wav) + torch.finfo(torch.float32).eps).log().mT
    ours = LogMel(100, n_mels, n_fft=n_fft, win_length=win_length, hop_length=hop, f_min=20, f_max=7_000)
    assert torch.allclose(ours.log_spectrum(wav, lengths_of(wav)), wanted, atol=1e-4)
    assert ours(wav).shape == (3, 1, 100, n_mels)


def test_long_clips_are_torchaudios():
    "Clips of several blocks of frames, in batches of several blocks of clips."
    wav = torch.randn(3, 1_300 * 160, generator=torch.Generator().manual_seed(0))
    mel = audio.import_torchaudio().transforms.MelSpectrogram(RATE, 400, 400, 160, f_min=50, f_max=8_000, n_mels=80)
    wanted = (mel(wav) + torch.finfo(torch.float32).eps).log().mT
    ours = LogMel(1_300, normalize="dataset")
    assert torch.allclose(ours.log_spectrum(wav, lengths_of(wav)), wanted, atol=1e-4)
    assert torch.allclose(ours(wav)[:, 0], (wanted[:, :1_300] + 4.2677393) / (2 * 4.5689974), atol=1e-4)


@pytest.mark.parametrize("rate, win_length, hop", [(16_000, 400, 160), (8_000, 200, 80), (16_000, 512, 160)])
def test_fbank_is_kaldis(rate, win_length, hop):
    wav = 0.1 * torch.randn(3, rate, generator=torch.Generator().manual_seed(0)) + 0.05
    kaldi = audio.import_torchaudio().compliance.kaldi.fbank
    wanted = [
        kaldi(
            (w - w.mean())[None], htk_compat=True, window_type="hanning", num_mel_bins=64, sample_frequency=rate,
            frame_length=win_length / rate * 1e3, frame_shift=hop / rate * 1e3,
        )
        for w in wav
    ] # fmt: skip
    ours = Fbank(len(wanted[0]) + 5, 64, rate, win_length, hop, f_max=rate / 2)
    found = ours.log_spectrum(wav, lengths_of(wav))
    assert torch.allclose(found[:, :-5], torch.stack(wanted), atol=1e-4)
    assert not found[:, -5:].any() # zero in the logarithm, before standardizing
    assert torch.allclose(ours(wav)[:, 0], (found + 4.2677393) / (2 * 4.5689974), atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: LogMel(50), lambda: Fbank(50, 64), lambda: Fbank(50, 64, normalize="clip")]
)
class TestBoth:
    "What holds for either front end."

    def test_padded_and_cropped(self, make):
        wav = torch.randn(2, 20_000)
        for samples in (1, 100, 399, 400, 7_999, 8_000, 8_240, 20_000):
            spec = make()(wav[:, :samples])
            assert spec.shape[:3] == (2, 1, 50) and spec.isfinite().all() and spec.abs().max() <= 20
        with pytest.raises(ValueError, match="batch"):
            make()(wav[0])

    def test_lengths_are_padding(self, make):
        short = 0.1 * torch.randn(1, 3_000)
        behind = [torch.zeros(1, 5_000), torch.randn(1, 5_000)]
        padded = torch.cat([torch.cat([short, what], 1) for what in behind] + [torch.randn(1, 8_000)])
        alone, found = make()(short), make()(padded, lengths=torch.tensor([3_000, 3_000, 8_000]))
        for spec in found[:2]:
            assert torch.allclose(spec, alone[0], atol=1e-4)

    def test_odd_clips_stay_bounded(self, make):
        n = torch.arange(8_000.0)
        noise = torch.randn(8_000, generator=torch.Generator().manual_seed(0))
        clips = [
            0 * n, (n == 4_000).float(), (n == 0) / 32_768, 1 + 0 * n, -0.3 + 1e-4 * noise, noise.clamp(-0.1, 0.1) * 10,
            noise.sign(), 1e-30 * noise, 1e30 * noise, 32_768 * noise, torch.sin(0.4 * n), (n % 2) * 2 - 1,
            1e-3 * torch.exp(-(((n - 4_000) / 80) ** 2)) * torch.sin(0.4 * n), torch.full((8_000,), 3e38),
        ] # fmt: skip
        for spec in make()(torch.stack(clips)):
            assert spec.isfinite().all() and spec.abs().max() <= 20

    def test_float32_whatever_the_surroundings(self, make):
        wav, frontend = torch.randn(2, 8_000), make()
        wanted = frontend(wav)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(frontend(wav), wanted)
        assert torch.equal(make().bfloat16()(wav), wanted) and torch.equal(make().half()(wav), wanted)
        assert frontend(wav.double()).dtype == frontend(wav.half()).dtype == torch.float32

    def test_neighbors_do_not_matter(self, make):
        wav = torch.randn(19, 8_000)
        batch = make()(wav)
        for i in (0, 7, 8, 18):
            assert torch.allclose(make()(wav[i : i + 1])[0], batch[i], atol=1e-5)

    def test_nothing_is_saved_or_trained(self, make):
        frontend = make()
        assert not frontend.state_dict() and not list(frontend.parameters())
        assert {b.device.type for b in make().to("meta").buffers()} == {"meta"} and len(list(frontend.buffers())) == 2
        assert torch.equal(pickle.loads(pickle.dumps(frontend))(torch.ones(1, 8_000)), frontend(torch.ones(1, 8_000)))

    def test_gradients_reach_the_waveform(self, make):
        wav = torch.randn(2, 8_000, requires_grad=True)
        make()(wav).square().sum().backward()
        assert wav.grad.isfinite().all() and wav.grad.abs().sum() > 0

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_on_a_gpu(self, make):
        wav = 0.1 * torch.randn(9, 8_000)
        assert torch.allclose(make().cuda()(wav.cuda(), torch.full((9,), 8_000)).cpu(), make()(wav), atol=1e-3)


def test_normal_audio_is_not_touched():
    wav = ORACLE["wav"]
    spec = LogMel().log_spectrum(wav, lengths_of(wav))
    plain = (spec - spec.mean((1, 2), keepdim=True)) / spec.std((1, 2), keepdim=True)
    assert torch.allclose(standardize_spec(spec), plain, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 400, 5_000, 80_000])
def test_a_short_sound_in_silence_is_standardized_exactly(samples):
    "Most values are the same, and their rounding errors must not add up."
    wav = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    frontend = LogMel(500)
    logs = frontend.log_spectrum(wav, lengths_of(wav)).double()
    exact = (logs - logs.mean((1, 2), keepdim=True)) / logs.std((1, 2), keepdim=True)
    assert (frontend(wav)[:, 0] - exact[:, :500].clamp(-20, 20)).abs().max() < 1e-4


def test_silence_is_flat():
    assert LogMel()(torch.zeros(2, 32_000)).abs().max() < 1e-3
    assert LogMel()((torch.arange(32_000) == 9_999)[None] / 32_768).abs().max() < 2 # one least bit of 16


def test_build_frontend():
    wav = torch.randn(2, 32_000)
    assert torch.equal(build_frontend(Config())(wav), LogMel()(wav))
    ours = dict(normalize="dataset", spec_mean=-6.0, spec_std=5.0)
    cfg = Config(frontend="fbank", img_size=(192, 128), patch_size=16, f_min=20.0, **ours)
    assert torch.equal(build_frontend(cfg)(wav), Fbank(192, **ours)(wav))
    by_clip, by_dataset = build_frontend(Config()), build_frontend(Config(**ours))
    logs = by_clip.log_spectrum(wav, lengths_of(wav))[:, :200]
    assert torch.equal(by_dataset.log_spectrum(wav, lengths_of(wav))[:, :200], logs)
    assert torch.allclose(by_dataset(wav)[:, 0], (logs + 6) / 10, atol=1e-5)
    wrong = types.SimpleNamespace(**{**Config().to_dict(), "frontend": "mfcc"})
    with pytest.raises(ValueError, match="'logmel' or 'fbank', got 'mfcc'"):
        build_frontend(wrong)
    with pytest.raises(ValueError, match="normalize"):
        LogMel(normalize="batch")
    with pytest.raises(ValueError, match="use 2 or more"):
        LogMel(num_frames=1)
