"""Fine-tuning, fold by fold: pretrained without labels on the other folds, tuned on them, scored on the held-out one.

    python benchmarks/finetune.py --data ../shared/data/esc10 --out runs/finetune

Beside it stand the linear probe of the same model, frozen, and the same training from random weights. Pretraining and
tuning see the same clips, none of the held-out fold; the last weights are scored. What is in --out is not done again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from quality import column_of, config_of, opened
from trial import trained

from audiomaepp.data import drop_unreadable, split
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.evaluate import chance, linear_probe
from audiomaepp.files import write_atomic
from audiomaepp.finetune import accuracy, finetune
from audiomaepp.model import AudioMAEPlusPlus

WAYS = ("fine-tuned", "from random weights", "linear probe, frozen", "chance")


def pretrained(folder: Path, cfg, train) -> AudioMAEPlusPlus:
    """The model of the other folds, trained if it is not there."""
    if not (folder / "model.safetensors").exists():
        trained(cfg, train)[0].write(folder)
    return AudioMAEPlusPlus.from_pretrained(folder)


def tuned(model, train, test, epochs: int) -> float:
    """Held-out accuracy after fine-tuning."""
    classifier, _ = finetune(model, train, epochs=epochs, warmup_epochs=epochs / 10, eval_every=0, quiet=True)
    return accuracy(classifier, test)


def scores(source: str, part, out: Path, epochs: int) -> dict[str, float]:
    """The four numbers of one held-out fold."""
    cfg = config_of(opened(source), "without labels", 1.0)
    recordings = drop_unreadable(opened(source, cfg.sample_rate), quiet=True)
    train, test, _ = split(recordings, **{column_of(recordings): part})
    model = pretrained(out / f"{Path(source).name}-{part}", cfg, train)
    embed = EmbeddingGenerator(model)
    x, y = embed.embed_recordings(train)[0], embed.embed_recordings(test)[0]
    torch.manual_seed(0)
    fresh = AudioMAEPlusPlus(model.cfg)
    return {"linear probe, frozen": linear_probe(x, train.labels, y, test.labels),
            "fine-tuned": tuned(model, train, test, epochs), "from random weights": tuned(fresh, train, test, epochs),
            "chance": chance(train.labels, test.labels), "n_test": len(test)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder in ESC-50's layout, or digits named like FSDD's")
    parser.add_argument("--out", default="runs/finetune", help="folder that keeps the pretrained models and scores")
    parser.add_argument("--epochs", type=int, default=30, help="of fine-tuning")
    parser.add_argument("--threads", type=int, default=None, help="default: what torch takes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    recordings = opened(args.data)
    path = Path(args.out) / f"{Path(args.data).name}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for part in map(str, recordings.table[column_of(recordings)].unique()):
        if part not in done:
            done[part] = scores(args.data, part, Path(args.out), args.epochs)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(done, indent=1).encode() + b"\n")
        print(f"{part}: " + ", ".join(f"{way} {done[part][way]:.3f}" for way in WAYS), flush=True)
    for way in WAYS:
        found = [row[way] for row in done.values()]
        print(f"{way:22} {np.mean(found):.3f} ± {np.std(found):.3f} over {len(found)} parts")


if __name__ == "__main__":
    main()
