"""A run is opened again with the data and the settings that it began with, or says what is different."""

import csv
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from audiomaepp import cli, source, synthetic
from audiomaepp.config import Config
from audiomaepp.synthetic import synthesize

TINY = """--epochs 1 --warmup-epochs 0 --batch-size 6 --embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32
    --decoder-depth 1 --decoder-num-heads 2 --precision fp32""".split()


def refused(*args):
    "What the command says when it ends."
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in args])
    return str(caught.value.code)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "A table of sounds in two folds, and a run on it."
    home, made = tmp_path_factory.mktemp("begun"), synthesize(n=6, classes=2, seconds=1)
    rows = []
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        soundfile.write(home / f"{i:02d}.wav", wave.numpy(), 16000)
        rows.append(dict(path=f"{i:02d}.wav", label=label, fold=1 + i % 2))
    pd.DataFrame(rows).to_csv(home / "list.csv", index=False)
    cli.main(["train", "--data", str(home / "list.csv"), "--fold", "2", *TINY, "--out", str(home / "run")])
    return home


@pytest.fixture
def home(begun, tmp_path, monkeypatch):
    "A copy of it, at the same place as far as the run can tell."
    shutil.copytree(begun, tmp_path / "home")  # keeps sizes and times
    import audiomaepp.finetune  # noqa: F401  # or it would take the function below for good

    load = source.load_source
    monkeypatch.setattr(source, "load_source", lambda run: replace(load(run), data=str(tmp_path / "home" / "list.csv")))
    return tmp_path / "home"


def resume(home, *flags):
    return "train", "--resume", "--out", home / "run", "--epochs", 2, *flags  # there is more to train


# ---- the data


