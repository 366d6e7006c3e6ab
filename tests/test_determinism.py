"""The same seed gives the same model, whatever came before, and whether or not the run was killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import audiomaepp
from audiomaepp.batches import Augment, ClipLoader
from audiomaepp.checkpoints import read_progress
from audiomaepp.config import Config
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.features import build_frontend
from audiomaepp.model import AudioMAEPlusPlus, MacaronBlock
from audiomaepp.run import train_run
from audiomaepp.source import Source
from audiomaepp.synthetic import generated, synthesize
from audiomaepp.train import Trainer


def config(**changes):
    small = dict(
        embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=8, epochs=2,
        warmup_epochs=1, eval_every=1, mix=0.5, gain_db=6, spec_time_mask=20, spec_freq_mask=10,
    )  # fmt: skip
    return Config.preset("nano", **{**small, **changes})


def assert_same(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def without_speed(rows):
    return [{k: v for k, v in row.items() if k != "clips_per_s"} for row in rows]


# ---- one seed, one model


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    return out, train_run(config(), Source(synthetic_clips=3), out, quiet=True)[1]


def test_same_seed_same_checkpoint(first, tmp_path):
    torch.manual_seed(99)  # whatever was drawn before
    np.random.seed(99)  # noqa: NPY002
    _, history = train_run(config(), Source(synthetic_clips=3), tmp_path, quiet=True)
    assert (tmp_path / "model.safetensors").read_bytes() == (first[0] / "model.safetensors").read_bytes()
    assert_same(tmp_path / "checkpoint.safetensors", first[0] / "checkpoint.safetensors")
    assert without_speed(history.rows) == without_speed(first[1].rows)


def test_another_seed_another_model(first, tmp_path):
    train_run(config(seed=1), Source(synthetic_clips=3), tmp_path, quiet=True)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(first[0] / "model.safetensors")
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("weight"))


def test_evaluating_more_often_does_not_change_the_training(first, tmp_path):
    _, history = train_run(config(eval_every=0), Source(synthetic_clips=3), tmp_path, quiet=True)
    assert_same(tmp_path / "checkpoint.safetensors", first[0] / "checkpoint.safetensors")


# ---- one clip, one embedding


@pytest.mark.parametrize("frontend", ["logmel", "fbank"])
def test_a_clip_has_one_embedding_in_any_company(frontend):
    torch.manual_seed(0)
    model = AudioMAEPlusPlus(config(frontend=frontend))
    seconds = [0.06, 0.5, 2.0, 2.00001, 3.3, 1 / 16000, 7.9, 2.0]
    clips = [0.1 * torch.randn(max(1, round(16000 * s))) * 10 ** (i - 4) for i, s in enumerate(seconds)]
    alone = np.stack([EmbeddingGenerator(model).extract_embedding(clip) for clip in clips])
    assert np.isfinite(alone).all() and np.abs(alone[:, None] - alone).max(-1)[~np.eye(8, dtype=bool)].min() > 1e-3
    for batch_size in (1, 3, 32):
        generator = EmbeddingGenerator(model.train(), batch_size=batch_size)  # a model that trains still embeds alike
        for order in (range(8), range(7, -1, -1), [4, 4, 0, 6, 4]):
            together = generator.extract_embedding([clips[i] for i in order])
            np.testing.assert_allclose(together, alone[list(order)], atol=1e-5, rtol=0)


# ---- killed, and resumed


FAST = dict(  # everything that makes a step cheaper, and a read-out
    cache_features=True, fused_optimizer=True, decode_ratio=0.5, roll=True, stretch_time=0.2, use_labels=False, views=2,
    pooling_mode="frame+std", add_statistics=True, whiten=True,
)  # fmt: skip
TAKES = FAST | dict(data="generated", echo=3)  # each batch for three steps, of which some are done


def parts(data="synthetic", **changes):
    recordings = generated(n=18, seconds=1.0) if data == "generated" else synthesize(n=3, classes=6)
    cfg = config(epochs=6, eval_every=3, **changes)
    return cfg, ClipLoader(recordings, cfg), Augment(cfg, build_frontend(cfg))


def slowly(row):
    time.sleep(0.3)


def run_to_be_killed(out, changes):
    torch.set_num_threads(1)
    cfg, loader, transform = parts(**json.loads(changes))
    Trainer(cfg, out_dir=out, transform=transform, quiet=True, save_minutes=0, callback=slowly).fit(loader)


@pytest.mark.parametrize("changes", [{}, FAST, TAKES], ids=["plain", "fast", "takes"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, changes):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        env = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1])}
        process = subprocess.Popen([sys.executable, __file__, str(tmp_path / "killed"), json.dumps(changes)], env=env)
        checkpoint, began = tmp_path / "killed" / "checkpoint.safetensors", time.monotonic()
        while not checkpoint.exists() or read_progress(checkpoint)["step"] < 4:
            assert process.poll() is None and time.monotonic() - began < 90, "it did not get as far as step 4"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"

        cfg, loader, transform = parts(**changes)
        whole = Trainer(cfg, out_dir=tmp_path / "whole", transform=transform, quiet=True, save_minutes=0)
        whole.fit(loader)
        total, reached = whole.state.step, read_progress(checkpoint)["step"]
        assert 4 <= reached < total
        torch.manual_seed(99)
        resumed = Trainer.resume(tmp_path / "killed", transform=transform, quiet=True, save_minutes=0)
        assert resumed.state.step == reached
        resumed.fit(parts(**changes)[1])
        for name in ("checkpoint.safetensors", "model.safetensors"):
            assert_same(tmp_path / "killed" / name, tmp_path / "whole" / name)
        assert without_speed(resumed.history.rows) == without_speed(whole.history.rows)
        left = [p.name for p in (tmp_path / "killed").iterdir() if not p.name.startswith(".")]
        kept = [f"checkpoint-{total - 1:08d}.safetensors", "checkpoint.safetensors"]
        assert sorted(left) == [*kept, "config.json", "history.csv", "model.safetensors"]
    finally:
        torch.set_num_threads(threads)


# ---- computed again


def test_recomputed_blocks_learn_the_same_from_less_memory():
    """A setting for memory must not change the model; one that keeps everything would be a setting for nothing."""
    kept, gradients = {}, {}
    for again in (False, True):
        torch.manual_seed(0)
        given = AudioMAEPlusPlus(cfg := config(depth=4, decoder_depth=4))  # also for a model that is fine-tuned
        model = Trainer(cfg.replace(recompute=again), given, quiet=True).model
        device = next(model.parameters()).device
        spec, sizes = torch.randn(8, 1, *model.cfg.img_size, device=device), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            loss = model(spec, torch.arange(8, device=device) // 2).loss
        loss.backward()
        kept[again], gradients[again] = sum(sizes), [p.grad for p in model.parameters()]
    assert all(map(torch.equal, *gradients.values())) and kept[True] < 0.3 * kept[False]


# ---- compiled


def compiled(trainer):
    return [m._compiled_call_impl is not None for m in trainer.model.modules() if isinstance(m, MacaronBlock)]


def test_compile_is_a_switch():
    assert compiled(Trainer(config(compile=True), quiet=True)) == [True] * 2
    assert compiled(Trainer(config(), quiet=True)) == [False] * 2


@pytest.mark.slow  # a minute or two, for the compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_blocks_learn_the_same(tmp_path):
    """Otherwise a setting for speed would be one for another model."""
    runs = {}
    for name, changes in {"plain": {}, "compiled": dict(compile=True)}.items():
        cfg, loader, transform = parts(**changes)
        trainer = Trainer(cfg.replace(epochs=2), out_dir=tmp_path / name, transform=transform, quiet=True)
        runs[name] = trainer.fit(loader).rows[-1]["loss"], trainer.model.state_dict()
    (loss, weights), (other_loss, other) = runs.values()
    assert list(weights) == list(other) and abs(loss - other_loss) < 1e-3
    assert not all(torch.equal(weights[n], other[n]) for n in weights)  # other sums: it was compiled


if __name__ == "__main__":
    run_to_be_killed(*sys.argv[1:])
