"""Held-out quality of the presets, beside the baselines and chance: every fold (or speaker) is held out once.

    python benchmarks/quality.py --data ../shared/data/esc10 ../shared/data/fsdd synthetic --out runs/quality

With labels, the contrastive loss sees classes; without, training sees no label at all, and labels only score what came
out. In each run, all other clips are trained on and the last weights are scored: the held-out clips choose nothing.

The presets were chosen in earlier trials on inner splits (trials.csv, trial.py). On ESC-10, folds 1, 3 and 4 took part
in trials, folds 2 and 5 did not. On the digits, all six speakers took part in the trials that chose the cut of the
front end (`top_db`), each judged by models that were not trained on that speaker; before the cut, the digits gave
0.80 / 0.80 with labels and 0.54 / 0.62 without (kNN-10 / linear probe, one seed). The read-outs and their whitening
were compared on pairs of speakers as well. All other changes for words were chosen on other recordings: nine speakers
of the Arabic speech commands, of whom five were trained on and four judged. No trial was made on the built-in sounds,
nor on Coswara (coswara.py), which was scored once, when everything was chosen (coswara.json).

quality.json in --out keeps the scores of every finished run, and each run has a folder with its checkpoint: an
interrupted benchmark resumes, and more seeds can be added later, on another machine. `--data` takes any folder in
ESC-50's layout, a table with the columns path, label and fold, a folder of spoken digits named like FSDD's
(digit_speaker_number), or "synthetic" (trained on one seed, held out another).
"""

import argparse
import json
import os
import platform
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audiomaepp.config import Config
from audiomaepp.data import drop_unreadable, open_recordings, split
from audiomaepp.evaluate import average_scores, chance, evaluate_embeddings
from audiomaepp.files import write_atomic
from audiomaepp.lab import UNTRAINED, compare_losses
from audiomaepp.synthetic import synthesize
from audiomaepp.validation import STATISTICS, statistics_of

WORDS = dict(label_from=r"^(\d)_", group_from=r"_([a-z]+)_")  # 7_theo_12.flac
BARS = {  # asked for: (kNN-10, linear)
    "esc10": {"with labels": (0.92, 0.94), "without labels": (0.88, 0.92)},
    "fsdd": {"with labels": (0.92, 0.94), "without labels": (0.78, 0.87)},
    "synthetic": {"without labels": (0.60, 0.85)},
}
MODES = {"with labels": "", "without labels": "_unlabelled"}  # → which kind of preset


def opened(source, sample_rate=16000):
    """The recordings of a source (the two parts of the synthetic set), not decoded yet."""
    if source == "synthetic":
        return tuple(synthesize(n=n, seed=seed, sample_rate=sample_rate) for n, seed in ((50, 0), (25, 1)))
    recordings = open_recordings(source, sample_rate)
    return recordings if "fold" in recordings.table else open_recordings(source, sample_rate, **WORDS)


def parts_of(recordings):
    """What is held out, one after the other."""
    return ["new seed"] if isinstance(recordings, tuple) else recordings.table[column_of(recordings)].unique().tolist()


def column_of(recordings):
    """What says which clips belong together."""
    return "fold" if "fold" in recordings.table else "group"


def baselines(source):
    """Scores of the statistics and of chance, for each part."""
    recordings = opened(source)
    recordings = recordings if source == "synthetic" else drop_unreadable(recordings, quiet=True)
    rows = {name: [] for name in (*STATISTICS, "chance")}
    for part in parts_of(recordings):
        train, test = recordings if source == "synthetic" else split(recordings, **{column_of(recordings): part})[:2]
        for name, (train_x, test_x) in statistics_of(train, test).items():
            rows[name].append(evaluate_embeddings(train_x, train.labels, test_x, test.labels))
        guess = chance(train.labels, test.labels)
        rows["chance"].append(dict(knn=guess, linear=guess, n_train=len(train), n_test=len(test)))
    return rows


