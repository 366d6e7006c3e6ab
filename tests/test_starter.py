"""The model in the box: it is there, it is small, it has heard no recording, and everything starts from it."""

import json
import shutil
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from audiomaepp import hear
from audiomaepp.cli import main
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.estimator import AudioMAEEmbedder
from audiomaepp.finetune import finetune_run
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.pretrained import STARTERS
from audiomaepp.run import Run, open_table
from audiomaepp.search import SoundIndex
from audiomaepp.source import Source
from audiomaepp.synthetic import generated, synthesize

FOLDER = files("audiomaepp") / "starters"
both = pytest.mark.parametrize("name", STARTERS)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of six classes with four short sounds each."""
    folder, made = tmp_path_factory.mktemp("starter") / "sounds", synthesize(n=4, seed=3)
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / label / f"{i}.wav", np.asarray(wave), made.sample_rate)
    return folder


# ---- what it is


@both
def test_it_is_small_enough_for_a_wheel(name):
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < 4_000_000
    model = AudioMAEPlusPlus.from_pretrained(name)
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert all(p.dtype == torch.float32 for p in model.parameters()) and model.whitening is not None


@both
def test_its_card_says_what_it_has_learnt_from(name):
    card = " ".join((FOLDER / name / "README.md").read_text("utf-8").split())
    assert "Generated sound programs" in card and "no recording" in card and "kNN" in card


@both
def test_it_knows_a_sound_when_it_is_performed_again(name):
    """Programs that no training has seen: the nearest neighbor of a take is the other take of its program."""
    embed = EmbeddingGenerator(name)
    made = generated(60, 987_654, embed.cfg.clip_seconds, embed.cfg.sample_rate)
    takes = ([embed.extract_embedding(made.wav(i, take), made.sample_rate) for i in range(60)] for take in (0, 1))
    x, y = map(np.stack, takes)
    x, y = ((v / np.linalg.norm(v, axis=1, keepdims=True)) for v in (x, y))
    assert ((x @ y.T).argmax(1) == np.arange(60)).mean() > 0.6


def test_a_folder_of_the_same_name_is_not_it(tmp_path, monkeypatch):
    (tmp_path / "starter").mkdir()
    monkeypatch.chdir(tmp_path)
    assert EmbeddingGenerator().model.embedding_dim == EmbeddingGenerator("starter").model.embedding_dim
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        EmbeddingGenerator("./starter")


def test_a_table_beside_a_folder_of_that_name_can_be_searched_and_mapped(sounds, tmp_path, monkeypatch):
    """`map` itself makes runs/starter: inside runs/, a table that names this folder as its model was of no more use."""
    (tmp_path / "runs" / "starter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    EmbeddingGenerator().embed_folder(sounds, "x.parquet", quiet=True)
    new = synthesize(n=1, seed=99)
    soundfile.write("new.wav", np.asarray(new.waves[0]), new.sample_rate)
    assert len(SoundIndex("x.parquet").search("new.wav", k=3)) == 3
    assert "trained on generated sounds alone" in open_table("x.parquet").held_out


def test_a_run_of_that_name_is_its_own_model(sounds, tmp_path, monkeypatch):
    """Run.train(out="starter") and all that follows from it used the weights of the package in place of its own."""
    monkeypatch.chdir(tmp_path)
    run = Run.train(sounds, out="starter", epochs=1, warmup_epochs=0.5, quiet=True)
    assert run.model.cfg.depth == run.config.depth != EmbeddingGenerator().cfg.depth
    assert EmbeddingGenerator(run.path).place == str(tmp_path / "starter")


def test_it_needs_no_network_and_no_folder(tmp_path):
    code = """
import socket
def refused(*args, **kwargs):
    raise OSError("no network here")
socket.socket.connect = refused
from audiomaepp import EmbeddingGenerator
import torch
print(len(EmbeddingGenerator().extract_embedding(torch.randn(16000))))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == EmbeddingGenerator().model.embedding_dim


