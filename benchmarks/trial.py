"""Try settings on inner splits and add what came out to trials.csv: how the presets are found.

    python benchmarks/trial.py --data ../shared/data/fsdd --set-aside theo --judge george jackson --set mask_ratio=0.7

Of a data set's parts (folds, speakers), those set aside are neither trained on nor judged; each judged part is held
out in turn and all others are trained on. Settings are changes to the preset that quality.py measures.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from quality import MODES, column_of, config_of, opened

from audiomaepp.config import Config, write_atomic
from audiomaepp.data import drop_unreadable
from audiomaepp.lab import compare_losses

TRIALS = Path(__file__).with_name("trials.csv")
NAMES = {"esc10": "ESC-10", "fsdd": "FSDD, 8 kHz"}  # as they stand in the table
POOLING = {"mean": "", "cls": "_cls", "cls+mean": "_cls_mean"}  # → ending of the columns knn and linear


def parsed(text: str) -> tuple[str, object]:
    """A setting from the command line: mask_ratio=0.7, img_size=[64,32], pooling_mode=cls."""
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--set {text!r} is no setting; mask_ratio=0.7 would do")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parts(source: str, cfg: Config, aside: list[str], judged: str):
    """Training and judged recordings of an inner split, and how they were made in words."""
    recordings = drop_unreadable(opened(source, cfg.sample_rate), quiet=True)
    names = recordings.table[column_of(recordings)].astype(str).to_numpy()
    for name in [*aside, judged]:
        if name not in names:
            raise ValueError(f"{name!r} is no part of {source}; one of {', '.join(np.unique(names))} would do")
    words = f"all but {', '.join([*aside, judged])} / {judged} ({', '.join(aside) or 'nothing'} set aside)"
    return recordings.select(~np.isin(names, [*aside, judged])), recordings.select(names == judged), words


def row_of(cfg: Config, data: str, words: str, results: list) -> dict:
    """A line of trials.csv: the settings, and the scores of each way of pooling."""
    row = {"data": NAMES.get(data, data), "inner_split": words, **cfg.to_dict(), "frames": cfg.num_frames,
           "n_mels": cfg.n_mels, "patch": "x".join(map(str, cfg.patch_size))}
    row["uniformity_weight"] *= cfg.use_uniformity_loss
    for result in results:
        row |= {name + POOLING[result.pooling]: round(result.scores[name], 3) for name in ("knn", "linear")}
    return row | {"seed": results[0].seed, "seconds": round(results[0].scores["seconds"])}


def add(row: dict, changed: list[str], path: Path = TRIALS):
    """Append a line to the table; a setting that was changed for the first time gets a column."""
    there = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = list(dict.fromkeys([*there.columns, *changed, "seconds"]))
    table = pd.concat([there, pd.DataFrame([row])])[columns]
    write_atomic(path, table.to_csv(index=False).encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder that quality.py takes, but not synthetic")
    parser.add_argument("--mode", default="with labels", choices=list(MODES))
    parser.add_argument("--set-aside", nargs="*", default=[], help="parts that stay out of it altogether")
    parser.add_argument("--judge", nargs="+", required=True, help="parts to hold out, one after the other")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="changes to the preset")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=None, help="default: what torch takes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    changes = dict(map(parsed, args.set))
    cfg = config_of(opened(args.data), args.mode, 1.0).replace(**changes)
    for judged in args.judge:
        train, held, words = parts(args.data, cfg, args.set_aside, judged)
        compared = compare_losses((train, held, words), {"trial": {}}, args.seeds, base=cfg, pooling=list(POOLING))
        for seed in args.seeds:
            results = [r for r in compared.results if r.seed == seed]
            if not results:
                raise RuntimeError(f"seed {seed}: {compared.failed}")
            row = row_of(cfg, Path(args.data).name, words, results)
            add(row, list(changes))
            print(", ".join(f"{k} {row[k]}" for k in ("inner_split", "seed", "knn", "linear", "seconds")), flush=True)


if __name__ == "__main__":
    main()
