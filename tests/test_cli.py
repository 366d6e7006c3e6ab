"""The command as its users meet it: flags become the config, a mistake is one message, a run leaves its folder."""

import base64
import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file

import audiomaepp
from audiomaepp import cli, source, validation
from audiomaepp import run as running
from audiomaepp.config import Config
from audiomaepp.data import Recordings
from audiomaepp.files import MARKER
from audiomaepp.finetune import Classifier
from audiomaepp.lab import CHANCE, LOSSES, STATISTICS, UNTRAINED, Comparison, design
from audiomaepp.synthetic import synthesize
from audiomaepp.train import Trainer, _Saver
from audiomaepp.validation import Validation

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


@pytest.mark.parametrize("made", [
    lambda: cli.parse(["train", "--preset", "semantic", "--pooling-mode", "cls"]).config,
    lambda: cli.parse(["train", "--preset=semantic", "--pooling_mode=cls"]).config,
    lambda: Config.preset("semantic", pooling_mode="cls"),
    lambda: design({"": dict(pooling_mode="cls")}, [0], "semantic", None).config("", 0),
], ids=["command", "underscore", "preset", "lab"])  # fmt: skip
def test_embeddings_follow_a_pooling_mode_that_is_chosen(made):
    """The preset has one of its own for embeddings: a choice for the training alone would seem to do nothing."""
    assert Config.preset("semantic").embedding_mode != "cls" and made().embedding_mode == "cls"
    assert Config.preset("semantic", pooling_mode="cls", embedding_pooling="frame").embedding_mode == "frame"


def test_every_setting_is_a_flag_with_its_help(capfd):
    assert refused("train", "--help-all") == 0
    shown = capfd.readouterr().out
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in shown, f.name
    for words in ("share of patches that are hidden", "hold out this fold", "continue the run in"):
        assert words in " ".join(shown.replace("│", " ").split()), words


def test_every_command_is_named(capfd):
    assert refused("--help") == 0
    shown = capfd.readouterr().out
    for name in ("demo", "train", "evaluate", "lab", "map", "embed", "doctor"):
        assert name in shown


@pytest.mark.parametrize("encoding, line", [("ascii", ["--help"]), ("latin-1", ["train", "--help"])])
def test_help_in_any_encoding(encoding, line, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = command(*line)
    assert done.returncode == 0 and "usage: audiomaepp" in done.stdout and "audiomaepp:" not in done.stderr


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
    assert message.startswith("audiomaepp: ") and "nothing" in message and "audiomaepp train" in message


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
    hidden = [p.name for p in run.iterdir() if p.name.startswith(".")]
    assert hidden == [MARKER], "a temporary file or a lock was left behind"
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


@pytest.mark.parametrize("name", ["TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"])
def test_a_command_that_is_started_again_goes_on(name, sounds, tmp_path, monkeypatch, capsys):
    """With the settings that --init has changed, too: nobody can correct the flags of a restarted command."""
    out = str(tmp_path / "run")
    words = ["train", "--data", str(sounds), "--out", out, "--preset", "semantic_unlabelled", "--init", "starter",
             "--epochs", "1", "--warmup-epochs", "0"]  # fmt: skip
    monkeypatch.setenv(name, "1")
    cli.main(words)
    before = load_file(tmp_path / "run" / "model.safetensors")
    cli.main(words)
    assert "already finished" in capsys.readouterr().out
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_stopped_run_resumes_from_the_command(run, sounds, tmp_path, monkeypatch, capsys):
    "Stopped with Ctrl-C after an epoch, resumed by the very words that it said: the same model as in one go."
    out, flags = tmp_path / "stopped", ["--epochs", "2", "--eval-every", "1", *TINY]
    whole = tmp_path / "whole"
    cli.main(["train", "--data", str(sounds), "--out", str(whole), *flags])
    save = _Saver.save

    def save_and_stop(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Saver, "save", save_and_stop)
    assert refused("train", "--data", sounds, "--out", out, *flags) == 130
    monkeypatch.undo()
    (words,) = [line for line in capsys.readouterr().err.splitlines() if "audiomaepp train --resume" in line]
    again = words[words.index("audiomaepp train") :].split(" continues")[0].split()[1:]
    assert len(rows_of(out / "history.csv")) == 1
    cli.main(again)
    assert len(rows_of(out / "history.csv")) == 2
    for name in ("model", "checkpoint"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in (whole, out))
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one), name


