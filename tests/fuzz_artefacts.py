"""Damaged files and what the loaders say of them.

`python tests/fuzz_artefacts.py 1500` damages a file per seed, each in a process of its own, and prints every raw
exception, the longest time and the most memory. `tests/test_loaders.py` runs the first 150 seeds in one process.
"""

import copy
import io
import json
import math
import os
import pickle
import random
import struct
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import soundfile
import torch

from audiomaepp.checkpoints import load_checkpoint, read_progress
from audiomaepp.config import Config
from audiomaepp.data import Skipped, open_recordings
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.finetune import Classifier
from audiomaepp.lab import BASELINE, UNTRAINED, Comparison, Result, class_codes, design
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.pretrained import load_official, read_weights
from audiomaepp.search import SoundIndex
from audiomaepp.source import Source, load_source, open_again, open_source, save_source
from audiomaepp.train import History, Trainer
from audiomaepp.weights import cpu_state

SMALL = dict(
    img_size=(16, 16), patch_size=(8, 8), embed_dim=8, depth=1, num_heads=2, decoder_embed_dim=8, decoder_depth=1,
    decoder_num_heads=2, mask_ratio=0.5, n_fft=64, win_length=64, hop_length=32, epochs=2, batch_size=2,
)  # fmt: skip


# ---- small valid ones of each kind


def artefacts(folder):
    "Write a small valid artefact of each kind; returns their paths below `folder`."
    folder = Path(folder)
    cfg, generator = Config(**SMALL), np.random.default_rng(0)
    torch.manual_seed(0)
    sounds = folder / "sounds"
    for name in ("a/0", "a/1", "b/2", "b/3"):
        (sounds / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(sounds / f"{name}.wav", 0.1 * generator.standard_normal(4000), 16000)
    _run(folder / "run", cfg, sounds)
    _comparison(folder / "lab", cfg, generator)
    Classifier(AudioMAEPlusPlus(cfg), ["a", "b"]).write(folder / "classifier")
    table = pd.DataFrame({
        "path": [f"sounds/{n}.wav" for n in ("a/0", "a/1", "b/2", "b/3")], "label": list("aabb"), "fold": [1, 2, 1, 2],
        "seconds": [0.25] * 4,
    })  # fmt: skip
    table.to_csv(folder / "manifest.csv", index=False)
    table.to_parquet(folder / "manifest.parquet")
    EmbeddingGenerator(folder / "run", "cpu").embed_folder(sounds, folder / "embeddings.parquet", quiet=True)
    weights = _released(cfg)
    torch.save({"model": weights, "epoch": 3}, folder / "released.pth")
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, folder / "released.safetensors")
    return sorted(
        p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.suffix != ".wav" and p.name[0] != "."
    )  # fmt: skip


def _run(folder, cfg, sounds):
    "A run's folder, trained for a moment."
    trainer = Trainer(cfg, out_dir=folder, quiet=True)
    batch = dict(spec=torch.randn(2, 1, 16, 16), label=torch.tensor([0, 1]))
    trainer.fit([batch])
    cfg.save(folder / "config.json")
    data = Source(data=str(sounds))
    save_source(data, folder, open_source(data, cfg, quiet=True), cfg.seed)


def _comparison(folder, cfg, generator):
    "A comparison's folder."
    experiment = design({"a": {"mask_ratio": 0.5}, "b": {"mask_ratio": 0.25}}, (0,), cfg, None)
    experiment.classes = ["a", "b"]
    held = pd.DataFrame({"path": list("wxyz"), "label": list("aabb")})
    y = np.array([0, 0, 1, 1])
    results = [
        Result.of((name, "mean", 0), generator.standard_normal((2, 4, 8)).astype(np.float32), (y, y), seconds=1.0)
        for name in (*experiment.settings, BASELINE, UNTRAINED)
    ]
    histories = {(name, 0): History([dict(epoch=1, step=1, loss=0.5, seconds=1.0)]) for name in experiment.settings}
    skipped = Skipped([("v", "is empty")])
    Comparison(experiment, held, results[:2], histories, results[2:], 0.5, skipped, {}).save(folder)


def _released(cfg):
    "Weights under the names of the released AudioMAE++, two blocks of width 192."
    path = Path(__file__).parent / "fixtures" / "oracle_audiomaepp.safetensors"
    tensors = safetensors.torch.load_file(path)
    return {k.removeprefix("model."): v.clone() for k, v in tensors.items() if k.startswith("model.")}


