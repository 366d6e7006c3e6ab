"""Who speaks? The speaker of a spoken digit, from vectors of the models of the package.

    python benchmarks/speakers.py ../shared/data/fsdd --out benchmarks/starter_speakers.json

Six speakers. Two of the ten digits are held out at a time, so no word is in both parts: kNN-10 and the linear probe
read the speakers of the other eight digits. Means over the five pairs are reported, beside chance, the baselines and
each model's untrained network, whose vectors are whitened on the part that is not held out. A speaker has one
microphone, which is part of what is told apart. Nothing was trained or chosen on it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from quality import WORDS, mean_and_spread

from audiomaepp.data import drop_unreadable, open_recordings
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.evaluate import chance, evaluate_embeddings
from audiomaepp.files import write_atomic
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.train import untrained
from audiomaepp.validation import LOGMEL, SEGMENTS, UNTRAINED, statistics_of, whitened


def scored(x, speaker, digit, apart=False):
    """kNN and linear probe, two digits held out at a time."""
    rows = []
    for first in "02468":
        held = np.isin(digit, [first, str(int(first) + 1)])
        train, test = whitened(x[~held], x[held]) if apart else (x[~held], x[held])
        rows.append(evaluate_embeddings(train, speaker[~held], test, speaker[held]))
    return mean_and_spread({0: rows})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of the spoken digits (free-spoken-digit-dataset)")
    parser.add_argument("--models", nargs="+", default=["starter", "starter_words"], help="models, or folders")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {}
    for name in args.models:
        model = AudioMAEPlusPlus.from_pretrained(name)
        recordings = drop_unreadable(open_recordings(args.data, model.cfg.sample_rate, **WORDS), quiet=True)
        digit, speaker = (recordings.table[column].astype(str).to_numpy() for column in ("label", "group"))
        for kind, each in ((Path(name).name, model), (f"{Path(name).name}, {UNTRAINED}", untrained(model.cfg))):
            x = EmbeddingGenerator(each).embed_recordings(recordings)[0]
            report[kind] = scored(x, speaker, digit, each is not model)
    statistics = statistics_of(recordings, recordings.select([0]))
    for kind in (LOGMEL, SEGMENTS):
        x, _ = statistics[kind]
        report |= {kind: scored(x, speaker, digit), f"{kind}, whitened": scored(x, speaker, digit, apart=True)}
    report["chance"] = dict(knn=chance(speaker, speaker), linear=chance(speaker, speaker))
    for kind, row in report.items():
        print(f"{kind:36}{row['knn']:8.3f}{row['linear']:8.3f}")
    if args.out:
        write_atomic(args.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
