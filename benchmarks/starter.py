"""Train the model in the box: on generated sounds alone, watched on recordings that it is not trained on.

    python benchmarks/starter.py --clips 1000000 --out runs/starter
    python benchmarks/starter.py --watch ../shared/data/esc10 --out runs/starter
    python benchmarks/starter.py --score ../shared/data/esc10 ../shared/data/fsdd synthetic --out runs/starter
    python benchmarks/starter.py --pack audiomaepp/starters/starter --out runs/starter

The first command trains, and resumes if it was interrupted. --clips counts the clips that are trained on, --programs
the distinct programs among them (default: each clip is a new one); a program that comes again is performed anew. With
--pool FOLDER two takes of each program are computed once, before the training, and every training that names the folder
reads them: on a machine with a GPU, the programs take longer than the training. The weights are kept --looks times.

The second command scores these weights, also while the training runs or on another machine: three read-outs, plain and
whitened, on held-out programs (kNN-10 and linear probe of the source, and how often a take's nearest neighbor among 480
programs is another take of the same one) and on at most three parts of each set, each held out in turn; the other parts
are not used. watch.csv has a line for each look.

The third command scores the trained model once: every fold or speaker held out, beside the statistics, the untrained
network and chance, and writes scores.json, in which the model has the name of its folder. The model's read-out is its
preset's; its whitening is fitted to generated clips. --pooling MODE adds another read-out, not whitened. The fourth
writes it in half precision, with a card, as the package brings it, and prints the cosine between the
vectors before and after.

Ablations: --without SOURCE leaves sources out (of a pool: all programs with a layer of one), --takes 1 contrasts two
augmented copies of one take instead of two takes, --strength moves the numbers of a program more or less from take to
take, --set changes any setting.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from quality import baselines, column_of, mean_and_spread, opened
from trial import READ_OUTS, parsed

from audiomaepp.batches import Augment, ClipLoader
from audiomaepp.config import POOLING_MODES, Config
from audiomaepp.data import Recordings, drop_unreadable
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.evaluate import evaluate_embeddings
from audiomaepp.features import build_frontend, log_clip, log_recording
from audiomaepp.files import write_atomic
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.pooling import fit_whitening
from audiomaepp.synthetic import SOURCES, generated
from audiomaepp.train import Trainer, untrained
from audiomaepp.validation import LOGMEL, UNTRAINED, whitened

SIZES = {  # of the encoder
    "small": dict(embed_dim=96), "preset": {}, "deep": dict(depth=3), "wide": dict(embed_dim=160),
    "large": dict(embed_dim=192, depth=3, decoder_embed_dim=96),
}
HELD = 480  # held-out programs
LOOKS = ("", "_frame", "_frame_std_statistics")  # read-outs that are watched, a name each in trial.py


# ---- what is watched


def in_memory(sounds, take):
    """One take of some programs, as recordings."""
    waves = [sounds.wav(i, take) for i in range(len(sounds))]
    return Recordings(sounds.table, sounds.sample_rate, sounds.classes, waves, source="generated")


def labelled_parts(source: str, cfg: Config, most: int = 3):
    """The recordings of a set's first parts, and the name of each one's part."""
    recordings = drop_unreadable(opened(source, cfg.sample_rate), quiet=True)
    names = recordings.table[column_of(recordings)].astype(str).to_numpy()
    rows = np.isin(names, np.unique(names)[:most])
    return recordings.select(rows), names[rows]


class Watch:
    """Scores a model in some read-outs."""

    def __init__(self, cfg: Config, sets: list[str], strength: float):
        programs = generated(2 * HELD, 1_000_000, cfg.clip_seconds, cfg.sample_rate, strength)
        self.programs, self.again = in_memory(programs, 0), in_memory(programs.select(range(HELD)), 1)
        self.sets = {Path(source).stem: labelled_parts(source, cfg) for source in sets}

    def __call__(self, model) -> dict[str, float]:
        cfg, row = model.cfg, {}
        for ending in LOOKS:
            model.cfg = cfg.replace(**READ_OUTS[ending], whiten=False)
            embed = EmbeddingGenerator(model).embed_recordings
            x, z = embed(self.programs)[0], embed(self.again)[0]
            labels = self.programs.labels
            for kind, (a, b) in (("", (x[HELD:], x[:HELD])), ("_whitened", whitened(x[HELD:], x[:HELD]))):
                found = evaluate_embeddings(a, labels[HELD:], b, labels[:HELD])
                row |= {f"programs_{k}{ending}{kind}": found[k] for k in ("knn", "linear")}
            row[f"takes{ending}"] = found_again(x[:HELD], z)
            for name, (recordings, names) in self.sets.items():
                x, y = embed(recordings)[0], recordings.labels
                for kind in ("", "_whitened"):
                    folds = [judged(x, y, names == part, kind) for part in np.unique(names)]
                    row |= {f"{name}_{k}{ending}{kind}": np.mean([f[k] for f in folds]) for k in ("knn", "linear")}
        return {name: round(float(value), 4) for name, value in row.items()}


def judged(x, y, held, kind):
    """Scores of one part of a set."""
    train, test = whitened(x[~held], x[held]) if kind else (x[~held], x[held])
    return evaluate_embeddings(train, y[~held], test, y[held])


def found_again(x, z):
    """How often the nearest neighbor of a take is another take of the same program."""
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, z = (torch.nn.functional.normalize(torch.from_numpy((v - mean) / spread), dim=1) for v in (x, z))
    return float(((z @ x.T).argmax(1) == torch.arange(len(z))).float().mean())


def watch(args):
    """Score the weights that a training has kept and that have no line yet; write watch.csv."""
    out, rows = Path(args.out), []
    if (out / "watch.csv").exists():
        rows = pd.read_csv(out / "watch.csv").to_dict("records")
    look = None
    for folder in sorted((out / "looks").iterdir()):
        step = int(folder.name)
        if step not in [row["step"] for row in rows]:
            model = AudioMAEPlusPlus.from_pretrained(folder)
            look = look or Watch(model.cfg, args.watch, args.strength)
            rows.append(dict(step=step, clips=step * model.cfg.batch_size // model.cfg.echo, **look(model)))
            pd.DataFrame(sorted(rows, key=lambda row: row["step"])).to_csv(out / "watch.csv", index=False)
            print(f"step {step}: {rows[-1]}")


# ---- a pool of takes


def takes_of(sounds, cfg, rows):
    """Log spectra of two takes of some programs, (n, 2, frames, n_mels) float16."""
    torch.set_num_threads(1)
    frontend = build_frontend(cfg)
    takes = [[log_clip(frontend, log_recording(frontend, sounds.wav(i, take))) for take in range(2)] for i in rows]
    return torch.stack([torch.stack(two) for two in takes]).half().numpy()


def pool_of(sounds, cfg, folder: Path, processes: int):
    """The takes of programs, read from a folder; computed first if it has none."""
    facts = json.loads(json.dumps(sounds.score._asdict() | dict(img_size=cfg.img_size)))
    found = json.loads((folder / "pool.json").read_text()) if (folder / "pool.json").exists() else None
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        takes = np.lib.format.open_memmap(folder / "takes.npy", "w+", np.float16, (len(sounds), 2, *cfg.img_size))
        blocks = [range(i, min(i + 64, len(sounds))) for i in range(0, len(sounds), 64)]
        with ProcessPoolExecutor(processes) as workers:
            for rows, some in zip(blocks, workers.map(partial(takes_of, sounds, cfg), blocks), strict=True):
                takes[rows.start : rows.stop] = some
        found = facts | dict(programs=len(sounds))
        write_atomic(folder / "pool.json", json.dumps(found).encode())
    if found != facts | dict(programs=found["programs"]) or found["programs"] < len(sounds):
        raise ValueError(f"{folder} must hold {len(sounds)} programs with {facts}, got {found}; choose another --pool")
    return np.load(folder / "takes.npy", mmap_mode="r")[: len(sounds)]


class PoolLoader:
    """Batches of some programs of a pool, in a new order in every epoch."""

    def __init__(self, takes, rows, cfg: Config, two: bool):
        self.takes, self.rows, self.cfg, self.two, self.epoch, self.start = takes, rows, cfg, two, 0, 0

    def __len__(self):
        return len(self.rows) // self.cfg.batch_size

    def set_epoch(self, epoch, start=0, rank=0, world_size=1):
        self.epoch, self.start = epoch, start

    def __iter__(self):
        size = self.cfg.batch_size
        order = np.random.default_rng([self.cfg.seed, self.epoch]).permutation(self.rows)
        for i in range(self.start, len(self)):
            rows = np.sort(order[i * size : (i + 1) * size])
            first, second = torch.from_numpy(self.takes[rows]).unbind(1)
            batch = dict(logmel=first, label=torch.full((size,), -1), index=torch.from_numpy(rows))
            yield batch | dict(view2=dict(logmel=second)) if self.two else batch


# ---- training


def config_of(args, programs: int) -> Config:
    """The preset at one of the sizes, for so many clips of distinct programs."""
    passes = args.clips / programs
    changes = dict(map(parsed, args.set))
    usual = dict(epochs=max(1, round(passes)), warmup_epochs=0.06 * passes, eval_every=0, num_workers=args.workers)
    cfg = Config.preset(args.preset, **SIZES[args.size] | usual | changes)
    steps = args.clips // cfg.batch_size * cfg.echo
    if passes >= args.looks:  # a look at the end of an epoch, else in between
        return cfg.replace(eval_every=round(passes / args.looks))
    return cfg.replace(eval_steps=max(1, steps // args.looks))


def train(args):
    """Train, or continue; write the model, and its weights at each look."""
    cfg, out = config_of(args, args.programs), Path(args.out)
    sources = [name for name in SOURCES if name not in args.without]
    given = None if args.pool else sources
    sounds = generated(args.programs, args.seed, cfg.clip_seconds, cfg.sample_rate, args.strength, given)
    sounds.has_takes = args.takes == 2
    if args.pool:
        pool = pool_of(sounds, cfg, Path(args.pool), args.workers)
        rows = [i for i in range(len(sounds)) if not set(sounds.layers(i)) & set(args.without)]
        cfg = config_of(args, len(rows))
    transform, began = Augment(cfg, build_frontend(cfg)), time.perf_counter()
    if (out / "checkpoint.safetensors").exists():
        trainer = Trainer.resume(out, transform=transform)
    else:
        trainer = Trainer(cfg, out_dir=out, transform=transform)
        out.mkdir(parents=True, exist_ok=True)
        facts = vars(args) | dict(sources=sources, torch=torch.__version__)
        write_atomic(out / "starter.json", json.dumps(facts, indent=1, default=str).encode() + b"\n")

    def keep(model):
        model.write(out / "looks" / f"{trainer.state.step:07d}")
        return {}

    batches = PoolLoader(pool, rows, cfg, two=args.takes == 2) if args.pool else ClipLoader(sounds, cfg)
    trainer.fit(batches, keep, best_by=None)
    print(f"{args.clips} clips, {sum(p.numel() for p in trainer.model.parameters()):,} weights, "
          f"{time.perf_counter() - began:.0f} s in this process")


# ---- scores


def finished(out: Path):
    """The trained model, with a whitening that is fitted once to generated clips."""
    model, facts = AudioMAEPlusPlus.from_pretrained(out), json.loads((out / "starter.json").read_text())
    if model.whitening is None:
        cfg = model.cfg
        how = facts["seed"] + 1, cfg.clip_seconds, cfg.sample_rate, facts["strength"], facts["sources"]
        x, _, _ = EmbeddingGenerator(model).embed_recordings(generated(3000, *how), quiet=True)
        model.whitening = fit_whitening(x)
        model.write(out)
    return model


def sounds_of(source: str, sample_rate: int):
    """The recordings of a set, of the synthetic one its two parts, and the name of each one's fold or speaker."""
    found = opened(source, sample_rate)
    if source == "synthetic":
        return found, np.repeat(["seed", "new seed"], [len(part) for part in found])
    recordings = drop_unreadable(found, quiet=True)
    return (recordings,), recordings.table[column_of(recordings)].astype(str).to_numpy()


