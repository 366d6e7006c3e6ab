"""Seconds of one core to a held-out score: the released recipe, earlier presets and today's, side by side.

    python benchmarks/time_to_score.py --data ../shared/data/esc10 synthetic --before PATH --out runs/time_to_score

A budget is a part of a recipe's epochs, with its own whole learning-rate schedule, so each point of a curve is the end
of a training and not a moment of a longer one. Every fold (or speaker), or the first --parts of them, is held out once;
the last weights are scored with the recipe's own read-out, kNN-10 and linear probe. Seconds are processor time of one
thread, from the first batch to the last step: scoring is left out, decoding and front end are not. A shared or busy
machine changes them little.

The recipes:
    released   the settings of the released AudioMAE++ (mask ratio 0.8, no embedding losses, its front end and patches,
               frame pooling) at the width, depth, batch size and learning rate of our presets
    before     the presets of an earlier commit, run by its own code: --before takes a checkout of it
    now        the presets of this commit
    starter    these presets, but the weights begin as those of a model that the package brings, which fix the network,
               the patches and the front end: `starter`, or `starter_words` where the windows are shorter than a second

Finished trainings in --out are skipped. The report compares each recipe with the last one: how many seconds both need
for the best score that both reach, by linear interpolation between budgets, and the ratio. A curve whose cheapest
training is better already counts with the seconds of that training. time_to_score.png shows the curves.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MODES = ("without labels", "with labels")
RECIPES = {  # → parts of its epochs to train for
    "released": (0.125, 0.25, 0.5, 1.0), "before": (0.125, 0.25, 0.5, 1.0), "now": (0.0625, 0.125, 0.25, 0.5, 1.0),
    "starter": (0.0625, 0.125, 0.25, 0.5, 1.0),
}


# ---- one training, in a process of its own: it imports the package of the recipe's commit


def released(cfg):
    """The released recipe at the width of a preset."""
    from audiomaepp.config import Config

    plain = Config.preset("official_tiny").to_dict()
    ours = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "epochs",
            "warmup_epochs", "batch_size", "base_lr", "sample_rate", "f_max", "seed")
    frames = cfg.num_frames * cfg.hop_length * 100 // cfg.sample_rate // 4 * 4  # hops of 10 ms, patches of 4 frames
    window = dict(img_size=(frames, 80), hop_length=cfg.sample_rate // 100, win_length=cfg.sample_rate // 40)
    return Config.from_dict(plain | {name: getattr(cfg, name) for name in ours} | window | dict(eval_every=0))


def train_and_score(job):
    """Train as one job says; return processor seconds and scores."""
    import torch

    torch.set_num_threads(1)
    from quality import column_of, config_of, opened

    import audiomaepp.data
    from audiomaepp.data import drop_unreadable, split
    from audiomaepp.embed import EmbeddingGenerator
    from audiomaepp.evaluate import evaluate_embeddings
    from audiomaepp.train import Trainer

    if hasattr(audiomaepp.data, "ClipLoader"):  # earlier commits
        from audiomaepp.audio import build_frontend
        from audiomaepp.data import Augment, ClipLoader
    else:
        from audiomaepp.batches import Augment, ClipLoader
        from audiomaepp.features import build_frontend

    cfg = config_of(opened(job["data"]), job["mode"], job["budget"]).replace(seed=job["seed"], eval_every=0)
    cfg = released(cfg) if job["recipe"] == "released" else cfg
    if job["recipe"] == "starter":
        from audiomaepp.run import with_weights

        cfg = with_weights(cfg.replace(init="starter_words" if cfg.clip_seconds < 1 else "starter"))
    recordings = opened(job["data"], cfg.sample_rate)
    if isinstance(recordings, tuple):
        train, test = recordings
    else:
        recordings = drop_unreadable(recordings, quiet=True)
        train, test = split(recordings, **{column_of(recordings): job["part"]})[:2]
    begin = time.process_time()
    trainer = Trainer(cfg, transform=Augment(cfg, build_frontend(cfg)), quiet=True)
    trainer.fit(ClipLoader(train, cfg))
    seconds, model = time.process_time() - begin, trainer.model
    if getattr(cfg, "whiten", False):
        from audiomaepp.embed import whiten_model

        whiten_model(model, train)
    pooling = "frame" if job["recipe"] == "released" else None
    x, z = (EmbeddingGenerator(model).embed_recordings(part, pooling)[0] for part in (train, test))
    scores = evaluate_embeddings(x, train.labels, z, test.labels)
    steps = trainer.history.rows[-1]["step"]
    return {"seconds": seconds, "steps": steps, **{k: scores[k] for k in ("knn", "linear", "n_test")}}


# ---- all trainings, and the report


def jobs_of(args):
    """Every training, cheapest budgets first."""
    from quality import opened, parts_of

    budgets = {recipe: args.budgets or RECIPES[recipe] for recipe in args.recipes}
    return [dict(data=source, mode=mode, recipe=recipe, budget=budget, part=str(part), seed=seed)
            for budget in sorted({b for some in budgets.values() for b in some}) for source in args.data
            for part in parts_of(opened(source))[: args.parts] for mode in args.modes for seed in args.seeds
            for recipe in args.recipes if budget in budgets[recipe]]


def run(job, args):
    """Run one job in a process of its own, unless its result is stored; return job and result."""
    facts = {**job, "data": Path(job["data"]).name}
    name = "-".join(str(value) for value in facts.values()).replace(" ", "-")
    path = Path(args.out) / "runs" / f"{name}.json"
    if not path.exists():
        here = Path(__file__).resolve().parent
        tree = Path(args.before).resolve() if job["recipe"] == "before" else here.parent
        paths = os.pathsep.join([str(tree), str(tree / "benchmarks")])
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        made = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], env=env, text=True,
                              stdout=subprocess.PIPE, check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made.stdout.splitlines()[-1] + "\n")
    return facts | json.loads(path.read_text())


def curve(rows):
    """[(seconds, knn, linear)] of one recipe: a point for each budget, means over parts and seeds."""
    import numpy as np

    points = []
    for budget in sorted({row["budget"] for row in rows}):
        some = [row for row in rows if row["budget"] == budget]
        weights = [row["n_test"] for row in some]
        points.append((float(np.mean([row["seconds"] for row in some])),
                       *(float(np.average([row[k] for row in some], weights=weights)) for k in ("knn", "linear"))))
    return points


def seconds_to(points, score, column):
    """Seconds at which a curve first reaches a score, by linear interpolation; None if it does not."""
    before = None
    for point in points:
        if point[column] >= score:
            if before is None:
                return point[0]
            share = (score - before[column]) / (point[column] - before[column])
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def compare(curves):
    """{column: {recipe: the highest score that it and the last recipe reach, seconds of both, their ratio}}."""
    found, (*others, last) = {}, curves
    for column, name in ((1, "knn"), (2, "linear")):
        found[name] = {}
        for recipe in others:
            pair = curves[recipe], curves[last]
            score = min(max(point[column] for point in points) for points in pair)
            theirs, ours = (seconds_to(points, score, column) for points in pair)
            found[name][recipe] = dict(score=score, seconds=theirs, ours=ours, ratio=theirs / ours)
    return found


def draw(report, path):
    """Write the curves as a picture."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    fig, axes = plt.subplots(len(report), 2, figsize=(8, 2.6 * len(report)), layout="constrained", squeeze=False)
    for row, (title, part) in zip(axes, report.items(), strict=True):
        for ax, (column, name) in zip(row, ((1, "kNN-10"), (2, "linear")), strict=True):
            for recipe, points in part["curves"].items():
                ax.plot([p[0] for p in points], [p[column] for p in points], "o-", label=recipe, markersize=4)
            ax.set(xscale="log", xlabel="seconds of one core", ylabel=f"{name}, held out")
            ax.set_title(title, fontsize=9)
            ax.grid(alpha=0.3)
        row[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)


