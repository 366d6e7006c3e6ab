"""How the command ends: one line for each error, the traceback on demand, quiet where nobody reads on."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import audiomaepp
from audiomaepp import cli
from audiomaepp.files import OutputError
from audiomaepp.train import LoaderError

ENV = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
TINY = """--embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32 --decoder-depth 1 --decoder-num-heads 2
    --precision fp32 --warmup-epochs 0 --batch-size 6 --synthetic-clips 3 --epochs 1""".split()


def python(*args, **options):
    "Python in a process of its own."
    how = dict(env=ENV, capture_output=True, text=True, check=False, timeout=300) | options
    return subprocess.run([sys.executable, *map(str, args)], **how)


FORESEEN = {
    "value": (ValueError("depth=0 is too small;\n  use 1"), "depth=0 is too small"),
    "missing": (FileNotFoundError("x is missing; name a run's folder"), "x is missing"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x"),
    "full": (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    "output": (OutputError("runs/x cannot be written; choose another output"), "choose another output"),
    "diverged": (FloatingPointError("the loss is nan; use a lower base_lr"), "lower base_lr"),
    "memory": (MemoryError(), "memory"),
    "gpu": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the notes"), "batch"),
    "allocate": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8"), "memory"),
    "extra": (ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript"), "onnxscript"),
    "loader": (LoaderError("a loader process ended; use a smaller num_workers"), "num_workers"),
    "worker": (ValueError("Caught ValueError in worker 0.\nOriginal Traceback (…):\n a\nValueError: b"), "Error: b"),
}  # fmt: skip


@pytest.fixture
def fail(monkeypatch):
    "Let the command `doctor` fail; returns what the command ends with."

    def failing(error, *flags):
        monkeypatch.setattr(cli.Doctor, "run", lambda self: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit) as caught:
            cli.main(["doctor", *flags])
        return caught.value.code

    return failing


@pytest.mark.parametrize("name", FORESEEN)
def test_a_foreseeable_error_is_one_line(fail, name):
    """A traceback of forty lines hides the one line that says what to do."""
    error, words = FORESEEN[name]
    message = fail(error)
    assert message.startswith("audiomaepp: ") and words in message and "\n" not in message
    assert "Traceback" not in message and "unexpected" not in message


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("y"), RuntimeError("mat1 and mat2"), RecursionError()])
def test_a_bug_says_how_to_see_more(fail, error):
    message = fail(error)
    assert message.startswith("audiomaepp: unexpected ") and type(error).__name__ in message
    assert "--debug" in message and "\n" not in message


@pytest.mark.parametrize("flags", [["doctor", "--debug"], ["--debug", "doctor"]])
def test_debug_shows_the_traceback(fail, flags, monkeypatch):
    fail(KeyError("x"))
    with pytest.raises(KeyError):
        cli.main(flags)
    monkeypatch.setenv("AUDIOMAEPP_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["doctor"])


def test_debug_may_stand_among_the_flags(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        cli.main(["evaluate", "--debug", str(tmp_path / "nothing")])


@pytest.mark.parametrize("args", [["train", "--help"], pytest.param(["doctor"], marks=pytest.mark.slow)])
def test_a_closed_pipe_ends_quietly(args):
    """`audiomaepp doctor | head -1` ended in a traceback, or in a complaint of Python on its way out."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python("-m", "audiomaepp", *args, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert done.stderr == "" and done.returncode not in (0, 1, 120)


@pytest.mark.parametrize("module", ["audiomaepp", "audiomaepp.cli"])
def test_python_m_is_the_command(module, tmp_path):
    """`python -m audiomaepp.cli train …` did nothing and ended with status 0."""
    done = python("-m", module, "evaluate", tmp_path / "nothing")
    assert done.returncode == 1 and done.stderr.startswith("audiomaepp: ") and "nothing" in done.stderr


@pytest.mark.slow
def test_torchrun_trains(tmp_path):
    """The documented way to train on several processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "audiomaepp"]
    done = python(*launch, "train", *TINY, "--out", tmp_path / "run", env={**ENV, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model.safetensors").exists() and done.stdout.count("The run is in") == 1


# ---- one class


def write_clips(folder, names):
    import soundfile

    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, torch.randn(4000).numpy() / 10, 16000)


def test_training_on_one_class_is_told(tmp_path):
    """With one class every pair is a positive: the contrastive loss pulls all clips together, and every score is 1."""
    flags = [flag for flag in TINY if flag not in ("--synthetic-clips", "3")]
    write_clips(tmp_path, [f"train/dog/{i}.wav" for i in range(6)] + [f"test/dog/{i}.wav" for i in range(2)])
    with pytest.warns(UserWarning, match="'dog'.*at least two classes.*--no-use-labels"):
        cli.main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *flags])


def test_a_single_class_folder_is_told(tmp_path):
    """A single class folder gives no labels at all, which nothing said."""
    write_clips(tmp_path, [f"dog/{i}.wav" for i in range(4)])
    with pytest.warns(UserWarning, match="one folder, dog.*no labels"):
        audiomaepp.open_recordings(tmp_path)


def test_two_classes_and_none_are_silent(recwarn, tmp_path):
    write_clips(tmp_path, ["a/0.wav", "b/1.wav"])
    write_clips(tmp_path / "a", ["2.wav"])
    audiomaepp.open_recordings(tmp_path)
    audiomaepp.open_recordings(tmp_path / "a")
    audiomaepp.split(audiomaepp.synthesize(n=4, classes=2))
    assert not [w for w in recwarn if "label" in str(w.message)]


# ---- a classifier's folder


def test_evaluate_and_map_of_a_classifier(tmp_path, capsys):
    """Both ended in a raw FileNotFoundError of data.json."""
    from audiomaepp.files import read_json

    run, tuned = tmp_path / "run", tmp_path / "tuned"
    cli.main(["train", *TINY, "--seed", "3", "--out", str(run)])
    cli.main(["finetune", str(run), "--out", str(tuned), "--epochs", "1"])
    before = read_json(tuned / "results.json")
    held = read_json(run / "data.json")["held_out"]
    cli.main(["evaluate", str(tuned)])
    assert "held out" in capsys.readouterr().out and read_json(tuned / "data.json")["held_out"] == held
    assert (tuned / "results.csv").exists()
    assert read_json(tuned / "results.json") == before, "the classifier's own scores stay"
    cli.main(["map", str(tuned)])
    made = {path.name for path in (tuned / "pictures").iterdir()}
    assert made >= {"map.png", "map.html", "losses.png"}
    assert not any("reconstruction" in name for name in made), "its encoder has left its decoder behind"
