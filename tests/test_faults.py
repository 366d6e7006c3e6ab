"""Training survives what happens to it: bad gradients, signals, full disks, data that vanish, loaders that die.

This file is a test and, run as a program, the training that is interrupted.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

import audiomaepp
from audiomaepp.batches import ClipLoader, UnreadableError
from audiomaepp.checkpoints import Checkpoints, read_progress
from audiomaepp.config import Config
from audiomaepp.data import open_recordings
from audiomaepp.features import build_frontend
from audiomaepp.files import OutputError
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.train import LoaderError, Trainer, loader_error

SMALL = Config(
    img_size=(40, 16), patch_size=4, embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1,
    decoder_num_heads=2, batch_size=8, epochs=3, warmup_epochs=1, base_lr=0.05, eval_every=1, precision="fp32",
)  # fmt: skip


class Toy:
    "Four batches an epoch, which depend on the epoch alone."

    def __init__(self, spoil=(), pace=None):
        self.spoil, self.pace, self.epoch, self.start = spoil, pace, 0, 0

    def __len__(self):
        return 4

    def set_epoch(self, epoch, start, rank, world_size):
        self.epoch, self.start = epoch, start

    def __iter__(self):
        return islice(self.batches(), self.start, None)

    def batches(self):
        generator = torch.Generator().manual_seed(self.epoch)
        for number in range(4):
            spec = torch.randn(8, 1, 40, 16, generator=generator)
            if (self.epoch, number) in self.spoil:
                spec[3] = float("nan")
            if self.pace:
                self.pace(self.epoch, number)
            yield {"spec": spec, "label": torch.arange(8) % 4, "index": torch.arange(8) + 8 * number}

    def names(self, batch):
        return [f"clip{i}.wav" for i in batch["index"].tolist()]


@pytest.fixture(autouse=True)
def one_thread():
    "Sums of several threads may differ in the last bit, and here processes are compared."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def finite(path):
    return all(t.isfinite().all() for t in load_file(path).values() if t.is_floating_point())


def trained(folder=None, data=None, cfg=SMALL, **options) -> dict[str, Tensor]:
    trainer = Trainer(cfg, out_dir=folder, quiet=True, **options)
    trainer.fit(data or Toy())
    return trainer.model.state_dict()


# ---- steps that are not finite


def test_one_bad_step_is_skipped_and_its_clips_are_named(tmp_path):
    "A NaN in the last step of an epoch, right before the checkpoint: the weights and the history stay finite."
    trainer = Trainer(SMALL, out_dir=tmp_path, quiet=True)
    with pytest.warns(UserWarning, match=r"not finite at step 8, which is skipped; its clips: clip24\.wav, clip25"):
        history = trainer.fit(Toy(spoil=[(1, 3)]))
    assert trainer.state.step == 12 and [bad["step"] for bad in trainer.state.bad_steps] == [8]
    assert all(np.isfinite(value) for row in history.rows for value in row.values())
    for name in ("checkpoint.safetensors", "model.safetensors"):
        assert finite(tmp_path / name)
    assert read_progress(tmp_path / "checkpoint.safetensors")["bad_steps"] == trainer.state.bad_steps
    whole = trained()
    assert not all(torch.equal(whole[name], value) for name, value in trainer.model.state_dict().items())


def test_a_run_that_diverges_stops_and_leaves_the_checkpoint_before_it(tmp_path):
    spoil = [(epoch, number) for epoch in (1, 2) for number in range(4)]
    with warnings.catch_warnings(), pytest.raises(FloatingPointError) as stopped:
        warnings.simplefilter("ignore")
        trained(tmp_path, Toy(spoil), SMALL.replace(max_bad_steps=6, eval_every=2))
    said = str(stopped.value)
    assert ": 6 in a row (max_bad_steps=6; its clips: clip8.wav" in said
    assert "base_lr below 0.05" in said and "nothing was saved" not in said
    assert finite(tmp_path / "checkpoint.safetensors") and finite(tmp_path / "model.safetensors")


def test_a_learning_rate_far_too_high_writes_nothing_that_is_not_finite(tmp_path):
    "A checkpoint after every step, while loss and gradients overflow."
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=r"3 in a row .*use base_lr below 1e\+06"):
        warnings.simplefilter("ignore")
        trained(tmp_path, Toy(), SMALL.replace(base_lr=1e6, max_bad_steps=3), save_minutes=0)
    saved = list(tmp_path.glob("*.safetensors"))
    assert saved and all(finite(path) for path in saved)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    "Whatever made them so: here a callback spoils a weight before the second checkpoint."

    def spoil(row):
        with torch.no_grad():
            trainer.model.encoder.norm.weight[0] = float("inf") if row["epoch"] == 2 else 1.0

    trainer = Trainer(SMALL, out_dir=tmp_path, quiet=True, callback=spoil)
    with pytest.raises(FloatingPointError, match=r"is not written: model.encoder.norm.weight must be"):
        trainer.fit(Toy())
    assert read_progress(tmp_path / "checkpoint.safetensors")["step"] == 4
    with pytest.raises(FloatingPointError, match="must be finite"):
        trainer.model.save_pretrained(tmp_path / "model")
    assert all(finite(path) for path in tmp_path.rglob("*.safetensors"))


# ---- checkpoints


@pytest.mark.parametrize("keep, earlier", [(1, []), (2, [8]), (3, [4, 8])])
def test_the_newest_checkpoints_stay(tmp_path, keep, earlier):
    trained(tmp_path, cfg=SMALL.replace(keep_checkpoints=keep))
    names = [f"checkpoint-{step:08d}.safetensors" for step in earlier]
    assert sorted(p.name for p in tmp_path.glob("checkpoint*")) == [*names, "checkpoint.safetensors"]
    assert [read_progress(tmp_path / name)["step"] for name in names] == earlier


def test_an_earlier_checkpoint_resumes_bit_for_bit_when_the_newest_is_damaged(tmp_path):
    whole = trained()
    trained(tmp_path)
    newest = tmp_path / "checkpoint.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(ValueError, match="rename it to checkpoint.safetensors: checkpoint-00000008.safetensors"):
        Trainer.resume(tmp_path)
    (tmp_path / "checkpoint-00000008.safetensors").rename(newest)
    trainer = Trainer.resume(tmp_path, quiet=True)
    trainer.fit(Toy())
    assert all(torch.equal(whole[name], value) for name, value in trainer.model.state_dict().items())


def test_a_new_training_does_not_replace_a_run(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match="already holds a run; use Trainer.resume"):
        trained(tmp_path)


def test_what_killed_runs_left_is_swept(tmp_path):
    for name in (".checkpoint.safetensors.0badcafe.tmp", ".checkpoint.safetensors.k3_9xq0z", ".mine"):
        (tmp_path / name).touch()
    trained(tmp_path)
    assert [p.name for p in tmp_path.glob(".*")] == [".mine"]


def test_a_kill_between_checkpoint_and_history_leaves_no_stale_table(tmp_path, monkeypatch):
    def killed(self, path):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("audiomaepp.train.History.to_csv", killed)
        with pytest.raises(SystemExit):
            trained(tmp_path, cfg=SMALL.replace(eval_every=0))
    assert not (tmp_path / "history.csv").exists()
    Trainer.resume(tmp_path, quiet=True).fit(Toy())  # it was at its end: nothing is left to train
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + SMALL.epochs


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_resumed_run_does_not_hold_its_old_checkpoint_on_disk(tmp_path):
    trained(tmp_path, cfg=SMALL.replace(keep_checkpoints=1))
    trainer = Trainer.resume(tmp_path, quiet=True, epochs=4)
    assert "checkpoint" not in Path("/proc/self/maps").read_text()
    trainer.fit(Toy())


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stands(tmp_path):
    cfg = SMALL.replace(keep_checkpoints=1)
    trained(tmp_path, cfg=cfg)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    trainer = Trainer.resume(tmp_path, quiet=True, epochs=5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"checkpoint.safetensors cannot be written \(File too large\)"):
            trainer.fit(Toy())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_earlier_checkpoints_make_room_on_a_full_disk(tmp_path, monkeypatch):
    from audiomaepp import checkpoints

    kept, write, model = Checkpoints(tmp_path, keep=3), checkpoints.write_checkpoint, AudioMAEPlusPlus(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    progress = dict(config=SMALL.to_dict(), epoch=1, batch=0, best=None, rows=[])
    for step in (1, 2, 3):
        kept.save(model, optimizer, progress | {"step": step})

    def on_a_disk_for_two(path, *args):
        if kept.earlier():
            error = OutputError("no space")
            error.errno = 28
            raise error
        write(path, *args)

    monkeypatch.setattr(checkpoints, "write_checkpoint", on_a_disk_for_two)
    kept.save(model, optimizer, progress | {"step": 4})
    assert read_progress(kept.newest)["step"] == 4


@pytest.mark.parametrize("place", ["file/run", "locked/run"])
def test_an_impossible_folder_is_one_line_that_names_it(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    if place.startswith("locked") and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    with pytest.raises(OutputError, match=f"{place} cannot be written"):
        trained(tmp_path / place)


def test_the_umask_decides_who_may_read_a_run(tmp_path):
    "On a shared machine, a person who hides their files hides their runs."
    before = os.umask(0o077)
    try:
        trained(tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) >= 4 and all(path.stat().st_mode & 0o077 == 0 for path in files)


# ---- signals


def as_program(folder: str, out: str, resume: str):
    "Train slowly enough to be interrupted: a line for each batch, and then wait for the next line of input."

    def pace(epoch, number):
        print(epoch, number, flush=True)
        sys.stdin.readline()

    with_pace = Toy(pace=pace)
    trainer = Trainer.resume(folder, quiet=True) if resume == "resume" else Trainer(SMALL, out_dir=folder, quiet=True)
    try:
        trainer.fit(with_pace)
    except KeyboardInterrupt as stopped:
        print(json.dumps({"signum": getattr(stopped, "signum", 0), "said": str(stopped)}), flush=True)
        raise
    torch.save(trainer.model.state_dict(), out)


def _heeding_signals():
    "A background job ignores Ctrl-C, and nohup SIGHUP; a child would inherit that."
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


def started(*args):
    env = {**os.environ, "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        stderr=subprocess.DEVNULL, preexec_fn=_heeding_signals,
    )  # fmt: skip


@pytest.mark.parametrize("name, batch", [("SIGINT", 0), ("SIGTERM", 6), ("SIGHUP", 3), ("SIGUSR1", 5)])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_bit_for_bit(tmp_path, name, batch):
    "Also in the very first batch. `SIGHUP` comes when a terminal closes, the others from people and schedulers."
    run = started(tmp_path / "run", tmp_path / "out", "new")
    for number in range(batch + 1):
        assert run.stdout.readline().split() == [str(number // 4), str(number % 4)]
        if number == batch:
            run.send_signal(getattr(signal, name))
        run.stdin.write("\n")
        run.stdin.flush()
    said = [line for line in run.communicate(timeout=60)[0].splitlines() if line.startswith("{")]
    stopped = json.loads(said[0])
    assert stopped["signum"] == getattr(signal, name)
    assert f"{name} stopped the training after step {batch + 1}; the checkpoint is in" in stopped["said"]
    trainer = Trainer.resume(tmp_path / "run", quiet=True)
    assert trainer.state.step == batch + 1
    trainer.fit(Toy())
    whole = trained()
    assert all(torch.equal(whole[key], value) for key, value in trainer.model.state_dict().items())


# ---- data that vanish


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "sounds" / f"class{i % 4}" / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, 8000), 16000)
    return tmp_path / "sounds"


FROM_FILES = Config.preset(
    "nano", img_size=(48, 80), patch_size=(16, 16), embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32,
    decoder_num_heads=2, batch_size=8, epochs=4, warmup_epochs=0, eval_every=1, max_unreadable=0.1,
)  # fmt: skip


def on_files(folder, run, when, cfg=FROM_FILES):
    "Train on files, and call `when(row)` after each epoch."
    loader = ClipLoader(open_recordings(folder), cfg)
    trainer = Trainer(cfg, out_dir=run, transform=build_frontend(cfg), quiet=True, callback=when)
    return trainer, loader


def test_a_few_clips_that_vanish_are_replaced_and_listed(folder, tmp_path):
    gone = [str(path) for path in sorted(folder.rglob("*.wav"))[:3]]

    def when(row):
        for path in gone if row["epoch"] == 1 else ():
            os.remove(path)

    trainer, loader = on_files(folder, tmp_path / "run", when)
    seen = []
    trainer.accelerator.unwrap_model(trainer.model).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    trainer.fit(loader)
    assert all(len(spec) == 8 for spec in seen) and all(s.std() > 0.1 for spec in seen for s in spec), "digital silence"
    listed = (tmp_path / "run" / "skipped.csv").read_text()
    assert all(path in listed for path in gone) and listed.count("does not exist") == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanish_stop_the_run_with_a_list_and_a_checkpoint(folder, tmp_path, workers):
    def when(row):
        if row["epoch"] == 2:
            folder.rename(folder.with_name("elsewhere"))

    cfg = FROM_FILES.replace(num_workers=workers)
    trainer, loader = on_files(folder, tmp_path / "run", when, cfg)
    with pytest.raises(UnreadableError, match=r"of 40 training clips cannot be read any more; at most 4 may be lost"):
        trainer.fit(loader)
    assert (tmp_path / "run" / "skipped.csv").read_text().count("does not exist") > 4
    assert read_progress(tmp_path / "run" / "checkpoint.safetensors")["step"] == trainer.state.step >= 10
    folder.with_name("elsewhere").rename(folder)
    resumed = Trainer.resume(tmp_path / "run", transform=build_frontend(cfg), quiet=True)
    resumed.fit(ClipLoader(open_recordings(folder), cfg))
    assert resumed.state.epoch == 4




def _with_worker(folder, tmp_path, monkeypatch, fate, **settings):
    "A run whose loader process meets its fate in the second epoch."
    import audiomaepp.batches as batches

    cfg, read = FROM_FILES.replace(num_workers=1, **settings), batches._Clips.__getitem__

    def doomed(self, key):
        if key[0] == 1:
            fate()
        return read(self, key)

    monkeypatch.setattr(batches._Clips, "__getitem__", doomed)
    trainer, loader = on_files(folder, tmp_path / "run", None, cfg)
    with pytest.raises(LoaderError) as failed:
        trainer.fit(loader)
    assert read_progress(tmp_path / "run" / "checkpoint.safetensors")["step"] == 5
    return str(failed.value)


def test_an_error_in_a_loader_process_keeps_its_own_words():
    "Only a process that was killed, or hangs, is told as such: a bug in a data set is not a lack of memory."
    bug = ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback …: no column 'x'")
    assert loader_error(bug) is bug


def test_a_killed_loader_process_is_said(folder, tmp_path, monkeypatch):
    said = _with_worker(folder, tmp_path, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert "a loader process ended" in said and "smaller num_workers" in said


def test_a_loader_process_that_hangs_is_said(folder, tmp_path, monkeypatch):
    said = _with_worker(folder, tmp_path, monkeypatch, lambda: time.sleep(30), loader_timeout=1)
    assert "no batch came from the loader processes" in said and "raise loader_timeout" in said


if __name__ == "__main__":
    as_program(*sys.argv[1:])