def notes_of(path):
    "The metadata of a safetensors file."
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def with_embedding(path, row, values):
    "Replace an embedding in a Parquet file, and nothing else."
    table = pq.read_table(path)
    rows = table["embedding"].to_pylist()
    rows[row] = values
    column, field = table.column_names.index("embedding"), table.schema.field("embedding")
    pq.write_table(table.set_column(column, field, pa.array(rows, field.type)), path)


# ---- loaders, by the name of what they read


def _fresh(folder):
    model = AudioMAEPlusPlus(Config(**SMALL))
    return model, torch.optim.AdamW(model.parameters())


def _checkpoint(folder):
    model, optimizer = _fresh(folder)
    load_checkpoint(folder / "run/checkpoint.safetensors", model, optimizer)
    return model, [state for state in optimizer.state.values()]


def _progress(folder):
    read_progress(folder / "run/checkpoint.safetensors")  # a score that could not be measured is NaN


def _resumed(folder):
    return Trainer.resume(folder / "run", quiet=True).model


def _embedded(folder):
    generator = EmbeddingGenerator(AudioMAEPlusPlus.from_pretrained(folder / "run"), "cpu")
    table = generator.embed_folder(folder / "sounds", folder / "embeddings.parquet", quiet=True)
    return np.stack(table["embedding"])


def _listed(name):
    def load(folder):
        recordings = open_recordings(folder / name)
        repr(recordings), recordings._repr_html_()
        return [wave for i in range(len(recordings)) for wave in [recordings.seconds(i)]]

    return load


def _searched(folder):
    index = SoundIndex(folder / "embeddings.parquet")
    return [index.x, index.search(index.x[0]).table["similarity"]]


def _compared(folder):
    comparison = Comparison.load(folder / "lab")
    str(comparison), comparison._repr_html_(), class_codes(comparison)
    return [result.x for result in [*comparison.baselines, *comparison.results]]


def _drawn(folder):
    repr(History.from_csv(folder / "run/history.csv"))


def _opened(folder):
    return [part.labels for part in open_again(folder / "run", Config(**SMALL), quiet=True)[:2]]


def _file(loader, name):
    return lambda folder: loader(folder / name)


def _official(name):
    return lambda folder: load_official(folder / name, num_heads=4, decoder_num_heads=4)


LOADERS = {
    "run/config.json": [
        _file(Config.load, "run/config.json"), _file(AudioMAEPlusPlus.from_pretrained, "run"),
        _file(EmbeddingGenerator, "run"),
    ],
    "run/model.safetensors": [_file(AudioMAEPlusPlus.from_pretrained, "run")],
    "run/checkpoint.safetensors": [_progress, _checkpoint, _resumed],
    "run/data.json": [_file(load_source, "run")],
    "run/history.csv": [_drawn],
    "run/recordings.csv": [_opened],
    "classifier/config.json": [_file(Classifier.from_pretrained, "classifier")],
    "classifier/model.safetensors": [_file(Classifier.from_pretrained, "classifier")],
    "classifier/head.safetensors": [_file(Classifier.from_pretrained, "classifier")],
    "classifier/classifier.json": [_file(Classifier.from_pretrained, "classifier")],
    "embeddings.parquet": [_searched, _embedded],
    "manifest.csv": [_listed("manifest.csv")],
    "manifest.parquet": [_listed("manifest.parquet")],
    "released.pth": [_file(read_weights, "released.pth"), _official("released.pth")],
    "old.pth": [_file(read_weights, "old.pth"), _official("old.pth")],
    "released.safetensors": [_file(read_weights, "released.safetensors"), _official("released.safetensors")],
}  # fmt: skip


def loaders(name):
    "The public loaders that read an artefact."
    return LOADERS.get(str(name)) or [_compared]


# ---- damage


_VALUES = (
    0, -1, 1, 2, 3, 7, 10**5, 10**7, 10**9, 10**12, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.5, -0.5, 1e-300,
    1e308, math.nan, math.inf, -math.inf, True, False, None, "", "a", "nan", "../..", "\0", "\udcff", "x" * 10**5, [],
    [[]], {}, {"a": 1}, [1, 2], [0, 0], [-1, -1], [10**9, 10**9], [10**6, 80], ["a"], [None], "F32", "I64", "BOOL",
    list(range(10**4)),
)  # fmt: skip


