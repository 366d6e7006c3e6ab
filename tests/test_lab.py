"""The lab is fair: one start, one order, one held-out part for all; nothing leaks; a kill changes no number."""

import dataclasses
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import audiomaepp
from audiomaepp import lab, report
from audiomaepp.checkpoints import read_progress
from audiomaepp.config import Config
from audiomaepp.data import Recordings
from audiomaepp.evaluate import wilson_interval
from audiomaepp.lab import BASELINE, CHANCE, LOSSES, STATISTICS, UNTRAINED, Comparison, compare_losses, grid
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.synthetic import synthesize
from audiomaepp.tables import html_table
from audiomaepp.train import Trainer


def config(**changes):
    small = dict(
        embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=8, epochs=2,
        warmup_epochs=0, eval_every=1, precision="fp32",
    )  # fmt: skip
    return Config.preset("nano", **{**small, **changes})


TWO = {name: LOSSES[name] for name in ("neither", "both")}


@pytest.fixture(scope="module")
def sounds():
    return synthesize(n=6, classes=4)


@pytest.fixture(scope="module")
def comparison(sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("lab") / "out"
    options = dict(base=config(), out=out, pooling=("mean", "cls"), fraction=0.4, quiet=True)
    return compare_losses(sounds, TWO, (0, 1), **options)


def write(folder, recordings):
    "The clips as files, a folder for each class."
    for i, label in enumerate(recordings.table["label"]):
        path = folder / label / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, recordings.wav(i).numpy(), recordings.sample_rate, subtype="PCM_16")
    return folder


def no_training(monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("a training began"))


# ---- alike in everything but the setting


def test_all_settings_start_from_the_same_weights_and_see_the_same_batches(sounds, monkeypatch):
    starts, orders = [], []

    def fit(self, train, *args, **kwargs):
        starts.append({k: v.clone() for k, v in self.model.state_dict().items()})
        train.set_epoch(0)
        orders.append([(b["index"].tolist(), b["wav"]) for b in train])
        train.set_epoch(0)
        return whole(self, train, *args, **kwargs)

    whole = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", fit)
    compare_losses(sounds, base=config(epochs=1), quiet=True)
    assert len(starts) == 4
    for start, order in zip(starts[1:], orders[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(starts[0].values(), start.values(), strict=True))
        assert [rows for rows, _ in order] == [rows for rows, _ in orders[0]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(order, orders[0], strict=True))


def test_the_last_weights_are_evaluated_on_clips_that_were_not_trained_on(sounds, monkeypatch):
    seen, fitted = set(), []

    def fit(self, train, *args, **kwargs):
        assert kwargs["best_by"] is None
        seen.update(train.recordings.paths)
        history = whole(self, train, *args, **kwargs)
        fitted.append(self.model)
        return history

    whole = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", fit)
    result = compare_losses(sounds, {"both": LOSSES["both"]}, base=config(), fraction=0.25, quiet=True)
    held = set(result.held_out["path"])
    assert not held & seen and held | seen == set(sounds.paths)
    test = sounds.select([i for i, path in enumerate(sounds.paths) if path in held])
    np.testing.assert_array_equal(result.results[0].x, lab._embed(fitted[0], test, "mean"))


def test_pooling_needs_no_training_of_its_own(sounds, monkeypatch):
    trained = []
    whole = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **kw: trained.append(1) or whole(self, *args, **kw))
    modes = ("cls", "mean", "cls+mean", "frame")
    result = compare_losses(sounds, {"both": {}}, base=config(), pooling=modes, quiet=True)
    assert len(trained) == 1
    assert list(result.scores["pooling"]) == list(modes)
    assert [r.x.shape[1] for r in result.results] == [32, 32, 64, 32 * config().grid_size[1]]
    rows = [f"{name} · {mode}" for name in ("both", UNTRAINED) for mode in modes]
    assert list(result.table.index) == [*rows[:4], *STATISTICS, *rows[4:], CHANCE]


# ---- what is asked for


@pytest.mark.parametrize("settings, words", [
    ([{"contrastive_wieght": 0.1}], "did you mean contrastive_weight"),
    (grid(mask_ratio=[0.5, 1.5]), "mask_ratio"),
    ({"a": {"seed": 1}}, "seeds="),
    ({"chance": {}}, "chance"),
    ({BASELINE: {}}, BASELINE),
    ({STATISTICS[-1]: {}}, STATISTICS[-1]),
    ({"log-mel statistics (floor)": {}}, "another row"),  # the folder of the baseline in version 0.1
    ({"a": 3}, "settings=.* must hold"),
    ([{"mask_ratio": 0.5}, {"mask_ratio": 0.5}], "twice"),
    ({}, "settings=.* must hold"),
])  # fmt: skip
def test_a_bad_setting_fails_before_anything_is_opened_or_trained(settings, words, monkeypatch):
    no_training(monkeypatch)
    with pytest.raises(ValueError, match=words):
        compare_losses("/nowhere", settings, base=config(), quiet=True)


@pytest.mark.parametrize("options", [{"seeds": ()}, {"seeds": (1, 1)}, {"pooling": "median"}, {"base": "nanno"}])
def test_other_bad_values_fail_too(options, monkeypatch):
    no_training(monkeypatch)
    with pytest.raises(ValueError, match="seeds=|pooling must .*, got 'median'|preset must .*, got 'nanno'"):
        compare_losses("/nowhere", **{"base": config(), "quiet": True, **options})


