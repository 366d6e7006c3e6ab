"""Several processes train as one does: the same parameters on all, the losses over the clips of all.

This file is a test and, under torchrun, the program that it tests.
"""

import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem
from torch.optim.optimizer import register_optimizer_step_pre_hook

import audiomaepp
import audiomaepp.batches as loading
from audiomaepp import headers
from audiomaepp.checkpoints import Checkpoints, load_checkpoint, read_progress
from audiomaepp.config import Config
from audiomaepp.data import open_recordings
from audiomaepp.features import build_frontend
from audiomaepp.files import MARKER
from audiomaepp.model import AudioMAEPlusPlus, split_by_noise
from audiomaepp.train import History, Trainer, _share
from audiomaepp.weights import cpu_state

STEPS, HALF = 6, 4  # optimizer steps; clips in a process's batch


def config(batch_size, **changes):
    small = dict(
        img_size=(48, 80), embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, epochs=3,
        warmup_epochs=0, base_lr=0.05, contrastive_weight=1.0, uniformity_weight=1.0, precision="fp32",
    )  # fmt: skip
    return Config.preset("nano", **{**small, **changes}, batch_size=batch_size)


def batches(size, labels=True, clips=4 * HALF):
    "Clips in batches of `size`, two steps' worth of them; classes have a clip in either half."
    generator = torch.Generator().manual_seed(5)
    spec = torch.randn(clips, 1, 48, 80, generator=generator)
    label = torch.arange(clips) % 4
    parts = [dict(spec=s, label=n) for s, n in zip(spec.split(size), label.split(size), strict=True)]
    return parts if labels else [{"spec": part["spec"]} for part in parts]


class MaskedByContent(AudioMAEPlusPlus):
    "Hides patches by what is in them, so that a clip has one mask in whatever process it lands."

    def forward(self, spec, labels=None, mask=None, view2=None):
        _, mask = split_by_noise(self.patchify(spec).sum(-1), self.cfg.num_visible)
        return super().forward(spec, labels, mask)


class Counted(MaskedByContent):
    "Has other first weights in each process, and a buffer that counts its clips."

    def __init__(self, cfg):
        torch.manual_seed(int(os.environ["RANK"]))
        super().__init__(cfg)
        self.register_buffer("clips", torch.zeros(()))

    def forward(self, spec, *args, **kwargs):
        if self.training:
            self.clips += len(spec)
        return super().forward(spec, *args, **kwargs)


def train(cfg, data, model=AudioMAEPlusPlus, **options):
    "Train, and return the trainer, the losses of each step, and the masks."
    torch.manual_seed(cfg.seed)
    losses, masks = [], []
    trainer = Trainer(cfg, model=model(cfg), quiet=True, **options)

    def note(module, args, out):
        losses.append({name: value.item() for name, value in {"loss": out.loss, **out.losses}.items()})
        masks.append(out.mask)

    getattr(trainer.model, "module", trainer.model).register_forward_hook(note)
    trainer.fit(data)
    return trainer, losses, torch.stack(masks)


def in_doubles(size):
    """Ten steps in double precision: losses and gradients (not clipped, so with their scale) of each, last weights."""
    gradients = []

    def note(optimizer, *_):
        gradients.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    hook = register_optimizer_step_pre_hook(note)
    torch.set_default_dtype(torch.float64)
    try:
        trainer, losses, _ = train(config(size, epochs=5, grad_clip=0), batches(size), MaskedByContent)
    finally:
        torch.set_default_dtype(torch.float32)
        hook.remove()
    return losses, gradients, trainer.state.model.state_dict()


class Stop(Exception):
    pass


def stop_after(steps):
    def callback(row):
        if row["step"] == steps:
            raise Stop

    return callback


def begin(folder, cfg, data, model=MaskedByContent):
    "A run that stops in the middle."
    try:
        train(cfg, data, model, out_dir=folder, save_minutes=0, callback=stop_after(4))
    except Stop:
        pass


