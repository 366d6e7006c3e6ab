"""What others made stays, one process writes at a time, and a signal loses nothing that was computed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import audiomaepp
from audiomaepp import cli, embed, source, synthetic
from audiomaepp import run as running
from audiomaepp.config import Config
from audiomaepp.files import LOCK, MARKER, made_by
from audiomaepp.finetune import finetune
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.train import Trainer

TINY = """--embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32 --decoder-depth 1 --decoder-num-heads 2
    --precision fp32 --warmup-epochs 0 --batch-size 6 --synthetic-clips 3""".split()
MAIN = "import sys; from audiomaepp.cli import main; main()"


def listening():
    "A background job ignores Ctrl-C, and nohup SIGHUP; a child would inherit that."
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


def begin(*args, code=MAIN, **options):
    "Start the command in a process of its own."
    env = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    how = dict(env=env, preexec_fn=listening) | pipes | options
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **how)


def ended(process):
    "Its exit status and what it wrote."
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def wait_for(condition, process):
    "Until a condition holds; a process that ends before is a failure."
    while not condition():
        assert process.poll() is None, ended(process)
        time.sleep(0.01)


def refused(*args):
    "What the command says when it ends, in this process."
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in args])
    return str(caught.value.code)


def contents(folder):
    "Every file below a folder."
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A small model as `save_pretrained` writes it."
    torch.manual_seed(0)
    at = tmp_path_factory.mktemp("pretrained") / "model"
    small = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    AudioMAEPlusPlus(Config.preset("nano", precision="fp32", **small)).save_pretrained(at)
    return at


@pytest.fixture
def sounds(tmp_path):
    "Short files, many enough that embedding them can be interrupted."
    rng, folder = np.random.default_rng(0), tmp_path / "sounds"
    folder.mkdir()
    for i in range(60):
        soundfile.write(folder / f"{i:03d}.wav", 0.1 * rng.standard_normal(800), 8000)
    return folder


# ---- what others made


@pytest.fixture
def quick_demo(monkeypatch):
    "A demo of a second."
    preset = Config.preset
    tiny = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, precision="fp32")
    monkeypatch.setattr(cli.Config, "preset", lambda name, **changes: preset(name, **tiny | changes | dict(epochs=1)))
    monkeypatch.setattr(running.Run, "draw", lambda run, **options: [])
    monkeypatch.setattr(source.Source, "synthetic_clips", 3)
    plain = source.Source.__init__

    def few(self, data="synthetic", **given):
        plain(self, data, **given | dict(synthetic_clips=3))

    monkeypatch.setattr(source.Source, "__init__", few)


def test_demo_replaces_a_demo_and_nothing_else(quick_demo, tmp_path):
    """A week's run in a folder of the same name would be gone."""
    out = tmp_path / "run"
    cli.main(["demo", "--out", str(out)])
    first = (out / "model.safetensors").stat().st_mtime_ns
    (out / "notes.txt").write_text("mine")
    cli.main(["demo", "--out", str(out)])
    assert (out / "model.safetensors").stat().st_mtime_ns > first and (out / "notes.txt").read_text() == "mine"

    cli.main(["train", "--resume", "--out", str(out), "--epochs", "2"])  # it is somebody's work now
    before = contents(out)
    message = refused("demo", "--out", out)
    assert "audiomaepp train made" in message and "use another output folder" in message and contents(out) == before

    other = tmp_path / "other"
    other.mkdir()
    for name in ("data.json", "thesis.txt"):
        (other / name).write_text("{}")
    message = refused("demo", "--out", other)
    assert "data.json" in message and {p.name for p in other.iterdir()} == {"data.json", "thesis.txt"}


@pytest.mark.parametrize("command", ["train", "finetune", "demo"])
def test_a_model_of_somebody_else_stays(command, model, tmp_path):
    """The only copy of a model that took days would be overwritten."""
    before = contents(model)
    args = dict(train=[*TINY, "--epochs", "1"], finetune=[model, "--data", "synthetic", "--epochs", "1"], demo=[])
    message = refused(command, *args[command], "--out", model)
    assert f"which audiomaepp {command} did not make" in message and "another output folder" in message
    assert contents(model) == before
    if command == "finetune":
        with pytest.raises(ValueError, match="which audiomaepp finetune did not make"):
            finetune(AudioMAEPlusPlus.from_pretrained(model), synthetic.synthesize(n=2, classes=2), out=model, epochs=1)
        assert contents(model) == before


