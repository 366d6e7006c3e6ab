"""The map of a run and of a table: what it compares, which clips it calls held out, and what the command leaves."""

import base64
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
from test_run import table_of

from audiomaepp import EmbeddingGenerator, Run, cli
from audiomaepp import run as running
from audiomaepp.embed import WindowEncoder
from audiomaepp.evaluate import evaluate_embeddings
from audiomaepp.explorer import Explorer
from audiomaepp.synthetic import synthesize
from audiomaepp.train import untrained
from audiomaepp.validation import STATISTICS

TINY = dict(
    embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=8, warmup_epochs=0,
    precision="fp32", preset="nano", quiet=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return table_of(synthesize(n=8, classes=3, seconds=0.6), tmp_path_factory.mktemp("data") / "sounds", north=9)


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    "A run with snapshots."
    out = tmp_path_factory.mktemp("runs") / "a"
    return Run.train(sounds, out=out, fold=2, snapshots=True, epochs=2, **TINY)


@pytest.fixture(scope="module")
def plain(sounds, tmp_path_factory):
    "A run without snapshots."
    return Run.train(sounds, out=tmp_path_factory.mktemp("runs") / "b", fold=2, epochs=1, **TINY)


@pytest.fixture
def table(run, sounds, tmp_path):
    "A table of embeddings that lies beside nothing."
    run.embed(sounds, out=tmp_path / "x.parquet", quiet=True)
    return tmp_path / "x.parquet"


def named(payload):
    return {setting["name"]: setting for setting in payload["settings"]}


def best_of(run):
    "The statistics with the highest kNN accuracy: the others would fill the map without being harder to beat."
    rows = run.evaluate(quiet=True).rows
    return max(STATISTICS, key=lambda name: rows[name]["knn"])


def held(payload):
    return np.frombuffer(base64.b64decode(payload["held"]), "u1")


def refused(*args):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in args])
    return str(caught.value.code)


