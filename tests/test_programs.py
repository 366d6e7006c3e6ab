"""Generated sounds: every clip is usable, the same anywhere, and takes of one program differ without losing it."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler, normalize

from audiomaepp import synthetic
from audiomaepp.batches import Augment, ClipLoader
from audiomaepp.config import Config
from audiomaepp.evaluate import logmel_statistics
from audiomaepp.features import LogMel, build_frontend
from audiomaepp.run import Run
from audiomaepp.synthetic import SOURCES, _Dice, _times, generated
from audiomaepp.train import Trainer, _Batches, _share
from audiomaepp.validation import without_validation

SETS = [(0, 5.0, 16000), (1, 0.1, 8000), (2, 1.3, 44100), (3, 10.0, 16000)] # seed, seconds, Hz


@pytest.mark.parametrize(("seed", "seconds", "rate"), SETS)
def test_no_clip_is_silent_clipped_or_of_another_length(seed, seconds, rate):
    sounds = generated(n=120, seed=seed, seconds=seconds, sample_rate=rate)
    for i in range(len(sounds)):
        for take in (0, 5):
            wave = sounds.wav(i, take)
            assert wave.dtype == torch.float32 and wave.shape == (round(seconds * rate),), (i, take)
            assert wave.isfinite().all(), (i, take)
            assert 0.03 < wave.abs().max() < 0.9, (i, take)
            assert wave.pow(2).mean().sqrt() > 1e-4, (i, take)


def test_layers_are_those_that_sound(monkeypatch):
    """An ablation leaves programs out by their layers."""
    heard, layer = [], synthetic._layer
    monkeypatch.setattr(synthetic, "_layer", lambda dice, name, *rest: heard.append(name) or layer(dice, name, *rest))
    programs = generated(48, 3, seconds=0.5)
    for i in range(48):
        heard.clear()
        programs.wav(i)
        assert programs.layers(i) == heard and heard[0] == programs.table["label"][i]


def test_a_layer_whose_sound_is_only_at_its_end_is_not_lost():
    """This voice begins with its layer's last sample, which the ramp at the end silences."""
    wave = generated(6000, 0, 0.64, 8000, sources=["voice"]).wav(3589, take=1)
    assert wave.isfinite().all() and wave.abs().max() > 0.03


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_every_source_alone_sounds_at_any_strength(source, strength):
    sounds = generated(n=40, seed=4, seconds=1.0, strength=strength, sources=[source])
    for i in range(40):
        wave = sounds.wav(i, 1)
        assert wave.isfinite().all() and wave.abs().max() > 0.03, i


def test_a_program_is_the_same_in_another_process_and_another_set():
    code = ("from audiomaepp.synthetic import generated; s = generated(n=50, seed=3, seconds=1.0).select([31])\n"
            "print(s.wav(0, 2).double().pow(2).sum().item())")
    other = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    sounds = generated(n=40, seed=3, seconds=1.0)
    assert sounds.wav(31, 2).double().pow(2).sum().item() == other
    assert torch.equal(sounds.select("label == 'engine'")[2].wav, sounds.wav(35))


def test_takes_make_the_same_choices_whatever_their_numbers_decide():
    class Noting(_Dice):
        def __init__(self, *key, take=0, strength=0.1, notes=None):
            super().__init__(*key, take=take, strength=strength)
            self.notes = {} if notes is None else notes

        def part(self, number):
            return Noting(*self.key, number, take=self.take, strength=self.strength, notes=self.notes)

        def happens(self, probability):
            return self._note(super().happens(probability))

        def choose(self, options):
            chosen = super().choose(options)
            self._note(next(i for i, option in enumerate(options) if option is chosen))
            return chosen

        def count(self, low, high):
            return self._note(super().count(low, high))

        def _note(self, value):
            self.notes.setdefault(self.key, []).append(value)
            return value

    for name, source in SOURCES.items():
        for program in range(12):
            dice = [Noting(8, program, take=take, strength=0.5) for take in range(3)]
            for some in dice:
                source(some, 16000, 16000)
            assert dice[0].notes == dice[1].notes == dice[2].notes, (name, program)


def test_two_takes_are_nearer_to_each_other_than_to_other_programs():
    """What a contrastive loss needs: takes can find their program, but not by averages of the spectrum alone."""
    sounds = generated(n=96, seed=5, seconds=2.0)
    x, y = (logmel_statistics(LogMel()(torch.stack([sounds.wav(i, t) for i in range(96)]))) for t in (1, 2))
    scaler = StandardScaler().fit(np.concatenate([x, y]))
    x, y = (normalize(scaler.transform(part)) for part in (x, y))
    found = ((x @ y.T).argmax(1) == np.arange(96)).mean()
    assert 0.15 < found < 0.8, found  # chance is 0.01


def test_events_begin_inside_the_clip():
    for program in range(3000):
        starts = _times(_Dice(9, program, take=1, strength=0.3), 15360, 16000, 60)
        assert 1 <= len(starts) <= 60 and starts[0] == 0, program
        assert (np.diff(starts) >= 0).all() and starts[-1] < 15360, program


