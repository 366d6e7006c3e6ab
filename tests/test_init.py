"""Trainings that start from another model: they begin with its weights, resume without it, say what does not fit."""

import shutil

import pytest
import torch

from audiomaepp.cli import main
from audiomaepp.config import Config
from audiomaepp.lab import compare_losses
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.run import Run, with_weights
from audiomaepp.synthetic import synthesize
from audiomaepp.train import Trainer

TINY = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2,
            img_size=(96, 80), patch_size=(16, 16), epochs=1, warmup_epochs=0.5)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model with a whitening, which a new training must not take over."""
    folder = tmp_path_factory.mktemp("model")
    run = Run.train(out=folder / "run", quiet=True, synthetic_clips=3, whiten=True, add_statistics=True, **TINY)
    return run.path


def test_a_training_starts_with_the_weights_and_without_their_whitening(model):
    theirs = AudioMAEPlusPlus.from_pretrained(model)
    cfg = with_weights(Config.preset("nano", init=str(model)))
    ours = Trainer(cfg, quiet=True).model
    assert theirs.whitening is not None and ours.whitening is None
    assert all(torch.equal(w, theirs.state_dict()[n]) for n, w in ours.state_dict().items())
    assert cfg.epochs == Config.preset("nano").epochs and not cfg.whiten


def test_a_run_resumes_after_the_model_it_started_from_is_gone(model, tmp_path):
    shutil.copytree(model, tmp_path / "first")
    how = dict(synthetic_clips=3, init=str(tmp_path / "first"), epochs=1, warmup_epochs=0.5, quiet=True)
    run = Run.train(out=tmp_path / "run", **how)
    assert run.config.embed_dim == 32 and run.config.init == how["init"]
    shutil.rmtree(tmp_path / "first")
    assert run.resume(epochs=2, quiet=True).epochs == 2


def test_what_does_not_fit_is_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"depth must be 1, as in the model init=.*, got 2; leave it out"):
        Run.train(out=tmp_path / "run", init=str(model), depth=2)
    assert not (tmp_path / "run").exists()
    line = ["train", "--init", str(model), "--embed-dim", "64", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="embed_dim must be 32, as in the model"):
        main(line)
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        Run.train(out=tmp_path / "run", init="nowhere")


@pytest.mark.parametrize("preset", ["words", "words_unlabelled"])
def test_a_preset_and_a_model_of_the_package_that_do_not_fit_are_both_named(tmp_path, preset):
    """The message was about top_db_jitter, which nobody had given, and not about the two words on the command line."""
    with pytest.raises(SystemExit) as end:
        main(["train", "--preset", preset, "--init", "starter", "--out", str(tmp_path / "run")])
    assert "preset and model must fit together, got init='starter'" in end.value.code
    assert "init='starter_words' with a preset of words" in end.value.code
    assert with_weights(Config.preset(preset, init="starter_words")).clip_seconds == 0.64


def test_windows_of_another_length_start_from_the_same_weights(model, tmp_path):
    run = Run.train(out=tmp_path / "run", init=str(model), img_size=(64, 80), synthetic_clips=3, epochs=1,
                    warmup_epochs=0.5, quiet=True)  # fmt: skip
    assert run.config.img_size == (64, 80) and run.config.patch_size == (16, 16)


def test_the_lab_compares_a_start_from_a_model_with_one_from_nothing(model, tmp_path):
    settings = {"from nothing": {}, "from a model": dict(init=str(model))}
    base = Config.preset("nano", **TINY)
    found = compare_losses(synthesize(n=6), settings, (0,), base=base, out=tmp_path / "lab", quiet=True)
    assert [r.setting for r in found.results] == list(settings) and not found.failed