def save_weights(trainer, path):
    save_file(cpu_state(trainer.state.model), f"{path}_{os.environ['RANK']}.safetensors")


def as_one_of_two(out):
    "What each process does under torchrun: train in several ways and write down what came out."
    import_module("torch.distributed.nn")  # DDP would, after the group, and the group could never end
    cfg, rank = config(HALF), int(os.environ["RANK"])
    found = {}

    def keep(name, trainer, losses, masks):
        save_weights(trainer, out / name)
        found[name] = dict(losses=losses, masks=masks.flatten(1).tolist())

    keep("given masks", *train(cfg, batches(HALF), MaskedByContent))
    keep("labels", *train(cfg, batches(HALF), out_dir=out / "with labels", save_minutes=0))
    keep("views", *train(cfg, batches(HALF, labels=False)))
    keep("counted", *train(cfg, batches(HALF), Counted))
    keep("off", *train(cfg.replace(use_contrastive_loss=False, use_uniformity_loss=False), batches(HALF)))

    torch.save(in_doubles(HALF), out / f"doubles_{rank}.pt")

    begin(out / "stopped by content", cfg, batches(HALF))
    begin(out / "stopped", cfg, batches(HALF), AudioMAEPlusPlus)
    begin(out / "whole", config(6), batches(6, clips=24))
    dist.barrier()
    resumed = Trainer.resume(out / "stopped", quiet=True, save_minutes=1e9)
    found["resumed at"] = resumed.state.step
    resumed.fit(batches(HALF))
    keep("resumed", resumed, [], torch.zeros(1, 1))

    model = MaskedByContent(config(2 * HALF))
    resumed = Trainer.resume(out / "of one", model=model, quiet=True)  # one process began it, on whole batches
    found["rates of one"] = resumed.fit(batches(2 * HALF))["lr"]
    save_weights(resumed, out / "resumed of one")

    spoilt = batches(HALF)
    spoilt[1]["spec"][0] = float("nan")  # the second process's first batch
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        keep("spoilt", *train(cfg.replace(epochs=1, use_contrastive_loss=False), spoilt, out_dir=out / "spoilt"))
    found["said"] = [str(w.message) for w in said if "not finite" in str(w.message)]
    (out / f"found_{rank}.json").write_text(json.dumps(found))

    del resumed
    gc.collect()  # a DDP that is freed after the group may wait for ever: for a thread that waits for Python's lock
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None  # so its threads have ended; one that outlives Python aborts the process


def as_one_with_a_part(out):
    "What each process does whose model is in parts; and the beginning of runs that three processes end."
    cfg = config(HALF, shard_model=True)
    trainer, losses, _ = train(cfg, batches(HALF), MaskedByContent, out_dir=out / "in parts", save_minutes=0)
    save_weights(trainer, out / "in parts")
    save_weights(train(cfg, batches(HALF), Counted)[0], out / "counted in parts")
    here = sum(p.to_local().numel() for p in trainer.model.parameters())
    (out / f"parts_{os.environ['RANK']}.json").write_text(json.dumps(dict(losses=losses, here=here)))
    begin(out / "stopped parts", cfg, batches(HALF))
    begin(out / "parts", cfg.replace(batch_size=6), batches(6, clips=24))
    dist.barrier()
    resumed = Trainer.resume(out / "stopped parts", model=MaskedByContent(cfg), quiet=True, save_minutes=1e9)
    resumed.fit(batches(HALF))
    save_weights(resumed, out / "resumed in parts")
    whole = config(2 * HALF, shard_model=True)
    resumed = Trainer.resume(out / "of one in parts", model=MaskedByContent(whole), quiet=True)
    resumed.fit(batches(2 * HALF))
    save_weights(resumed, out / "of one in parts")
    del resumed
    on_a_full_disk(out / "full", cfg.replace(keep_checkpoints=3))
    gc.collect()
    (out / f"spectra_{os.environ['RANK']}.json").write_text(json.dumps(spectra_of(out / "sounds")))
    dist.destroy_process_group()


