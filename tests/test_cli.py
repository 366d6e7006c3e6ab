"""The command as its users meet it: flags become the config, a mistake is one message, a run leaves its folder."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

import audiomaepp
from audiomaepp import cli
from audiomaepp.config import Config
from audiomaepp.data import Recordings, synthesize

TINY = """--warmup-epochs 0 --batch-size 6 --embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32
    --decoder-depth 1 --decoder-num-heads 2 --precision fp32""".split()


def command(*args, **kwargs):
    "The command in a process of its own."
    env = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", "from audiomaepp.cli import main; main()", *map(str, args)],
        env=env, capture_output=True, text=True, check=False, timeout=400, **kwargs,
    )  # fmt: skip


def refused(*args):
    "The code with which the command ends, in this process; of a mistake it is the message."
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in args])
    return caught.value.code


# ---- flags


def test_flags_become_the_config():
    flags = "--mask-ratio 0.5 --img-size 384 --patch-size 16 --no-use-contrastive-loss --pooling-mode cls+mean --seed 7"
    cfg = cli.parse(["train", *flags.split()]).config
    assert cfg == Config.preset(
        "nano", mask_ratio=0.5, img_size=(384, 384), patch_size=(16, 16), use_contrastive_loss=False,
        pooling_mode="cls+mean", seed=7,
    )  # fmt: skip


def test_two_numbers_are_time_and_mel():
    cfg = cli.parse("train --img-size 1024 128 --patch-size 16 16 --betas 0.8 0.99".split()).config
    assert (cfg.img_size, cfg.patch_size, cfg.betas) == ((1024, 128), (16, 16), (0.8, 0.99))


@pytest.mark.parametrize("preset", [["--preset", "tiny"], ["--preset=tiny"]])
@pytest.mark.parametrize("first", [True, False])
def test_flags_win_over_the_preset_in_any_order(preset, first):
    flags = ["--depth", "3", "--data", "here"]
    train = cli.parse(["train", *(preset + flags if first else flags + preset)])
    assert train.config == Config.preset("tiny", depth=3) and train.data.data == "here"


def test_every_setting_is_a_flag_with_its_help(capfd):
    assert refused("train", "--help") == 0
    shown = capfd.readouterr().out
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in shown, f.name
    for words in ("share of the patches that is hidden", "hold out this fold", "go on where"):
        assert words in " ".join(shown.replace("│", " ").split()), words


def test_every_command_is_named(capfd):
    assert refused("--help") == 0
    shown = capfd.readouterr().out
    for name in ("demo", "train", "evaluate", "map", "embed", "doctor"):
        assert name in shown


# ---- mistakes


def test_an_unknown_folder_is_one_line(tmp_path):
    done = command("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("audiomaepp: ") and "nowhere" in line and "Traceback" not in line
    assert not (tmp_path / "run").exists(), "a run that never began leaves nothing"


@pytest.mark.parametrize(
    "flags, field, would_do",
    [
        ("--mask-ratio 1.5", "mask_ratio", "0.75"),
        ("--img-size 230 --patch-size 16", "img_size", "224 or 240"),
        ("--num-heads 5", "num_heads", "4"),
        ("--base-lr -1", "base_lr", "0.00015"),
        ("--preset smal", "preset", "small"),
    ],
)
def test_a_bad_value_names_the_field_and_what_would_do(flags, field, would_do, capfd):
    code = refused("train", *flags.split())
    said = " ".join(f"{code} {capfd.readouterr().err}".replace("│", " ").split())
    assert code != 0 and field in said and would_do in said and "Traceback" not in said


@pytest.mark.parametrize("flags", ["--mask-ratio much", "--pooling-mode max", "--mask-rato 0.5", "--epochs 1.5"])
def test_a_flag_that_does_not_parse_is_named(flags, capfd):
    code = refused("train", *flags.split())
    assert code != 0 and flags.split()[0] in capfd.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "map"])
def test_no_run_there(name, tmp_path):
    message = refused(name, tmp_path / "nothing")
    assert message.startswith("audiomaepp: ") and "nothing" in message and "would do" in message


def test_embed_without_a_model(tmp_path):
    assert "config.json is missing" in refused("embed", tmp_path, "--data", tmp_path)


def test_resume_needs_a_run(tmp_path):
    assert "--out" in refused("train", "--resume")
    assert "checkpoint.safetensors is missing" in refused("train", "--resume", "--out", tmp_path)


# ---- a run, from files to pictures


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    "Forty clips of four classes as files."
    at = tmp_path_factory.mktemp("data") / "sounds"
    made = synthesize(n=10, classes=4)
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        (at / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(at / label / f"clip {i}.flac", np.asarray(wave), 16000)
    return at


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    cli.main(["train", "--data", str(sounds), "--out", str(out), "--epochs", "2", *TINY])
    return out


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_leaves_a_run_folder(run, sounds):
    assert {p.name for p in run.iterdir()} >= {
        "config.json", "model.safetensors", "checkpoint.safetensors", "history.csv", "data.json",
    }  # fmt: skip
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")], "a temporary file was left behind"
    cfg = Config.load(run / "config.json")
    assert (cfg.embed_dim, cfg.epochs) == (32, 2)
    facts = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert facts["n_train"] == 32 and facts["n_test"] == 8 and "held out" in facts["protocol"]
    assert Path(facts["data"]) == sounds and len(facts["classes"]) == 4
    assert [row["epoch"] for row in rows_of(run / "history.csv")] == ["1", "2"]
    assert not (run / "skipped.csv").exists()


def test_a_run_is_never_overwritten(run, sounds):
    before = contents(run)
    message = refused("train", "--data", sounds, "--out", run, "--epochs", "1", *TINY)
    assert str(run) in message and "--resume" in message
    assert contents(run) == before


def test_a_finished_run_resumes_to_itself(run):
    before = load_file(run / "model.safetensors")
    cli.main(["train", "--resume", "--out", str(run)])
    after = load_file(run / "model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert len(rows_of(run / "history.csv")) == 2


def test_a_stopped_run_resumes_from_the_command(run, sounds, tmp_path, monkeypatch):
    "Stopped with Ctrl-C after an epoch, resumed by the very words that it said: the same model as in one go."
    out, flags = tmp_path / "stopped", ["--epochs", "2", "--eval-every", "1", *TINY]
    whole = tmp_path / "whole"
    cli.main(["train", "--data", str(sounds), "--out", str(whole), *flags])
    save = cli.Trainer._save

    def save_and_stop(self, epoch, batch):
        save(self, epoch, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Trainer, "_save", save_and_stop)
    message = refused("train", "--data", sounds, "--out", out, *flags)
    monkeypatch.undo()
    (words,) = [line for line in message.splitlines() if "audiomaepp train --resume" in line]
    again = words[words.index("audiomaepp train") :].split(" goes on")[0].split()[1:]
    assert len(rows_of(out / "history.csv")) == 1
    cli.main(again)
    assert len(rows_of(out / "history.csv")) == 2
    for name in ("model", "checkpoint"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in (whole, out))
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one), name


def test_evaluate_map_and_embed(run, sounds, tmp_path, capsys):
    import pandas as pd

    cli.main(["evaluate", str(run)])
    said = capsys.readouterr().out
    assert "held out" in said and "chance" in said and "floor" in said
    rows = rows_of(run / "results.csv")
    assert len(rows) == 3 and "chance" in json.dumps(json.loads((run / "results.json").read_text(encoding="utf-8")))

    cli.main(["map", str(run)])
    pictures = {p.name: p.read_bytes() for p in (run / "pictures").iterdir()}
    assert pictures.keys() >= {"map.png", "map.html", "losses.png", "reconstruction_1.png"}
    assert all(data[:8] == b"\x89PNG\r\n\x1a\n" for name, data in pictures.items() if name.endswith("png"))
    page = pictures["map.html"].decode()
    assert page.count("clip ") >= 8 and "held out" in page
    assert str(sounds.parent) not in page, "a page that one may hand on names no folder of this machine"
    said = capsys.readouterr().out
    assert all(str(run / "pictures" / name) in said for name in pictures)

    out = tmp_path / "all.parquet"
    cli.main(["embed", str(run), "--data", str(sounds), "--out", str(out)])
    table = pd.read_parquet(out)
    assert len(table) == 40 and table["embedding"].map(len).eq(32).all()
    assert set(table["label"]) == set(os.listdir(sounds))
    assert not out.with_suffix(".skipped.csv").exists()


def test_an_unknown_colour_is_named(run):
    message = refused("map", run, "--colour", "pitsch")
    assert "pitsch" in message and "label" in message


def test_held_out_clips_are_never_trained_on(tmp_path, monkeypatch):
    "Every clip that training touches, to fit or to choose the checkpoint, is one that the evaluation does not."
    touched = set()
    for name in ("wav", "crop"):
        plain = getattr(Recordings, name)

        def spy(self, i, *args, plain=plain):
            touched.add(self.paths[i])
            return plain(self, i, *args)

        monkeypatch.setattr(Recordings, name, spy)
    cli.main(["train", "--synthetic-clips", "5", "--out", str(tmp_path / "run"), "--epochs", "1", *TINY])
    monkeypatch.undo()
    evaluation = cli.evaluate_run(tmp_path / "run", quiet=True)
    assert touched == set(evaluation.train.paths) and len(touched) == 48
    assert len(evaluation.test) == 12 and not touched & set(evaluation.test.paths)


@pytest.mark.slow
def test_doctor_and_quick_demo(tmp_path):
    done = command("doctor")
    assert done.returncode == 0 and "FAILED" not in done.stdout and "forward and backward" in done.stdout
    done = command("demo", "--quick", "--out", tmp_path / "demo")
    assert done.returncode == 0 and "chance" in done.stdout and "map.png" in done.stdout