@pytest.mark.parametrize("line", [
    "embed startr sounds", "train sounds --init Starter --out run", "finetune starter-words sounds --out run",
    "distil startr sounds --out run", "distil gone.parquet sounds --out run",
])  # fmt: skip
def test_a_wrong_name_of_a_model_fails_at_once_and_says_what_there_is(tmp_path, monkeypatch, line):
    """The message knew only of folders, and distil decoded all sounds before it came to its teacher."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sounds").mkdir()
    for i in range(3):
        (tmp_path / "sounds" / f"{i}.wav").write_bytes(b"RIFFxxxx")  # an attempt to decode them is another error
    with pytest.raises(SystemExit) as end:
        main(line.split())
    name = next(word for word in line.split() if word.lower().startswith("start") or word == "gone.parquet")
    assert name in end.value.code and "readable" not in end.value.code
    assert name == "gone.parquet" or "use starter or starter_words, which the package brings" in end.value.code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("line", "reason"), [
    ("map sounds --out m1", "use m1.html"), ("map sounds --out note.html", "use another --out"),
    ("map sounds --all", "all must come with a run"),
    ("embed sounds --pooling-mode maxi", "pooling_mode must be one of"),
    ("map sounds/a.wav", "place must be a run, a folder or table of sounds, or a Parquet file"),
    ("embed empty", "contains no audio"),
])  # fmt: skip
def test_what_cannot_work_fails_before_the_sounds_are_embedded(sounds, tmp_path, monkeypatch, line, reason):
    """An hour of embedding ended in an error about a flag; `embed` of nothing left an empty table of skipped files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(sounds / "struck", tmp_path / "sounds")
    shutil.copy(next(sounds.rglob("*.wav")), tmp_path / "sounds" / "a.wav")
    (tmp_path / "note.html").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert reason in end.value.code
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_pooling_mode_fails_before_a_sound_is_decoded(tmp_path):
    with pytest.raises(ValueError, match="got 'maxi'; leave it out"):
        EmbeddingGenerator().extract_embedding(tmp_path / "gone.wav", pooling_mode="maxi")


# ---- what starts from it


def test_commands_without_a_model(sounds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["embed", str(sounds), "--json"])
    facts = json.loads(capsys.readouterr().out)
    table = pd.read_parquet("embeddings.parquet")
    assert len(table) == 48 and facts["new"] == 48 and len(table["embedding"][0]) == 512
    clip = table["path"][7]
    main(["search", str(sounds), clip, "--json"])
    hits = json.loads(capsys.readouterr().out)
    assert hits["hits"][0]["path"] != clip and len(hits["hits"]) > 3
    main(["map", str(sounds), "--json"])
    (page,) = (p for p in json.loads(capsys.readouterr().out)["pictures"] if p.endswith(".html"))
    assert "trained on generated sounds alone" in open(page, encoding="utf-8").read()


@pytest.mark.parametrize("command", ["map", "search"])
def test_damaged_sounds_are_not_left_out_in_silence(sounds, tmp_path, monkeypatch, capsys, command):
    """A map or a search of 9,000 of 10,000 sounds looked complete."""
    monkeypatch.chdir(tmp_path)
    folder, query = shutil.copytree(sounds / "struck", tmp_path / "sounds"), str(next(sounds.rglob("*.wav")))
    for i in range(7):
        (folder / f"bad{i}.wav").write_bytes(b"RIFFxxxx")
    main([command, "sounds", *[query] * (command == "search"), "--json"])
    told = capsys.readouterr().err
    assert "4 recordings embedded, 0 were there already, 7 skipped" in told
    assert "bad0.wav: " in told and "… and 2 more, all in skipped.csv" in told
    (listed,) = tmp_path.rglob("*.skipped.csv")
    assert f"All in {listed.relative_to(tmp_path)}" in told and len(pd.read_csv(listed)) == 7
    main([command, "sounds", *[query] * (command == "search"), "--json", "--quiet"])
    facts = json.loads(capsys.readouterr().out)
    assert [path.rsplit("/")[-1] for path, _ in facts["skipped"]] == [f"bad{i}.wav" for i in range(7)]