def test_a_setting_alone_takes_no_batches_in_pairs_from_unlabeled_clips(sounds):
    unlabeled = Recordings(sounds.table.drop(columns="label"), waves=sounds.waves, source="sounds")
    result = compare_losses(unlabeled, {"both": LOSSES["both"]}, base=config(), quiet=True)
    row = result.scores.iloc[0]
    assert "knn" not in row
    assert np.isfinite(row[["uniformity", "rankme", "reconstruction", "seconds"]].astype(float)).all()
    assert result.chance is None and "rankme" in result.histories["both", 0].columns and str(result)


# ---- held out


def test_a_pair_that_shares_a_clip_is_refused(sounds):
    train, test = sounds.select(range(0, 16)), sounds.select(range(15, 24))
    with pytest.raises(ValueError, match=f"{sounds.paths[15]} is in both parts"):
        compare_losses((train, test), TWO, base=config(), quiet=True)


def test_a_pair_that_shares_samples_under_another_name_is_refused(sounds):
    train, test = sounds.select(range(0, 16)), sounds.select(range(15, 24))
    test = Recordings(test.table.assign(path=[f"other/{i}" for i in range(9)]), waves=test.waves)
    with pytest.raises(ValueError, match="other/0"):
        compare_losses((train, test), TWO, base=config(), quiet=True)


@pytest.mark.parametrize("leak", ["symlink", "hard link", "copy", "other format", "link to the folder"])
def test_a_held_out_file_cannot_come_into_training_by_another_way(leak, sounds, tmp_path):
    train = write(tmp_path / "train", sounds.select(range(0, 24, 2)))
    test = write(tmp_path / "test", sounds.select(range(1, 24, 2)))
    victim = sorted(test.rglob("*.wav"))[0]
    hidden = train / victim.parent.name / "hidden.wav"
    if leak == "symlink":
        hidden.symlink_to(victim)
    elif leak == "hard link":
        os.link(victim, hidden)
    elif leak == "copy":
        hidden.write_bytes(victim.read_bytes())
    elif leak == "other format":
        soundfile.write(hidden.with_suffix(".flac"), soundfile.read(victim, dtype="int16")[0], 16000)
    else:
        (train / "linked").symlink_to(victim.parent)
    with pytest.raises(ValueError, match="held out|both parts"):
        compare_losses((train, test), TWO, base=config(), quiet=True)


def test_copies_within_a_folder_are_not_trained_on(sounds, tmp_path):
    write(tmp_path, sounds)
    for path in sorted(tmp_path.rglob("*.wav")):
        path.with_name(f"{path.stem}_again.wav").write_bytes(path.read_bytes())
    train, test, words = lab.open_parts(tmp_path, 16000)
    assert not set(lab.clip_digests(train)) & set(lab.clip_digests(test))
    assert words.endswith(f"the same sounds are held out: {48 - len(train) - len(test)}")


def test_a_folder_goes_on_with_the_same_comparison_only(comparison, sounds, tmp_path, monkeypatch):
    no_training(monkeypatch)
    folder = tmp_path / "saved"
    comparison.save(folder)
    same = dict(base=config(), out=folder, pooling=("mean", "cls"), fraction=0.4, quiet=True)
    assert compare_losses(sounds, TWO, (0, 1), **same).same_as(comparison)
    for changed, words in [
        (dict(seeds=(0, 2)), "seeds"), (dict(seeds=(1,)), "seeds"), (dict(base=config(depth=2)), "base.depth"),
        (dict(settings={"both": TWO["both"]}), "settings.neither"),
        (dict(settings={**TWO, "both": {**TWO["both"], "mask_ratio": 0.5}}), "settings.both.mask_ratio"),
        (dict(pooling="cls"), "pooling"), (dict(split_seed=1), "data."), (dict(fraction=0.5), "protocol"),
        (dict(data=synthesize(n=6, classes=4, seed=1)), "data."),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"another comparison: .*{words}"):
            compare_losses(**{**same, "data": sounds, "settings": TWO, "seeds": (0, 1), **changed})


def test_a_folder_of_a_version_with_other_words_for_the_split_goes_on(comparison, sounds, tmp_path, monkeypatch):
    """A comparison that took days would be refused, because a sentence about its split is now worded differently."""
    no_training(monkeypatch)
    comparison.save(tmp_path)
    path = tmp_path / "comparison.json"
    path.write_text(path.read_text().replace(comparison.experiment.protocol, "some clips held out"))
    same = dict(base=config(), out=tmp_path, pooling=("mean", "cls"), fraction=0.4, quiet=True)
    assert compare_losses(sounds, TWO, (0, 1), **same).same_as(comparison)


def test_a_folder_takes_more_seeds_and_settings_and_trains_only_those(sounds, tmp_path, monkeypatch):
    trained, whole = [], Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, *args, **kw: trained.append(1) or whole(self, *args, **kw))

    def compare(settings, seeds, out):
        return compare_losses(sounds, settings, seeds, base=config(epochs=1), out=tmp_path / out, quiet=True)

    one = {"both": TWO["both"]}
    first = compare(one, (0,), "grown")
    more_seeds = compare(one, (0, 1), "grown")
    assert len(trained) == 2 and more_seeds.results[0].scores == first.results[0].scores
    grown = compare(TWO, (0, 1), "grown")
    assert len(trained) == 4 and grown.same_as(compare(TWO, (0, 1), "at once")) and not grown.unfinished


def test_a_setting_that_changes_the_order_of_the_clips_is_not_added(sounds, tmp_path):
    options = dict(base=config(epochs=1), out=tmp_path, quiet=True)
    compare_losses(sounds, {"neither": TWO["neither"]}, **options)
    with pytest.raises(ValueError, match="in pairs of a class is False in the folder and True now"):
        compare_losses(sounds, TWO, **options)


