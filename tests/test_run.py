"""`Run`, as a person in Jupyter meets it: the same call twice, another folder, sounds that changed, a low score."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from audiomaepp import Config, Run, cli, train
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.run import hints, train_run
from audiomaepp.source import Source, load_source, open_source
from audiomaepp.synthetic import synthesize
from audiomaepp.train import Trainer

TINY = dict(
    embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=8, warmup_epochs=0,
    epochs=1, precision="fp32",
)  # fmt: skip


def table_of(made, at, north):
    "Write sounds with folds into a new folder; the first ones are from a site in the north. Return their table."
    at.mkdir()
    rows = []
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        soundfile.write(at / f"{i:02d}.wav", np.asarray(wave), 16000)
        rows.append(dict(path=f"{i:02d}.wav", label=label, fold=1 + i % 3, site="north" if i < north else "south"))
    pd.DataFrame(rows).to_csv(at / "list.csv", index=False)
    return at / "list.csv"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return table_of(synthesize(n=6, classes=3, seconds=1), tmp_path_factory.mktemp("data") / "sounds", north=4)


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    return Run.train(sounds, out=tmp_path_factory.mktemp("runs") / "a", fold=2, quiet=True, **TINY)


def no_training(monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("a training began"))


# ---- training


def test_the_same_call_returns_the_same_run(run, sounds, monkeypatch):
    "A notebook is run from top to bottom again: nothing is trained twice, and nothing is overwritten."
    no_training(monkeypatch)
    before = (run.path / "model.safetensors").read_bytes()
    assert Run.train(sounds, out=run.path, fold=2, quiet=True, **TINY).path == run.path
    assert (run.path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change, words", [(dict(mask_ratio=0.6), "mask_ratio=0.6"), (dict(fold=3), "fold='3'")])
def test_another_call_into_the_same_folder_is_refused(change, words, run, sounds, monkeypatch):
    no_training(monkeypatch)
    with pytest.raises(ValueError, match=f"{words} differs from the run in .*choose another out"):
        Run.train(sounds, out=run.path, quiet=True, **{"fold": 2} | TINY | change)


def test_an_interrupted_run_continues(run, sounds, tmp_path, monkeypatch):
    "Killed after the first epoch, called again: the same weights as in one go."
    flags = dict(fold=2, quiet=True, **TINY | dict(epochs=2, eval_every=1))
    whole = Run.train(sounds, out=tmp_path / "whole", **flags)
    save = train._Saver.save

    def save_and_stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(train._Saver, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        Run.train(sounds, out=tmp_path / "cut", **flags)
    assert "run.resume() continues" in repr(Run(tmp_path / "cut"))
    monkeypatch.undo()
    continued = Run.train(sounds, out=tmp_path / "cut", **flags)
    assert [row["epoch"] for row in continued.history.rows] == [1, 2]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, continued.model.state_dict()[name]), name


def test_train_longer(run, sounds, tmp_path):
    longer = Run.train(sounds, out=tmp_path / "b", fold=2, quiet=True, **TINY)
    longer.evaluate(quiet=True)
    assert "kNN-10" in repr(longer)
    before = longer.state()
    assert longer.resume(epochs=3, quiet=True).epochs == 3 and longer.state() != before
    assert "kNN-10" not in repr(longer), "the scores of other weights"


@pytest.mark.parametrize("rows", [[0, 1, 2, 7], "site == 'north'"])
def test_rows_are_held_out_by_number_or_query(rows, sounds, tmp_path):
    out = tmp_path / "run"
    run = Run.train(sounds, out=out, held_out=rows, quiet=True, **TINY)
    table = pd.read_csv(sounds)
    held = table.iloc[rows] if isinstance(rows, list) else table.query(rows)
    assert {Path(path).name for path in run.data.test.paths} == set(held["path"])
    assert Run(out).data.protocol == run.data.protocol


def test_row_numbers_count_unreadable_files_too(sounds, tmp_path):
    "Row 3 of the table is row 3 for the person who wrote it, although row 1 cannot be read."
    home = shutil.copytree(sounds.parent, tmp_path / "copy")
    (home / "01.wav").write_text("no sound")
    run = Run.train(home / "list.csv", out=tmp_path / "run", held_out=[3, 4], quiet=True, **TINY)
    assert sorted(Path(path).name for path in run.data.test.paths) == ["03.wav", "04.wav"]


def test_a_mask_is_a_way_to_hold_out(sounds, tmp_path):
    mask = np.arange(18) % 6 == 0
    run = Run.train(sounds, out=tmp_path / "run", held_out=mask, quiet=True, **TINY)
    assert load_source(run.path).held_out_rows == (0, 6, 12)


def test_a_misspelt_setting_is_named(tmp_path):
    with pytest.raises(ValueError, match="did you mean mask_ratio"):
        Run.train(out=tmp_path / "run", mask_rato=0.5)
    assert not (tmp_path / "run").exists()


def test_no_run_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="Run.train"):
        Run(tmp_path)


# ---- scores


def test_evaluate_agrees_with_its_files_and_is_computed_once(run, monkeypatch):
    report = run.evaluate(quiet=True)
    stored = json.loads((run.path / "results.json").read_text())
    assert stored["protocol"] == report.protocol and "fold 2 held out" in report.protocol
    for name, row in report.rows.items():
        assert {k: v for k, v in stored["rows"][name].items() if not k.endswith(("_low", "_high"))} == row
    monkeypatch.setattr("audiomaepp.run.score_parts", lambda *args: pytest.fail("the clips were embedded again"))
    assert run.evaluate(quiet=True) is report
    with open(run.path / "results.csv", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(report.rows)


def test_sounds_that_changed_are_refused(sounds, tmp_path):
    "Another file under an old name would be scored as held out."
    home = shutil.copytree(sounds.parent, tmp_path / "copy")
    run = Run.train(home / "list.csv", out=tmp_path / "run", fold=2, quiet=True, **TINY)
    soundfile.write(home / "00.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    for what in (run.evaluate, run.map, lambda quiet: run.data):
        with pytest.raises(ValueError, match="00.wav has other contents"):
            what(quiet=True)


def test_a_low_score_is_said_with_what_to_try(run):
    "A tiny model after one epoch is no better than log-mel statistics; its user must not have to work that out."
    report = run.evaluate(quiet=True)
    report.rows["this model"]["knn"] = report.rows["chance"]["knn"]
    said = str(report)
    assert "baseline" in said and "preset 'words'" in said and "longer training" in said


def test_an_unfinished_training_is_scored_as_such(run, tmp_path):
    """Its scores would be taken for those of the whole training."""
    begun = tmp_path / "begun"
    shutil.copytree(run.path, begun)
    cfg = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps(cfg | {"epochs": 99}))
    assert f"the training stopped after {run.epochs} of 99 epochs" in str(Run(begun).evaluate(quiet=True))
    assert "stopped after" not in str(run.evaluate(quiet=True))


def test_hints_look_at_the_sounds():
    cfg = Config.preset("nano")
    short, long = (synthesize(n=2, classes=2, seconds=seconds) for seconds in (1, 4))
    assert "'words'" in hints(cfg, short)[0] and "'semantic'" in hints(cfg, long)[0]
    assert not any("preset" in hint for hint in hints(Config.preset("semantic", seed=3), long))
    assert any("use_labels=False" in hint for hint in hints(cfg.replace(use_labels=False), long))


# ---- what it returns shows itself


def test_pictures(run):
    from matplotlib.figure import Figure

    assert isinstance(run.map("site", quiet=True).plot(), Figure) and isinstance(run.curves(), Figure)
    assert run.reconstructions(2)._repr_html_().count("<img") == 2
    with pytest.raises(ValueError, match="color must be a column of the recordings, got 'sight'.*site"):
        run.map("sight", quiet=True)
    assert {path.name for path in run.draw(quiet=True)} >= {"map.png", "map.html", "losses.png"}


def test_embed_is_reused_and_search_finds_itself(run, sounds, monkeypatch):
    table = run.embed(quiet=True)
    assert len(table) == 18 and Path(table.attrs["path"]).is_relative_to(run.path)
    clip = sounds.parent / "04.wav"
    hits = run.search(clip, k=3, quiet=True)
    assert len(hits.table) == 3 and table["label"].iloc[4] in repr(hits)
    monkeypatch.setattr("audiomaepp.embed.WindowEncoder.embed", lambda *args: pytest.fail("embedded again"))
    again = run.embed(quiet=True)
    assert np.array_equal(np.stack(again["embedding"]), np.stack(table["embedding"]))


def test_a_classifier_is_a_run_too(run, sounds, tmp_path):
    tuned = run.finetune(out=tmp_path / "tuned", quiet=True, epochs=1)
    assert tuned.is_classifier and "predict" in repr(tuned)
    table = tuned.predict([sounds.parent / "00.wav", sounds.parent])
    assert len(table) == 19 and list(table.columns[:2]) == ["path", "class"]
    assert np.allclose(table.iloc[:, 2:].sum(axis=1), 1, atol=1e-4)
    assert run.finetune(out=tmp_path / "tuned", quiet=True, epochs=1).path == tuned.path
    with pytest.raises(FileNotFoundError, match="classifier.json"):
        run.predict(sounds.parent)


def test_it_shows_itself_in_text_and_in_html(run):
    run.evaluate(quiet=True)
    assert "1 of 1 epochs" in repr(run) and "kNN-10" in repr(run) and "Next:" in repr(run)
    page = run._repr_html_()
    assert "<table" in page and "<code>" in page and str(run.path) in page


def test_embeddings_of_earlier_weights_are_made_again(sounds, tmp_path):
    "After more training, `run.embed()` ended in an error about a file that its user had never named."
    run = Run.train(sounds, out=tmp_path / "run", fold=2, quiet=True, **TINY)
    before = run.embed(quiet=True)
    after = run.resume(epochs=2, quiet=True).embed(quiet=True)
    assert len(after) == len(before) and not np.allclose(np.stack(after["embedding"]), np.stack(before["embedding"]))
    assert len(run.search(sounds.parent / "00.wav", k=2, quiet=True).table) == 2


def test_more_epochs_are_a_matter_for_resume(run, sounds):
    "The advice to train longer led to an error that named no way to do it."
    with pytest.raises(ValueError, match=r"epochs=9 differs .*resume\(epochs=9\)"):
        Run.train(sounds, out=run.path, fold=2, quiet=True, **TINY | dict(epochs=9))


def test_a_second_search_embeds_nothing_and_leaves_the_table(run, sounds, tmp_path, monkeypatch):
    """Each search wrote the table of a million recordings again, and then the keys of that table."""
    more = tmp_path / "more"
    shutil.copytree(sounds.parent, more)
    (more / "list.csv").unlink()
    (more / "broken.wav").write_bytes(b"no sound")
    first = run.search(more / "04.wav", k=3, among=more, quiet=True).table
    assert str(more / "04.wav") not in set(first["path"]) and len(first) == 3
    (table,) = (run.path / "embeddings").glob("more-*.parquet")
    before = table.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingGenerator, "embed_folder", lambda *args, **how: pytest.fail("the table was written"))
        assert run.search(more / "04.wav", k=3, among=more, quiet=True).table.equals(first)
    assert table.stat().st_mtime_ns == before
    shutil.copy(more / "04.wav", more / "copy.wav")
    assert run.search(more / "04.wav", k=1, among=more, quiet=True).table["path"].iat[0] == str(more / "copy.wav")
    soundfile.write(more / "copy.wav", np.sin(np.arange(16000) / 3), 16000)
    hits = run.search(more / "04.wav", k=30, among=more, quiet=True).table.set_index("path")
    assert hits.loc[str(more / "copy.wav"), "similarity"] < 0.999
    (more / "copy.wav").unlink()
    assert str(more / "copy.wav") not in set(run.search(more / "04.wav", k=30, among=more, quiet=True).table["path"])


def test_a_new_label_is_shown_by_the_next_search(run, sounds, tmp_path):
    rows = pd.read_csv(sounds).assign(path=[str(sounds.parent / name) for name in pd.read_csv(sounds)["path"]])
    for label in ("quiet", "loud"):
        rows.assign(label=label).to_csv(tmp_path / "list.csv", index=False)
        hits = run.search(sounds.parent / "04.wav", k=3, among=tmp_path / "list.csv", quiet=True).table
        assert set(hits["label"]) == {label}


def test_keys_go_with_their_table(sounds, tmp_path, monkeypatch):
    """After more training, the keys of the old embeddings stayed on the disk for ever."""
    monkeypatch.setattr("audiomaepp.search.SMALL", 0)
    run = Run.train(sounds, out=tmp_path / "run", fold=2, quiet=True, **TINY)
    kept = []
    for epochs in (1, 2):
        run = run.resume(epochs=epochs, quiet=True) if epochs > 1 else run
        run.search(sounds.parent / "00.wav", k=2, quiet=True)
        kept.append([path.name for path in (run.path / "embeddings").glob("*.search")])
    assert [len(names) for names in kept] == [1, 1] and kept[0] != kept[1]


def test_a_missing_sound_is_named_before_anything_is_embedded(run, monkeypatch):
    monkeypatch.setattr("audiomaepp.run.embed_with_run", lambda *args: pytest.fail("something was embedded"))
    with pytest.raises(FileNotFoundError, match="'nosuch.wav', which does not exist"):
        run.search("nosuch.wav")


def test_a_run_without_a_model_says_how_to_continue(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run.path / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="--resume --out"):
        Run(tmp_path).evaluate(quiet=True)


# ---- what a new user stumbled on


@pytest.mark.parametrize("how, words", [
    (dict(fold=9), "got 9; use one of 1, 2, 3"),
    (dict(group="theo"), "recordings must have the column 'group'"),
    (dict(fold=2, group="north"), "got fold='2' and group='north'; remove all but one"),
    (dict(fold=2, held_out=[0]), "got fold='2' and held_out_rows="),
])  # fmt: skip
def test_what_cannot_be_held_out_is_refused_before_decoding(how, words, sounds, tmp_path, monkeypatch):
    """--fold 9 was refused after all sounds had been decoded, and a message named a setting that nobody had given."""
    monkeypatch.setattr("audiomaepp.data.drop_unreadable", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=re.escape(words)):
        Run.train(sounds, out=tmp_path / "run", quiet=True, **how, **TINY)
    assert not (tmp_path / "run" / "config.json").exists()


def test_resuming_a_finished_run_says_so(run, monkeypatch, capsys):
    """It decoded everything, showed a full bar and said "Next: evaluate", as if it had trained."""
    no_training(monkeypatch)
    monkeypatch.setattr("audiomaepp.data.drop_unreadable", lambda *args, **kwargs: pytest.fail("decoded"))
    run.resume()
    assert capsys.readouterr().out == "already finished: 1 epochs; train longer with epochs=2 (--epochs 2)\n"


def test_embed_counts_what_is_new_and_starts_again_when_told(run, sounds, tmp_path, monkeypatch):
    """A repeated call said that everything was embedded, and there was no way to embed it again."""
    out = tmp_path / "e.parquet"
    first = run.embed(sounds, out=out, quiet=True)
    assert (first.attrs["new"], run.embed(sounds, out=out, quiet=True).attrs["new"]) == (18, 0)
    again = run.embed(sounds, out=out, quiet=True, overwrite=True)
    assert again.attrs["new"] == 18 and np.allclose(np.stack(again["embedding"]), np.stack(first["embedding"]))
    with pytest.raises(ValueError, match=r"overwrite=True \(--overwrite\)"):
        run.embed(sounds, out=out, quiet=True, pooling_mode="cls")
    other = run.embed(sounds, out=out, quiet=True, pooling_mode="cls", overwrite=True)
    assert other.attrs["new"] == 18 and not np.allclose(np.stack(other["embedding"]), np.stack(first["embedding"]))
    assert run.embed(quiet=True, overwrite=True).attrs["new"] == 18  # the same file in the folder of the run
    assert run.embed(quiet=True).attrs["new"] == 0


def test_overwrite_spares_files_of_others(run, sounds, tmp_path):
    table = tmp_path / "mine.parquet"
    pd.DataFrame({"path": ["a.wav"]}).to_parquet(table)
    before = table.read_bytes()
    with pytest.raises(ValueError, match="must be a table that audiomaepp wrote"):
        run.embed(sounds, out=table, quiet=True, overwrite=True)
    assert table.read_bytes() == before


def test_embeddings_of_earlier_weights_are_removed(sounds, tmp_path):
    """They lay in the folder forever, and no call could ever use them."""
    run = Run.train(sounds, out=tmp_path / "run", fold=2, quiet=True, **TINY)
    old = [Path(run.embed(quiet=True).attrs["path"]), Path(run.embed(quiet=True, windows=True).attrs["path"])]
    own = old[0].with_name("own.parquet")
    own.write_bytes(old[0].read_bytes())
    parts = old[0].with_name(old[0].name + ".parts")
    parts.mkdir()
    shutil.copy(old[0], parts / "000000.parquet")  # of a call that was interrupted
    new = Path(run.resume(epochs=2, quiet=True).embed(quiet=True).attrs["path"])
    assert sorted(new.parent.iterdir()) == sorted([new, own])
    assert run.embed(quiet=True, windows=True).attrs["new"] == 18


def test_copies_of_training_sounds_are_not_scored_without_a_word(run, sounds, tmp_path):
    """The scores of clips that the weights were fitted to looked like held-out scores."""
    for i, path in enumerate(sorted(sounds.parent.glob("*.wav"))):
        (tmp_path / "copies" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "copies" / "ab"[i % 2] / f"copy{i}.wav")
    report = run.evaluate(tmp_path / "copies", quiet=True, fraction=0.5)
    n = report.rows["this model"]["n_test"]
    names = {Path(path).stem for path in run.data.train.paths}
    test = open_source(Source(str(tmp_path / "copies"), fraction=0.5), run.config, quiet=True).test
    known = sum(f"{int(Path(path).stem[4:]):02d}" in names for path in test.paths)
    said = f"{known} of the {n} scored recordings are training recordings of the run, so these are not held-out numbers"
    assert 0 < known and said in str(report) and said in report._repr_html_() and said in report.to_dict()["protocol"]
    made = synthesize(n=4, classes=3, seconds=1, seed=9)
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        (tmp_path / "new" / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "new" / label / f"{i}.wav", np.asarray(wave), 16000)
    assert "training recordings" not in str(run.evaluate(tmp_path / "new", quiet=True))


def test_the_shell_searches_what_python_searches(run, sounds, capsys):
    """`run.search` looked among the run's sounds, `audiomaepp search` in a file that happened to be in the folder."""
    clip = sounds.parent / "04.wav"
    hits = run.search(clip, k=3, quiet=True).table
    cli.main(["search", str(run.path), str(clip), "--k", "3", "--json", "--quiet"])
    shown = json.loads(capsys.readouterr().out)["hits"]
    assert [row["path"] for row in shown] == list(hits["path"])
    assert np.allclose([row["similarity"] for row in shown], hits["similarity"], atol=1e-5)
    table = run.embed(quiet=True).attrs["path"]
    for line in (["search", table, clip], ["search", clip, "--in", table]):
        cli.main([*map(str, line), "--k", "3", "--json"])
        assert json.loads(capsys.readouterr().out)["hits"] == shown
    two = run.search([clip, sounds.parent / "05.wav"], k=3, quiet=True)
    cli.main(["search", str(run.path), str(clip), str(sounds.parent / "05.wav"), "--k", "3", "--json"])
    assert [row["path"] for row in json.loads(capsys.readouterr().out)["hits"]] == list(two.table["path"])


