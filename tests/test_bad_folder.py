"""A folder as folders are: some files are no use. Each is listed with its reason, and nothing else is lost."""

import builtins
import csv
import json
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomaepp import cli
from audiomaepp.audio import AudioError
from audiomaepp.data import open_recordings

RATE = 16000
TINY = """--epochs 1 --warmup-epochs 0 --batch-size 4 --embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32
    --decoder-depth 1 --decoder-num-heads 2 --precision fp32""".split()
BAD = {  # name: what its reason must say
    "empty.wav": "empty",
    "text.wav": "not audio",
    "cut off.flac": "cut off",
    "zero samples.wav": "no samples",
    "nan.wav": "NaN",
    "broken link.wav": "link to .*nowhere.wav, which does not exist",
    "pipe.wav": "not a (regular )?file",
    "socket.wav": "not a (regular )?file",
    "locked.wav": "cannot be opened .*[Pp]ermission denied",
}


def tone(seconds, rate=RATE, hertz=440.0):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, *args, **kwargs)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two classes; in each good clips, odd but legal ones, and every kind of bad one. Returns it and the good names."
    at = tmp_path_factory.mktemp("in") / "my sounds"
    for name in ("owl", "wind"):
        for i in range(5):
            write(at / name / f"{name} {i}.wav", tone(0.4 + 0.5 * i, hertz=300 + 100 * i), RATE)
    write(at / "owl" / "Käuzchen im Wald — 梟 (1).flac", tone(1), RATE)
    write(at / "owl" / "one sample.wav", np.array([0.5]), RATE)
    write(at / "wind" / "six channels.wav", np.repeat(tone(0.3, 192000)[:, None], 6, 1), 192000)
    good = {path.name for path in at.rglob("*.*")}

    (at / "owl" / "empty.wav").touch()
    (at / "owl" / "text.wav").write_text("Dear listener,\nthis is a letter and not a sound.\n")
    write(at / "owl" / "zero samples.wav", np.zeros(0), RATE)
    cut = write(at / "owl" / "cut off.flac", np.random.default_rng(0).normal(0, 0.1, 3 * RATE), RATE)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    write(at / "wind" / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (at / "wind" / "broken link.wav").symlink_to(at / "nowhere.wav")
    write(at / "wind" / "locked.wav", tone(1), RATE).chmod(0)
    os.mkfifo(at / "owl" / "pipe.wav")
    here = os.getcwd()
    os.chdir(at / "owl")  # a socket's path must be short
    socket.socket(socket.AF_UNIX).bind("socket.wav")
    os.chdir(here)
    return at, good


def lock(monkeypatch):
    "Who is root may open everything, so the file without permissions refuses here."
    plain = builtins.open

    def guarded(file, *args, **kwargs):
        if isinstance(file, str | bytes | os.PathLike) and os.fsdecode(file).endswith("locked.wav"):
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", guarded)


@pytest.fixture(autouse=True)
def locked(monkeypatch):
    lock(monkeypatch)


@pytest.fixture(autouse=True)
def no_hang():
    "A pipe that nobody writes to would block for ever."

    def too_long(*args):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check_list(path):
    "The list names the bad files, each once, each with its reason."
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    reasons = {Path(row["path"]).name: row["reason"] for row in rows}
    assert len(rows) == len(BAD) and reasons.keys() == BAD.keys()
    for name, words in BAD.items():
        assert re.search(words, reasons[name]), f"{name}: {reasons[name]}"


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    "A run that was trained on the folder, through the command."
    out = tmp_path_factory.mktemp("run") / "first"
    with pytest.MonkeyPatch.context() as patch:
        lock(patch)
        cli.main(["train", "--data", str(folder[0]), "--out", str(out), *TINY])
    return out


def test_training_uses_the_good_and_lists_the_bad(folder, run):
    at, good = folder
    facts = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert facts["n_train"] + facts["n_test"] == len(good)
    assert facts["classes"] == ["owl", "wind"] and facts["skipped"] == len(BAD)
    check_list(run / "skipped.csv")
    history = list(csv.DictReader((run / "history.csv").open()))
    assert np.isfinite(float(history[-1]["loss"]))


def test_evaluate_goes_over_the_same_clips(run, capsys):
    cli.main(["evaluate", str(run)])
    rows = (run / "results.csv").read_text(encoding="utf-8")
    assert "chance" in rows and "held out" in capsys.readouterr().out


def test_embedding_uses_the_good_and_lists_the_bad(folder, run, tmp_path, capsys):
    import pandas as pd

    at, good = folder
    out = tmp_path / "vectors.parquet"
    cli.main(["embed", str(run), "--data", str(at), "--out", str(out)])
    table = pd.read_parquet(out)
    assert {Path(path).name for path in table["path"]} == good and len(table) == len(good)
    assert set(table["label"]) == {"owl", "wind"}
    assert np.isfinite(np.stack(table["embedding"])).all()
    check_list(out.with_suffix(".skipped.csv"))
    assert f"{len(good)} recordings embedded" in (text := capsys.readouterr().out)
    assert f"{len(BAD)} skipped" in text


def test_one_by_one_the_reason_is_an_error(folder, run):
    from audiomaepp.embed import EmbeddingGenerator

    at, good = folder
    generator, seen = EmbeddingGenerator(run), set()
    for path in (*at.glob("*/*"), at / "wind" / "broken link.wav"):
        seen.add(path.name)
        if path.name in good:
            assert generator.extract_embedding(path).shape == (32,)
        else:
            with pytest.raises(AudioError, match=re.escape(path.name)):
                generator.extract_embedding(path)
    assert seen == good | BAD.keys()


def test_nothing_but_bad_files_is_said(folder, run, tmp_path):
    at, good = folder
    (tmp_path / "bad").mkdir()
    for name in ("empty.wav", "text.wav"):
        (tmp_path / "bad" / name).write_bytes(next(at.rglob(name)).read_bytes())
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--data", str(tmp_path / "bad"), "--out", str(tmp_path / "run"), *TINY])
    message = str(caught.value)
    assert message.startswith("audiomaepp: ") and "0 readable" in message
    assert "empty.wav" in message and "text.wav" in message and "not audio" in message
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="got 2 that cannot") as caught:
        cli.main(["embed", str(run), "--data", str(tmp_path / "bad"), "--out", str(tmp_path / "none.parquet")])
    assert str(caught.value).startswith("audiomaepp: ")
    listed = (tmp_path / "none.skipped.csv").read_text()
    assert "empty.wav" in listed and "text.wav" in listed


def test_the_list_survives_in_the_recordings(folder):
    recordings = open_recordings(folder[0])
    assert {Path(path).name for path, _ in recordings.skipped} == {"broken link.wav", "pipe.wav", "socket.wav"}