def config_of(recordings, mode, budget):
    """The preset for sounds or for words, by the median duration of some; a window is no longer than that."""
    first = recordings[0] if isinstance(recordings, tuple) else recordings
    seconds = np.median([first.seconds(i) for i in range(0, len(first), max(1, len(first) // 100))])
    cfg = Config.preset(("words" if seconds < 1 else "semantic") + MODES[mode], eval_every=0)
    frames = int(seconds * cfg.sample_rate / cfg.hop_length)
    if seconds >= 1 and frames < cfg.img_size[0]:
        cfg = cfg.replace(img_size=(frames // 8 * 8, cfg.n_mels), patch_size=(8, 16))
    return cfg.replace(epochs=max(1, round(cfg.epochs * budget)), warmup_epochs=cfg.warmup_epochs * budget)


def run(source, part, mode, seed, args):
    """Train once; return the scores of the model and of the network before its training."""
    torch.set_num_threads(args.threads)
    cfg = config_of(opened(source), mode, args.budget)
    recordings = opened(source, cfg.sample_rate)
    how = {} if source == "synthetic" else {column_of(recordings): part}
    out = Path(args.out) / f"{Path(source).stem}-{part}-{mode.replace(' ', '-')}-{seed}".replace(" ", "-")
    compared = compare_losses(recordings, {mode: {}}, (seed,), base=cfg, out=out, quiet=True, **how)
    if compared.failed:
        raise RuntimeError(f"{out.name}: {compared.failed}")
    start = next(result for result in compared.baselines if result.setting == UNTRAINED)
    return compared.results[0].scores | {"untrained": start.scores}


def stored(path, budget):
    """{(source, part, mode, seed): scores} of the finished runs in a quality.json; none if there is no such file."""
    report = json.loads(path.read_text()) if path.exists() else {"budget": budget, "data": {}}
    if report["budget"] != budget:
        raise ValueError(f"{path} holds runs with --budget {report['budget']}, not {budget}: choose another --out")
    return {(source, run.pop("part"), run.pop("mode"), run.pop("seed")): run
            for source, found in report["data"].items() for run in found["runs"]}


def mean_and_spread(runs):
    """{seed: [scores of each part]} → scores, and their deviations over seeds and over parts."""
    seeds = [average_scores(parts) for parts in runs.values()]
    row = {"seeds": len(seeds), "n_test": seeds[0]["n_test"]}
    for name in ("knn", "linear"):
        row[name] = float(np.mean([s[name] for s in seeds]))
        row[f"{name}_sd_seeds"] = float(np.std([s[name] for s in seeds], ddof=1)) if len(seeds) > 1 else None
        row[f"{name}_sd_parts"] = float(np.std([p[name] for parts in runs.values() for p in parts]))
    return row


def key_of(source, part, mode, seed):
    """How quality.json names a run."""
    return Path(source).stem, part, mode, seed


def report_of(scores, fixed, args):
    """All that quality.json holds: a table and the runs, for each source."""
    report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads a run",
              "torch": torch.__version__, "budget": args.budget, "data": {}}
    for source in fixed:
        found, table = {key[1:]: value for key, value in scores.items() if key[0] == source}, {}
        for mode in MODES:
            runs = {}  # {seed: the scores of its parts}
            for (_, of, seed), value in found.items():
                if of == mode:
                    runs.setdefault(seed, []).append(value)
            if runs:
                trained = {s: [{k: v for k, v in p.items() if k != "untrained"} for p in ps] for s, ps in runs.items()}
                untrained = {s: [p["untrained"] for p in ps] for s, ps in runs.items()}
                table |= {mode: mean_and_spread(trained), f"{UNTRAINED}, {mode}": mean_and_spread(untrained)}
        table |= {name: mean_and_spread({0: parts}) for name, parts in fixed[source].items()}
        runs = [dict(part=part, mode=mode, seed=seed, **value) for (part, mode, seed), value in found.items()]
        report["data"][source] = {"table": table, "runs": runs}
    return report


def show(source, rows):
    """Print one table."""
    print(f"\n{source}: {rows['chance']['n_test']} held-out clips; ± over parts (and over seeds)")
    print(f"{'':33}{'kNN-10':>26}{'linear':>26}{'asked':>14}")
    for name, row in rows.items():
        cells = [f"{row[k]:.3f} ± {row[k + '_sd_parts']:.3f}"
                 + (f" (± {row[k + '_sd_seeds']:.3f})" if row[k + "_sd_seeds"] is not None else "")
                 for k in ("knn", "linear")]
        bar = BARS.get(source, {}).get(name)
        asked = f"{bar[0]:.2f} / {bar[1]:.2f}" if bar else ""
        print(f"{name:33}{cells[0]:>26}{cells[1]:>26}{asked:>14}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["synthetic"], help="folders, or synthetic")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budget", type=float, default=1.0, help="part of the presets' epochs to train for")
    parser.add_argument("--out", default="runs/quality", help="folder that keeps every run, and quality.json")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=None, help="of each training; default: the cores shared out")
    args = parser.parse_args()
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    path = Path(args.out) / "quality.json"
    scores = stored(path, args.budget)
    jobs = [(source, part, mode, seed) for seed in args.seeds for source in args.data
            for mode in args.modes for part in parts_of(opened(source))]
    jobs = [job for job in jobs if key_of(*job) not in scores]
    fixed = {Path(source).stem: baselines(source) for source in args.data}
    with ProcessPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        waiting = {pool.submit(run, *job, args): key_of(*job) for job in jobs}
        for done in as_completed(waiting):
            key = waiting[done]
            scores[key] = done.result()
            bar.update()
            told = ", ".join(f"{name} {scores[key][name]:.3f}" for name in ("knn", "linear"))
            tqdm.write(f"{' '.join(map(str, key))}: {told}")
            write_atomic(path, json.dumps(report_of(scores, fixed, args), indent=1).encode() + b"\n")
    report = report_of(scores, fixed, args)
    write_atomic(path, json.dumps(report, indent=1).encode() + b"\n")
    for source, found in report["data"].items():
        show(source, found["table"])


if __name__ == "__main__":
    main()