def test_results_of_another_version_can_be_read_but_not_mixed(comparison, sounds, tmp_path, monkeypatch):
    no_training(monkeypatch)
    comparison.save(tmp_path)
    path = tmp_path / "comparison.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    lab.run_folder(tmp_path, STATISTICS[1], 0).joinpath("results.json").unlink()  # a version without this baseline
    same = dict(base=config(), out=tmp_path, pooling=("mean", "cls"), fraction=0.4, quiet=True)
    finished = compare_losses(sounds, TWO, (0, 1), **same)
    assert [name for name in STATISTICS if name not in finished.table.index] == [STATISTICS[1]], "only read"
    assert finished.experiment.versions["torch"] == Comparison.load(tmp_path).experiment.versions["torch"] == "1.0"
    before = path.read_bytes()
    with pytest.raises(ValueError, match="versions.torch is '1.0' in the folder .*Comparison.load.* another folder"):
        compare_losses(sounds, TWO, (0, 1, 2), **same)
    with pytest.raises(ValueError, match="versions.torch"):
        comparison.save(tmp_path)
    assert path.read_bytes() == before


def test_a_field_that_is_newer_than_a_folder_counts_as_its_default(comparison, sounds, tmp_path, monkeypatch):
    no_training(monkeypatch)
    comparison.save(tmp_path)
    path = tmp_path / "comparison.json"
    facts = json.loads(path.read_text())
    del facts["experiment"]["base"]["rope"]
    path.write_text(json.dumps(facts))
    options = dict(base=config(), out=tmp_path, pooling=("mean", "cls"), fraction=0.4, quiet=True)
    assert compare_losses(sounds, TWO, (0, 1), **options).same_as(comparison)


def test_the_progress_of_a_training_begins_without_the_score_of_the_one_before(sounds, monkeypatch):
    bars, shown, whole = [], [], Trainer.fit

    class Bar(lab.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})
            bars.append(self)

    def fit(self, *args, **kwargs):
        shown.append(bars[0].postfix)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(lab, "tqdm", Bar)
    monkeypatch.setattr(Trainer, "fit", fit)
    compare_losses(sounds, TWO, base=config(epochs=1))
    assert [text or "" for text in shown] == ["", ""] and "kNN" in bars[0].postfix


def test_clips_that_cannot_be_read_are_left_out_once_and_listed(sounds, tmp_path):
    write(tmp_path / "data", sounds)
    (tmp_path / "data" / "struck.wav").write_bytes(b"no sound")
    result = compare_losses(tmp_path / "data", {"neither": LOSSES["neither"]}, base=config(epochs=1), quiet=True)
    assert [Path(path).name for path, _ in result.skipped] == ["struck.wav"]
    assert "1 recording left out: it could not be read" in str(result) and "1 setting, one seed" in str(result)


def test_parts_opened_apart_get_common_classes(sounds, tmp_path):
    train = write(tmp_path / "train", sounds.select(sounds.labels != 0))
    test = write(tmp_path / "test", synthesize(n=3, classes=4, seed=5))
    result = compare_losses((train, test), {"neither": LOSSES["neither"]}, base=config(epochs=1), quiet=True)
    assert [result.experiment.classes[i] for i in lab.class_codes(result)] == list(result.held_out["label"])
    names = np.array(result.experiment.classes)[result.results[0].predicted]
    assert result.results[0].scores["knn"] == pytest.approx((names == result.held_out["label"]).mean())


def test_shuffled_labels_give_chance_and_true_ones_do_not():
    sounds = synthesize(n=30, classes=["rising steps", "struck", "fast tremolo", "speeding pulses"])
    shuffled = np.random.default_rng(0).permutation(sounds.table["label"])
    cfg = config(embed_dim=64, epochs=12, base_lr=3e-2, batch_size=24, contrastive_weight=1.0, eval_every=0)
    setting, scores = {"contrastive": LOSSES["contrastive"]}, []
    for labels in (sounds.table["label"], shuffled):
        data = Recordings(sounds.table.assign(label=labels), waves=sounds.waves)
        result = compare_losses(data, setting, base=cfg, fraction=0.4, quiet=True)
        scores.append(result.results[0].scores["knn"])
    low, high = wilson_interval(0.25, 48, level=0.99)
    assert result.chance == 0.25 and low <= scores[1] <= high, scores
    assert scores[0] > high, "the same training on true labels tells the classes apart"


# ---- collapse


def test_a_planted_collapse_is_reported(sounds, monkeypatch):
    def constant(self, spec, mode=None, frames=None):
        return torch.ones(len(spec), 32) + 1e-4 * spec.mean((1, 2, 3))[:, None]

    monkeypatch.setattr(AudioMAEPlusPlus, "get_embedding", constant)
    result = compare_losses(sounds, {"neither": LOSSES["neither"]}, base=config(epochs=1), quiet=True)
    for text in (str(result), result._repr_html_(), result.table.loc["neither", "warning"]):
        assert "the embeddings have collapsed to one direction" in text
    monkeypatch.undo()
    healthy = compare_losses(sounds, {"neither": LOSSES["neither"]}, base=config(epochs=1), quiet=True)
    assert "collapsed" not in str(healthy)


