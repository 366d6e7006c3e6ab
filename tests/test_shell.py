"""The command as a shell meets it: answers without heavy libraries, JSON for scripts, codes, and no surprises."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audiomaepp
from audiomaepp import cli
from audiomaepp.config import POOLING_MODES, PRESETS
from audiomaepp.synthetic import synthesize

ENV = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
TINY = """--warmup-epochs 0 --batch-size 6 --embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32
    --decoder-depth 1 --decoder-num-heads 2 --precision fp32 --epochs 1""".split()
HEAVY = ("torch", "sklearn", "umap", "numba", "matplotlib", "accelerate", "transformers")
WATCHED = f"""
import sys
from audiomaepp.cli import main
try: main()
finally: print("loaded:", *({{*{HEAVY!r}}} & set(sys.modules)), file=sys.stderr)
"""


def shell(*args):
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, args)],
        env=ENV, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def loaded(done):
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("loaded:")]
    return line.split()[1:]


# ---- answers at once


@pytest.mark.parametrize("line", ["--help", "--version", "train --help", "train --help-all", "evaluate --help",
                                  "train --preset", "predict --help"])  # fmt: skip
def test_questions_are_answered_without_torch(line):
    """A person who types --help waited three seconds for libraries that the answer does not need."""
    done = shell(*line.split())
    assert done.returncode == 0 and done.stdout and loaded(done) == []


@pytest.mark.parametrize(
    "line, words",
    [
        ("trian --data x", "did you mean train?"),
        ("train --data nowhere", "'nowhere', which does not exist"),
        ("demo --data nowhere", "'nowhere', which does not exist"),
        ("finetune tiny --data nowhere", "'nowhere', which does not exist"),
        ("embed runs/a --data nowhere", "'nowhere', which does not exist"),
        ("evaluate nowhere", "must be the folder of a run, got 'nowhere'"),
        ("map nowhere", "must be the folder of a run, got 'nowhere'"),
        ("predict nowhere", "must be the folder of a run, got 'nowhere'"),
        ("search a.wav --in nowhere.parquet", "run audiomaepp embed first"),
        ("train --mask-ratio 2", "mask_ratio must be"),
        ("train nowhere --preset smal", "small"),
    ],
)
def test_mistakes_are_answered_without_torch(line, words):
    done = shell(*line.split())
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
    assert loaded(done) == [] and done.stdout == ""


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "command must be one of demo, train, evaluate"),
        ("train sounds --preset smal", "did you mean small?"),
        ("train sounds --mask-ratio 2", "mask_ratio must be greater than 0 and less than 1, got 2.0; use 0.75"),
        ("lab sounds --fraction 2", "fraction must be between 0 and 1, got 2.0; use 0.2"),
        ("train sounds --fold 9 --group theo", "got fold='9' and group='theo'; remove"),
        ("train --epochs x", "--epochs must be a whole number, got x; audiomaepp train --help-all explains it"),
        ("train --batch_size x", "--batch-size must be a whole number, got x"),
        ("train --base-lr=much", "--base-lr must be a number, got much; audiomaepp train --help-all explains it"),
        ("lab sounds --seeds 0 one", "--seeds must be [INT [INT ...]], got 0 one; audiomaepp lab --help"),
        ("train --epochs", "--epochs must be followed by a value, got none; audiomaepp train --help"),
        ("train --pooling-mode max", f"--pooling-mode must be one of {', '.join(POOLING_MODES)}, got max"),
        ("train --set nonsense", "train has no option --set; did you mean"),
        ("train --qqq 3", "train has no option --qqq; audiomaepp train --help-all lists them"),
        ("train --mask-rato=0.5", "has no option --mask-rato; did you mean --mask-ratio?"),
        ("evaluate", "evaluate needs RUN-FOLDER, folder of a run; audiomaepp evaluate --help explains it"),
        ("embed runs/a", "embed needs --data STR, folder or table of sounds"),
        ("map runs/a sounds", "map takes no argument sounds there; audiomaepp map --help explains"),
        ("train --quiet sounds", "takes no argument sounds there; a folder of sounds comes right after train"),
        ("train sounds more", "takes no argument more there"),
        ("embed runs/a sounds --data more", "takes no argument sounds there"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_plain_line(line, words, capsys):
    """A box around "Error parsing __tyro-dummy-inner__.config" hid what was wrong with one word."""
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    said = capsys.readouterr()
    (told,) = said.err.splitlines()
    assert told.startswith("audiomaepp: ") and words in told and caught.value.code == 2 and not said.out


@pytest.mark.parametrize("line", ["train {}", "lab {}", "demo {}", "embed runs/a {}", "evaluate runs/a {}",
                                  "finetune runs/a {}"])  # fmt: skip
def test_a_folder_needs_no_flag(line):
    """`audiomaepp train sounds` was an unrecognized option."""
    short, long = (cli.parse(line.format(how).split()) for how in ("sounds --quiet", "--data sounds --quiet"))
    assert short == long and short.quiet


def test_the_plain_help_of_train_fits_two_screens():
    shown, whole = (shell("train", flag).stdout for flag in ("--help", "--help-all"))
    assert len(shown.splitlines()) <= 80 < len(whole.splitlines())
    for flag in ("--data", "--preset", "--out", "--epochs", "--mask-ratio", "--use-contrastive-loss", "--pooling-mode"):
        assert flag in shown, flag
    assert "--stretch-mel" in whole and "--stretch-mel" not in shown


def test_every_preset_is_listed_with_a_line():
    lines = shell("train", "--preset").stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line.split()) > 3 for line in lines), "a name alone says nothing"
    assert list(json.loads(shell("train", "--preset", "--json").stdout)) == list(PRESETS)


def test_completion_for_the_shell():
    done = shell("--tyro-print-completion", "bash")
    assert done.returncode == 0 and "complete" in done.stdout and loaded(done) == []


# ---- a run, read by a script


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    at, made = tmp_path_factory.mktemp("data") / "sounds", synthesize(n=6, classes=3, seconds=1)
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        (at / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(at / label / f"{i}.wav", np.asarray(wave), 16000)
    return at


@pytest.fixture(scope="module")
def run(sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    done = shell("train", "--data", sounds, "--out", out, *TINY, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout) # nothing else is on standard output
    assert facts["run"] == str(out) and facts["epoch"] == 1 and "validation clips choose" in done.stderr
    return out


@pytest.fixture(scope="module")
def classifier(run):
    out = run.parent / "classifier"
    done = shell("finetune", run, "--out", out, "--epochs", "1", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["n_test"] == 3 and 0 <= facts["accuracy"] <= 1
    assert "accuracy" not in done.stderr
    return out


def test_json_of_every_reading_command(run, sounds, tmp_path):
    facts = json.loads(shell("evaluate", run, "--json", "--quiet").stdout)
    assert set(facts["rows"]) >= {"this model", "chance"} and facts["rows"]["this model"]["n_test"] == 3
    table = tmp_path / "e.parquet"
    facts = json.loads(shell("embed", run, "--data", sounds, "--out", table, "--json").stdout)
    assert (facts["rows"], facts["dimensions"], facts["skipped"]) == (18, 32, [])
    assert (facts["new"], json.loads(shell("embed", run, sounds, "--out", table, "--json").stdout)["new"]) == (18, 0)
    clip = next(sounds.rglob("*.wav"))
    facts = json.loads(shell("search", table, clip, "--k", "2", "--json").stdout)
    assert len(facts["hits"]) == 2 and {"path", "similarity"} <= set(facts["hits"][0])


def test_quiet_leaves_the_result_alone(run):
    done = shell("evaluate", run, "--quiet")
    assert "kNN-10" in done.stdout and "Written to" not in done.stdout
    assert done.stderr.startswith("loaded:"), "a progress bar is no result"


def test_evaluate_on_other_sounds(run, tmp_path):
    """Scores of another set go nowhere near those of the run's own clips."""
    before = (run / "results.csv").read_bytes() if (run / "results.csv").exists() else None
    made = synthesize(n=5, classes=2, seconds=1, seed=7)
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        (tmp_path / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / label / f"{i}.wav", np.asarray(wave), 16000)
    facts = json.loads(shell("evaluate", run, "--data", tmp_path, "--fraction", "0.4", "--json").stdout)
    assert facts["rows"]["this model"]["n_test"] == 4 and facts["rows"]["chance"]["knn"] == 0.5
    assert ((run / "results.csv").read_bytes() if (run / "results.csv").exists() else None) == before