def test_the_table_of_a_run(begun):
    with open(begun / "run" / "recordings.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["train"] * 6 + ["test"] * 6
    assert sorted(row["path"] for row in rows) == [f"{i:02d}.wav" for i in range(12)], "relative to the data"
    for row in rows:
        stat = os.stat(begun / row["path"])
        assert (int(row["size"]), int(row["modified"])) == (stat.st_size, stat.st_mtime_ns) and len(row["digest"]) == 32
    assert {row["label"] for row in rows} == {"rising glide", "falling glide"}


def test_data_that_is_the_same_is_opened_again(home):
    """Data that was copied to another disk, or listed in another order, would be refused for nothing."""
    table = pd.read_csv(home / "list.csv")
    table[::-1].to_csv(home / "list.csv", index=False)
    for path in home.glob("*.wav"):
        os.utime(path, ns=(1, 1))
    train, test, _ = source.open_again(home / "run", Config(), quiet=True)
    assert [Path(p).name for p in train.paths] == [f"{i:02d}.wav" for i in range(0, 12, 2)], "in the order of the run"
    assert [Path(p).name for p in test.paths] == [f"{i:02d}.wav" for i in range(1, 12, 2)]
    cli.main([str(word) for word in resume(home)])


def relabel(home):
    table = pd.read_csv(home / "list.csv")
    table.loc[[0, 6], "label"] = ["falling glide", "rising glide"]
    table.to_csv(home / "list.csv", index=False)
    return ["00.wav had the label 'rising glide' and has 'falling glide'", "06.wav had"]


def leak(home):
    shutil.copy2(home / "00.wav", home / "01.wav")
    return ["01.wav has other contents"]


def change_a_training_file(home):
    wave, rate = soundfile.read(home / "02.wav")
    soundfile.write(home / "02.wav", wave[::-1], rate)
    return ["02.wav has other contents"]


def remove(home):
    (home / "04.wav").unlink()
    return ["04.wav is missing or cannot be read"]


def add(home):
    shutil.copy(home / "00.wav", home / "new.wav")
    with open(home / "list.csv", "a") as file:
        file.write("new.wav,rising glide,1\n")
    return ["new.wav is new"]


def swap(home):
    table = pd.read_csv(home / "list.csv")
    table.loc[[0, 1], "fold"] = [2, 1]
    table.to_csv(home / "list.csv", index=False)
    return ["00.wav was in the training part and is in the held-out part",
            "01.wav was in the held-out part and is in the training part"]


@pytest.mark.parametrize("change", [relabel, leak, change_a_training_file, remove, add, swap])
def test_what_has_changed_is_named(change, home, tmp_path):
    """A score of clips that were trained on looks good and means nothing."""
    words = change(home)
    for line in (resume(home), ("evaluate", home / "run"), ("finetune", home / "run", "--out", tmp_path / "tuned")):
        message = refused(*line)
        assert "has changed since the run" in message and "restore the data or train a new run" in message
        for word in words:
            assert word in message, message
    assert not (tmp_path / "tuned").exists()


def test_many_changes_are_counted(home):
    for path in home.glob("*.wav"):
        wave, rate = soundfile.read(path)
        soundfile.write(path, wave * 0.5, rate)
    message = refused("evaluate", home / "run")
    assert message.count("has other contents") == 5 and "; and 7 more; restore" in message


def test_generated_sounds_are_compared_too(tmp_path, monkeypatch):
    """A new version that generates other sounds would score a model on clips that nobody has held out."""
    out = tmp_path / "run"
    cli.main(["train", "--synthetic-clips", "2", *TINY, "--out", str(out)])
    plain = synthetic.synthesize
    monkeypatch.setattr(synthetic, "synthesize", lambda **how: almost(plain(**how)))
    source.open_again(out, Config(), quiet=True)
    monkeypatch.setattr(synthetic, "synthesize", lambda **how: plain(**how, seed=1))
    assert "has other contents" in refused("evaluate", out)


def almost(made):
    "The same sounds as another processor computes them."
    made.waves = [wave + 1e-7 for wave in made.waves]
    return made


def test_names_that_are_not_utf8(tmp_path):
    """One file from an old disk, and no run could begin."""
    made, folder = synthesize(n=4, classes=2, seconds=1), tmp_path / "in"
    for i, wave in enumerate(made.waves):
        path = os.fsencode(folder) + b"/caf\xe9 %d" % (i // 4) + b"/%d\n.wav" % i
        os.makedirs(os.path.dirname(path), exist_ok=True)
        soundfile.write(path, wave.numpy(), 16000)
    cli.main(["train", "--data", str(folder), *TINY, "--out", str(tmp_path / "run")])
    assert "caf\\xe9 0" in (tmp_path / "run" / "recordings.csv").read_text(encoding="utf-8")
    train, test, _ = source.open_again(tmp_path / "run", Config(), quiet=True)
    assert len(train) + len(test) == 8


def test_names_that_are_not_utf8_are_compared(tmp_path):
    """Two files that differ in such bytes would count as one."""
    parts = []
    for part in (b"a", b"b"):
        made = synthesize(n=2, classes=1, seconds=1)
        made.paths = [os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 %b %d\n.wav" % (part, i)) for i in range(2)]
        for path, wave in zip(made.paths, made.waves, strict=True):
            soundfile.write(os.fsencode(path), wave.numpy(), 16000)
        parts.append(made)
    table = tmp_path / "recordings.csv"
    source.write_recordings(table, *parts, str(tmp_path))
    assert "caf\\xe9 a 0" in table.read_text(encoding="utf-8")
    assert source.compare_recordings(table, *parts, str(tmp_path))[2] == []
    os.rename(parts[1].paths[0], tmp_path / "plain.wav")
    parts[1].paths[0] = str(tmp_path / "plain.wav")
    changes = source.compare_recordings(table, *parts, str(tmp_path))[2]
    assert changes == ["caf\\xe9 b 0\n.wav is missing or cannot be read", "plain.wav is new"]


def test_runs_of_earlier_versions_are_opened(home):
    """They have no table of recordings: what they have is checked, and nothing more."""
    (home / "run" / "recordings.csv").unlink()
    assert len(source.open_again(home / "run", Config(), quiet=True)[0]) == 6
    swap(home)
    assert "other recordings would be held out" in refused("evaluate", home / "run")


def test_a_random_split_stays_with_its_seed(tmp_path):
    """Fine-tuning with another seed would hold out clips that the pretraining has seen."""
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    cli.main(["train", "--synthetic-clips", "4", "--seed", "7", *TINY, "--out", str(run)])
    cli.main(["finetune", str(run), "--epochs", "1", "--seed", "3", "--out", str(tuned)])
    parts = [source.open_again(folder, cli.Config.load(folder / "config.json"), quiet=True) for folder in (run, tuned)]
    assert parts[0][1].paths == parts[1][1].paths


# ---- the flags


@pytest.mark.parametrize("flags, words", [
    ("--data elsewhere", ["data='", "elsewhere' differs", "list.csv'"]),
    ("--fold 1", ["fold='1' differs", "which has '2'"]),
    ("--fold=1", ["fold='1' differs", "which has '2'"]),
    ("--group theo", ["group='theo' differs", "which has None"]),
    ("--label-from (.*)_", ["label_from='(.*)_' differs"]),
    ("--synthetic_clips 9", ["synthetic_clips=9 differs", "which has 50"]),
    ("--preset tiny", ["preset='tiny' means patch_size=(4, 16)", "has (8, 16)"]),
    ("--mask-ratio 0.75", ["mask_ratio=0.75 differs", "has 0.5"]),
    ("--depth 4", ["depth=4 differs", "has 1"]),  # the preset's own value
    ("--no-use-labels", ["use_labels=False differs", "has True"]),
    ("--use-uniformity-loss --seed 1", ["seed=1 differs", "has 0"]),
])  # fmt: skip
def test_a_flag_that_contradicts_the_run_is_refused(flags, words, begun):
    """Whoever believes that a run went on with other data or settings reports what never was."""
    message = refused(*resume(begun, *flags.split()))
    for word in [*words, str(begun / "run"), "choose another --out"]:
        assert word in message, message


def test_the_flags_of_the_run_may_be_given_again(begun, tmp_path):
    """The command in a job script is the same every time, but for --resume."""
    run = tmp_path / "run"
    shutil.copytree(begun / "run", run)
    again = ["--data", begun / "list.csv", "--fold", "2", "--preset", "nano", *TINY, "--epochs", "2"]
    cli.main([str(word) for word in ("train", "--resume", "--out", run, *again)])
    assert len(pd.read_csv(run / "history.csv")) == 2
    cli.main(["train", "--resume", "--out", str(run)])
    assert np.isfinite(pd.read_csv(run / "history.csv")["loss"]).all()