def test_a_training_that_diverges_is_reported_and_the_others_are_compared(sounds, tmp_path, monkeypatch):
    def fit(self, *args, **kwargs):
        if self.cfg.use_uniformity_loss:
            raise FloatingPointError("the loss is nan at step 3; base_lr below 1 may help")
        return whole(self, *args, **kwargs)

    whole = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", fit)
    result = compare_losses(sounds, TWO, base=config(epochs=1), out=tmp_path / "out", quiet=True)
    assert list(result.table.index) == ["neither", *STATISTICS, UNTRAINED, CHANCE] and not result.unfinished
    assert "“both” (seed 0) failed: the loss is nan at step 3; base_lr below 1 may help" in str(result)
    result.save(tmp_path / "saved")
    assert Comparison.load(tmp_path / "saved").failed == result.failed


def test_a_comparison_of_few_clips_has_the_baselines_that_they_allow(tmp_path):
    "Six whitened vectors are about equally far from each other: their row would say nothing."
    few = compare_losses(synthesize(n=4, classes=2), {"neither": {}}, base=config(epochs=1), out=tmp_path, quiet=True)
    assert list(few.table.index) == ["neither", BASELINE, "three segments", UNTRAINED, CHANCE] and few.remarks()
    assert Comparison.load(tmp_path).same_as(few)


def test_a_comparison_killed_in_its_first_training_can_be_looked_at(comparison, tmp_path):
    comparison.save(tmp_path)
    for path in tmp_path.rglob("seed*/results.json"):
        if path.parent != lab.run_folder(tmp_path, BASELINE, 0):
            path.unlink()
    halfway = Comparison.load(tmp_path)
    assert list(halfway.table.index) == [BASELINE, CHANCE] and len(halfway.scores) == 0
    assert len(halfway.unfinished) == 4 and "not finished: “neither” (seed 0)" in str(halfway) + halfway._repr_html_()
    assert "not finished" in halfway.report(tmp_path / "report.html", pictures=False).read_text()
    lab.run_folder(tmp_path, BASELINE, 0).joinpath("results.json").unlink()
    with pytest.raises(ValueError, match="continue it with compare_losses"):
        Comparison.load(tmp_path)


# ---- the table


def test_the_table_holds_mean_and_spread_over_seeds(comparison):
    rows = ["neither · mean", "neither · cls", "both · mean", "both · cls"]
    baselines = [*STATISTICS, f"{UNTRAINED} · mean", f"{UNTRAINED} · cls"]
    assert list(comparison.table.index) == [*rows, *baselines, CHANCE]
    scores = comparison.scores.query("setting == 'both' and pooling == 'cls'")
    assert list(scores["seed"]) == [0, 1]
    row = comparison.table.loc["both · cls"]
    for name in lab.MEASURES:
        values = scores[name].to_numpy()
        assert row[name] == pytest.approx(values.mean()) and row[f"{name}_sd"] == pytest.approx(values.std(ddof=1))
    assert comparison.table.loc[BASELINE, "knn"] == comparison.baselines[0].scores["knn"]
    assert comparison.table.loc[CHANCE, ["knn", "linear"]].tolist() == [0.25, 0.25]
    first, second = (comparison.histories["both", seed]["loss"] for seed in (0, 1))
    assert first != second


def with_scores(comparison, column, values, baseline=None):
    "The same comparison pooled by the mean, but for one score: setting → a value for each seed."
    some = {(r.setting, r.seed): r for r in comparison.results if r.pooling == "mean"}
    copies = [
        lab.Result(**{**vars(some[name, seed % 2]), "seed": seed, "scores": {**some[name, 0].scores, column: value}})
        for name, row in values.items() for seed, value in enumerate(row)
    ]  # fmt: skip
    seeds = list(range(len(next(iter(values.values())))))
    experiment = dataclasses.replace(comparison.experiment, seeds=seeds)
    histories = {(r.setting, r.seed): comparison.histories[r.setting, 0] for r in copies}
    below = [dataclasses.replace(b, scores=dict.fromkeys(("knn", "linear"), (baseline or 0.5) - 0.05 * i))
             for i, b in enumerate(comparison.baselines)]  # the first is the best one
    changes = dict(results=copies, experiment=experiment, histories=histories, baselines=below, maps={})
    return Comparison(**{**vars(comparison), **changes})


def verdict(comparison, column="knn"):
    return next(v for v in comparison.verdicts() if v.column == column)


def test_a_best_is_named_only_beyond_the_spread(comparison):
    clips = len(comparison.held_out)
    clear = with_scores(comparison, "knn", {"neither": (0.1, 0.1), "both": (0.9, 0.9)})
    assert verdict(clear).clear and "★ 0.90" in str(clear)
    assert (verdict(clear).best, verdict(clear).second) == ("both · mean", "neither · mean")
    close = with_scores(comparison, "knn", {"neither": (0.6, 0.6), "both": (0.7, 0.7)})
    assert not verdict(close).clear and f"{clips} held-out clips" in str(close) and "within the margin" in str(close)
    loose = with_scores(comparison, "knn", {"neither": (0.0, 1.0), "both": (1.0, 1.0)})
    assert not verdict(loose).clear and "2 seeds" in str(verdict(loose)) and "★ 1.00" not in str(loose)