def on_a_full_disk(folder, cfg):
    "Train; the disk of the second process has no room for parts beside more than one earlier checkpoint."
    stream = filesystem.FileSystem.create_stream

    def create(self, path, mode):
        if "w" in mode and os.environ["RANK"] == "1" and len(list(folder.glob("checkpoint-*.safetensors"))) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return stream(self, path, mode)

    filesystem.FileSystem.create_stream = create
    train(cfg, batches(HALF), MaskedByContent, out_dir=folder, save_minutes=0)
    filesystem.FileSystem.create_stream = stream


def spectra_of(sounds):
    "Train on files and return the lengths of the recordings whose spectra this process has computed."
    cfg, computed, plain = config(HALF, cache_features=True), [], loading.log_recording
    loading.log_recording = lambda front, wav: computed.append(len(wav)) or plain(front, wav)
    clips = loading.ClipLoader(open_recordings(sounds), cfg)
    Trainer(cfg, transform=loading.Augment(cfg, build_frontend(cfg)), quiet=True).fit(clips)
    return computed


def as_one_of_three(out):
    "What each of three processes does: continue runs that two have begun."
    import_module("torch.distributed.nn")
    for name in ("whole", "parts"):
        resumed = Trainer.resume(out / name, model=MaskedByContent(config(6)), quiet=True)
        resumed.fit(batches(6, clips=24))
        save_weights(resumed, out / name)
    del resumed
    gc.collect()
    dist.destroy_process_group()


def torchrun(program, *args, processes=2, restarts=0):
    done = run_several(program, *args, processes=processes, restarts=restarts)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def run_several(program, *args, processes=2, restarts=0):
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted processes may find the addresses of dead ones
        "PYTHONPATH": str(Path(audiomaepp.__file__).parents[1]),
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, "--max_restarts", str(restarts), program, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=180)


pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What both processes found: (losses and masks by name, folder)."
    out = tmp_path_factory.mktemp("two")
    (out / "sounds").mkdir()
    for i in range(4 * HALF):
        soundfile.write(out / "sounds" / f"{i:02d}.wav", torch.randn(8000 + i).numpy() / 9, 16000)
    for name, parts in (("of one", False), ("of one in parts", True)):
        begin(out / name, config(2 * HALF, shard_model=parts), batches(2 * HALF))
    for work in ("as_one_of_two", "as_one_with_a_part"):
        torchrun(__file__, work, out)
    return [json.loads((out / f"found_{rank}.json").read_text()) for rank in (0, 1)], out


@pytest.fixture(scope="module")
def three(two, tmp_path_factory):
    "Folder of two runs that two processes began and three ended."
    out = tmp_path_factory.mktemp("three")
    for name in ("whole", "parts"):
        shutil.copytree(two[1] / name, out / name)
    torchrun(__file__, "as_one_of_three", out, processes=3)
    return out


NAMES = ["given masks", "labels", "views", "off", "resumed"]  # whole copies of a model in parts are equal anyway


