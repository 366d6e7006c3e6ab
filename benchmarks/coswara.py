"""The set that no choice has looked at: Coswara's coughs, breaths, vowels and counting, as a table for quality.py.

    python benchmarks/coswara.py AUDIO ANNOTATIONS runs/coswara.csv
    python benchmarks/quality.py --data runs/coswara.csv --out runs/coswara

AUDIO: the recordings, a folder for each participant; a checkout of github.com/therealmanraj/coswara at commit c06e422
holds those of 76 participants. ANNOTATIONS: the folder `annotations` of github.com/iiscleap/Coswara-Data (commit
4942c97), whose listeners gave each recording a quality from 0 to 2. License of the recordings: CC BY 4.0 (Sharma et
al. 2020, "Coswara: a database of breathing, cough, and voice sounds for COVID-19 diagnosis", arXiv 2005.10548).

coswara.json is the first result, of seed 0; nothing was changed after it.

The labels are the nine things that people were asked to do. Recordings of quality 0, without a quality, shorter than
half a second or with the bytes of another one are left out. The participants are shared out among five folds by a
digest of their names, so that no voice is on both sides of a split.
"""

import argparse
import hashlib
from pathlib import Path

import pandas as pd
import soundfile

from audiomaepp.files import write_atomic


def qualities(annotations: Path) -> dict[str, int]:
    """Quality of each recording, by participant_task as the annotations name it."""
    tables = [pd.read_csv(path) for path in sorted(annotations.glob("*_labels.csv"))]
    return {name: quality for table in tables for name, quality in table.iloc[:, :2].itertuples(index=False)}


def seconds(path: Path) -> float:
    """Duration; 0 for a file without audio."""
    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError:
        return 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audio", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    quality, rows, seen = qualities(args.annotations), [], set()
    for path in sorted(args.audio.rglob("*.wav")):
        participant, task, digest = path.parent.name, path.stem, hashlib.md5(path.read_bytes()).digest()
        good = quality.get(f"{participant}_{task}", 0) >= 1 and seconds(path) >= 0.5 and digest not in seen
        seen.add(digest)
        if good:
            fold = 1 + hashlib.md5(participant.encode()).digest()[0] % 5
            rows.append(dict(path=path.resolve(), label=task, group=participant, fold=fold))
    table = pd.DataFrame(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, table.to_csv(index=False).encode())
    print(f"{args.out}: {len(table)} recordings, {table['label'].nunique()} labels, {table['group'].nunique()} "
          f"participants; in each fold {table['fold'].value_counts().sort_index().tolist()}")


if __name__ == "__main__":
    main()