def test_few_seeds_must_differ_by_more_than_many(comparison):
    values = {"neither": (1.0, 1.1), "both": (0.8, 0.9)}
    few, many = (
        verdict(with_scores(comparison, "reconstruction", {k: v * n for k, v in values.items()}), "reconstruction")
        for n in (1, 3)
    )
    assert not few.clear and few.margin == pytest.approx(4.303 * 0.1 / 2**0.5, rel=1e-3)  # t of 2 degrees of freedom
    sd = np.std(values["both"] * 3, ddof=1)
    assert many.clear and many.margin == pytest.approx(2.228 * sd * (2 / 6) ** 0.5, rel=1e-3)
    both = verdict(with_scores(comparison, "knn", {"neither": (0.3, 0.4), "both": (0.8, 0.9)}))
    low, high = wilson_interval(0.85, len(comparison.held_out))
    assert both.margin == pytest.approx(np.hypot(4.303 * 0.1 / 2**0.5, (high - low) / 2), rel=1e-3)


def test_one_seed_names_no_best(comparison):
    one = with_scores(comparison, "knn", {"neither": (0.1,), "both": (0.9,)})
    assert not verdict(one).clear and "★" not in str(one) and "one seed cannot show" in str(verdict(one))


def test_rows_that_are_equal_are_called_so(comparison):
    tied = with_scores(comparison, "knn", {"neither": (0.1, 0.2), "both": (0.2, 0.1)})
    assert str(verdict(tied)) == "kNN-10: “neither · mean” and “both · mean” are equal"


def test_many_rows_are_counted_and_few_are_named():
    rows = [f"row {i}" for i in range(9)]
    assert (report.who_of(rows, 9), report.who_of(rows[:6], 9)) == ("all are", "6 of 9 are")
    assert (report.who_of(rows[:1], 9), report.who_of(rows[:2], 9)) == ("“row 0” is", "“row 0” and “row 1” are")


def test_the_baseline_is_put_in_words(comparison):
    def said(neither, both, baseline, seeds=2):
        scores = {"neither": (neither,) * seeds, "both": (both,) * seeds}
        remarks = with_scores(comparison, "knn", scores, baseline).remarks()
        return next(line for line in remarks if line.startswith(f"kNN-10, baseline {baseline:.2f} ({BASELINE}): "))

    assert said(0.3, 0.4, 0.75).endswith("all are below it")
    assert said(0.9, 1.0, 0.1).endswith("all are above it by more than the margin")
    assert said(0.3, 0.99, 0.4).endswith(
        "“neither · mean” is below it; “both · mean” is above it by more than the margin")
    assert said(0.51, 0.55, 0.5).endswith("all are above it by no more than the margin")
    assert said(0.5, 0.55, 0.5).endswith(
        "“neither · mean” is equal to it; “both · mean” is above it by no more than the margin")
    assert said(0.5, 0.5, 0.5).endswith("all are equal to it")
    assert said(0.3, 1.0, 0.4, seeds=1).endswith("“both · mean” is above it by more than the margin")


def test_a_sentence_tells_the_name_of_a_setting_from_its_own_words(comparison, tmp_path):
    """A setting may be called neither, both or all: "neither is below it" would say of all rows what holds of one."""
    changed = with_scores(comparison, "knn", {"neither": (0.3, 0.3), "both": (0.99, 0.99)}, 0.4)
    changed.results[0].warning, changed.failed = "they have collapsed", {("both", 7): "the loss is nan"}
    changed.histories = {}
    page = html.unescape(changed.report(tmp_path / "report.html", pictures=False).read_text("utf-8"))
    said = [*changed.remarks(), *re.findall("From .*? to .*?</p>", page)]
    assert len(said) >= 7
    for sentence in said:
        assert not re.search(r"(?<!“)\b(neither|both)\b", sentence.removesuffix("would say so too")), sentence


# ---- what moved


def planted(comparison, **changes):
    "A comparison of one seed and one pooling whose settings are copies, but for what is changed in `after`."
    (base,) = (r for r in comparison.results if (r.setting, r.pooling, r.seed) == ("neither", "mean", 0))
    copies = [lab.Result(**{**vars(base), "setting": "both", **changes})]
    return Comparison(**{**vars(comparison), "results": [base, *copies], "maps": {}}), base


def test_nothing_moves_from_a_setting_to_its_copy(comparison):
    shift = planted(comparison)[0].shift("neither", "both")
    assert shift.moved == 0 and (shift.clips["moved"] == 0).all() and (shift.confusions["difference"] == 0).all()
    assert (shift.classes["recall_before"] == shift.classes["recall_after"]).all()


def test_shift_tells_what_was_planted(comparison):
    labels, names = lab.class_codes(comparison), comparison.experiment.classes
    before = planted(comparison)[1]
    wrong = np.where(labels == 1, 0, labels) # before: every clip of class 1 is called class 0
    right = labels.copy() # after: all are right, but for one of class 2
    right[np.flatnonzero(labels == 2)[0]] = 3
    nearest = before.nearest.copy()
    nearest[0] = before.nearest[0] + 1000 # one clip has only new neighbors, another one half
    nearest[1, :5] = before.nearest[1, :5] + 1000
    nearest[2] = nearest[2, ::-1] # and one has the same in another order
    changed, _ = planted(comparison, predicted=right, nearest=nearest)
    changed.results[0] = lab.Result(**{**vars(before), "predicted": wrong})
    shift = changed.shift("neither", "both")
    n = int((labels == 1).sum())
    assert shift.confusions.to_dict("records") == [
        {"true": names[1], "predicted": names[0], "before": n, "after": 0, "difference": -n},
        {"true": names[2], "predicted": names[3], "before": 0, "after": 1, "difference": 1},
    ]
    first = shift.classes.iloc[0]
    assert (first["label"], first["recall_before"], first["recall_after"]) == (names[1], 0, 1)
    assert shift.clips["path"].tolist()[:2] == comparison.held_out["path"].tolist()[:2]
    assert shift.clips["moved"].tolist()[:3] == [1, 0.5, 0] and shift.moved == pytest.approx(1.5 / len(labels))
    for text in (str(shift), shift._repr_html_()):
        assert "confusions that went away" in text and names[1] in text


