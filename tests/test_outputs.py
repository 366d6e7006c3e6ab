"""What others made stays, one process writes at a time, and a signal loses nothing that was computed."""

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import audiomaepp
from audiomaepp.config import Config
from audiomaepp.model import AudioMAEPlusPlus

TINY = """--embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32 --decoder-depth 1 --decoder-num-heads 2
    --precision fp32 --warmup-epochs 0 --batch-size 6 --synthetic-clips 3""".split()
MAIN = "import sys; from audiomaepp.cli import main; main()"


def begin(*args, code=MAIN, **options):
    "Start the command in a process of its own."
    env = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, **pipes | options)


def ended(process):
    "Its exit status and what it wrote."
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def wait_for(condition, *processes):
    "Until a condition holds; a process that ends before is a failure."
    while not condition():
        for process in processes:
            assert process.poll() is None, ended(process)
        time.sleep(0.01)


@cache
def model_folder(at):
    "A small model as `save_pretrained` writes it, with its card."
    torch.manual_seed(0)
    small = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    AudioMAEPlusPlus(Config.preset("nano", **small)).save_pretrained(at)
    return at


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sounds(tmp_path):
    "Short files, many enough that embedding them can be interrupted."
    rng, folder = np.random.default_rng(0), tmp_path / "sounds"
    folder.mkdir()
    for i in range(200):
        soundfile.write(folder / f"{i:03d}.wav", 0.1 * rng.standard_normal(800), 8000)
    return folder


# ---- signals

# one recording at a time, slowly, so that a signal comes in the middle
SLOW = """
import sys, time
from audiomaepp import embed
from audiomaepp.cli import main
plain = embed._Windows._embed
def slow(self, *args):
    print("batch", flush=True)
    time.sleep(0.05)
    return plain(self, *args)
embed._Windows._embed = slow
init = embed._Windows.__init__
def small(self, *args, **options):
    init(self, *args, **options)
    self.batch_size = 2
embed._Windows.__init__ = small
main()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_what_was_embedded(signum, model, sounds, tmp_path):
    """Up to a minute of a large model's work would be lost, and nothing would say that the rest is kept."""
    out = tmp_path / "x.parquet"
    args = ["embed", model, "--data", sounds, "--out", out]
    process = begin(*args, code=SLOW)
    for _ in range(12):
        assert process.stdout.readline().strip() == "batch"
    process.send_signal(signum)
    status, said = ended(process)
    assert status == 128 + signum and "Traceback" not in said
    assert "same command" in said.splitlines()[-1]
    kept = sum(len(pd.read_parquet(part)) for part in tmp_path.glob("x.parquet.parts/*.parquet"))
    assert 10 <= kept < 200 and not out.exists()
    again = begin(*args, code=SLOW)
    status, said = ended(again)
    assert status == 0 and said.count("batch\n") == (200 - kept) / 2
    assert len(pd.read_parquet(out)) == 200 and sorted(os.listdir(tmp_path)) == ["sounds", "x.parquet"]