@pytest.mark.parametrize("how", ["table", "csv", "json"])
def test_predict(how, classifier, sounds, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    files = [*sorted(sounds.rglob("*.wav"))[:2], bad]
    done = shell("predict", classifier, *files, "--format", how)
    assert done.returncode == 0 and "bad.wav" in done.stderr and "bad.wav" not in done.stdout
    assert "2 sounds predicted, 1 skipped" in done.stderr
    if how == "table":
        assert "class" in done.stdout and len(done.stdout.strip().splitlines()) == 3
        return
    rows = json.loads(done.stdout) if how == "json" else list(csv.DictReader(io.StringIO(done.stdout.strip())))
    classes = [path.name for path in sorted(sounds.iterdir())]
    assert [row["path"] for row in rows] == [str(path) for path in files[:2]]
    for row in rows:
        chances = {name: float(row[name]) for name in classes}
        assert abs(sum(chances.values()) - 1) < 1e-4 and row["class"] == max(chances, key=chances.get)


def test_predict_of_nothing_fails(classifier, sounds, tmp_path):
    """A script took the exit code 0 for a prediction."""
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    done = shell("predict", classifier, bad, "--format", "json")
    assert done.returncode == 1 and done.stdout == "" and "skipped" in done.stderr and "use others" in done.stderr


def test_classes_may_have_the_names_of_columns(classifier, sounds, tmp_path):
    """A training succeeded, and then every prediction failed."""
    named = tmp_path / "named"
    shutil.copytree(classifier, named)
    facts = json.loads((named / "classifier.json").read_text())
    facts["classes"][:2] = ["path", "class"]
    (named / "classifier.json").write_text(json.dumps(facts))
    clip = next(sounds.rglob("*.wav"))
    done = shell("predict", named, clip, "--json")
    (row,) = json.loads(done.stdout)["predictions"]
    assert row["path"] == str(clip) and {"path (class)", "class (class)"} <= row.keys()


def test_predict_needs_sounds(classifier):
    done = shell("predict", classifier)
    assert done.returncode != 0 and "files must name at least one sound" in done.stderr


def test_predict_needs_a_classifier(run, sounds):
    done = shell("predict", run, next(sounds.rglob("*.wav")))
    assert done.returncode != 0 and "classifier.json" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [("--json train sounds", "--json must come after the command"),
     ("search nowhere a.wav", "does not exist"),
     ("embed runs/a more --out vectors.csv", "use vectors.parquet")],
)  # fmt: skip
def test_what_to_type_instead(line, words, tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    monkeypatch.chdir(tmp_path)
    done = shell(*line.split())
    said = [line for line in done.stderr.splitlines() if not line.startswith("loaded:")]
    assert done.returncode != 0 and words in done.stderr and len(said) == 1


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Doctor, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    assert caught.value.code == 130 and "Stopped." in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named(run):
    done = shell("evaluate", run, "--device", "cuda:99")
    assert done.returncode != 0 and "device must be" in done.stderr and "use cpu" in done.stderr
    assert "Traceback" not in done.stderr
