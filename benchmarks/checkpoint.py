"""How long a training waits for a checkpoint: until it is copied, beside until it is written.

    python benchmarks/checkpoint.py                              presets nano and base; a minute, 4 GB of disk
    python benchmarks/checkpoint.py --out /network/folder        on another disk

Each round saves weights and AdamW's averages twice: `start`, after which a training goes on while a thread writes, and
`save`, which waits. The seconds are medians.
"""

import argparse
import statistics
import tempfile
import time

import torch

from audiomaepp.checkpoints import Checkpoints, training_tensors
from audiomaepp.config import Config
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.tables import text_table


def trained(preset):
    """A model and its optimizer after a step."""
    model = AudioMAEPlusPlus(Config.preset(preset))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return model, optimizer


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def row(preset, folder, rounds):
    """Megabytes, both medians and their ratio."""
    model, optimizer = trained(preset)
    progress = dict(config=model.cfg.to_dict(), epoch=1, batch=0, step=1, best=None, rows=[])
    size = sum(value.nbytes for value in training_tensors(model, optimizer).values()) / 2**20
    kept, times = Checkpoints(folder, keep=1), []
    kept.save(model, optimizer, progress)
    for _ in range(rounds):
        copied = seconds(lambda: kept.start(model, optimizer, progress))
        kept.job.wait()
        times.append((copied, seconds(lambda: kept.save(model, optimizer, progress))))
    copied, written = map(statistics.median, zip(*times, strict=True))
    return [preset, f"{size:,.0f}", f"{copied:.3f}", f"{written:.3f}", f"{written / copied:.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "base"], help="sizes of the model")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--out", help="folder on the disk to measure; default: the temporary one")
    args = parser.parse_args()
    cells = [["model", "MB", "copied, s", "written, s", "ratio"]]
    for preset in args.presets:
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            cells.append(row(preset, folder, args.rounds))
    print(text_table("", cells))


if __name__ == "__main__":
    main()