def test_training_calls_validation_clips_by_their_name(tmp_path, capsys, monkeypatch):
    """They are a part of the training clips and choose the checkpoint: who takes their score for a held-out one is
    misled. A run of an earlier version, which called them held out, goes on under the right name."""
    from audiomaepp import plots

    flags = ["--synthetic-clips", "5", "--eval-every", "1", *TINY]
    cli.main(["train", *flags, "--epochs", "1", "--out", str(tmp_path / "run")])
    with monkeypatch.context() as patch:
        patch.setattr(validation, "Validation", lambda *parts: Validation(*parts, clips="heldout"))
        cli.main(["train", *flags, "--epochs", "1", "--out", str(tmp_path / "old")])
    first, second = capsys.readouterr().out.split("The run is in")[:2]
    assert "validation clips choose the checkpoint" in first
    assert "validation_reconstruction" in first and "heldout" not in first and "heldout_reconstruction" in second
    pictures, plain = [], plots.plot_history
    monkeypatch.setattr(plots, "plot_history", lambda *a, **k: pictures.append(plain(*a, **k)) or pictures[-1])
    for name in ("run", "old"):
        running.draw_run(tmp_path / name, running.evaluate_run(tmp_path / name, quiet=True))
    cli.main(["train", "--resume", "--out", str(tmp_path / "old"), "--epochs", "2"])
    rows = rows_of(tmp_path / "old" / "history.csv")
    assert len(rows) == 2 and not [name for name in rows[0] if "heldout" in name]
    for figure in pictures:
        titles = [ax.get_title() for ax in figure.axes if ax.get_visible()]
        assert "kNN-10 accuracy\n(validation clips)" in titles and "reconstruction error\n(validation clips)" in titles
        assert not [title for title in titles if "held-out" in title]


def test_evaluate_map_and_embed(run, sounds, tmp_path, capsys):
    import pandas as pd

    cli.main(["evaluate", str(run)])
    said = capsys.readouterr().out
    names = ["this model", *STATISTICS, UNTRAINED, "chance"]
    assert "held out" in said and all(name in said for name in names)
    stored = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in rows_of(run / "results.csv")] == list(stored["rows"]) == names

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


def test_a_class_has_one_color_on_both_maps(run, monkeypatch):
    """Whoever looks a clip up on the page that has stood out in the picture looks for its color."""
    from matplotlib.colors import to_hex

    from audiomaepp import explorer

    figures, plain = [], explorer.plot_maps
    monkeypatch.setattr(explorer, "plot_maps", lambda *a, **k: figures.append(plain(*a, **k)) or figures[-1])
    found = running.evaluate_run(run, quiet=True)
    some = found.test.labels > 0  # the first class has no clip among them
    cut = {name: (x, y[some]) for name, (x, y) in found.baselines.items()}
    part = dict(test=found.test.select(some), test_x=found.test_x[some], baselines=cut)
    running.draw_run(run, replace(found, **part))
    page = (run / "pictures" / "map.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r"application/json[^>]*>(.*?)</script>", page, re.S)[1])
    label = next(column for column in data["columns"] if column["name"] == "label")
    codes = np.unique(np.frombuffer(base64.b64decode(label["codes"]), "<u2"))
    drawn = {h.get_label(): to_hex(h.get_facecolor()[0]).upper() for h in figures[0].axes[0].collections}
    shown = {label["classes"][code]: data["styles"][code][0] for code in codes}
    assert len(shown) == 3 and shown.items() <= drawn.items()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_scores_in_any_encoding(run, encoding, monkeypatch):
    "The scores would be lost for a dash; they can be read with a plain one."
    printed = io.TextIOWrapper(io.BytesIO(), encoding)
    with contextlib.redirect_stdout(printed):
        cli.main(["evaluate", str(run)])
    printed.flush()
    said = printed.buffer.getvalue().decode(encoding)
    row = json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]["this model"]
    assert f"{row['knn']:.2f} ({row['knn_low']:.2f}-{row['knn_high']:.2f})" in said


