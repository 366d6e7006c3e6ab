"""How seconds and memory grow with the number of recordings.

    python benchmarks/scale.py                                   1,000 and 10,000 recordings; some minutes
    python benchmarks/scale.py --recordings 1000 10000 100000 --out runs/scale     needs 5 GB of disk

The recordings are tones in noise, 1 s at 16 kHz, of which 50 are distinct: as shards (--files: as WAV files), labeled.
The model is `nano`. Each measurement runs in its own process, so memory is measured separately; imports
are not counted. (`benchmarks/search.py --rows 1000000` searches a million rows.)

open         opens the set, for the first time in its process
first step   from the beginning of a training until its first step is done
load 960     960 clips of a training, decoded and collated into batches by one worker
train 960    960 clips that are decoded already, in steps of the model with its augmentations; under the table, the
             rate of one worker is divided by this one: below 1, the model would wait for it
embed        the set to a Parquet file, as the command does: the vectors are not read again
evaluate     scores alone, without decoding and embedding: kNN-10 and linear probe of random vectors of 128 numbers
             around ten class means, one in ten held out
search       ten nearest rows of a table of as many rows: the first search, and another one in a new process

"growth" is the time or the memory divided by that of the next smaller set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile
import torch
from speed import machine, memory_now

from audiomaepp import train as training
from audiomaepp.batches import Augment, ClipLoader
from audiomaepp.config import Config
from audiomaepp.data import Recordings, open_recordings
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.evaluate import evaluate_embeddings
from audiomaepp.features import build_frontend
from audiomaepp.files import write_atomic
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.run import Run
from audiomaepp.search import SoundIndex
from audiomaepp.shards import shard
from audiomaepp.tables import text_table

RATE = 16000


def make(folder: Path, n: int, files: bool):
    """Make n recordings of ten classes."""
    import pandas as pd

    rng, at = np.random.default_rng(0), np.arange(RATE) / RATE
    tones = [0.3 * np.sin(2 * np.pi * (200 + 100 * i) * at) for i in range(10)]
    waves = [tones[i % 10] + 0.05 * rng.standard_normal(RATE) for i in range(50)]
    labels = [f"tone {i % 10}" for i in range(n)]
    if not files:
        table = pd.DataFrame(dict(path=[f"made/{i:07d}" for i in range(n)], label=labels))
        tensors = [torch.from_numpy(wave).float() for wave in waves]
        made = Recordings(table, RATE, sorted(set(labels)), [tensors[i % 50] for i in range(n)], source="made")
        shard(made, folder, quiet=True)
        return
    for i in range(n):
        path = folder / labels[i] / f"{i:07d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, waves[i % 50], RATE)


# ---- one measurement, in a process of its own


def opened(folder, work):
    """Open the set."""
    return lambda: open_recordings(folder, RATE)


def first_step(folder, work):
    """Train one step."""
    class Done(Exception):
        pass

    def step(*args):
        inner(*args)
        raise Done

    def run():
        with suppress(Done):
            Run.train(folder, preset="nano", out=work / "run", quiet=True, epochs=1, num_workers=1)

    inner, training._Engine.step = training._Engine.step, step
    return run


def load(folder, work):
    """Load 960 clips."""
    loader = ClipLoader(open_recordings(folder, RATE), Config.preset("nano", num_workers=1))
    return lambda: list(batches_of(loader))


def batches_of(loader):
    """Batches of 960 clips; of several epochs, if the set is smaller."""
    clips, epoch = 0, 0
    while clips < 960:
        loader.set_epoch(epoch)
        for batch in loader:
            yield batch
            clips += len(batch["index"])
            if clips >= 960:
                return
        epoch += 1


def train(folder, work):
    """Train on 960 clips that are in memory."""
    cfg = Config.preset("nano", num_workers=1, epochs=1)
    batches = list(batches_of(ClipLoader(open_recordings(folder, RATE), cfg)))
    trainer = training.Trainer(cfg, transform=Augment(cfg, build_frontend(cfg)), quiet=True)
    return lambda: trainer.fit(batches)


def embed(folder, work):
    """Embed the set."""
    torch.manual_seed(0)
    generator = EmbeddingGenerator(AudioMAEPlusPlus(Config.preset("nano")).eval(), "cpu")
    return lambda: generator.embed_folder(folder, work / "x.parquet", quiet=True, vectors=False)


def evaluate(folder, work):
    """Score made vectors."""
    n, rng = len(open_recordings(folder, RATE)), np.random.default_rng(0)
    y = rng.integers(0, 10, n)
    x = rng.standard_normal((n, 128), dtype=np.float32) + rng.standard_normal((10, 128), dtype=np.float32)[y] / 4
    cut = n // 10
    return lambda: evaluate_embeddings(x[cut:], y[cut:], x[:cut], y[:cut])


def find(folder, work):
    """Find the nearest rows of a clip in the table that `embed` wrote."""
    path = open_recordings(folder, RATE).paths[0]
    return lambda: SoundIndex(work / "x.parquet").search(path)


WORK = {"open": opened, "first step": first_step, "load 960": load, "train 960": train, "embed": embed,
        "evaluate": evaluate, "search, first": find, "search, again": find}  # fmt: skip


def child(name, folder, work):
    """Print seconds and MB of one measurement."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    run = WORK[name](folder, work)
    before, start = memory_now(), time.perf_counter()
    run()
    print(json.dumps([time.perf_counter() - start, memory_now(peak=True) - before]))


