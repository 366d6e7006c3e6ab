"""What the vectors tell of a sound beside its class: pitch, tempo and the like, by ridge regression.

    python benchmarks/regress.py --out benchmarks/starter_regress.json

The built-in sounds have these numbers in their table. The regression is fitted to 600 sounds of one seed and scored on
300 of another one: the share of the variance that it explains (R²; 1 is all, 0 no better than the mean). Its penalty is
chosen by cross-validation among the 600. Pitch and tempo are taken as logarithms; the level of the noise is in dB.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.files import write_atomic
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.synthetic import synthesize
from audiomaepp.train import untrained
from audiomaepp.validation import UNTRAINED, statistics_of

NUMBERS = dict(pitch=np.log2, tempo=np.log2, noise=np.asarray, duration=np.asarray)  # name → scale


def explained(train_x, train_y, test_x, test_y):
    """R² on the held-out sounds."""
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15)))
    return model.fit(train_x, train_y).score(test_x, test_y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["starter"], help="models of the package, or folders")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {Path(name).name: AudioMAEPlusPlus.from_pretrained(name) for name in args.models}
    models[UNTRAINED] = untrained(next(iter(models.values())).cfg)
    rate = models[UNTRAINED].cfg.sample_rate
    parts = [synthesize(n=n, seed=seed, sample_rate=rate) for n, seed in ((50, 0), (25, 1))]
    vectors = {name: [EmbeddingGenerator(model).embed_recordings(part, quiet=True)[0] for part in parts]
               for name, model in models.items()}
    vectors |= statistics_of(*parts)
    report = {}
    for name, (train_x, test_x) in vectors.items():
        report[name] = {}
        for number, scale in NUMBERS.items():
            train_y, test_y = (scale(part.table[number].to_numpy(float)) for part in parts)
            report[name][number] = explained(train_x, train_y, test_x, test_y)
        print(f"{name:32}" + "".join(f"{number}: {value:.3f}   " for number, value in report[name].items()))
    if args.out:
        write_atomic(args.out, json.dumps(report, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