def test_a_finished_run_without_its_checkpoint_stays(tmp_path):
    """Whoever removes the checkpoint to save space, and types the same command again, would lose the model."""
    out, line = tmp_path / "run", ["train", *TINY, "--epochs", "1", "--out", str(tmp_path / "run")]
    cli.main(line)
    for path in out.glob("checkpoint*"):
        path.unlink()
    before = contents(out)
    assert "already holds a run (history.csv)" in refused(*line) and contents(out) == before


def test_a_run_that_has_saved_nothing_starts_again(tmp_path, monkeypatch):
    """A command that died in its first minutes would block its folder for ever."""
    out, line = tmp_path / "run", ["train", *TINY, "--epochs", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError))
    assert "out of memory" in refused(*line)
    assert (out / "data.json").exists() and made_by(out) == "train"
    monkeypatch.undo()
    cli.main(line)
    assert (out / "checkpoint.safetensors").exists()


def test_evaluate_keeps_a_readme_of_the_user(tmp_path, capsys):
    """Hours of writing about a model would be replaced by a generated page."""
    out = tmp_path / "run"
    cli.main(["train", *TINY, "--epochs", "1", "--out", str(out)])
    cli.main(["evaluate", str(out)])
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: audiomaepp" in card
    cli.main(["evaluate", str(out)])
    assert (out / "README.md").read_text() == card
    for mine in (card.replace("Held-out scores", "How well it does on my island"), "# My notes\n"):
        (out / "README.md").write_text(mine)
        cli.main(["evaluate", str(out)])
        assert (out / "README.md").read_text() == mine and "README.md" in capsys.readouterr().out


def test_tables_of_others_stay(model, sounds, tmp_path):
    """A manifest, or the table of another tool, would be overwritten by an output of the same name."""
    table = tmp_path / "x.parquet"
    line = ["embed", model, "--data", sounds, "--out", table]
    pd.DataFrame({"path": ["a.wav"], "note": ["mine"]}).to_parquet(table)
    before = contents(tmp_path)
    assert "must be a table that audiomaepp wrote" in refused(*line) and contents(tmp_path) == before
    table.write_bytes(b"no Parquet at all")
    assert str(table) in refused(*line)
    assert table.read_bytes() == b"no Parquet at all"
    table.unlink()
    table.mkdir()
    assert "must be a file, got a folder" in refused(*line)
    table.rmdir()
    (tmp_path / "x.skipped.csv").write_text("path,reason for my choice\n")
    assert "x.skipped.csv exists" in refused(*line)
    (tmp_path / "x.skipped.csv").unlink()
    (tmp_path / "x.parquet.parts").mkdir()
    (tmp_path / "x.parquet.parts" / "notes.txt").write_text("mine")
    cli.main([str(word) for word in line])
    assert (tmp_path / "x.parquet.parts" / "notes.txt").read_text() == "mine"

    hits, clip = tmp_path / "hits.csv", sorted(sounds.iterdir())[0]
    search = ["search", clip, "--in", table, "--k", "2", "--out", hits]
    hits.write_text("path,label\na.wav,dog\n")
    assert "is not a table with the columns path, similarity" in refused(*search) and "a.wav,dog" in hits.read_text()
    hits.unlink()
    for _ in range(2):  # its own it replaces
        cli.main([str(word) for word in search])
        assert len(pd.read_csv(hits)) == 2


def test_lab_keeps_what_is_in_its_folder(tmp_path):
    """A page or a table of the user would be replaced by the report of a comparison."""
    line = ["lab", *TINY, "--epochs", "1", "--axis", "mask_ratio=0.5", "--out", tmp_path, "--no-maps"]
    for name, text in (("report.html", "my report"), ("comparison.json", '{"my": "own"}')):
        (tmp_path / name).write_text(text)
        assert name in refused(*line) and contents(tmp_path) == {Path(name): text.encode()}
        (tmp_path / name).unlink()


# ---- one writer