def test_an_unknown_color_is_named(run):
    message = refused("map", run, "--color", "pitsch")
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
    evaluation = running.evaluate_run(tmp_path / "run", quiet=True)
    assert touched == set(evaluation.train.paths) and len(touched) == 48
    assert len(evaluation.test) == 12 and not touched & set(evaluation.test.paths)



# ---- what a trained model is for


def test_embed_goes_on_and_search_finds(run, sounds, tmp_path, capsys, monkeypatch):
    table = tmp_path / "x.parquet"
    embed = ["embed", str(run), "--data", str(sounds), "--out", str(table)]
    cli.main(embed)
    first = table.stat().st_mtime_ns
    cli.main(embed)
    said = capsys.readouterr().out
    assert "40 recordings embedded, 0 were there already" in said and "0 recordings embedded, 40 were" in said
    assert table.stat().st_mtime_ns > first
    clip = sorted(sounds.rglob("*.flac"))[0]
    cli.main(["search", str(clip), "--in", str(table), "--k", "3", "--out", str(tmp_path / "hits.csv")])
    found, printed = rows_of(tmp_path / "hits.csv"), capsys.readouterr().out
    assert len(found) == 3 and str(clip) not in {row["path"] for row in found}
    assert all(row["path"] in printed for row in found)
    elsewhere = tmp_path / "elsewhere.flac"
    elsewhere.write_bytes(clip.read_bytes())
    for model in ([], ["--model", str(run)]):
        cli.main(["search", str(elsewhere), "--in", str(table), *model, "--k", "1"])
        assert str(clip) in capsys.readouterr().out  # the same sound under its other name
    (tmp_path / "embeddings.parquet").write_bytes(table.read_bytes())
    monkeypatch.chdir(tmp_path)
    cli.main(["search", str(clip), "--k", "3"])  # the table of this folder, as `embed` names it
    assert all(row["path"] in capsys.readouterr().out for row in found[:1])
    assert "which does not exist" in refused("search", clip, "--in", tmp_path / "nothing.parquet")


def test_an_evaluated_run_has_a_model_card(run):
    """On the Hub, a model that does not say what it was trained on and how well it did is of no use."""
    cli.main(["evaluate", str(run)])
    card, results = (run / "README.md").read_text(), json.loads((run / "results.json").read_text())
    assert results["protocol"] in card and f"| this model | {results['rows']['this model']['knn']:.3g} |" in card
    assert all(f"| {name} |" in card for name in (*STATISTICS, UNTRAINED, "chance"))
    assert "| `embed_dim` | `32` |" in card and card.startswith("---\n")


def test_finetune_scores_the_clips_that_the_run_held_out(run, sounds, tmp_path, capsys):
    """Scored on clips that the pretraining saw, every classifier would look good."""
    cli.main(["finetune", str(run), "--out", str(tmp_path / "tuned"), "--epochs", "1"])
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert results["protocol"] == json.loads((run / "data.json").read_text())["protocol"]
    assert results["n_test"] == 8 and 0 <= results["accuracy"] <= 1
    assert f"accuracy {results['accuracy']:.3f}" in capsys.readouterr().out
    again = Classifier.from_pretrained(tmp_path / "tuned")
    assert again.classes == sorted(p.name for p in sounds.iterdir())
    assert "already holds a classifier" in refused("finetune", run, "--out", tmp_path / "tuned")
    assert "name a folder with --data" in refused("finetune", "nano", "--out", tmp_path / "b")


# ---- settings side by side