def test_a_shift_compares_seed_with_seed_and_knows_the_usual_movement(comparison):
    shift = comparison.shift("neither", "both · mean")
    pairs = {seed: [lab.results_of(comparison, row, seed)[0].nearest for row in ("neither", "both")] for seed in (0, 1)}
    assert shift.seeds == [0, 1]
    assert shift.moved == pytest.approx(np.mean([report.moved_share(*pair) for pair in pairs.values()]))
    between = [report.moved_share(pairs[0][i], pairs[1][i]) for i in (0, 1)]
    assert shift.usual == pytest.approx(np.mean(between)) and "between two seeds" in str(shift)
    assert comparison.shift("neither", "both", seed=1).moved == pytest.approx(report.moved_share(*pairs[1]).mean())
    assert comparison.shift(BASELINE, "both").seeds == [0, 1]
    for arguments, words in [(("neither", "non"), "non"), (("neither", "both", 7), "trained seeds, got 7")]:
        with pytest.raises(ValueError, match=words):
            comparison.shift(*arguments)


def test_a_movement_as_between_two_seeds_is_no_finding(comparison):
    def moved(shares):
        rows = [r for r in comparison.results if r.pooling == "mean"]
        nearest = {key: np.arange(10)[None].repeat(len(rows[0].x), 0) + 100 * i for i, key in enumerate(shares)}
        for (setting, seed), share in shares.items():
            nearest[setting, seed][:, : 10 - share] = np.arange(10 - share)
        copies = [lab.Result(**{**vars(r), "nearest": nearest[r.setting, r.seed]}) for r in rows]
        return Comparison(**{**vars(comparison), "results": copies, "maps": {}}).shift("neither", "both")

    names = [("neither", 0), ("neither", 1), ("both", 0), ("both", 1)]
    noise = moved(dict(zip(names, (4, 4, 4, 4), strict=True)))
    assert noise.moved == noise.usual == 0.4
    assert "40% of a clip's ten neighbors changed, no more than between two seeds of one setting (40%)" in str(noise)
    found = moved(dict(zip(names, (0, 0, 9, 9), strict=True)))
    assert found.moved == 0.9 and "changed, more than between two seeds of one setting (45%)" in str(found)
    assert "one seed cannot show" in str(planted(comparison)[0].shift("neither", "both"))


def test_the_report_calls_no_row_of_equals_the_best(comparison, tmp_path):
    results = [lab.Result(**{**vars(r), "scores": {**r.scores, "knn": 0.5}}) for r in comparison.results]
    tied = Comparison(**{**vars(comparison), "results": results})
    page = tied.report(tmp_path / "report.html", pictures=False).read_text()
    same = "“neither · cls”, “both · mean” and “both · cls” have the same kNN-10"
    assert f"From “neither · mean” to “neither · cls”: {same}." in page
    assert f"kNN-10: “neither · mean”, {same.removesuffix(' have the same kNN-10')} are equal" in page


def test_clips_are_shown_with_what_tells_them_apart(comparison):
    paths = comparison.held_out["path"]
    assert paths.map(lambda path: Path(path).name).duplicated().any()
    shown = comparison.shift("neither", "both").parts()["clips that moved most"]
    assert all(f"synthetic/{row[0]}" in set(paths) and "/" in row[0] for row in shown[1:])
    assert report._short_names(["a/b/1.wav", "a/c/2.wav"]) == ["1.wav", "2.wav"]


def test_text_stands_left_in_a_table_and_numbers_right(comparison):
    page = comparison.shift("neither", "both")._repr_html_()
    assert "<th style='text-align:left'>predicted before</th>" in page
    assert "<th style='text-align:right'>own before</th>" in page
    assert "text-align:right'>★" in html_table("", [["", "kNN"], ["a", "★ 0.90 ± 0.01"], ["b", "–"]])


# ---- pictures


def best_of(comparison):
    "The statistics with the highest kNN accuracy: the others would fill a map without being harder to beat."
    return max(STATISTICS, key=lambda name: comparison.table.loc[name, "knn"])


def test_maps_show_the_held_out_clips_with_their_numbers(comparison):
    figure = comparison.plot()
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["neither · mean", "both · mean", best_of(comparison), f"{UNTRAINED} · mean"]
    numbers = [ax.get_xlabel().replace("\xa0", " ") for ax in figure.axes if ax.get_title()]
    assert all("kNN-10" in line and "trust" in line for line in numbers) and "RankMe" not in numbers[2]
    assert f"held-out clips: {comparison.experiment.protocol}" in " ".join(figure.get_suptitle().split())
    assert len(comparison.plot("pitch", ["neither", "both · cls"], seed=1).axes) == 3  # two maps and a color bar
    assert len(comparison.maps) == 2 and comparison.plot("tempo") and len(comparison.maps) == 2
    for draw in (comparison.plot, comparison.map):
        for arguments, words in [(("color",), "not a column"), (("label", ["non"]), "must be a row of")]:
            with pytest.raises(ValueError, match=words):
                draw(*arguments)


def test_the_map_shows_each_setting_and_the_untrained_network_pooled_alike(comparison):
    "The baseline stood there by its first pooling mode, beside settings by another one."
    experiment = dataclasses.replace(comparison.experiment, pooling=["cls", "mean"])
    turned = dict(experiment=experiment, results=comparison.results[::-1], maps={},
                  baselines=[*comparison.baselines[:-2], *comparison.baselines[:-3:-1]])  # fmt: skip
    shown = report.make_maps(dataclasses.replace(comparison, **turned)).results
    assert {result.pooling for result in shown.values()} == {"mean", ""} and len(shown) == 4