def payload_of(page):
    return json.loads(re.search(r'json"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])


def sound_nothing(monkeypatch):
    monkeypatch.setattr(WindowEncoder, "embed", lambda *args: pytest.fail("something was embedded"))


# ---- a run


def test_a_map_says_what_the_training_changed(plain):
    "A map of the trained model alone shows clusters that the untrained network has too."
    explorer = plain.map(quiet=True)
    assert isinstance(explorer, Explorer)
    payload = explorer.payload
    settings, opens = named(payload), payload["settings"][payload["first"]]["name"]
    assert list(settings) == ["untrained network", "this model", best_of(plain)] and opens == "this model"
    assert [(s["baseline"], s["step"]) for s in settings.values()] == [(True, False), (False, False), (True, False)]
    assert all({"kNN-10", "linear"} <= {*s["numbers"]} for s in settings.values())
    assert payload["references"].keys() == {"chance"} and len(payload["previews"]) == 8 and all(payload["previews"])
    assert "fold 2" in payload["note"] and payload["names"][0].endswith(".wav")
    shown = [ax.get_title() for ax in explorer.plot().axes if ax.get_title()]
    assert shown == list(settings)


def test_the_untrained_network_is_scored_as_the_model_is(plain):
    "Scores of other clips, or of another network than the one that was trained, would make the training look good."
    space = running.space_of(plain, quiet=True)
    generator, (train, test, _) = EmbeddingGenerator(untrained(plain.config)), plain.data
    x, y = (generator.embed_recordings(part)[0] for part in (train, test))
    expected = evaluate_embeddings(x, train.labels, y, test.labels)
    np.testing.assert_array_equal(space.vectors["untrained network"], y)
    rows = plain.evaluate(quiet=True).rows
    assert space.numbers["untrained network"]["kNN-10"] == rows["untrained network"]["knn"] == expected["knn"]
    assert space.numbers["this model"]["kNN-10"] == rows["this model"]["knn"]
    assert space.numbers["chance"]["linear"] == rows["chance"]["linear"]


def test_snapshots_become_the_steps_of_a_slider(run):
    payload = run.map(quiet=True).payload
    steps = [setting["name"] for setting in payload["settings"] if setting["step"]]
    assert steps == ["untrained network", "epoch 1", "epoch 2", "this model"]
    assert payload["settings"][payload["first"]]["name"] == "this model" and len(named(payload)) == 5
    assert all("kNN-10" in s["numbers"] for s in payload["settings"])
    vectors = running.space_of(run, quiet=True).vectors
    moved = [np.linalg.norm(vectors[name] - vectors["epoch 2"]) for name in ("untrained network", "epoch 1")]
    assert moved[0] > moved[1] > 0, "each step is a step of this training"


def test_a_second_look_computes_nothing(run, monkeypatch):
    first = run.map(quiet=True)
    sound_nothing(monkeypatch)
    monkeypatch.setattr("audiomaepp.maps.aligned_umap", lambda *args: pytest.fail("laid out again"))
    assert run.map(quiet=True) is first
    assert run.map("site", quiet=True).payload["color"] == "site" and first.payload["color"] == "label"
    run.draw(quiet=True)


def test_more_training_makes_another_map(sounds, tmp_path):
    "The map of the weights of yesterday would pass for that of today."
    one = Run.train(sounds, out=tmp_path / "run", fold=2, epochs=1, **TINY)
    first = one.map(quiet=True)
    assert one.resume(epochs=2, quiet=True).map(quiet=True) is not first


def test_everything_shows_the_training_clips_hollow(run):
    payload = run.map(quiet=True, everything=True).payload
    train, test = run.data.train, run.data.test
    assert payload["n"] == 24 and held(payload).sum() == len(test) == 8
    names = {name for name, flag in zip(payload["names"], held(payload), strict=True) if flag}
    assert names == {path.rpartition("/")[2] for path in test.paths} and len(train) == 16
    assert "8 held-out clips" in payload["note"] and "16 training clips" in payload["note"]
    assert payload["references"] == run.map(quiet=True).payload["references"]
    knn = [named(one)["this model"]["numbers"]["kNN-10"] for one in (payload, run.map(quiet=True).payload)]
    assert knn[0] == knn[1], "the scores are those of the held-out clips"


def test_a_held_out_copy_of_a_training_clip_is_not_called_new(sounds, tmp_path):
    "A clip that was downloaded twice stood on the map as one that the training never saw."
    home = shutil.copytree(sounds.parent, tmp_path / "twice")
    table = pd.read_csv(home / "list.csv")
    one, other = (table["path"][table["fold"] == fold].iloc[0] for fold in (1, 2))
    shutil.copy(home / one, home / other)
    made = Run.train(home / "list.csv", out=tmp_path / "run", fold=2, epochs=1, **TINY)
    for everything in (False, True):
        payload = made.map(quiet=True, everything=everything).payload
        assert held(payload).sum() == 7 and "7 held-out clips" in payload["note"]
        assert not held(payload)[payload["names"].index(other)]
    said = "copies of training clips among the held-out clips: 1"
    assert said in made.evaluate(quiet=True).protocol and said in (made.path / "results.json").read_text()


def test_without_labels_there_are_no_accuracies(sounds, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in sounds.parent.glob("*.wav"):
        shutil.copy(path, bare)
    payload = Run.train(bare, out=tmp_path / "run", epochs=1, **TINY).map(quiet=True).payload
    assert payload["color"] is None and not payload["references"]
    assert all("kNN-10" not in s["numbers"] and "linear" not in s["numbers"] for s in payload["settings"])


def test_many_clips_show_this_model_alone_and_say_so(plain, monkeypatch):
    "Aligned maps hold a number for each pair: 50,000 clips would need 20 GB for each setting."
    monkeypatch.setattr(running, "MOST_ALIGNED", 7)
    monkeypatch.setattr(running, "embed_together", lambda *args: pytest.fail("other settings were embedded"))
    payload = Run(plain.path).map(quiet=True).payload
    assert list(named(payload)) == ["this model"] and "at most 7 clips" in payload["title"]
    assert "kNN-10" in named(payload)["this model"]["numbers"] and "chance" in payload["references"]


def test_a_classifier_has_a_map(run, tmp_path):
    tuned = run.finetune(out=tmp_path / "tuned", quiet=True, epochs=1)
    assert list(named(tuned.map(quiet=True).payload)) == ["untrained network", "this model", best_of(tuned)]


@pytest.mark.parametrize("clips", [2, 3, 5])
def test_very_few_clips(clips, sounds, tmp_path):
    few = Run.train(sounds, out=tmp_path / "run", held_out=list(range(clips - 1)), epochs=1, **TINY)
    assert few.map(quiet=True).payload["n"] == clips - 1 and few.map(quiet=True).plot()


def test_built_in_sounds_have_names(tmp_path):
    'All classes had clips named "000", which nobody could look up.'
    made = Run.train(out=tmp_path / "run", synthetic_clips=3, epochs=1, **TINY)
    names = made.map(quiet=True).payload["names"]
    assert len(set(names)) == len(names) and all("/" in name for name in names)


# ---- the command


def test_the_command_writes_the_map_and_says_what_to_do(run, capsys):
    cli.main(["map", str(run.path), "--all", "--atlas"])
    said, pictures = capsys.readouterr().out, run.path / "pictures"
    assert f"Open {pictures / 'map.html'} in a browser: click a point to hear it" in said
    assert payload_of(pictures / "map.html")["n"] == 24
    atlas = pd.read_parquet(pictures / "map_atlas.parquet")
    assert len(atlas) == 24 and {"x", "y", "neighbors", "label", "site"} <= {*atlas}
    cli.main(["map", str(run.path)])
    assert payload_of(pictures / "map.html")["n"] == 8


def test_an_unknown_color_is_refused_before_anything_is_decoded(run, table, monkeypatch):
    "Hours of decoding, and then a typing error."
    monkeypatch.setattr(running, "open_again", lambda *args: pytest.fail("the recordings were decoded"))
    sound_nothing(monkeypatch)
    message = refused("map", run.path, "--color", "sight")
    assert "got 'sight'" in message and "site" in message
    assert "got 'sight'" in refused("map", table, "--color", "sight")
    for hidden in ("size", "embedding", "path"):
        assert f"got '{hidden}'" in refused("map", table, "--color", hidden), "the map has another color"
    assert "got 'path'" in refused("map", run.path, "--color", "path")


def test_too_many_clips_lead_to_the_atlas(plain, table, monkeypatch):
    monkeypatch.setattr("audiomaepp.explorer.MOST_POINTS", 7)
    assert "at most 7 clips, got 8" in (message := refused("map", plain.path)) and "--atlas" in message
    assert "at most 7 clips, got 24" in (message := refused("map", table)) and "--atlas" in message
    cli.main(["map", str(plain.path), "--atlas"])
    assert len(pd.read_parquet(plain.path / "pictures" / "map_atlas.parquet")) == 8
    for _ in range(2):
        cli.main(["map", str(table), "--atlas"])
    assert sorted(p.name for p in table.parent.iterdir()) == ["x.parquet", "x_map_atlas.parquet"]


def test_too_many_clips_are_refused_before_anything_is_decoded(plain, table, sounds, tmp_path, monkeypatch):
    "Hours of embedding, and then no map."
    monkeypatch.setattr("audiomaepp.explorer.MOST_POINTS", 7)
    monkeypatch.setattr(running, "open_again", lambda *args: pytest.fail("the recordings were decoded"))
    monkeypatch.setattr(running, "open_table", lambda *args: pytest.fail("the vectors were read"))
    monkeypatch.chdir(tmp_path)
    sound_nothing(monkeypatch)
    for place, more, count in (plain.path, [], 8), (plain.path, ["--all"], 24), (table, [], 24), (sounds, [], 24):
        message = refused("map", place, *more)
        assert f"at most 7 clips, got {count}; use" in message and "--atlas" in message


# ---- a table


def test_a_table_of_a_run_knows_its_training_clips(run, table, capsys):
    cli.main(["map", str(table)])
    payload, names = payload_of(table.with_name("x_map.html")), {p.rpartition("/")[2] for p in run.data.test.paths}
    assert {name for name, flag in zip(payload["names"], held(payload), strict=True) if flag} == names
    assert all(payload["previews"]) and payload["color"] == "label" and table.with_name("x_map.png").is_file()
    shown = {column["name"] for column in payload["columns"]}
    assert {"label", "fold", "site"} <= shown and not shown & {"embedding", "path", "size", "modified"}
    said = capsys.readouterr().out
    assert f"Open {table.with_name('x_map.html')} in a browser: click a point to hear it" in said


def test_a_copy_of_a_training_clip_is_one_too(run, sounds, tmp_path):
    "Under another name in another folder it would be called held out."
    other = tmp_path / "other"
    other.mkdir()
    train, test, _ = run.data
    shutil.copy(train.paths[3], other / "copy.wav")
    shutil.copy(test.paths[3], other / "new.wav")
    soundfile.write(other / "other.wav", np.zeros(9000), 16000)
    run.embed(other, out=tmp_path / "y.parquet", quiet=True)
    opened = running.open_table(tmp_path / "y.parquet")
    assert dict(zip(opened.table["name"], opened.held_out.tolist(), strict=True)) == {
        "copy.wav": False, "new.wav": True, "other.wav": True}  # fmt: skip


@pytest.mark.parametrize("change", ["moved", "trained on", "classifier"])
def test_otherwise_nothing_is_claimed(change, sounds, plain, tmp_path, capsys):
    "Clips of the training would pass for new ones."
    maker = Run(shutil.copytree(plain.path, tmp_path / "maker"))
    maker = maker.finetune(out=tmp_path / "tuned", quiet=True, epochs=1) if change == "classifier" else maker
    maker.embed(sounds, out=tmp_path / "x.parquet", quiet=True)
    if change == "moved":
        maker.path.rename(tmp_path / "elsewhere")
    if change == "trained on":
        maker.resume(epochs=2, quiet=True)
    cli.main(["map", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "new" / "page.html")])
    payload = payload_of(tmp_path / "new" / "page.html")
    said = "It is not known which of these clips the training saw."
    assert payload["note"] == said and said in capsys.readouterr().out and set(held(payload)) == {2}


@pytest.mark.parametrize("change", ["removed", "replaced", "model removed"])
def test_files_that_are_not_what_was_embedded_are_not_called_held_out(change, run, sounds, tmp_path):
    "Each clip of the training was a held-out clip on the map, once the folder that was embedded was gone."
    home, maker = tmp_path / "copy", shutil.copytree(run.path, tmp_path / "maker")
    home.mkdir()
    for path in sounds.parent.glob("*.wav"):
        shutil.copy(path, home / f"other{path.name}")
    Run(maker).embed(home, out=tmp_path / "z.parquet", quiet=True)
    assert sum(~running.open_table(tmp_path / "z.parquet").held_out) == len(run.data.train)
    if change == "removed":
        shutil.rmtree(home)
    elif change == "replaced":
        for path in home.iterdir():
            soundfile.write(path, np.zeros(9000), 16000)
    else:
        (maker / "model.safetensors").unlink()
    assert running.open_table(tmp_path / "z.parquet").held_out == "unknown"


def test_a_table_is_known_without_its_files(tmp_path):
    made = Run.train(out=tmp_path / "run", synthetic_clips=3, epochs=1, **TINY)
    made.embed(out=tmp_path / "x.parquet", quiet=True)
    assert sum(running.open_table(tmp_path / "x.parquet").held_out) == len(made.data.test)


def test_windows_are_heard_each(run, tmp_path):
    "Every window would play the beginning of its recording."
    home = tmp_path / "long"
    home.mkdir()
    ramp = np.concatenate([np.full(4 * 16000, 0.1), np.full(4 * 16000, 0.4)])
    soundfile.write(home / "long.wav", ramp, 16000)
    table = EmbeddingGenerator(run.path).embed_folder(home, tmp_path / "w.parquet", windows=True, quiet=True)
    opened = running.open_table(tmp_path / "w.parquet")
    assert len(opened.audio) == len(table) > 2 and opened.table["name"].is_unique
    levels = [float(np.abs(opened.audio[i][0]).mean()) for i in (0, len(table) - 1)]
    assert levels[0] == pytest.approx(0.1, abs=0.01) and levels[1] == pytest.approx(0.4, abs=0.01)
    (home / "long.wav").unlink()
    assert opened.audio[0] is None and running.map_table(tmp_path / "w.parquet")[1].payload["previews"] is None


def test_only_maps_are_replaced(run, table, tmp_path):
    "Somebody's page of the same name would be gone."
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    assert "which is neither" in refused("map", table, "--out", mine) and mine.read_text() == "<p>mine</p>"
    assert "must be an HTML file" in refused("map", table, "--out", tmp_path / "mine.png")
    mine.write_text(report := '<h1>Report</h1><div id="explorer"></div>')  # of a comparison
    assert "which is neither" in refused("map", table, "--out", mine) and mine.read_text() == report
    table.with_name("x_map.png").write_bytes(b"mine")
    assert "which is neither" in refused("map", table) and table.with_name("x_map.png").read_bytes() == b"mine"
    table.with_name("x_map.png").unlink()
    for _ in range(2):
        cli.main(["map", str(table), "--quiet"])
    assert "out must name the map of a table" in refused("map", run.path, "--out", mine)
    assert "all must come with a run" in refused("map", table, "--all")


def test_another_file_is_no_table(sounds):
    (sounds.parent / "notes.txt").write_text("no table")
    said = refused("map", sounds.parent / "notes.txt")
    assert "a Parquet file that embed wrote, got the file" in said and "notes.txt" in said