def score(args):
    """Score the trained model on whole sets, beside the baselines; write scores.json."""
    out = Path(args.out)
    model = finished(out)
    report = json.loads((out / "scores.json").read_text()) if (out / "scores.json").exists() else {}
    for source in args.score:
        recordings, names = sounds_of(source, model.cfg.sample_rate)
        y, table = np.concatenate([some.labels for some in recordings]), report.get(Path(source).stem, {})
        scored = [(out.name, model, None), (UNTRAINED, untrained(model.cfg), None)]
        for name, each, mode in [*scored, *[(f"{out.name}, {mode}", model, mode) for mode in args.pooling]]:
            embed, rows = EmbeddingGenerator(each).embed_recordings, []
            x = np.concatenate([embed(some, mode)[0] for some in recordings])
            for part in ["new seed"] if source == "synthetic" else np.unique(names):
                held = names == part
                train, test = whitened(x[~held], x[held]) if each is not model else (x[~held], x[held])
                rows.append(evaluate_embeddings(train, y[~held], test, y[held]))
            table[name] = mean_and_spread({0: rows})
        if LOGMEL not in table:
            table |= {name: mean_and_spread({0: rows}) for name, rows in baselines(source).items()}
        report[Path(source).stem] = table
        print(f"\n{Path(source).stem}: {table[out.name]['n_test']} held-out clips, nothing trained on them")
        for name, row in table.items():
            print(f"{name:32}{row['knn']:8.3f}{row['linear']:8.3f}")
        write_atomic(out / "scores.json", json.dumps(report, indent=1).encode() + b"\n")