def test_a_person_can_switch_settings_on_the_map_and_hear_the_clips(comparison, tmp_path):
    payload = comparison.map().payload
    settings = {s["name"]: s for s in payload["settings"]}
    assert list(settings) == ["neither · mean", "both · mean", best_of(comparison), f"{UNTRAINED} · mean"]
    assert [s["baseline"] for s in settings.values()] == [False, False, True, True]
    trained = next(r for r in comparison.results if (r.setting, r.pooling, r.seed) == ("both", "mean", 0))
    assert settings["both · mean"]["numbers"]["kNN-10"] == f"{trained.scores['knn']:.2f}", "of the seed that is shown"
    assert payload["references"] == {CHANCE: {"kNN-10": "0.25", "linear": "0.25"}}
    assert payload["names"] == [path.split("/")[-1] for path in comparison.held_out["path"]]
    assert len(payload["previews"]) == len(comparison.held_out) and all(payload["previews"])
    comparison.save(tmp_path)
    again = Comparison.load(tmp_path).map().payload
    assert again["previews"] is None and not again["sound"], "sounds that were only in memory are gone"
    assert again["settings"] == payload["settings"]


def test_a_stored_comparison_plays_the_files_of_its_clips(comparison, sounds, tmp_path):
    rate, paths = sounds.sample_rate, []
    for i in range(len(comparison.held_out)):
        paths.append(str(tmp_path / f"{i}.wav"))
        soundfile.write(paths[-1], comparison.sounds.wav(i).numpy(), rate)
    os.unlink(paths[3])
    files = dataclasses.replace(comparison, sounds=None, held_out=comparison.held_out.assign(path=paths))
    previews = files.map().payload["previews"]
    assert [i for i, preview in enumerate(previews) if preview is None] == [3]


def test_large_comparisons_are_mapped_by_a_sample_that_says_so(comparison, monkeypatch):
    whole = [column["name"] for column in comparison.map().payload["columns"]]
    monkeypatch.setattr(report, "_MOST_CLIPS", 7)
    fresh = dataclasses.replace(comparison, maps={})
    payload, rows = fresh.map().payload, report.make_maps(fresh).rows
    assert payload["n"] == 7 and f"7 of {len(comparison.held_out)} clips" in payload["title"]
    names = [path.split("/")[-1] for path in comparison.held_out["path"]]
    assert payload["names"] == [names[i] for i in rows], "names and sounds are those of the sample"
    columns = [column["name"] for column in payload["columns"]]
    assert sorted(columns) == sorted([*whole, "row"]), "the place of each clip in the table of held-out clips"


