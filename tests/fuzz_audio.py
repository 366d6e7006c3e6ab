"""Sound files with something wrong, drawn from a seed. Each must be a usable recording or an `AudioError`.

    python tests/fuzz_audio.py [--seeds 3000] [--first 0]

prints the slowest files and those that need most memory, and exits 1 with the seeds that break the promise.
"""

import argparse
import io
import re
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from audiomaepp.audio import AudioError, load_audio, probe, stream_audio
from audiomaepp.data import Recordings, drop_unreadable

NUMBERS = (0, 1, 2, 3, 4, 8, 16, 99, 100, 255, 256, 8_000, 44_101, 65_535, 655_350, 2**24 - 1, 2**31 - 2**20, 2**31 - 1,
           2**31, 2**32 - 2, 2**32 - 1, 2**36 - 1, 2**40, 2**63 - 1, 2**64 - 1)  # fmt: skip


@cache
def originals() -> list[tuple[str, bytes]]:
    "Valid files, as (ending, content), of every container and of codecs that fail in their own ways."
    rng, files = np.random.default_rng(0), []
    kinds = [(".wav", dict(format="WAV", subtype=name)) for name in
             ("PCM_16", "PCM_24", "PCM_U8", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610", "PCM_16")]
    kinds += [(".wav", dict(format="WAVEX")), (".rf64", dict(format="RF64")), (".w64", dict(format="W64"))]
    kinds += [(".aiff", dict(format="AIFF")), (".au", dict(format="AU")), (".caf", dict(format="CAF"))]
    kinds += [(".flac", dict(format="FLAC", subtype=name)) for name in ("PCM_16", "PCM_24", "PCM_S8", "PCM_16")]
    kinds += [(".ogg", dict(format="OGG", subtype=name)) for name in ("VORBIS", "OPUS", "VORBIS", "OPUS")]
    kinds += [(".mp3", dict(format="MP3", bitrate_mode=mode)) for mode in ("CONSTANT", "VARIABLE", "AVERAGE")]
    for i, (ending, how) in enumerate(kinds):
        rate = (8_000, 16_000, 48_000)[i % 3]
        channels = 1 + (i % 4 == 3 and how.get("subtype") not in ("GSM610",))
        wave = 0.1 * rng.standard_normal((rng.integers(rate // 4, rate), channels))
        file = io.BytesIO()
        soundfile.write(file, wave, rate, **how)
        files.append((ending, file.getvalue()))
        if ending == ".mp3":  # one that does not state its length
            files.append((ending, files[-1][1][files[-1][1].find(files[-1][1][:2], 4) :]))
    return files


def pick(rng, values):
    "One of some values."
    return values[int(rng.integers(len(values)))]


def span(rng, size: int, most: float = 1.0) -> slice:
    "Some bytes in a row."
    first = int(rng.integers(size)) if size else 0
    return slice(first, first + 1 + int(rng.integers(max(1, int(most * size)))))


def flip(rng, data: bytearray):
    "A few bits, mostly near the beginning."
    near = len(data) if rng.random() < 0.4 else min(len(data), 200)
    for at in rng.integers(near, size=int(rng.integers(1, 33))):
        data[at] ^= 1 << int(rng.integers(8))


def cut(rng, data: bytearray):
    "The end is missing, or the beginning."
    at = int(rng.integers(len(data))) if rng.random() < 0.7 else len(data) - int(rng.integers(min(len(data), 40)))
    del data[slice(at, None) if rng.random() < 0.9 else slice(0, at)]


def number(rng, data: bytearray):
    "Another number in a field of the header, whichever it is."
    size, order = pick(rng, (1, 2, 4, 8)), pick(rng, ("little", "big"))
    at = int(rng.integers(min(len(data), 120)))
    data[at : at + size] = (pick(rng, NUMBERS) % 256**size).to_bytes(size, order)


def field(rng, data: bytearray):
    "Another rate, another number of channels, bits or samples, where the format has it."
    if data[:4] in (b"RIFF", b"RF64"):
        at, size = pick(rng, ((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2), (40, 4)))
        at = data.find(b"data") + 4 if rng.random() < 0.3 else at
        data[at : at + size] = (pick(rng, NUMBERS) % 256**size).to_bytes(size, "little")
    elif data[:4] == b"fLaC":  # 20 bits of rate, 3 of channels, 5 of depth, 36 of samples
        shift, bits = pick(rng, ((44, 20), (41, 3), (36, 5), (0, 36), (0, 36)))
        facts = int.from_bytes(data[18:26], "big")
        facts = facts & ~((2**bits - 1) << shift) | (pick(rng, NUMBERS) % 2**bits) << shift
        data[18:26] = facts.to_bytes(8, "big")
    else:
        number(rng, data)


def page(rng, data: bytearray):
    "Another position, flag or serial number in an Ogg page, with the checksum that belongs to it; else a field."
    pages = [found.start() for found in re.finditer(b"OggS", data)]
    if not pages:
        return field(rng, data)
    at = pick(rng, pages)
    end = min((p for p in pages if p > at), default=len(data))
    where, size = pick(rng, ((5, 1), (6, 8), (6, 8), (14, 4), (18, 4), (26, 1), (28, 2)))
    where = where if rng.random() < 0.6 else int(rng.integers(27, max(28, min(end - at, 90))))
    data[at + where : at + where + size] = (pick(rng, NUMBERS) % 256**size).to_bytes(size, "little")
    data[at + 22 : at + 26] = bytes(4)
    data[at + 22 : at + 26] = ogg_checksum(data[at:end]).to_bytes(4, "little")
    return None


def ogg_checksum(data: bytes) -> int:
    "The checksum of an Ogg page in which it is zero."
    value = 0
    for byte in data:
        value = (value << 8 & 0xFFFFFFFF) ^ OGG[value >> 24 ^ byte]
    return value


def _row(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value


OGG = [_row(byte) for byte in range(256)]


def repeat(rng, data: bytearray):
    "A part of the file once more, somewhere."
    part, at = bytes(data[span(rng, len(data), 0.5)]), int(rng.integers(len(data)))
    data[at:at] = part * pick(rng, (1, 1, 1, 20))


def blank(rng, data: bytearray):
    "A run of zeros or of ones."
    where = span(rng, len(data), 0.5)
    data[where] = pick(rng, (b"\0", b"\xff")) * len(data[where])


def splice(rng, data: bytearray):
    "The beginning of this one, the end of another."
    other = pick(rng, originals())[1]
    data[int(rng.integers(len(data))) :] = other[int(rng.integers(len(other))) :]


def noise(rng, data: bytearray):
    "Random bytes, in between or behind."
    at = pick(rng, (len(data), int(rng.integers(len(data)))))
    data[at:at] = rng.bytes(int(rng.integers(1, 100_000)))


CHANGES = (flip, flip, cut, cut, number, number, field, field, field, page, page, repeat, blank, splice, noise)


def mutated(seed: int, folder: Path) -> Path:
    "Write the file of a seed; the same seed, the same bytes."
    rng = np.random.default_rng(seed)
    ending, data = pick(rng, originals())
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if data:
            pick(rng, CHANGES)(rng, data)
    if rng.random() < 0.1:
        ending = pick(rng, (".wav", ".mp3", ".raw", ".ogg", ""))
    path = Path(folder) / f"{seed}{ending}"
    path.write_bytes(data)
    return path


def outcome(path: Path, call):
    "What a call gives, or None where it refuses the file as it should: by an `AudioError` that names it."
    try:
        return call()
    except AudioError as error:
        str(error).encode()
        assert path.name in str(error) and error.reason.strip(), f"{error} does not say which file it is of, or why"
        return None


def check(path: Path):
    "Whatever is in a file: a usable, finite recording, the same from each function, or an `AudioError`."
    about = outcome(path, lambda: probe(path))
    whole = outcome(path, lambda: load_audio(path))
    pieces = outcome(path, lambda: list(stream_audio(path, seconds=5)))
    part = outcome(path, lambda: load_audio(path, start=0.05, seconds=0.1))
    channels = outcome(path, lambda: load_audio(path, mono=False))
    if about is not None:
        assert about.frames >= 0 and about.seconds >= 0 and about.sample_rate > 0 and about.channels > 0, about
    for wave in (whole, *(pieces or ()), part, *(channels if channels is not None else ())):
        assert wave is None or (wave.ndim == 1 and wave.isfinite().all())
    assert whole is None or (len(whole) and about is not None), "there is a recording, but probe refuses it"
    assert (whole is None) == (pieces is None) == (channels is None), "some functions refuse it, others do not"
    assert whole is None or len(whole) == sum(map(len, pieces)) == channels.shape[1], "another number of samples"
    found = drop_unreadable(Recordings(pd.DataFrame({"path": [str(path)]})), workers=1, quiet=True)
    assert len(found) == (whole is not None) and len(found) + len(found.skipped) == 1
    assert all(np.isfinite(seconds) and seconds > 0 for seconds in found.table["seconds"])
    for _, reason in found.skipped:
        assert not re.match(r"\w+(Error|Exception|Interrupt): ", reason), reason


def peak() -> float:
    "The most memory since the last call, in MB."
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3000, help="how many files")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    args = parser.parse_args()
    rows, broken = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.first, args.first + args.seeds):
            path = mutated(seed, Path(folder))
            print(f"\rseed {seed}, {len(broken)} broken", end="", file=sys.stderr, flush=True)
            before, start = peak(), time.perf_counter()
            before = peak()
            try:
                check(path)
            except Exception:
                broken.append(seed)
                print(f"\nseed {seed}: {traceback.format_exc()}")
            rows.append((seed, path.suffix, time.perf_counter() - start, peak() - before))
            path.unlink()
    table = pd.DataFrame(rows, columns=["seed", "ending", "seconds", "MB"])
    for column in ("seconds", "MB"):
        print(f"\nmost {column}:", table.sort_values(column, ascending=False).head(5).to_string(index=False), sep="\n")
    print(f"\n{len(rows)} files, {len(broken)} broken{': ' * bool(broken)}{', '.join(map(str, broken))}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