@pytest.mark.parametrize("line", ["embed sounds", "map sounds", "search sounds sounds/0.wav"])
def test_sounds_of_which_none_can_be_decoded_are_an_error(tmp_path, monkeypatch, capsys, line):
    """`embed` ended with exit code 0, although its help says 1; the others found fault with a table of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sounds").mkdir()
    for i in range(3):
        (tmp_path / "sounds" / f"{i}.wav").write_bytes(b"RIFFxxxx")
    with pytest.raises(SystemExit, match="sounds must hold sounds that can be decoded, got 3 that cannot"):
        main(line.split())
    assert "0.wav: " in capsys.readouterr().out and len(list(tmp_path.rglob("*.skipped.csv"))) == 1


def test_map_and_search_take_the_model_of_words_too(sounds, tmp_path, monkeypatch, capsys):
    """Only embed took its name, although words are what it is better at."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sounds / "struck", tmp_path / "sounds")
    query = str(next(sounds.rglob("*.wav")))
    main(["search", "starter_words", "sounds", query, "--json"])
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 4
    main(["map", "starter_words", "sounds", "--json"])
    (page, _) = json.loads(capsys.readouterr().out)["pictures"]
    assert page.startswith("runs/starter_words/") and "generated sounds alone" in open(page, encoding="utf-8").read()
    assert not (tmp_path / "runs" / "starter").exists()
    for line in ("map sounds --model runs/a", "search sounds a.wav --model runs/a", f"map {page} --model starter"):
        with pytest.raises(SystemExit, match="model must "):
            main(line.split())


def test_a_clip_that_is_not_in_the_table_is_searched_with_it(sounds, tmp_path):
    out = tmp_path / "x.parquet"
    EmbeddingGenerator().embed_folder(sounds, out, quiet=True)
    new = synthesize(n=1, seed=99)
    soundfile.write(tmp_path / "new.wav", np.asarray(new.waves[0]), new.sample_rate)
    assert len(SoundIndex(out).search(tmp_path / "new.wav").table) > 3


def test_the_demo_maps_all_sounds_before_it_trains(sounds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["demo", "--data", str(sounds), "--quick", "--out", "runs/demo"])
    told = capsys.readouterr().out
    assert told.index("48 clips; the model was trained on generated sounds alone") < told.index("Now a training")
    assert (tmp_path / "runs" / "demo" / "pictures" / "map.html").is_file()


def test_a_pipeline_and_hear_without_a_model(sounds):
    paths = sorted(map(str, sounds.rglob("*.wav")))
    labels = [path.split("/")[-2] for path in paths]
    pipeline = make_pipeline(AudioMAEEmbedder(), KNeighborsClassifier(1)).fit(paths, labels)
    assert pipeline.score(paths, labels) == 1
    model = hear.load_model()
    assert hear.get_scene_embeddings(torch.randn(2, 16_000), model).shape == (2, model.scene_embedding_size)


@both
def test_a_classifier_is_fine_tuned_from_it(sounds, tmp_path, name):
    """The head was trained on pooled tokens and then given the whole read-out: an error about the size of a tensor."""
    found = finetune_run(name, tmp_path / "run", Source(str(sounds)), quiet=True, epochs=1)
    assert 0 <= found["accuracy"] <= 1 and found["n_test"] > 0
    assert len(Run(tmp_path / "run").predict(next(sounds.rglob("*.wav")))) == 1


@both
def test_a_training_starts_from_it(sounds, tmp_path, name):
    run = Run.train(sounds, out=tmp_path / "run", init=name, epochs=1, warmup_epochs=0.5, quiet=True)
    assert run.config.embed_dim == AudioMAEPlusPlus.from_pretrained(name).cfg.embed_dim
    assert run.resume(epochs=2, quiet=True).epochs == 2