# ---- the report


def measured(name, folder, work):
    """Seconds and MB of one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", name, str(folder), str(work)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows):
    """The rows as text for a terminal."""
    cells = [["work", "recordings", "seconds", "growth", "MB", "growth"]]
    for i, (name, n, seconds, mb) in enumerate(rows):
        before = next((row[2:] for row in rows[:i][::-1] if row[0] == name), (0, 0))
        growth = [f"{now / then:.1f}" if then else "" for now, then in zip((seconds, mb), before, strict=True)]
        cells.append([name, f"{n:,}", f"{seconds:.2f}", growth[0], f"{mb:.0f}", growth[1]])
    return text_table("", cells)


def loading_beside_training(rows):
    """A line for each size: clips a second of one loading worker and of the model."""
    seconds = {(name, n): seconds for name, n, seconds, _ in rows}
    for name, n in seconds:
        if name == "train 960" and ("load 960", n) in seconds:
            loaded, trained = (960 / seconds[what, n] for what in ("load 960", name))
            yield (f"{n:,} recordings: one worker loads {loaded:,.0f} clips/s, {loaded / trained:.2f} times the "
                   f"{trained:,.0f} of the model")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, nargs="+", default=[1000, 10_000], help="sizes of the set, growing")
    parser.add_argument("--files", action="store_true", help="WAV files in class folders, not shards")
    parser.add_argument("--only", nargs="+", default=list(WORK), choices=list(WORK), help="what to measure")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for scale.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], *map(Path, args.child[1:]))
    args.device, args.clock, rows = "cpu", "wall", []
    for n in args.recordings:
        with tempfile.TemporaryDirectory() as home:
            folder, work = Path(home, "set"), Path(home, "work")
            work.mkdir()
            make(folder, n, args.files)
            for name in args.only:
                rows.append((name, n, *measured(name, folder, work)))
                print(f"  {n:,}: {name} done", file=sys.stderr)
                if args.out:
                    args.out.mkdir(parents=True, exist_ok=True)
                    report = dict(machine=machine(args), kind="files" if args.files else "shards", rows=rows)
                    write_atomic(args.out / "scale.json", json.dumps(report, indent=1).encode() + b"\n")
    print(table(sorted(rows, key=lambda row: args.only.index(row[0]))), *loading_beside_training(rows), sep="\n")


if __name__ == "__main__":
    main()