@pytest.mark.parametrize(
    "text, name, values",
    [
        ("contrastive_weight=0,0.01,1e-3,1", "contrastive_weight", [0, 0.01, 0.001, 1]),
        ("mask-ratio=0.5, 0.75,", "mask_ratio", [0.5, 0.75]),
        ("depth=2,4", "depth", [2, 4]),
        ("use_labels=true,off", "use_labels", [True, False]),
        ("pooling_mode=mean,cls+mean", "pooling_mode", ["mean", "cls+mean"]),
        ("img_size=200x80,400×80,384", "img_size", [(200, 80), (400, 80), 384]),
        ("betas=0.9x0.95,0.8x0.99", "betas", [(0.9, 0.95), (0.8, 0.99)]),
    ],
)
def test_an_axis_is_read_by_the_type_of_its_setting(text, name, values):
    assert cli.read_axis(text) == (name, values)
    assert [type(value) for value in cli.read_axis(text)[1]] == [type(value) for value in values]


def lab(*flags):
    return cli.parse(["lab", *map(str, flags)])


def test_axes_become_every_combination():
    settings = lab("--axis", "contrastive_weight=0,1", "--axis", "mask_ratio=0.5,0.75").settings()
    assert settings == [dict(contrastive_weight=w, mask_ratio=m) for w in (0, 1) for m in (0.5, 0.75)]
    assert lab().settings() == LOSSES == lab("--losses").settings()
    both = lab("--losses", "--axis", "mask_ratio=0.5,0.75").settings()
    assert len(both) == 8 and both["uniformity, mask_ratio=0.75"] == {**LOSSES["uniformity"], "mask_ratio": 0.75}


def test_the_flags_of_a_comparison():
    flags = "--seeds 0 1 2 --pooling mean cls cls+mean --preset tiny --depth 3 --data here --group theo --no-maps"
    command = lab(*flags.split())
    assert (command.seeds, command.pooling, command.maps) == ((0, 1, 2), ("mean", "cls", "cls+mean"), False)
    assert command.config == Config.preset("tiny", depth=3)
    assert (command.data.data, command.data.group) == ("here", "theo")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--axis contrastive_wieght=0,1", ["contrastive_wieght", "did you mean contrastive_weight?"]),
        ("--axis mask_ratio=0.5,1.5", ["mask_ratio=1.5", "use 0.75"]),
        ("--axis mask_ratio=much", ["mask_ratio", "'much'", "0.75"]),
        ("--axis epochs=1.5", ["epochs=1.5", "an integer"]),
        ("--axis img_size=200x80x2", ["img_size", "(200, 80, 2)", "use 384"]),
        ("--axis betas=fast", ["betas", "(0.9, 0.95)"]),
        ("--axis betas=0.9", ["betas", "(0.9, 0.95)"]),
        ("--axis use_labels=perhaps", ["use_labels", "'perhaps'", "true or false"]),
        ("--axis pooling_mode=max", ["pooling_mode", "'max'", "'mean'"]),
        ("--axis mask_ratio", ["axis 'mask_ratio'", "use mask_ratio=0.75"]),
        ("--axis mask_ratio=0.5,0.50", ["mask_ratio=0.5", "twice"]),
        ("--axis mask_ratio=0.5 --axis mask-ratio=0.7", ["mask_ratio", "two axes"]),
        ("--axis seed=0,1", ["seed", "--seeds"]),
        ("--losses --axis use_uniformity_loss=true,false", ["use_uniformity_loss", "--losses"]),
        ("--preset official_tiny --axis contrastive_weight=0,1", ["contrastive_weight", "--use-contrastive-loss"]),
        ("--pooling max", ["got 'max'", "cls+mean"]),
        ("--seeds 1 1", ["seeds", "different"]),
    ],
)
def test_a_bad_axis_is_refused_before_anything_is_opened(flags, words, monkeypatch):
    for place in ("synthetic.synthesize", "data.open_recordings", "lab.compare_losses"):
        monkeypatch.setattr(f"audiomaepp.{place}", lambda *args, **kwargs: pytest.fail("something was opened"))
    message = refused("lab", *flags.split())
    assert message.startswith("audiomaepp: ") and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def compare(sounds, tmp_path_factory):
    "The flags of a comparison of two weights, all but the folder."
    return ["lab", "--data", str(sounds), "--axis", "contrastive_weight=0,0.5", "--epochs", "1", *TINY]


