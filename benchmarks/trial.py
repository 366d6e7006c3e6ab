"""Try settings on inner splits and add what came out to trials.csv: how the presets are found.

    python benchmarks/trial.py --data ../shared/data/fsdd --judge george+jackson lucas+nicolas --set mask_ratio=0.7

Of a data set's parts (folds, speakers), those set aside are neither trained on nor judged. The judged ones are held
out in turn, or several together with a +, and all others are trained on; each part has a line of its own. Parts that
were held out together choose for each other: a speaker who is to be held out in the end has no say in what is chosen
from the lines of those who were held out beside that one. Settings are changes to the preset that quality.py measures.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from quality import MODES, column_of, config_of, opened

from audiomaepp.batches import Augment, ClipLoader
from audiomaepp.config import Config
from audiomaepp.data import drop_unreadable
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.evaluate import evaluate_embeddings
from audiomaepp.features import build_frontend
from audiomaepp.files import write_atomic
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.train import Trainer
from audiomaepp.validation import whitened

TRIALS = Path(__file__).with_name("trials.csv")
NAMES = {"esc10": "ESC-10", "fsdd": "FSDD, 8 kHz"}  # as they stand in the table
READ_OUTS = {  # ending of knn and linear → settings; each also whitened
    "": dict(embedding_pooling="mean", add_statistics=False),
    "_frame": dict(embedding_pooling="frame", add_statistics=False),
    "_frame_std": dict(embedding_pooling="frame+std", add_statistics=False),
    "_statistics": dict(embedding_pooling="mean", add_statistics=True),
    "_frame_std_statistics": dict(embedding_pooling="frame+std", add_statistics=True),
}


def parsed(text: str) -> tuple[str, object]:
    """A setting from the command line: mask_ratio=0.7, img_size=[64,32], pooling_mode=cls."""
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--set {text!r} is no setting; mask_ratio=0.7 would do")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parts(source: str, cfg: Config, aside: list[str], judged: list[str]):
    """Training recordings of an inner split, and those of each judged part."""
    recordings = drop_unreadable(opened(source, cfg.sample_rate), quiet=True)
    names = recordings.table[column_of(recordings)].astype(str).to_numpy()
    for name in [*aside, *judged]:
        if name not in names:
            raise ValueError(f"{name!r} is no part of {source}; one of {', '.join(np.unique(names))} would do")
    train = recordings.select(~np.isin(names, [*aside, *judged]))
    return train, {name: recordings.select(names == name) for name in judged}


def trained(cfg: Config, recordings) -> tuple[AudioMAEPlusPlus, float]:
    """The last weights of one training, and the seconds that it took."""
    begin, trainer = time.perf_counter(), Trainer(cfg, transform=Augment(cfg, build_frontend(cfg)), quiet=True)
    trainer.fit(ClipLoader(recordings, cfg))
    return trainer.accelerator.unwrap_model(trainer.model), time.perf_counter() - begin


def scored(model: AudioMAEPlusPlus, train, held: dict) -> dict[str, dict]:
    """kNN and linear probe of each part, in each read-out, plain and whitened."""
    scores, cfg = {name: {} for name in held}, model.cfg
    for ending, read_out in READ_OUTS.items():
        model.cfg = cfg.replace(**read_out, whiten=False)
        embed = EmbeddingGenerator(model)
        x, *others = (embed.embed_recordings(part)[0] for part in (train, *held.values()))
        for name, y in zip(held, others, strict=True):
            for kind, pair in (("", (x, y)), ("_whitened", whitened(x, y))):
                found = evaluate_embeddings(pair[0], train.labels, pair[1], held[name].labels)
                scores[name] |= {k + ending + kind: round(found[k], 3) for k in ("knn", "linear")}
    return scores


def row_of(cfg: Config, data: str, words: str, scores: dict, seconds: float) -> dict:
    """A line of trials.csv."""
    row = {"data": NAMES.get(data, data), "inner_split": words, **cfg.to_dict(), "frames": cfg.num_frames,
           "n_mels": cfg.n_mels, "patch": "x".join(map(str, cfg.patch_size)), **scores, "seconds": round(seconds)}
    row["uniformity_weight"] *= cfg.use_uniformity_loss
    return row


def add(row: dict, changed: list[str], path: Path = TRIALS):
    """Append a line to the table; a setting that was changed for the first time gets a column."""
    there = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = list(dict.fromkeys([*there.columns, *changed]))
    table = pd.concat([there, pd.DataFrame([row])])[columns]
    write_atomic(path, table.to_csv(index=False).encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder that quality.py takes, but not synthetic")
    parser.add_argument("--mode", default="with labels", choices=list(MODES))
    parser.add_argument("--set-aside", nargs="*", default=[], help="parts that stay out of it altogether")
    parser.add_argument("--judge", nargs="+", required=True, help="parts to hold out in turn; a+b: together")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="changes to the preset")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=None, help="default: what torch takes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    changes = dict(map(parsed, args.set))
    for judged in args.judge:
        for seed in args.seeds:
            cfg = config_of(opened(args.data), args.mode, 1.0).replace(**changes, seed=seed, eval_every=0)
            train, held = parts(args.data, cfg, args.set_aside, judged.split("+"))
            model, seconds = trained(cfg, train)
            for name, scores in scored(model, train, held).items():
                words = f"all but {', '.join([*args.set_aside, *held])} / {name}"
                row = row_of(cfg, Path(args.data).name, words, scores, seconds)
                add(row, list(changes))
                shown = ("inner_split", "seed", "knn", "linear", "seconds")
                print(", ".join(f"{k} {row[k]}" for k in shown), flush=True)


if __name__ == "__main__":
    main()
