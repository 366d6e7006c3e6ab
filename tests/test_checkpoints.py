"""A checkpoint is complete or it does not count, is that of its own moment, and costs the training no waiting."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from audiomaepp import checkpoints, train
from audiomaepp.checkpoints import Checkpoints, load_checkpoint, read_progress, training_tensors
from audiomaepp.config import Config
from audiomaepp.files import OutputError
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.train import Trainer

SMALL = Config.preset(
    "nano", img_size=(48, 80), embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, epochs=3,
    warmup_epochs=0, precision="fp32", batch_size=4,
)  # fmt: skip
BATCHES = [{"spec": torch.randn(4, 1, 48, 80, generator=torch.Generator().manual_seed(i))} for i in range(4)]


def progress(step):
    return dict(config=SMALL.to_dict(), epoch=1, batch=0, step=step, best=None, rows=[])


# ---- while the training goes on


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that ends its first write only after the next step of a training; the weights that began that step."""
    write, step, moved, kept = checkpoints.write_checkpoint, train._Engine.step, threading.Event(), {}

    def slow(path, tensors, said):
        if not kept.get("written"):
            assert moved.wait(30), "the training waited for the disk"
            kept["history"] = (path.parent / "history.csv").exists()
            kept["written"] = said["step"]
        write(path, tensors, said)

    def noted(engine, batches, number, *rest):
        if number == 2:
            kept["weights"] = {name: value.clone() for name, value in engine.whole.state_dict().items()}
        done = step(engine, batches, number, *rest)
        if number == 2:
            moved.set()
        return done

    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    monkeypatch.setattr(train._Engine, "step", noted)
    return kept


def test_the_training_goes_on_while_the_disk_is_slow_and_the_checkpoint_is_of_its_own_step(tmp_path, slow_disk):
    """Else each checkpoint stops all processes, or holds weights of two steps, with which no run could resume."""
    cfg = SMALL.replace(eval_steps=2, epochs=1, keep_checkpoints=5)
    Trainer(cfg, out_dir=tmp_path, quiet=True).fit(BATCHES)
    assert slow_disk["written"] == 2 and not slow_disk["history"]  # a folder with a history alone can't be resumed
    saved = load_file(tmp_path / "checkpoint-00000002.safetensors")
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in slow_disk["weights"].items())
    assert read_progress(tmp_path / "checkpoint.safetensors")["step"] == 4


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path, monkeypatch):
    """In the thread the error would be seen by nobody, and a week of training would have no checkpoint."""
    def failing(path, *args):
        error = OutputError(f"{path} cannot be written")
        error.errno = errno.EIO
        raise error

    steps, step = [], train._Engine.step
    monkeypatch.setattr(checkpoints, "write_checkpoint", failing)
    monkeypatch.setattr(train._Engine, "step", lambda *args: steps.append(args[2]) or step(*args))
    with pytest.raises(OutputError, match="checkpoint.safetensors cannot be written"):
        Trainer(SMALL.replace(epochs=50), out_dir=tmp_path, quiet=True, save_minutes=0).fit(BATCHES)
    assert len(steps) < 50