# ---- in the box


def clips_of(out: Path) -> str:
    """What a model was trained on, in words; what it started from comes first."""
    cfg, facts = AudioMAEPlusPlus.from_pretrained(out).cfg, json.loads((out / "starter.json").read_text())
    before = f"{clips_of(Path(cfg.init))}, then " if cfg.init else ""
    return (f"{before}{facts['clips']:,} clips of {facts['programs']:,} programs at a contrastive temperature of "
            f"{cfg.contrastive_temperature:g}")


def pack(args):
    """Write the trained model in half precision, with its card; say how near its vectors are to those before."""
    out, target = Path(args.out), Path(args.pack)
    model, facts = finished(out), json.loads((out / "starter.json").read_text())
    cfg, scores = model.cfg, json.loads((out / "scores.json").read_text())
    some = in_memory(generated(100, args.seed + 2, cfg.clip_seconds, cfg.sample_rate), 0)
    before = EmbeddingGenerator(model).embed_recordings(some)[0]
    model.cfg = cfg.replace(init="")  # a path of this machine
    model.half().write(target)
    model = AudioMAEPlusPlus.from_pretrained(target)
    data = (f"Generated sound programs (audiomaepp.synthetic.generated, seed {facts['seed']}), two takes of each, and "
            f"no recording: {clips_of(out)}. The scores are those of labelled sets that nothing was trained on: each "
            "fold or speaker is held out once, and its labels are read from the other ones.")
    rows = {f"{name}: {who}": {"kNN-10": row["knn"], "linear probe": row["linear"]} for name, table in scores.items()
            for who, row in table.items()}
    model.generate_model_card(data=data, scores=rows).save(target / "README.md")
    after = EmbeddingGenerator(model).embed_recordings(some)[0]
    near = torch.nn.functional.cosine_similarity(torch.from_numpy(before), torch.from_numpy(after))
    print(f"{sum(path.stat().st_size for path in target.iterdir()) / 1e6:.2f} MB in {target}; "
          f"cosine to the vectors before, of 100 clips: {float(near.min()):.6f} at least")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the model, its checkpoints and its scores")
    parser.add_argument("--clips", type=int, default=1_000_000, help="clips to train on")
    parser.add_argument("--programs", type=int, help="distinct programs; default: as many as clips")
    parser.add_argument("--preset", default="semantic_unlabelled", help="settings to start from")
    parser.add_argument("--size", choices=SIZES, default="preset")
    parser.add_argument("--pool", help="folder for two takes of each program, computed once for several trainings")
    parser.add_argument("--looks", type=int, default=12, help="how often the weights are kept")
    parser.add_argument("--watch", nargs="*", help="score the weights that were kept, on programs and on these sets")
    parser.add_argument("--strength", type=float, default=0.05, help="how far a take moves the numbers of a program")
    parser.add_argument("--takes", type=int, choices=(1, 2), default=2, help="takes that are contrasted")
    parser.add_argument("--without", nargs="*", default=[], choices=list(SOURCES), help="sources to leave out")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="changes to the preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1))
    parser.add_argument("--threads", type=int, help="of the training; default: what torch takes")
    parser.add_argument("--score", nargs="*", help="score the model on these sets instead of training it")
    parser.add_argument("--pooling", nargs="*", default=[], choices=POOLING_MODES, help="further read-outs to score")
    parser.add_argument("--pack", help="folder for the trained model in half precision, instead of training it")
    args = parser.parse_args()
    args.programs = args.programs or args.clips
    torch.set_num_threads(args.threads or torch.get_num_threads())
    work = pack if args.pack else score if args.score else train if args.watch is None else watch
    work(args)


if __name__ == "__main__":
    main()
