"""Ten instruments that no choice has looked at, as a table for starter.py and quality.py.

    python benchmarks/instruments.py CHECKOUT runs/instruments.csv
    python benchmarks/starter.py --score runs/instruments.csv --out runs/starter
    python benchmarks/quality.py --data runs/instruments.csv --modes "without labels" --budget 0.25

CHECKOUT: github.com/seth814/Audio-Classification at commit 2aca693. Its folder `wavfiles` holds thirty recordings of
each instrument from FSDKaggle2018 (Freesound, Creative Commons; Fonseca et al. 2018, arXiv 1807.09902). It does not say
who recorded what: of each instrument, sorted by name, every fifth recording is in one fold, so recordings of one person
may be on both sides of a split.

The first result is that of `shorter` in starter_candidates.csv, the model that the package had then; nothing was
changed after it. The model in starter.json came later and was not chosen on this set.
"""

import argparse
from pathlib import Path

import pandas as pd

from audiomaepp.files import write_atomic


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    paths = sorted((args.checkout / "wavfiles").rglob("*.wav"))
    table = pd.DataFrame(dict(path=[path.resolve() for path in paths], label=[path.parent.name for path in paths]))
    table["fold"] = 1 + table.groupby("label").cumcount() % 5
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, table.to_csv(index=False).encode())
    print(f"{args.out}: {len(table)} recordings, {table['label'].nunique()} labels")


if __name__ == "__main__":
    main()
