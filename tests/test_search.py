"""Search knows which file is meant however its path is written, and which model made the table."""

import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from audiomaepp import cli
from audiomaepp.config import Config
from audiomaepp.data import open_recordings
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.search import SoundIndex
from audiomaepp.synthetic import synthesize

CFG = Config.preset("nano", depth=1, embed_dim=32, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2)


def model(seed):
    torch.manual_seed(seed)
    return AudioMAEPlusPlus(CFG)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A model, some sounds and the table of their embeddings, made with relative paths."
    at = tmp_path_factory.mktemp("search")
    made = synthesize(n=3, classes=2)
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        (at / "more" / label[:6]).mkdir(parents=True, exist_ok=True)
        soundfile.write(at / "more" / label[:6] / f"{i}.flac", np.asarray(wave), 16000)
    os.symlink(at / "more", at / "linked")
    model(0).write(at / "model")
    before = os.getcwd()
    os.chdir(at)
    try:
        cli.main(["embed", "model", "--data", "more", "--out", "x.parquet"])
    finally:
        os.chdir(before)
    return at


def found(capsys, *args):
    "The printed hits."
    capsys.readouterr()
    cli.main(["search", *map(str, args)])
    return capsys.readouterr().out


@pytest.mark.parametrize("clip", ["more/rising/0.flac", "./more/../more/rising/0.flac", "linked/rising/0.flac"])
@pytest.mark.parametrize("named", [[], ["--model", "model"]])
def test_a_path_means_its_file_however_it_is_written(home, capsys, monkeypatch, clip, named):
    """`search more/dog/x.flac` after `embed --data more` found nothing; with --model the clip was its own best hit."""
    monkeypatch.chdir(home)
    shown = found(capsys, clip, "--in", "x.parquet", "--k", "5", *named)
    assert "rising/0.flac" not in shown and shown.count(".flac") == 5


def test_vectors_alone_are_no_table():
    with pytest.raises(TypeError, match="table must be a Parquet file or a DataFrame .* got ndarray; use the path"):
        SoundIndex(np.zeros((3, 2)))


def test_the_model_that_made_the_table_is_found(home, capsys, tmp_path, monkeypatch):
    """A sound from elsewhere needed --model, although the table can tell which model made it."""
    other = tmp_path / "other name.flac"
    shutil.copy(home / "more/rising/0.flac", other)
    monkeypatch.chdir(tmp_path)  # the table knows the model's place from any folder
    shown = found(capsys, other, "--in", home / "x.parquet", "--k", "1")
    assert "rising/0.flac" in shown and "1.000" in shown


def test_another_model_at_its_place_is_refused(home, tmp_path, capsys):
    """Embeddings of two models in one search are numbers without meaning."""
    for path in ("model", "more"):
        shutil.copytree(home / path, tmp_path / path)
    cli.main(["embed", str(tmp_path / "model"), "--data", str(tmp_path / "more"), "--out", str(tmp_path / "x.parquet")])
    model(1).write(tmp_path / "model")
    clip = tmp_path / "elsewhere.flac"
    shutil.copy(home / "more/rising/0.flac", clip)
    for named in ([], ["--model", str(tmp_path / "model")]):
        with pytest.raises(SystemExit, match="fingerprint.*x.parquet|x.parquet.*fingerprint"):
            cli.main(["search", str(clip), "--in", str(tmp_path / "x.parquet"), *named])
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(SystemExit, match="(?s)model.*--model"):
        cli.main(["search", str(clip), "--in", str(tmp_path / "x.parquet")])
    assert ".flac" in found(capsys, tmp_path / "more/rising/0.flac", "--in", tmp_path / "x.parquet")  # needs no model


def test_a_table_of_an_earlier_version_keeps_working(home, tmp_path, capsys):
    table = pq.read_table(home / "x.parquet")
    kept = {k: v for k, v in table.schema.metadata.items() if k != b"audiomaepp.place"}
    pq.write_table(table.replace_schema_metadata(kept), tmp_path / "x.parquet")
    clip = tmp_path / "elsewhere.flac"
    shutil.copy(home / "more/rising/0.flac", clip)
    with pytest.raises(SystemExit) as caught:
        cli.main(["search", str(clip), "--in", str(tmp_path / "x.parquet")])
    assert "--model" in str(caught.value) and "elsewhere.flac" in str(caught.value)
    assert "rising/0.flac" in found(capsys, clip, "--in", tmp_path / "x.parquet", "--model", home / "model", "--k", "1")


def test_a_table_goes_on_when_its_model_has_moved(home, tmp_path):
    """Where a model lies is no part of what it computes."""
    for path in ("model", "x.parquet"):
        (shutil.copytree if path == "model" else shutil.copy)(home / path, tmp_path / path)
    embed = EmbeddingGenerator(tmp_path / "model", "cpu")
    assert len(embed.embed_folder(home / "more", tmp_path / "x.parquet", quiet=True)) == 6
    assert str(tmp_path / "model").encode() == pq.read_schema(tmp_path / "x.parquet").metadata[b"audiomaepp.place"]


def test_a_query_is_embedded_as_the_table_was(home, tmp_path):
    """A table of cls+mean embeddings met queries of half its width."""
    embed = EmbeddingGenerator(home / "model", "cpu")
    embed.embed_folder(home / "more", tmp_path / "x.parquet", "cls+mean", quiet=True)
    clip = tmp_path / "elsewhere.flac"
    shutil.copy(home / "more/rising/0.flac", clip)
    assert SoundIndex(tmp_path / "x.parquet").search(str(clip), 1).table["similarity"].iloc[0] > 0.999


def test_paths_of_recordings_are_a_list_of_sounds(tmp_path):
    """They are no Python list since a set of a million files is opened, and counted as one clip."""
    for name, tone in (("a", 300), ("b", 900)):
        wave = 0.1 * np.sin(np.arange(16000) * 2 * np.pi * tone / 16000)
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000)
    paths, generator = open_recordings(tmp_path).paths, EmbeddingGenerator()
    vectors = generator.extract_embedding(paths)
    assert len(vectors) == 2 and np.allclose(vectors, generator.extract_embedding([*paths]))
    generator.embed_folder(tmp_path, tmp_path / "x.parquet", quiet=True)
    index = SoundIndex(tmp_path / "x.parquet")
    assert isinstance(index.paths, list) and np.allclose(index.vector(paths), index.vector([*paths]))
    assert index.search(paths, k=1).table.equals(index.search([*paths], k=1).table)