def show(title, part):
    """Print one table."""
    print(f"\n{title}: seconds, kNN-10 / linear, of the cheapest to the longest training")
    for recipe, points in part["curves"].items():
        print(f"{recipe:10}" + "".join(f"{f'{s:.0f} s {k:.3f} / {li:.3f}':>24}" for s, k, li in points))
    base = list(part["curves"])[-1]
    for name, pairs in part["equal"].items():
        for recipe, found in pairs.items():
            print(f"to {name} {found['score']:.3f}: {recipe} {found['seconds']:.0f} s, {base} {found['ours']:.0f} s, "
                  f"{found['ratio']:.2f} times")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["synthetic"], help="sources that quality.py takes")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--recipes", nargs="+", default=["released", "before", "now"], choices=RECIPES,
                        help="the last one is the base")
    parser.add_argument("--parts", type=int, help="hold out only so many folds or speakers, the first ones")
    parser.add_argument("--before", help="checkout of the commit whose presets are compared")
    parser.add_argument("--budgets", nargs="+", type=float, help="for every recipe; default: see RECIPES")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", default="runs/time_to_score")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        sys.path.pop(0)  # this folder: quality.py comes from the tree of the recipe
        print(json.dumps(train_and_score(json.loads(args.job))))
        return
    if "before" in args.recipes and not args.before:
        parser.error("--before must name a checkout of an earlier commit (git worktree add PATH COMMIT), got none; "
                     "use it, or --recipes released now")
    from tqdm import tqdm

    jobs = jobs_of(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(tqdm(pool.map(lambda job: run(job, args), jobs), total=len(jobs), unit="run"))
    report = {}
    for data, mode in dict.fromkeys((row["data"], row["mode"]) for row in rows):
        part = [row for row in rows if (row["data"], row["mode"]) == (data, mode)]
        curves = {recipe: curve([row for row in part if row["recipe"] == recipe]) for recipe in args.recipes}
        report[f"{data}, {mode}"] = dict(parts=sorted({row["part"] for row in part}), seeds=args.seeds, curves=curves,
                                         equal=compare(curves))
        show(f"{data}, {mode}", report[f"{data}, {mode}"])
    (Path(args.out) / "time_to_score.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, Path(args.out) / "time_to_score.png")


if __name__ == "__main__":
    main()
