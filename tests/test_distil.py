"""Distillation: the student comes nearer to its teacher, and a killed one resumes without it, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from audiomaepp.cli import main
from audiomaepp.config import Config
from audiomaepp.distil import _numbered, distil, teacher_vectors
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.run import Run
from audiomaepp.synthetic import synthesize
from audiomaepp.train import untrained

TINY = dict(preset="nano", depth=1, embed_dim=64, num_heads=4, decoder_embed_dim=32, img_size=(96, 80),
            patch_size=(8, 16), batch_size=24, quiet=True)  # fmt: skip


def pitch(wave, sample_rate):
    """A teacher that hears two things: how high a sound is and how loud."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    center = (power * np.arange(len(power))).sum() / power.sum() / len(power)
    return [np.log(center), np.log(np.abs(wave).max()), 1.0]


def agreement(x, y):
    """How well a linear map from x predicts the first column of y: R² on the second half, fitted on the first."""
    x, y, half = np.c_[x, np.ones(len(x))], y[:, 0], len(x) // 2
    scale = x[:half].std(0) + 1e-6
    a = x / scale
    w = np.linalg.solve(a[:half].T @ a[:half] + np.eye(a.shape[1]), a[:half].T @ y[:half])
    return 1 - ((a[half:] @ w - y[half:]) ** 2).mean() / y[half:].var()


def test_the_student_learns_what_the_teacher_hears(tmp_path):
    run = distil(pitch, "synthetic", out=tmp_path / "run", synthetic_clips=16, epochs=24, warmup_epochs=2,
                 base_lr=4e-3, **TINY)  # fmt: skip
    assert run.history["distillation"][-1] < 0.75 * run.history["distillation"][0]
    new = synthesize(n=8, seed=9)
    order = np.random.default_rng(0).permutation(len(new))
    y = teacher_vectors(pitch, new)[0][order]
    models = run.model, untrained(run.config)
    after, before = (agreement(EmbeddingGenerator(m).embed_recordings(new)[0][order], y) for m in models)
    assert after > max(0.5, before + 0.05), (after, before)


def test_a_teacher_trained_here_stands_beside_its_student(tmp_path, capsys):
    teacher = Run.train(out=tmp_path / "teacher", synthetic_clips=4, epochs=1, warmup_epochs=0.5, **TINY)
    how = TINY | dict(quiet=False)
    distil(teacher, "synthetic", out=tmp_path / "student", synthetic_clips=4, epochs=1, warmup_epochs=0.5, **how)
    table = pd.read_csv(tmp_path / "student" / "teacher.csv", index_col=0)
    assert list(table.index[:2]) == ["teacher", "student"]
    assert {"untrained network", "chance"} <= set(table.index)
    scores = teacher.evaluate(quiet=True).rows["this model"]
    assert table.loc["teacher"].tolist() == pytest.approx([scores["knn"], scores["linear"]], abs=1e-3)
    assert "teacher" in capsys.readouterr().out


def test_a_killed_distillation_resumes_bit_for_bit_without_its_teacher(tmp_path):
    table = tmp_path / "vectors.parquet"
    EmbeddingGenerator(AudioMAEPlusPlus(Config.preset("nano"))).embed_folder(synthesize(n=6), table, quiet=True)
    how = TINY | dict(synthetic_clips=6, epochs=8, warmup_epochs=1)
    code = ("import sys, time, torch; torch.set_num_threads(1)\n"
            "from audiomaepp.train import _Saver; late = _Saver.late\n"
            "_Saver.late = lambda self: (time.sleep(0.2), True)[1]\n"
            "from audiomaepp.distil import distil\n"
            f"distil(sys.argv[1], 'synthetic', out=sys.argv[2], **{how!r})")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        killed = subprocess.Popen([sys.executable, "-c", code, str(table), str(tmp_path / "killed")],
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        began = time.monotonic()
        while not (tmp_path / "killed" / "checkpoint.safetensors").exists():
            assert killed.poll() is None and time.monotonic() - began < 120
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        whole = distil(str(table), "synthetic", out=tmp_path / "whole", **how)
        table.unlink()
        resumed = distil(str(table), "synthetic", out=tmp_path / "killed", **how)
    finally:
        torch.set_num_threads(threads)
    assert resumed.epochs == 8
    one, other = (run.model.state_dict() for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_clips_without_a_vector_are_left_out_and_listed(tmp_path):
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, 16000), 16000)
    (tmp_path / "12.wav").write_bytes(b"RIFF")
    table = pd.DataFrame(dict(path=[str(tmp_path / f"{i}.wav") for i in range(11)], embedding=list(np.eye(11))))
    run = distil(table, tmp_path, out=tmp_path / "run", epochs=1, warmup_epochs=0.5, **TINY)
    assert len(pd.read_parquet(run.path / "teacher.parquet")) == 11
    assert not (run.path / "teacher.csv").exists()  # without labels nothing can be scored


def test_the_command_trains_a_student_and_another_teacher_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EmbeddingGenerator(AudioMAEPlusPlus(Config.preset("nano"))).embed_folder(synthesize(n=50), "v.parquet", quiet=True)
    line = ["distil", "v.parquet", "--data", "synthetic", "--preset", "nano", "--epochs", "1", "--synthetic-clips", "3",
            "--quiet"]  # fmt: skip
    main(line)
    assert Run("runs/distilled").epochs == 1
    with pytest.raises(ValueError, match="must hold a run of train to resume it, got one of distil"):
        Run("runs/distilled").resume(epochs=2)
    with pytest.raises(SystemExit, match="teacher differs from the distillation"):
        main(["distil", "w.parquet", *line[2:]])
    with pytest.raises(SystemExit, match="data must be a folder"):
        main(["distil", "v.parquet", "nowhere"])


def test_labels_never_reach_the_student():
    sounds = synthesize(n=2)
    assert _numbered(sounds).labels.tolist() == list(range(24)) and sounds.labels.max() == 11