PROGRAM = """
import os, signal, sys
from audiomaepp import checkpoints
from test_checkpoints import BATCHES, SMALL, Trainer

write = checkpoints.write_checkpoint


def slow(path, tensors, said):
    if said["step"] == 4:  # the last one
        checkpoints.threading.Event().wait(1)
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        checkpoints.threading.Event().wait(1)
    write(path, tensors, said)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    checkpoints.write_checkpoint = slow
    Trainer(SMALL.replace(epochs=1), out_dir=sys.argv[1], quiet=True).fit(BATCHES)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(name, tmp_path):
    """A job that was ended at its time limit, just when it had finished, kept nothing of its last epoch."""
    (tmp_path / "program.py").write_text(PROGRAM)
    places = [str(Path(__file__).parent), str(Path(checkpoints.__file__).parents[1])]
    done = subprocess.run([sys.executable, tmp_path / "program.py", tmp_path / "run", name], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(places)})  # fmt: skip
    assert done.returncode != 0 and f"{name} stopped the training after step 4" in done.stderr, done.stderr
    assert read_progress(tmp_path / "run" / "checkpoint.safetensors")["step"] == 4
    assert (tmp_path / "run" / "history.csv").exists()


# ---- in parts


@pytest.fixture
def divided():
    "A model that a group of one process has divided, and its optimizer after two steps."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = AudioMAEPlusPlus(SMALL)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    yield model, optimizer
    dist.destroy_process_group()


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    model(torch.randn(4, 1, 48, 80)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model, optimizer):
    "All weights and averages, copied."
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
            for name, value in training_tensors(model, optimizer).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_divided_model_is_saved_in_parts_and_loaded_whole_or_divided(divided, tmp_path):
    kept = Checkpoints(tmp_path)
    step(*divided, 1)
    kept.save(*divided, progress(1))
    now = whole(*divided)
    (folder,) = tmp_path.glob("*.parts")
    assert kept.newest.stat().st_size < 20_000 < sum(path.stat().st_size for path in folder.iterdir())
    other = AudioMAEPlusPlus(SMALL)
    its = torch.optim.AdamW(other.parameters())
    load_checkpoint(kept.newest, other, its)
    assert same(whole(other, its), now)
    step(*divided, 2)
    assert not same(whole(*divided), now)
    load_checkpoint(kept.newest, *divided)
    assert same(whole(*divided), now)
    kept.close()


def test_the_copy_of_a_divided_model_is_freed(divided, tmp_path, monkeypatch):
    """PyTorch keeps it until its stager is closed: a model that just fits had no room after some checkpoints."""
    from torch.distributed.checkpoint.staging import DefaultStager

    closed, close = [], DefaultStager.close
    monkeypatch.setattr(DefaultStager, "close", lambda self: closed.append(1) or close(self))
    kept = Checkpoints(tmp_path)
    for number in (1, 2):
        kept.save(*divided, progress(number))
        assert len(closed) == number
    kept.close()


def test_parts_are_removed_with_the_last_checkpoint_that_names_them(divided, tmp_path):
    """A copy of a checkpoint under another name keeps its parts; a damaged file keeps its own, not those of all."""
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(*divided, progress(1))
    shutil.copy(kept.newest, tmp_path / "mine.safetensors")
    for number in (2, 3):
        kept.save(*divided, progress(number))
    (tmp_path / "checkpoint-00000002.safetensors").write_bytes(b"damaged")
    assert [folder.name[:19] for folder in sorted(tmp_path.glob("*.parts"))] == [
        "checkpoint-00000001", "checkpoint-00000002", "checkpoint-00000003"]  # fmt: skip
    kept.keep = 3
    for number in (4, 5):
        kept.save(*divided, progress(number))
    assert [folder.name[:19] for folder in sorted(tmp_path.glob("*.parts"))] == [
        "checkpoint-00000001", "checkpoint-00000003", "checkpoint-00000004", "checkpoint-00000005"]  # fmt: skip
    load_checkpoint(tmp_path / "mine.safetensors", *divided)
    kept.close()


def test_one_file_is_loaded_into_a_divided_model(divided, tmp_path):
    """A run that one process began, or an earlier version, goes on in parts."""
    other = AudioMAEPlusPlus(SMALL)
    its = torch.optim.AdamW(other.parameters())
    step(other, its, 1)
    Checkpoints(tmp_path).save(other, its, progress(1))
    assert not list(tmp_path.glob("*.parts"))
    load_checkpoint(tmp_path / "checkpoint.safetensors", *divided)
    assert same(whole(*divided), whole(other, its))
    assert all(hasattr(value, "placements") for value in divided[1].state[divided[0].encoder.cls_token].values()
               if value.dim())  # fmt: skip


def test_parts_count_only_when_all_are_written(divided, tmp_path, monkeypatch):
    """A process that is killed among the parts leaves the checkpoint before, and no folder for ever."""
    kept = Checkpoints(tmp_path, keep=1)
    step(*divided, 1)
    kept.save(*divided, progress(1))
    before = whole(*divided)
    step(*divided, 2)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "write_checkpoint", killed)
        kept.save(*divided, progress(2))
    assert len(list(tmp_path.glob("*.parts"))) == 2
    assert read_progress(kept.newest)["step"] == 1
    other = AudioMAEPlusPlus(SMALL)
    its = torch.optim.AdamW(other.parameters())
    load_checkpoint(kept.newest, other, its)
    assert same(whole(other, its), before)
    kept.save(*divided, progress(3))
    assert [path.name[:19] for path in tmp_path.glob("*.parts")] == ["checkpoint-00000003"]
    kept.close()


def test_on_a_full_disk_earlier_parts_make_room(divided, tmp_path, monkeypatch):
    from torch.distributed.checkpoint import filesystem

    kept, stream = Checkpoints(tmp_path, keep=3), filesystem.FileSystem.create_stream
    step(*divided, 1)
    for number in (1, 2, 3):
        kept.save(*divided, progress(number))
    assert len(list(tmp_path.glob("*.parts"))) == 3

    def on_a_disk_for_one(self, path, mode):
        if "w" in mode and len(list(tmp_path.glob("checkpoint-*.safetensors"))):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return stream(self, path, mode)

    monkeypatch.setattr(filesystem.FileSystem, "create_stream", on_a_disk_for_one)
    kept.save(*divided, progress(4))
    assert read_progress(kept.newest)["step"] == 4

    def full(self, path, mode):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(filesystem.FileSystem, "create_stream", full)
    with pytest.raises(OutputError, match=r"\.parts cannot be written .No space left.*free some space"):
        kept.save(*divided, progress(5))
    load_checkpoint(kept.newest, *divided)
    assert read_progress(kept.newest)["step"] == 4
    kept.close()


def test_a_weight_that_is_not_finite_is_not_saved_in_parts(divided, tmp_path):
    kept = Checkpoints(tmp_path)
    step(*divided, 1)
    kept.save(*divided, progress(1))
    with torch.no_grad():
        divided[0].encoder.norm.weight.to_local()[0] = float("nan")
    with pytest.raises(FloatingPointError, match="encoder.norm.weight must be finite"):
        kept.save(*divided, progress(2))
    assert read_progress(kept.newest)["step"] == 1 and len(list(tmp_path.glob("*.parts"))) == 1
    kept.close()


def test_incomplete_parts_are_named(divided, tmp_path):
    """PyTorch leaves weights as they are, without a word, if a file that holds them is missing."""
    kept = Checkpoints(tmp_path)
    step(*divided, 1)
    for number in (1, 2):
        kept.save(*divided, progress(number))
    kept.close()
    (file,) = next(tmp_path.glob("checkpoint-00000002-*.parts")).iterdir()
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(ValueError, match=rf"{file.name} must have \d+ bytes, as .* states, got \d+ bytes"):
        load_checkpoint(kept.newest, *divided)
    file.unlink()
    with pytest.raises(ValueError, match="got no file; use an undamaged copy of the folder"):
        load_checkpoint(kept.newest, *divided)
    with pytest.raises(ValueError, match=r"got no file; .*; to resume from an earlier one, .*: checkpoint-00000001"):
        kept.read()