def test_the_bar_says_that_it_is_scoring(sounds, tmp_path, capsys):
    """It stood at 100 % for as long as the validation took, as if the command hung."""
    Run.train(sounds, out=tmp_path / "run", fold=2, **TINY)
    assert re.search("scoring: 100%.*training: 100%", capsys.readouterr().err, re.S)


def test_some_clips_may_have_no_label(sounds, tmp_path):
    "A table with an empty cell ended with a TypeError before the training began."
    table = pd.read_csv(sounds)
    table.loc[::4, "label"] = None
    table.assign(path=[sounds.parent / path for path in table["path"]]).to_csv(tmp_path / "list.csv", index=False)
    run = Run.train(tmp_path / "list.csv", out=tmp_path / "run", fold=2, quiet=True, **TINY)
    assert sum(label is None for part in run.data[:2] for label in part.table["label"]) == 5
    assert "kNN-10" in run.map(quiet=True).payload["settings"][0]["numbers"]


def test_a_whitening_that_a_kill_left_out_is_fitted_when_the_run_goes_on(tmp_path):
    sounds, out = tmp_path / "sounds", tmp_path / "run"
    for i, name in enumerate(("low", "high")):
        (sounds / name).mkdir(parents=True)
        for k in range(12):
            wave = np.sin(np.arange(16000) * (0.05 + 0.2 * i + 0.003 * k)) * 0.3
            soundfile.write(sounds / name / f"{k}.wav", wave, 16000)
    cfg, source = Config.preset("nano", depth=1, epochs=1, batch_size=8, whiten=True), Source(str(sounds))
    model, _ = train_run(cfg, source, out, quiet=True)
    assert model.whitening is not None and Run(out).model.embedding_dim == model.embedding_dim < cfg.embed_dim
    weight = model.whitening.weight.clone()
    model.whitening = None
    model.write(out)  # the state between the last step and the whitening
    again, _ = train_run(cfg, source, out, resume=True, quiet=True)
    assert torch.equal(again.whitening.weight, weight) and Run(out).model.whitening is not None
    shutil.rmtree(sounds)
    finished, _ = train_run(cfg, source, out, resume=True, quiet=True)
    assert finished.whitening is not None, "a finished run needs no sounds"