def mutate(
    seed,
    folder, # with artefacts
    names, # what `artefacts` returned
):
    "Damage one artefact in a way that the seed chooses; returns its name and the way."
    rng = random.Random(seed)
    name = names[seed % len(names)]
    path = folder / name
    data = path.read_bytes()
    ways = [_bits, _cut, _zeros, _swapped, _grown]
    ways += 3 * {
        ".json": [_json], ".safetensors": [_header, _header, _length, _numbers], ".csv": [_cells],
        ".parquet": [_columns], ".npz": [_arrays], ".pth": [_pickled],
    }[path.suffix]  # fmt: skip
    way = rng.choice(ways)
    path.write_bytes(way(rng, data, folder, names))
    return name, way.__name__


def _bits(rng, data, *_):
    data = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(min(len(data), rng.choice((64, 4096, 10**9))))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _cut(rng, data, *_):
    return data[: rng.choice((0, 1, 8, rng.randrange(len(data)), len(data) - 1))]


def _zeros(rng, data, *_):
    first = rng.randrange(len(data))
    n = min(rng.choice((1, 8, 64, 4096)), len(data) - first)
    return data[:first] + bytes(n) + data[first + n :]


def _swapped(rng, data, folder, names):
    return (folder / rng.choice(names)).read_bytes()


def _grown(rng, data, *_):
    return data + rng.randbytes(rng.choice((1, 100))) if rng.random() < 0.5 else data[: len(data) // 2] + data


def _places(value, at=()):
    "Every place in nested dicts and lists."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from _places(inner, (*at, key))


def _changed(rng, facts):
    "JSON text with one place changed."
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(("", "null", "[]", "3", '"a"', "{", "[" * 10**5, '{"a":' * 10**5, "\ufeff{}", "{} {}", "NaN"))
    facts = copy.deepcopy(facts)
    places = list(_places(facts))
    *at, last = rng.choice(places) if places else ("a",)
    holder = facts
    for key in at:
        holder = holder[key]
    if kind == 1:
        del holder[last]
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(("unknown", "x" * 10**5, "", "\0"))] = rng.choice(_VALUES)
    elif kind == 3:
        mark = "0.123456789"
        holder[last] = float(mark)
        depth = rng.choice((50, 400, 10**5))
        return json.dumps(facts).replace(mark, "[" * depth + "]" * depth)
    elif kind == 4 and isinstance(holder, dict):
        text = json.dumps(facts)
        return text[:-1] + f', "{next(iter(facts), 1)}": {json.dumps(rng.choice(_VALUES))}' + "}"
    else:
        holder[last] = rng.choice(_VALUES)
    return json.dumps(facts)


def _utf8(text):
    return text.encode("utf-8", "surrogatepass")


def _json(rng, data, *_):
    return _utf8(_changed(rng, json.loads(data)))


def _header(rng, data, *_):
    "Another header before the same numbers; of a checkpoint, sometimes another progress in it."
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    progress = header.get("__metadata__", {}).get("progress")
    if progress and rng.random() < 0.6:
        header["__metadata__"]["progress"] = _changed(rng, json.loads(progress))
        text = json.dumps(header)
    elif rng.random() < 0.3:  # tensors under each other's names
        one, two = rng.sample([k for k in header if k != "__metadata__"], 2)
        header[one], header[two] = header[two], header[one]
        text = json.dumps(header)
    else:
        text = _changed(rng, header)
    head = _utf8(text)
    return struct.pack("<Q", len(head)) + head + data[8 + n :]