@pytest.fixture(scope="module")
def compared(compare, tmp_path_factory):
    "The folder of that comparison, and what was printed."
    out, printed = tmp_path_factory.mktemp("lab") / "weights", io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main([*compare, "--out", str(out)])
    return out, printed.getvalue()


def no_training(monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: pytest.fail("a training began"))


def test_a_comparison_is_printed_and_written(compared):
    import pandas as pd

    out, said = compared
    comparison, weights = Comparison.load(out), ["contrastive_weight=0", "contrastive_weight=0.5"]
    table = pd.read_csv(out / "table.csv", index_col=0)
    rows = [*weights, *STATISTICS, UNTRAINED, CHANCE]
    assert list(table.index) == rows
    for name in ("knn", "linear", "alignment", "uniformity", "rankme", "reconstruction", "seconds"):
        assert np.allclose(table[name], comparison.table[name].astype(float), equal_nan=True), name
    shown = [*rows, "kNN-10", "RankMe", comparison.experiment.protocol, *comparison.remarks()]
    for words in shown:
        assert words in said, words
    for name in ("report.html", "maps.png", "curves.png", "table.csv"):
        assert (out / name).stat().st_size > 100 and str(out / name) in said
    for name in ("maps.png", "curves.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (out / "skipped.csv").exists()


def test_a_weight_of_0_is_the_weight_0(compared):
    cfg = Comparison.load(compared[0]).experiment.config("contrastive_weight=0", 0)
    assert cfg.contrastive_weight == 0 and cfg.use_contrastive_loss
    rows = rows_of(compared[0] / "contrastive_weight=0" / "seed0" / "history.csv")
    assert float(rows[-1]["contrastive"]) > 0, "what the loss would be is still there to see"
    alone = [float(rows[-1][name]) for name in ("reconstruction", "uniformity")]
    assert float(rows[-1]["loss"]) == pytest.approx(alone[0] + cfg.uniformity_weight * alone[1], abs=1e-4)


def test_the_report_says_how_to_repeat_it(compared, compare):
    import html
    import shlex

    out, _ = compared
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    comparison = Comparison.load(out)
    for words in [*comparison.table.index, comparison.experiment.protocol, "<h1>sounds: contrastive_weight</h1>"]:
        assert words in page, words
    assert shlex.join(["audiomaepp", *compare, "--out", str(out)]) in page and page.count("data:image/png") >= 2


def test_the_same_command_goes_on_and_trains_nothing_again(compared, compare, monkeypatch):
    out, said = compared
    table = (out / "table.csv").read_bytes()
    (out / "table.csv").unlink()
    no_training(monkeypatch)
    cli.main([*compare, "--out", str(out), "--no-maps"])
    assert (out / "table.csv").read_bytes() == table


def test_a_stopped_comparison_goes_on_and_comes_to_the_same_numbers(compared, compare, tmp_path, monkeypatch, capsys):
    "Stopped with Ctrl-C in its second training."
    out, whole, trained = tmp_path / "out", Trainer.fit, []

    def fit(self, *args, **kwargs):
        trained.append(self.cfg.contrastive_weight)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", fit)
    assert refused(*compare, "--out", out, "--no-maps") == 130
    assert "The same command continues" in capsys.readouterr().err and not (out / "report.html").exists()
    cli.main([*compare, "--out", str(out), "--no-maps"])
    assert trained == [0, 0.5, 0.5] and Comparison.load(out).same_as(Comparison.load(compared[0]))


def test_another_comparison_does_not_go_into_the_folder(compared, compare, monkeypatch):
    no_training(monkeypatch)
    before = contents(compared[0])
    message = refused(*compare, "--out", compared[0], "--mask-ratio", "0.7")
    assert "another comparison" in message and "mask_ratio is 0.5 in the folder and 0.7 now" in message
    assert contents(compared[0]) == before


def test_it_holds_out_what_train_and_evaluate_hold_out(compared, compare):
    command = cli.parse(compare)
    _, test, protocol = source.open_source(command.data, command.config, quiet=True)
    comparison = Comparison.load(compared[0])
    assert sorted(comparison.held_out["path"]) == sorted(test.paths) and comparison.experiment.protocol == protocol


def test_a_color_that_is_no_column_is_named_before_training(compare, tmp_path, monkeypatch):
    no_training(monkeypatch)
    message = refused(*compare, "--out", tmp_path / "out", "--color", "pitsch")
    assert "pitsch" in message and "label" in message and not (tmp_path / "out").exists()


def test_without_a_name_the_same_command_means_the_same_folder(compare):
    def folder(*flags):
        command = cli.parse([*compare, *flags])
        return cli.lab_folder(command, design(command.settings(), (0,), command.config, None))

    assert folder() == folder("--no-maps") and str(folder()).startswith(os.path.join("runs", "lab-sounds-"))
    assert len({folder(), folder("--mask-ratio", "0.7"), folder("--fold", "1"), folder("--axis", "depth=1,2")}) == 4


def test_a_field_that_is_newer_than_a_comparison_does_not_rename_its_folder(compare):
    command = cli.parse(list(compare))
    now = design(command.settings(), (0,), command.config, None)
    before = dataclasses.replace(now, base={name: v for name, v in now.base.items() if name != "snapshots"})
    assert cli.lab_folder(command, now) == cli.lab_folder(command, before)


@pytest.mark.parametrize("all_fail", [False, True])
def test_a_setting_that_fails_is_said_and_the_rest_is_compared(all_fail, compare, tmp_path, monkeypatch, capsys):
    whole = Trainer.fit

    def fit(self, *args, **kwargs):
        if all_fail or self.cfg.contrastive_weight:
            raise FloatingPointError("the loss is nan at step 3; base_lr below 1 may help")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", fit)
    line = [*compare, "--out", str(tmp_path / "out"), "--no-maps"]
    if all_fail:
        assert "no training came to an end" in refused(*line)
    else:
        cli.main(line)
    words = "“contrastive_weight=0.5” (seed 0) failed: the loss is nan at step 3; base_lr below 1 may help"
    assert words in capsys.readouterr().out and words in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_collapse_is_said_in_plain_words(compare, tmp_path, monkeypatch, capsys):
    import torch

    from audiomaepp.model import AudioMAEPlusPlus

    def constant(self, spec, mode=None, frames=None):
        return torch.ones(len(spec), 32) + 1e-4 * spec.mean((1, 2, 3))[:, None]

    monkeypatch.setattr(AudioMAEPlusPlus, "get_embedding", constant)
    cli.main([*compare, "--out", str(tmp_path), "--no-maps"])
    assert "the embeddings have collapsed to one direction" in capsys.readouterr().out


def test_without_labels_it_compares_what_needs_none(sounds, tmp_path, capsys):
    import shutil

    for i, path in enumerate(sorted(sounds.rglob("*.flac"))[::2]):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "flat" / f"{i}.flac")
    flags = f"--data {tmp_path}/flat --out {tmp_path}/o --fraction 0.4 --epochs 1".split() + TINY
    cli.main(["lab", "--axis", "use_uniformity_loss=true,false", *flags])
    said = capsys.readouterr().out
    assert "uniformity" in said and "RankMe" in said and "kNN" not in said and "12 train / 8 test" in said
    assert (tmp_path / "o" / "maps.png").exists()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused("lab")


def test_broken_files_are_named_and_left_out(sounds, tmp_path, capsys):
    import shutil

    data, out = tmp_path / "sounds", tmp_path / "out"
    shutil.copytree(sounds, data)
    (data / "broken.wav").write_text("no sound at all")
    cli.main(["lab", "--data", str(data), "--axis", "mask_ratio=0.5", "--epochs", "1", *TINY, "--out", str(out),
              "--no-maps"])
    assert "broken.wav" in capsys.readouterr().out and "broken.wav" in (out / "skipped.csv").read_text()


@pytest.mark.slow
def test_doctor_and_quick_demo(tmp_path):
    done = command("doctor")
    assert done.returncode == 0 and "FAILED" not in done.stdout and "forward and backward" in done.stdout
    done = command("demo", "--quick", "--out", tmp_path / "demo")
    assert done.returncode == 0 and "chance" in done.stdout and "map.png" in done.stdout