def test_strength_decides_how_far_a_take_moves():
    dice = [_Dice(1, k, take=1, strength=strength) for strength in (0, 0.05, 0.5) for k in range(300)]
    places = np.array([d.number(0, 1) for d in dice]).reshape(3, 300)
    moved = np.abs(places[1:] - places[0]).mean(1)
    assert 0.02 < moved[0] < 0.06 and moved[1] > 4 * moved[0]
    assert (places >= 0).all() and (places <= 1).all()


WRONG = [dict(n=0), dict(seconds=0.01), dict(strength=2), dict(seed=-1), dict(sources=["horn"]), dict(sources=[])]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=r"must be.*use"):
        generated(**wrong)


def test_a_loader_streams_programs_in_worker_processes_as_without():
    sounds = generated(n=16, seed=2, seconds=1.0)
    cfg = Config(img_size=(96, 80), patch_size=(16, 16), batch_size=8)
    alone, several = (list(ClipLoader(sounds, cfg.replace(num_workers=workers), pairs=False)) for workers in (0, 2))
    assert len(alone) == len(several) == 2
    for a, b in zip(alone, several, strict=True):
        assert torch.equal(a["wav"], b["wav"]) and torch.equal(a["label"], b["label"])


def unlabelled(**settings):
    """A tiny training that contrasts two takes, on log-mel spectra that the loader computes."""
    usual = dict(img_size=(64, 80), batch_size=8, epochs=2, warmup_epochs=0.5, eval_every=0, precision="fp32")
    return Config.preset("semantic_unlabelled", **usual | settings)


def test_a_second_take_is_another_view_than_an_augmented_first_one():
    cfg = unlabelled(epochs=1)
    assert "view2" in next(iter(ClipLoader(generated(n=8, seconds=0.5), cfg)))
    for without in (dict(views=1), dict(use_contrastive_loss=False)):
        assert "view2" not in next(iter(ClipLoader(generated(n=8, seconds=0.5), cfg.replace(**without))))
    assert "view2" not in next(iter(ClipLoader(generated(n=8, seconds=0.5), cfg, train=False)))


def test_echo_trains_more_steps_on_each_batch():
    steps = []
    for echo in (1, 3):
        trainer = Trainer(unlabelled(echo=echo), quiet=True)
        trainer.transform = Augment(trainer.cfg, build_frontend(trainer.cfg)).to(trainer.device)
        trainer.fit(ClipLoader(generated(n=24, seed=6, seconds=0.5), trainer.cfg))
        steps.append(trainer.history.rows[-1]["step"])
    assert steps == [6, 18]


def test_echo_on_two_processes_counts_the_steps_that_each_can_take():
    """A process that waits for a batch that never comes would hang the others."""
    cfg = unlabelled(echo=3)
    loader = ClipLoader(generated(n=40, seed=6, seconds=0.5), cfg)  # five batches: each process loads two
    two = SimpleNamespace(count=2, rank=1, gather=lambda value: [value, value])
    assert _Batches(loader, cfg, two, 2).per_epoch == 6
    loader.set_epoch(0, start=2 * 4, rank=1, world_size=2)
    assert len(list(loader)) == 2  # four of six are done
    with pytest.raises(ValueError, match="must resume on as many processes as it began with, 2, got 1; use 2"):
        _Batches(loader, cfg, SimpleNamespace(count=1, rank=0), 2)


def test_processes_that_share_a_batch_share_its_second_view():
    batches = [{"wav": torch.full((2, 4), k), "view2": {"wav": torch.full((2, 4), k + 10)}} for k in (0, 1)]
    part = _share(batches, 1, 2)
    assert part["wav"].tolist() == [[1] * 4] * 2 and part["view2"]["wav"].tolist() == [[11] * 4] * 2
    with pytest.raises(ValueError, match="cannot share"):
        _share(batches, 0, 3)


def test_a_run_on_generated_sounds_is_trained_scored_drawn_and_resumed(tmp_path):
    cfg = dict(preset="semantic_unlabelled", img_size=(64, 80), epochs=1, warmup_epochs=0, batch_size=16, echo=2)
    run = Run.train("generated", out=tmp_path / "run", clips=48, quiet=True, **cfg)
    assert not (tmp_path / "run" / "recordings.csv").exists()
    report = run.evaluate(quiet=True)
    assert report.protocol.startswith("generated programs of another seed held out: 48 train / 480 test")
    assert {"log-mel statistics", "untrained network", "chance"} <= set(report.rows)
    again = Run(tmp_path / "run").resume(epochs=2, quiet=True)
    assert again.history.rows[-1]["epoch"] == 2
    assert again.config.whiten and again.model.whitening is not None


def test_many_generated_clips_cost_nothing_before_they_are_used():
    """A million clips open in a moment, a part of them judges, and validation takes a few hundred."""
    sounds = generated(n=1_000_000, seconds=5.0)
    fitted, held = without_validation(sounds, seed=0)
    assert 480 <= len(held) <= 520 and len(fitted) + len(held) == 1_000_000
    assert len(ClipLoader(fitted, unlabelled())) == len(fitted) // 8