def _length(rng, data, *_):
    n = struct.unpack("<Q", data[:8])[0]
    near = (0, 1, 2, n - 1, n + 1, n + 8, len(data), len(data) - 8)
    length = rng.choice((*near, 10**6, 10**8, 2**31, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + data[8:]


def _numbers(rng, data, *_):
    "NaN, infinite or enormous weights."
    n = struct.unpack("<Q", data[:8])[0]
    value = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf)))
    at = 8 + n + rng.randrange((len(data) - 8 - n) // 4) * 4
    return data[:at] + value + data[at + 4 :]


def _cells(rng, data, *_):
    rows = [line.split(",") for line in data.decode().splitlines()]
    kind, row, column = rng.randrange(6), rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    if kind == 0:
        rows = [r[:column] + r[column + 1 :] for r in rows]
    elif kind == 1:
        rows = [r + [r[column]] for r in rows]
    elif kind == 2:
        rows = rows[: rng.randrange(2)]
    else:
        values = ("", "nan", "inf", "-1", "1e400", "9" * 5000, "\0", '"', "x" * 200_000, "a,b", "é", "/", "True", "[1]")
        rows[row][column] = rng.choice(values)
    return "\n".join(map(",".join, rows)).encode("latin-1" if rng.random() < 0.1 else "utf-8")


def _columns(rng, data, *_):
    table = pq.read_table(io.BytesIO(data))
    kind, column = rng.randrange(8), rng.randrange(table.num_columns)
    name, n = table.column_names[column], table.num_rows
    if kind == 0:
        table = table.drop_columns(name)
    elif kind == 1:
        table = table.append_column(name, table[name])
    elif kind == 2:
        table = table.slice(0, 0)
    elif kind == 3:
        table = table.replace_schema_metadata(None)
    elif kind == 4 and "embedding" in table.column_names:
        rows = table["embedding"].to_pylist()
        rows[rng.randrange(n)] = rng.choice(([], None, [1.0], [math.nan] * len(rows[0]), [math.inf] * len(rows[0]),
                                             [None] * len(rows[0]), [1e39] * len(rows[0])))  # fmt: skip
        kind = pa.list_(rng.choice((pa.float32(), pa.float64())))
        table = table.set_column(table.column_names.index("embedding"), "embedding", pa.array(rows, kind))
    else:
        values = rng.choice((
            [None] * n, ["a"] * n, [-1] * n, [2**62] * n, [math.nan] * n, [math.inf] * n, [[1, 2]] * n, [{"a": 1}] * n,
            [b"\xff"] * n, [True] * n, ["x" * 10**5] * n, [pd.Timestamp(0)] * n, [[["a"]]] * n, [["a"]] * n,
        ))  # fmt: skip
        table = table.set_column(column, name, pa.array(values))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _arrays(rng, data, *_):
    arrays = dict(np.load(io.BytesIO(data)))
    name, kind = rng.choice(list(arrays)), rng.randrange(7)
    old = arrays[name]
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = np.full(old.shape, rng.choice((math.nan, math.inf, -1.0, 1e300)))
    elif kind == 2:
        other = (np.array(old.tolist(), object), np.array(["a"] * 4), np.zeros((0, 3)), np.array(3.0))
        arrays[name] = rng.choice(other)
    elif kind == 3:
        arrays[name] = rng.choice((old[1:], old[..., None], old.astype(complex), old.astype("U4"), old.astype(">f8")))
    sink = io.BytesIO()
    (np.savez_compressed if kind == 4 else np.savez)(sink, **arrays)
    if kind < 5:
        return sink.getvalue()
    members, sink = zipfile.ZipFile(sink), io.BytesIO()
    with zipfile.ZipFile(sink, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as out:
        for member in members.namelist():
            content = members.read(member)
            if member == f"{name}.npy":
                shape, fake = rng.choice(((10**10,), (10**30,), (-1,), (2**62, 4))), io.BytesIO()
                np.lib.format.write_array_header_1_0(fake, dict(descr="<f8", fortran_order=False, shape=shape))
                content = bytes(5 * 10**8) if kind == 5 and rng.random() < 0.2 else fake.getvalue()
            out.writestr(member, content)
    return sink.getvalue()


class _Thing:
    "What a pickle should not hold."


def _pickled(rng, data, *_):
    held = torch.load(io.BytesIO(data), weights_only=True)
    weights = held.get("model", held)
    name, kind = rng.choice(list(weights)), rng.randrange(10)
    old = weights[name]
    if kind == 0:
        del weights[name]
    elif kind == 1:
        weights[name] = torch.full_like(old, rng.choice((math.nan, math.inf)))
    elif kind == 2:
        weights[name] = rng.choice((old[None], old.flatten(), old[:1], old.double() * 1e300, old.to(torch.int8),
                                    old.to(torch.complex64), old.to_sparse(), old.to("meta"), old.half()))  # fmt: skip
    elif kind == 3:
        shape = rng.choice(((10**12,), (10**6, 10**6), (1280, 1, 16, 10**9), (0, 1, 4, 16)))
        weights[rng.choice((name, "patch_embed.proj.weight", "encoder.blocks.0.ffn1.layer1.weight"))] = (
            torch.zeros(1).expand(shape) if math.prod(shape) else torch.zeros(shape)
        )  # fmt: skip
    elif kind == 4:
        weights |= {f"encoder.blocks.{i}.x": torch.zeros(0) for i in range(2000)}
    elif kind == 5:
        weights[name] = rng.choice((3, "a", None, [1], {"a": 1}, _Thing()))
    elif kind == 6:
        held = rng.choice(([], {}, None, {"model": {}}, {"model": None}, old, {3: old}, {"model": {3: old, None: old}}))
    elif kind == 7:
        return pickle.dumps(rng.choice((_Thing(), {"model": 3}, os.getcwd)))
    elif kind == 8:
        sink = io.BytesIO()
        members = zipfile.ZipFile(io.BytesIO(data)) if zipfile.is_zipfile(io.BytesIO(data)) else None
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as out:
            for member in members.namelist() if members else ():
                out.writestr(member, members.read(member) if rng.random() < 0.9 else bytes(10**8))
        return sink.getvalue()
    sink = io.BytesIO()
    torch.save(held, sink, _use_new_zipfile_serialization=rng.random() < 0.8)
    return sink.getvalue()


# ---- what must hold


def finite(value):
    "Whether all numbers in a value are finite."
    if isinstance(value, torch.nn.Module):
        value = cpu_state(value)
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, float | np.ndarray | pd.Series):
        return bool(np.isfinite(value).all())
    return True


def check(
    folder,
    name, # of the damaged artefact, below `folder`
):
    """Load a damaged artefact through everything that reads it; raises `AssertionError` where that ends badly.

    Returns the seconds of the slowest loader on the processor.
    """
    seconds = []
    for load in loaders(name):
        began = time.process_time()
        try:
            value = load(folder)
        except (ValueError, OSError) as error:  # FileNotFoundError is one
            assert name.name in str(error), f"no file's name in {type(error).__name__}: {error}"
            assert len(str(error)) < 2000, f"a message of {len(str(error))} characters"
        except Exception as error:
            traceback.print_exc()
            raise AssertionError(f"{type(error).__name__}: {str(error)[:500]}") from error
        else:
            assert finite(value), "numbers that are not finite were loaded"
        seconds.append(time.process_time() - began)
    return max(seconds)


class Folder:
    "A folder of artefacts whose files are damaged one at a time."

    def __init__(self, folder):
        self.at, self.names = Path(folder), artefacts(folder)
        self.data = {path: path.read_bytes() for path in self.at.rglob("*") if path.is_file()}

    def restore(self):
        "Put everything back as it was."
        for path in [path for path in self.at.rglob("*") if path.is_file() and path not in self.data]:
            path.unlink()
        for path, data in self.data.items():
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)