def test_the_report_shows_the_map_and_a_picture_for_each_curve(comparison, tmp_path):
    page = comparison.report(tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="explorer_data">')[1].split("</script>")[0])
    assert data == json.loads(json.dumps(comparison.map().payload))
    assert 'alt="curve: RankMe (held-out clips)"' in page
    for name in comparison.experiment.settings:
        assert f"</svg> {name}</span>" in page, "the legend is text"
    policy = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    assert "default-src 'none'" in policy and "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_a_report_without_maps_keeps_its_curves(comparison, tmp_path):
    page = comparison.report(tmp_path / "report.html", maps=False).read_text(encoding="utf-8")
    assert "explorer_data" not in page and 'alt="curve: RankMe (held-out clips)"' in page


# ---- the report


def test_the_report_is_one_page_that_says_it_all(comparison, tmp_path):
    again = "audiomaepp lab --data x"
    path = comparison.report(tmp_path / "report.html", "Losses <here>", repeat=again, pictures=False)
    page = path.read_text(encoding="utf-8")
    for words in [
        "Losses &lt;here&gt;", again, comparison.experiment.protocol, BASELINE, "both · cls",
        "use_uniformity_loss=False", "embed_dim=32", "confusions that went away", torch.__version__, "viewport",
        "prefers-color-scheme: dark", *comparison.remarks(),
    ]:  # fmt: skip
        assert words in page, words
    assert "://" not in page and "src=" not in page


def test_the_settings_of_a_report_are_those_that_hold(sounds, tmp_path):
    base = config(epochs=1, mask_ratio=0.4)
    result = compare_losses(sounds, grid(mask_ratio=[0.5, 0.6]), base=base, quiet=True)
    page = result.report(tmp_path / "report.html", pictures=False).read_text(encoding="utf-8")
    section = page.split("<h2>Settings</h2>")[1].split("</section>")[0]
    assert "mask_ratio" not in section and "embed_dim=32" in section


def test_the_call_in_the_report_makes_the_same_experiment(comparison, sounds, monkeypatch):
    calls = []
    call = report.repeat_call(comparison.experiment)
    eval(call, {"Config": Config, "compare_losses": lambda *args, **kwargs: calls.append((args, kwargs))})
    ((_, settings), options) = calls[0]
    again = lab.design(settings, options["seeds"], options["base"], options["pooling"])
    for name in ("settings", "seeds", "base", "pooling"):
        assert getattr(again, name) == getattr(comparison.experiment, name)
    assert (options["fraction"], options["split_seed"]) == (0.4, 0)


# ---- kept, killed, gone on with


def test_saved_and_loaded_it_is_the_same(comparison, tmp_path):
    comparison.save(tmp_path / "new" / "folder")
    again = Comparison.load(tmp_path / "new" / "folder")
    assert again.same_as(comparison) and comparison.same_as(again)
    pd.testing.assert_frame_equal(again.table, comparison.table)
    pd.testing.assert_frame_equal(again.held_out, comparison.held_out)
    assert str(again) == str(comparison) and again.skipped == comparison.skipped
    for change in (
        lambda other: other.results[0].x.__setitem__((0, 0), 9),
        lambda other: other.results[1].scores.update(knn=0.123),
        lambda other: other.histories["both", 1].rows[-1].update(loss=0.5),
    ):
        change(other := Comparison.load(tmp_path / "new" / "folder"))
        assert not other.same_as(comparison)
    again.results[0].scores["seconds"] = again.histories["both", 1].rows[0]["seconds"] = 99
    assert again.same_as(comparison)
    with pytest.raises(FileNotFoundError, match="comparison.json"):
        Comparison.load(tmp_path)


@pytest.mark.parametrize("name", ["plain", "../up", "..", ".", "a/b", "both, or neither", "x" * 300, "ä", "a b", "a_b"])
def test_any_name_is_one_folder_of_its_own(name, tmp_path):
    folder = lab.run_folder(tmp_path, name, 0)
    assert folder.parent.parent == tmp_path and folder.parent.name.strip(".") and len(folder.parent.name) < 80
    others = [lab.run_folder(tmp_path, other, 0) for other in ("a b", "a_b", "both", BASELINE) if other != name]
    assert folder not in others


def slow_comparison(out, pause=0.0):
    torch.set_num_threads(1)
    whole = lab._Progress.row

    def row(self, row):
        time.sleep(pause)
        whole(self, row)

    lab._Progress.row = row
    try:
        return compare_losses(synthesize(n=4, classes=3), TWO, base=config(epochs=4), out=out, quiet=True)
    finally:
        lab._Progress.row = whole


def test_a_killed_comparison_goes_on_and_comes_to_the_same_numbers(tmp_path):
    threads = torch.get_num_threads()
    env = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, __file__, str(out)], env=env)
    checkpoint, began = out / "both" / "seed0" / "checkpoint.safetensors", time.monotonic()
    while not checkpoint.exists() or not 1 <= read_progress(checkpoint)["epoch"] < 4:
        assert process.poll() is None and time.monotonic() - began < 120, "it did not get as far as the second training"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    try:
        halfway = Comparison.load(out)
        assert halfway.unfinished == [("both", 0)] and "not finished: “both” (seed 0)" in str(halfway)
        first = out / "neither" / "seed0"
        untouched = {path: path.stat().st_mtime_ns for path in first.iterdir()}
        reached = read_progress(checkpoint)["rows"]
        assert 1 <= len(reached) < 4
        resumed, whole = slow_comparison(out), slow_comparison(tmp_path / "whole")
        assert resumed.same_as(whole) and not resumed.unfinished
        assert resumed.histories["both", 0].rows[: len(reached)] == reached, "the training began anew"
        assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == untouched, "a finished training ran again"
        assert resumed.histories["both", 0]["seconds"] == sorted(resumed.histories["both", 0]["seconds"])
    finally:
        torch.set_num_threads(threads)


def test_seconds_are_of_training_alone_and_grow(comparison):
    for result in comparison.results:
        seconds = comparison.histories[result.setting, result.seed]["seconds"]
        assert seconds == sorted(seconds) and seconds[0] > 0
        assert result.scores["seconds"] == seconds[-1]


def test_what_is_written_is_plain(comparison, tmp_path):
    comparison.save(tmp_path)
    facts = json.loads((tmp_path / "comparison.json").read_text())["experiment"]
    assert facts["settings"] == TWO and facts["seeds"] == [0, 1] and facts["base"]["embed_dim"] == 32
    assert set(facts["versions"]) >= {"audiomaepp", "torch", "numpy", "python"}


if __name__ == "__main__":
    slow_comparison(sys.argv[1], pause=0.3)


def test_a_training_whose_last_step_diverges_does_not_end_the_comparison(sounds, tmp_path):
    "No loss was infinite yet, so the scores of its weights ended all trainings with an error of the SVD."
    settings = {"calm": {}, "wild": dict(base_lr=1e30, warmup_epochs=0)}
    found = compare_losses(sounds, settings, base=config(), out=tmp_path / "lab", quiet=True)
    assert {r.setting for r in found.results} == {"calm"} and "lower base_lr" in found.failed["wild", 0]
    assert found.report(tmp_path / "report.html").is_file() and "wild" not in repr(found.map())


def test_the_untrained_network_is_read_as_the_settings_are(tmp_path):
    reading = {"plain": {}, "whitened": dict(whiten=True), "longer": dict(epochs=3)}
    base = Config.preset("nano", depth=1, epochs=2, batch_size=8)
    found = compare_losses(synthesize(n=8, classes=4), reading, base=base, fraction=0.4, out=tmp_path, quiet=True)
    first, white = UNTRAINED, f"{UNTRAINED}, whiten=True"
    assert [name for name in found.table.index if name.startswith(UNTRAINED)] == [first, white]
    rows = {result.setting: result.x for result in found.baselines}
    assert rows[white].shape[1] < rows[first].shape[1] == base.embed_dim
    trained = {path.parent.parent.name for path in tmp_path.glob("*/seed0/history.csv")}
    assert trained == {"plain", "longer"}, "a read-out costs a training of its own"
    assert Comparison.load(tmp_path).same_as(found)
