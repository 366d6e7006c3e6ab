"""Folders that version 0.1 wrote (commit a605f12) still open, score, resume, and search."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from audiomaepp import AudioMAEPlusPlus, Comparison, EmbeddingGenerator, lab, synthesize
from audiomaepp.cli import main
from audiomaepp.lab import BASELINE, STATISTICS, UNTRAINED

OLD = Path(__file__).parent / "fixtures/v0.1"


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(OLD, tmp_path / "old")


def test_a_model_gives_the_vectors_that_it_gave(old):
    table = pd.read_parquet(old / "embeddings.parquet")
    sounds = synthesize(n=1)
    found = EmbeddingGenerator(old / "run").extract_embedding(list(sounds.waves))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(np.stack(table["embedding"])), rtol=1e-4, atol=1e-4)


def test_a_run_is_scored_as_it_was(old):
    before = json.loads((old / "run/results.json").read_text())
    main(["evaluate", str(old / "run")])
    after = json.loads((old / "run/results.json").read_text())
    assert before["protocol"] == after["protocol"] and list(before["rows"].values())[0]["n_test"] == 12
    assert list(after["rows"]) == ["this model", *STATISTICS, UNTRAINED, "chance"], "version 0.1 had fewer"
    renamed = {"log-mel statistics (floor)": BASELINE}
    for name, was in before["rows"].items():
        now = after["rows"][renamed.get(name, name)]
        # twelve held-out clips: one of them may fall on the other side on another processor
        assert now["knn"] == pytest.approx(was["knn"], abs=0.09)
        assert now.get("n_test") == was.get("n_test")


def test_a_run_resumes(old):
    main(["train", "--resume", "--out", str(old / "run"), "--epochs", "3"])
    history = pd.read_csv(old / "run/history.csv")
    assert list(history["epoch"]) == [1, 2, 3]
    assert AudioMAEPlusPlus.from_pretrained(old / "run").cfg.embed_dim == 16


def test_a_classifier_is_scored(old, capsys):
    main(["evaluate", str(old / "classifier")])
    said = capsys.readouterr().out
    assert "12 test" in said and "classifier" in said


def test_a_comparison_loads(old):
    comparison = Comparison.load(old / "lab")
    assert set(comparison.experiment.settings) == {"mask_ratio=0.5", "mask_ratio=0.75"}
    assert len(comparison.held_out) == 12 and "knn" in comparison.table
    assert comparison.table.loc[BASELINE, "knn"] == comparison.baselines[0].scores["knn"]
    assert BASELINE == comparison.baselines[0].setting != "log-mel statistics (floor)", "its name has changed since"


def test_a_comparison_that_grows_finds_its_baseline(old):
    """Its folder is named after the baseline's old name."""
    before, folders = Comparison.load(old / "lab"), {path.name for path in (old / "lab").glob("[!.]*")}
    grown = dataclasses.replace(before.experiment)
    grown.settings = before.experiment.settings | {"mask_ratio=0.6": {"mask_ratio": 0.6}}
    clips = synthesize(n=1)
    lab.score_baselines(grown, (clips, clips), old / "lab")
    after = Comparison.load(old / "lab")
    assert after.unfinished == [("mask_ratio=0.6", 0)] and after.baselines[0].scores == before.baselines[0].scores
    after.save(old / "lab")
    new = {lab.run_folder(old / "lab", name, 0).parent.name for name in (*STATISTICS[1:], UNTRAINED)}
    assert folders | new == {path.name for path in (old / "lab").glob("[!.]*")}, "version 0.1 had one baseline"
    after.save(old / "copy")
    again = Comparison.load(old / "copy")
    assert again.same_as(after) and not (old / "copy" / lab.run_folder(old / "lab", BASELINE, 0).parent.name).exists()


def test_a_table_of_embeddings_is_searched(old, capsys):
    main(["search", "synthetic/rising glide/000", "--in", str(old / "embeddings.parquet")])
    assert capsys.readouterr().out.count("synthetic/") == 10