# ---- by hand


def _memory(field):
    "A line of /proc/self/status in MB."
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def _measured(seed, folder):
    "One seed, in a process that is thrown away: name, way, what was wrong, seconds, MB above the start."
    name, way = mutate(seed, folder.at, folder.names)
    Path("/proc/self/clear_refs").write_text("5")  # the most memory is counted from here on
    before, problem, seconds = _memory("VmRSS"), "", 0.0
    try:
        seconds = check(folder.at, name)
    except AssertionError as error:
        problem = str(error)
    return str(name), way, problem, seconds, _memory("VmHWM") - before


def main(first, last):
    "Run some seeds and say what came out."
    import multiprocessing
    import tempfile

    torch.set_num_threads(1)
    found, fork = [], multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as d:
        folder = Folder(d)
        for seed in range(first, last):
            out, into = fork.Pipe(False)
            child = fork.Process(target=lambda seed=seed, into=into: into.send(_measured(seed, folder)))
            child.start()
            into.close()
            try:
                result = out.recv() if out.poll(60) else ("?", "?", "took over a minute", 60.0, 0.0)
            except EOFError:
                result = ("?", "?", f"died ({child.exitcode})", 0.0, 0.0)
            child.kill()
            child.join()
            folder.restore()
            found.append((seed, *result))
            if result[2] or result[3] > 2 or result[4] > 200:
                print("seed {}: {} {}: {} ({:.1f} s, {:.0f} MB)".format(*found[-1]), flush=True)
    wrong = [row for row in found if row[3]]
    slowest, largest = max(found, key=lambda row: row[4]), max(found, key=lambda row: row[5])
    print(f"{len(found)} seeds, {len(wrong)} wrong; longest {slowest[4]:.2f} s (seed {slowest[0]}), "
          f"most memory {largest[5]:.0f} MB (seed {largest[0]})")  # fmt: skip


if __name__ == "__main__":
    main(*([0] + [int(n) for n in sys.argv[1:]])[-2:])