HOLD = """
import sys
from pathlib import Path
from audiomaepp.files import only_writer
with only_writer(sys.argv[1], folder=not sys.argv[1].endswith(".parquet")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["train", "demo", "finetune", "lab", "embed"])
def test_a_second_writer_is_refused(command, model, sounds, tmp_path):
    """Two runs in one folder end with a checkpoint of one and a model of the other, and both exit with status 0."""
    out = tmp_path / ("x.parquet" if command == "embed" else "out")
    args = dict(train=[*TINY, "--epochs", "1"], demo=[], finetune=[model, "--data", "synthetic", "--epochs", "1"],
                lab=[*TINY, "--epochs", "1", "--no-maps"], embed=[model, "--data", sounds])[command]
    with begin(out, code=HOLD, stdin=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        message = refused(command, *args, "--out", out)
        assert f"{out} is being written by process {holder.pid}" in message and "wait until it ends" in message
        assert "\n" not in message
        holder.kill()  # the system takes the lock back
    before = set(tmp_path.iterdir())
    with running.only_writer(out, folder=command != "embed"):
        assert {p.name for p in tmp_path.iterdir()} >= {p.name for p in before}
    assert not list(tmp_path.rglob(f"*{LOCK}"))


def test_what_killed_runs_left_is_removed(model, sounds, tmp_path):
    """Temporary files as large as the model pile up until the disk is full."""
    out, table = tmp_path / "run", tmp_path / "x.parquet"
    out.mkdir()
    half = pd.DataFrame({"a": range(1000)}).to_parquet()[:-8]
    (tmp_path / "x.parquet.whole").write_bytes(half)
    for path in (out / ".model.safetensors.0a1b2c3d.tmp", out / ".checkpoint.safetensors.k3_9xq0z",
                 tmp_path / ".x.parquet.0a1b2c3d.tmp", tmp_path / ".y.parquet.0a1b2c3d.tmp"):
        path.touch()
    cli.main(["train", *TINY, "--epochs", "1", "--out", str(out)])
    cli.main(["embed", str(model), "--data", str(sounds), "--out", str(table)])
    assert [p.name for p in out.glob(".*")] == [MARKER]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".y.parquet.0a1b2c3d.tmp", "run", "sounds", "x.parquet"]


@pytest.mark.slow
def test_no_process_waits_for_one_that_was_refused(tmp_path):
    """On two machines, the processes of the second one would wait half an hour for the first, which has ended."""
    out = tmp_path / "run"
    entry = tmp_path / "entry.py"
    entry.write_text(MAIN)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", entry, "train", *TINY, "--out", out]
    with begin(out, code=HOLD, stdin=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]), **os.environ}
        done = subprocess.run([sys.executable, "-m", *map(str, launch)], env=env, capture_output=True, text=True,
                              timeout=120)
        holder.kill()
    assert done.returncode and done.stderr.count(f"is being written by process {holder.pid}") == 2


# ---- signals

# one recording at a time, slowly, so that a signal comes in the middle
SLOW = """
import sys, time
from audiomaepp import embed
from audiomaepp.cli import main
plain = embed.WindowEncoder.embed
def slow(self, *args):
    print("batch", flush=True)
    time.sleep(0.05)
    return plain(self, *args)
embed.WindowEncoder.embed = slow
init = embed.EmbeddingGenerator.__init__
def small(self, *args, **options):
    init(self, *args, **options)
    self.batch_size = 2
embed.EmbeddingGenerator.__init__ = small
main()
"""


SIGNALS = [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGHUP))]


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_saves_what_was_embedded(signum, model, sounds, tmp_path, monkeypatch):
    """Up to a minute of a large model's work would be lost, and nothing would say that the rest is kept."""
    out = tmp_path / "x.parquet"
    args = ["embed", model, "--data", sounds, "--out", out]
    process = begin(*args, code=SLOW)
    for _ in range(12):
        assert process.stdout.readline().strip() == "batch"
    process.send_signal(signum)
    status, said = ended(process)
    assert status == 128 + signum and "Traceback" not in said
    assert "same command" in said.splitlines()[-1]
    kept = sum(len(pd.read_parquet(part)) for part in tmp_path.glob("x.parquet.parts/*.parquet"))
    assert 10 <= kept < 60 and not out.exists()
    plain, again = embed.WindowEncoder.embed, []
    monkeypatch.setattr(embed.WindowEncoder, "embed",
                        lambda self, *args: again.append(len(args[0])) or plain(self, *args))
    cli.main([str(word) for word in args])
    assert sum(again) == 60 - kept, "nothing is embedded twice"
    assert len(pd.read_parquet(out)) == 60 and sorted(os.listdir(tmp_path)) == ["sounds", "x.parquet"]