@pytest.mark.parametrize("name", NAMES)
def test_both_processes_end_with_the_same_parameters(two, name):
    a, b = (load_file(two[1] / f"{name}_{rank}.safetensors") for rank in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    torch.manual_seed(0)
    start = AudioMAEPlusPlus(config(HALF)).state_dict()
    assert all(a[key].isfinite().all() and not torch.equal(a[key], start[key]) for key in a)


def test_half_batches_in_two_processes_are_whole_batches_in_one(two):
    """With the same masks, every loss of every step, and the parameters at the end; in single precision.

    Not bit for bit: two means of four are added up in another order than one of eight.
    """
    trainer, alone, masks = train(config(2 * HALF), batches(2 * HALF), MaskedByContent)
    both = [rank["given masks"]["losses"] for rank in two[0]]
    assert len(alone) == len(both[0]) == len(both[1]) == STEPS
    for step, one, first, second in zip(range(STEPS), alone, *both, strict=True):
        for name in ("contrastive", "uniformity"):  # over the clips of both, so the same on both
            assert first[name] == pytest.approx(one[name], rel=1e-5), (step, name)
            assert second[name] == pytest.approx(first[name], rel=1e-6), (step, name)
        assert first["reconstruction"] != second["reconstruction"]  # of a process's own clips
        for name in ("reconstruction", "loss"):
            assert (first[name] + second[name]) / 2 == pytest.approx(one[name], rel=1e-5), (step, name)
    theirs = load_file(two[1] / "given masks_0.safetensors")
    torch.manual_seed(0)
    start = MaskedByContent(trainer.cfg).state_dict()
    for name, ours in trainer.model.state_dict().items():
        moved = (ours - start[name]).norm()
        assert (theirs[name] - ours).norm() < 0.05 * moved, name  # AdamW makes much of little gradients


def test_two_processes_compute_what_one_does(two):
    """In double precision, where only the order of sums differs: nothing is lost or counted twice between processes.

    Weights alone do not show it: AdamW makes the same step of gradients that are half as large.
    """
    losses, gradients, weights = in_doubles(2 * HALF)
    both = [torch.load(two[1] / f"doubles_{rank}.pt") for rank in (0, 1)]
    assert len(losses) == len(gradients) == 10 and gradients[-1].norm() > 0
    for step, one in enumerate(losses):
        for name, value in one.items():
            assert np.mean([theirs[0][step][name] for theirs in both]) == pytest.approx(value, rel=1e-9), (step, name)
    for theirs in both:
        for step, (one, other) in enumerate(zip(gradients, theirs[1], strict=True)):
            assert (other - one).norm() < 1e-9 * one.norm(), step
        for name, one in weights.items():
            assert (theirs[2][name] - one).norm() <= 1e-6 * one.norm(), name


def test_each_process_draws_its_own_masks(two):
    for name in ("labels", "views", "off"):
        first, second = (torch.tensor(rank[name]["masks"]) for rank in two[0])
        assert len(first) == STEPS and not any(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


def test_views_are_paired_across_processes(two):
    first, second = (rank["views"]["losses"] for rank in two[0])
    for a, b in zip(first, second, strict=True):
        assert a["contrastive"] == pytest.approx(b["contrastive"], rel=1e-6) and a["contrastive"] > 0


def test_a_resumed_run_of_two_goes_on_as_it_would_have(two):
    assert [rank["resumed at"] for rank in two[0]] == [3, 3]  # saved in the middle of an epoch
    whole, resumed = (load_file(two[1] / f"{name}_0.safetensors") for name in ("labels", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def moved(state):
    torch.manual_seed(0)
    start = MaskedByContent(config(HALF)).state_dict()
    return torch.cat([(state[name] - start[name]).flatten() for name in start])


def test_a_run_of_one_goes_on_with_two(two):
    "The same steps, rates and clips in a step: the clips of each batch are shared between the processes."
    trainer, *_ = train(config(2 * HALF), batches(2 * HALF), MaskedByContent)
    first, second = (load_file(two[1] / f"resumed of one_{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    progress = read_progress(two[1] / "of one" / "checkpoint.safetensors")
    assert (progress["step"], progress["epoch"], progress["world"]) == (STEPS, 3, 1)
    assert two[0][0]["rates of one"] == [row["lr"] for row in progress["rows"]]
    assert progress["rows"][-1]["lr"] == trainer.history["lr"][-1] > 0
    whole = moved(trainer.model.state_dict())
    assert (moved(first) - whole).norm() < 0.02 * whole.norm()


def test_a_run_of_two_goes_on_with_one(two, tmp_path):
    "It ends with the parameters that two processes reach, at the same step, with the rate of two."
    folder = tmp_path / "run"
    shutil.copytree(two[1] / "stopped by content", folder)
    resumed = Trainer.resume(folder, model=MaskedByContent(config(HALF)), quiet=True)
    assert (resumed.state.world, resumed.state.step) == (2, 3)
    resumed.fit(batches(HALF))
    assert resumed.state.step == resumed.schedule.total == STEPS
    whole = moved(load_file(two[1] / "given masks_0.safetensors"))
    assert (moved(resumed.model.state_dict()) - whole).norm() < 0.01 * whole.norm()


def test_a_model_in_parts_learns_what_a_whole_one_learns(two):
    """Each process holds half of the weights; the losses, the weights at the end and the files are the same."""
    weights = sum(p.numel() for p in MaskedByContent(config(HALF)).parameters())
    parts = [json.loads((two[1] / f"parts_{rank}.json").read_text()) for rank in (0, 1)]
    for rank, part in zip(two[0], parts, strict=True):
        assert 0.4 * weights < part["here"] < 0.6 * weights
        for one, other in zip(rank["given masks"]["losses"], part["losses"], strict=True):
            assert other == pytest.approx(one, rel=1e-5)
    one, other, resumed = (
        load_file(two[1] / f"{name}_0.safetensors") for name in ("given masks", "in parts", "resumed in parts")
    )
    assert (moved(one) - moved(other)).norm() < 1e-3 * moved(one).norm()
    assert all(torch.equal(other[name], resumed[name]) for name in other)
    written = AudioMAEPlusPlus.from_pretrained(two[1] / "in parts").state_dict()
    assert all(torch.equal(other[name], written[name]) for name in other)


def test_each_process_writes_its_part_of_a_checkpoint(two):
    """One of them had to gather the averages of all: 12 bytes for each weight of a model that no process can hold."""
    newest = two[1] / "in parts" / "checkpoint.safetensors"
    folder = newest.with_name(read_progress(newest)["parts"]["folder"])
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes) and newest.stat().st_size < 0.1 * sum(sizes)


def test_one_full_disk_makes_room_for_all(two):
    """Both processes removed the same files; one of them failed, and the other waited for it."""
    kept = Checkpoints(two[1] / "full")
    assert kept.read()["step"] == STEPS and len(kept.earlier()) < 2
    model = MaskedByContent(config(HALF))
    load_checkpoint(kept.newest, model, torch.optim.AdamW(model.parameters()))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in
               load_file(two[1] / "in parts_0.safetensors").items())  # fmt: skip


def test_a_run_of_one_file_goes_on_in_parts(two):
    """It ends where a run of one process ends."""
    trainer, *_ = train(config(2 * HALF), batches(2 * HALF), MaskedByContent)
    whole = moved(trainer.model.state_dict())
    first, second = (load_file(two[1] / f"of one in parts_{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (moved(first) - whole).norm() < 0.02 * whole.norm()


def test_processes_of_a_machine_share_what_they_have_computed(two):
    """Each process decoded the whole set and kept it for itself."""
    computed = [json.loads((two[1] / f"spectra_{rank}.json").read_text()) for rank in (0, 1)]
    assert all(computed) and sorted(computed[0] + computed[1]) == [8000 + i for i in range(4 * HALF)]


def test_buffers_and_first_weights_are_those_of_the_main_process(two):
    "In parts as in whole models: else half of the weights would begin as in another process."
    whole, parts = (load_file(two[1] / f"{name}_0.safetensors") for name in ("counted", "counted in parts"))
    assert whole.pop("clips") == parts.pop("clips") == STEPS * HALF
    assert (moved(whole) - moved(parts)).norm() < 1e-3 * moved(whole).norm()


@pytest.mark.parametrize("name", ["whole", "parts"])
def test_a_run_of_two_goes_on_with_three_and_with_one(two, three, name, tmp_path):
    "Whole or in parts, with the same steps and clips in a step."
    trainer, *_ = train(config(12), batches(12, clips=24), MaskedByContent)
    whole = moved(trainer.model.state_dict())
    first, *others = (load_file(three / f"{name}_{rank}.safetensors") for rank in range(3))
    assert all(torch.equal(first[key], other[key]) for key in first for other in others)
    assert (moved(first) - whole).norm() < 0.02 * whole.norm()
    progress = read_progress(three / name / "checkpoint.safetensors")
    assert (progress["step"], progress["epoch"], progress["world"]) == (STEPS, 3, 2)
    shutil.copytree(two[1] / name, tmp_path / name)
    alone = Trainer.resume(tmp_path / name, model=MaskedByContent(config(6)), quiet=True)
    alone.fit(batches(6, clips=24))
    assert (moved(alone.model.state_dict()) - whole).norm() < 0.02 * whole.norm()


def test_processes_that_cannot_share_a_step_are_refused():
    step = batches(HALF)[:2]
    with pytest.raises(ValueError, match="8 clips .2 processes when it began., which 3 processes cannot .* 1, 2, 4"):
        _share(step, rank=0, count=3)
    parts = [_share(step, rank, count=4) for rank in range(4)]
    assert torch.equal(torch.cat([p["spec"] for p in parts]), torch.cat([b["spec"] for b in step]))


def test_a_bad_batch_in_one_process_is_skipped_by_both(two):
    first, second = (load_file(two[1] / f"spoilt_{rank}.safetensors") for rank in (0, 1))
    assert all(first[name].isfinite().all() and torch.equal(first[name], second[name]) for name in first)
    assert all(len(rank["said"]) == 1 and "at step 1, which is skipped" in rank["said"][0] for rank in two[0])
    assert read_progress(two[1] / "spoilt" / "checkpoint.safetensors")["step"] == 2


FLAGS = """--synthetic-clips 4 --epochs 2 --warmup-epochs 0 --batch-size 8 --embed-dim 32 --depth 1 --num-heads 2
    --decoder-embed-dim 32 --decoder-num-heads 2 --precision fp32 --eval-every 1""".split()
COMMAND = """
import os, signal, sys
from audiomaepp import train
from audiomaepp.cli import main

step = train._Engine.step


def deadly(engine, batches, number, *rest):
    if number == int(sys.argv[1]) and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        print(f"killed at step {number}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(engine, batches, number, *rest)


if __name__ == "__main__":
    train._Engine.step = deadly
    main(sys.argv[2:])
"""


@pytest.fixture
def command(tmp_path):
    "A program that trains, and whose second process is killed at a step the first time."
    entry = tmp_path / "command.py"
    entry.write_text(COMMAND)
    return str(entry)


def test_the_command_under_two_processes(tmp_path, command):
    "The real pipeline: files' worth of sounds, balanced batches, held-out scores, one run folder, one voice."
    run = tmp_path / "run"
    said = torchrun(command, -1, "train", "--out", run, *FLAGS)
    for name in ("config.json", "model.safetensors", "checkpoint.safetensors", "history.csv", "data.json"):
        assert (run / name).stat().st_size > 0, name
    assert [p.name for p in run.glob(".*")] == [MARKER], "a temporary file was left behind"
    assert len((run / "history.csv").read_text().splitlines()) == 3
    assert said.count("The run is in") == 1, said
    from audiomaepp.run import evaluate_run

    assert "chance" in str(evaluate_run(run, quiet=True).report)


ELSEWHERE = """
import os, sys
from audiomaepp import data
from audiomaepp.cli import main

decode = data._Check.decode


def failing(check, i):  # a network disk that is away for a moment, in one process
    if os.environ["RANK"] == "1" and i % 3 == 0:
        raise OSError(5, "Input/output error")
    return decode(check, i)


def refusing(*args, **how):  # a library that one machine lacks
    raise ImportError("no codec")


if __name__ == "__main__":
    if sys.argv[1] == "files":
        data._Check.decode = failing
    elif os.environ["RANK"] == "1":
        data.usable = refusing
    main(sys.argv[2:])
"""


@pytest.mark.parametrize(("what", "reason"), [
    ("files", "all processes must open the same recordings, got 24 in process 0"),
    ("library", "process 1 cannot open the recordings: no codec"),
])
def test_processes_that_open_other_recordings_do_not_train(what, reason, tmp_path):
    """One process would train on what another has held out, or wait for one that is gone."""
    entry, sounds = tmp_path / "command.py", tmp_path / "sounds"
    entry.write_text(ELSEWHERE)
    sounds.mkdir()
    for i in range(24):
        wave = torch.randn(8000, generator=torch.Generator().manual_seed(i))
        soundfile.write(sounds / f"{i:02d}.wav", wave.numpy() / 9, 16000)
    done = run_several(entry, what, "train", sounds, "--out", tmp_path / "run", "--epochs", "1")
    assert done.returncode == 1 and reason in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "run" / "history.csv").exists()


MEMORIES = """
import os, sys
from functools import partial
from audiomaepp import data
from audiomaepp.cli import main

if __name__ == "__main__":
    os.environ["AUDIOMAEPP_DATA"] += os.environ["RANK"]  # two machines
    data.usable = partial(data.usable, keep=8000)
    main(sys.argv[1:])
"""


def test_processes_that_remember_other_damaged_recordings_train_on_the_same_ones(tmp_path, monkeypatch):
    """Machines keep what they have found in folders of their own; what the main process knows counts."""
    entry, sounds, home = tmp_path / "command.py", tmp_path / "sounds", tmp_path / "home"
    entry.write_text(MEMORIES)
    sounds.mkdir()
    monkeypatch.setattr(headers, "damage", lambda path, end: "is damaged")
    for i in range(24):
        wave = torch.randn(8000, generator=torch.Generator().manual_seed(i))
        soundfile.write(sounds / f"{i:02d}.wav", wave.numpy() / 9, 16000)
    for rank in range(2):
        monkeypatch.setenv("AUDIOMAEPP_DATA", f"{home}{rank}")
        headers.remember(str(sounds), [str(sounds / f"{rank:02d}.wav")])
    monkeypatch.setenv("AUDIOMAEPP_DATA", str(home))
    torchrun(entry, "train", sounds, "--out", tmp_path / "run", *FLAGS[2:], "--num-workers", 1)
    opened = pd.read_csv(tmp_path / "run" / "recordings.csv")["path"]
    assert sorted(opened) == [f"{i:02d}.wav" for i in range(1, 24)]


def test_a_killed_process_ends_both_by_name(tmp_path, command):
    done = run_several(command, 3, "train", "--out", tmp_path / "run", *FLAGS)
    assert done.returncode == 1
    reason = done.stderr[done.stderr.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", reason) and "Signal 9 (SIGKILL)" in reason, done.stderr[-3000:]


def test_a_run_whose_process_was_killed_is_started_again_and_ends_as_if_it_had_not_been(tmp_path, command):
    """`torchrun --max-restarts` starts the same command again; it goes on from its last checkpoint, bit for bit."""
    for name, at in (("whole", -1), ("killed", 3)):
        said = torchrun(command, at, "train", "--out", tmp_path / name, *FLAGS, restarts=1)
        assert said.count("The run is in") == 1 and ("killed at step 3" in said) == (name == "killed")
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and all(torch.equal(whole[key], killed[key]) for key in whole)
    rows = [History.from_csv(tmp_path / name / "history.csv") for name in ("whole", "killed")]
    assert rows[0]["loss"] == rows[1]["loss"] and len(rows[0]) == 2


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