def test_an_interrupted_fine_tuning_goes_on(tmp_path, model):
    """It would start again from the pretrained model, and a job with a time limit would never end."""
    line = ["finetune", model, "--data", "synthetic", "--synthetic-clips", "4", "--epochs", "3", "--batch-size", "8"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    cli.main([*map(str, line), "--out", str(whole)])
    process = begin(*line, "--out", out, code=STOPS.format(after=1))
    status, said = ended(process)
    assert status == 128 + signal.SIGTERM and "The same command continues" in said, said
    assert not (out / "results.json").exists()
    assert "epochs=9 differs" in refused(*line, "--out", out, "--epochs", "9")
    cli.main([*map(str, line), "--out", str(out)])
    histories = [pd.read_csv(folder / "history.csv")["loss"].tolist() for folder in (whole, out)]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, out)]
    assert results[0] == results[1]
    assert "already holds a classifier" in refused(*line, "--out", out)


# ends itself with a signal after an epoch
STOPS = """
import os, signal
from audiomaepp.cli import main
from audiomaepp.train import _Saver
plain, saved = _Saver.save, []
def save(self):
    plain(self)
    saved.append(1)
    if len(saved) == {after}:
        os.kill(os.getpid(), signal.SIGTERM)
_Saver.save = save
main()
"""


def test_a_signal_ends_a_comparison_and_says_how_it_goes_on(tmp_path):
    """A scheduler that ends a job would leave a comparison of hours that looks broken."""
    line = ["lab", *TINY, "--epochs", "2", "--eval-every", "1", "--axis", "mask_ratio=0.5", "--no-maps"]
    line += ["--out", tmp_path / "out"]
    status, said = ended(begin(*line, code=STOPS.format(after=1)))
    assert status == 128 + signal.SIGTERM and "The same command continues" in said and "Traceback" not in said
    cli.main([str(word) for word in line])
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("command", ["train", pytest.param("demo", marks=pytest.mark.slow)])
def test_a_signal_ends_a_training_and_says_how_it_goes_on(command, tmp_path):
    """Without a word on the checkpoint, the training would be started anew."""
    out = tmp_path / "my run"
    line = ["train", *TINY, "--epochs", "9", "--eval-every", "1"] if command == "train" else ["demo", "--quick"]
    status, said = ended(begin(*line, "--out", out, code=STOPS.format(after=1)))
    assert status == 128 + signal.SIGTERM and "Traceback" not in said
    assert f"audiomaepp train --resume --out '{out}' continues" in said.splitlines()[-1]


# ---- nothing that can be read


@pytest.mark.parametrize("command", ["train", "embed", "evaluate"])
def test_what_is_wrong_with_every_file_is_written(command, model, tmp_path):
    """Five lines of a message say little about why none of a thousand files can be read."""
    bad, out = tmp_path / "bad", tmp_path / ("x.parquet" if command == "embed" else "out")
    bad.mkdir()
    if command == "evaluate":
        for i in range(8):
            soundfile.write(bad / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(8000), 8000)
        cli.main(["train", "--data", str(bad), *TINY, "--epochs", "1", "--out", str(out)])
    for i in range(8):
        (bad / f"{i}.wav").write_text("no sound")
    if command == "embed":
        pd.DataFrame({"path": [f"missing {i}.wav" for i in range(8)]}).to_csv(bad / "list.csv", index=False)
        refused("embed", model, "--data", bad / "list.csv", "--out", out)
    else:
        line = ["train", "--data", bad, *TINY, "--out", out] if command == "train" else ["evaluate", out]
        assert "all in skipped.csv" in refused(*line)
    table = tmp_path / "x.skipped.csv" if command == "embed" else out / "skipped.csv"
    with open(table, newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
