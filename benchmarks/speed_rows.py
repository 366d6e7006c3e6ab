"""The rows of speed.py: the work that each one compares."""

import functools
import importlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from speed_peers import HuggingFace, Ours, PlainReference, Released, Timm, check_model, found, need_equal

from audiomaepp.audio import import_torchaudio
from audiomaepp.batches import Augment, ClipLoader
from audiomaepp.config import Config
from audiomaepp.data import open_recordings
from audiomaepp.embed import EmbeddingGenerator, decode_ahead
from audiomaepp.features import Fbank, LogMel, build_frontend, log_recording
from audiomaepp.model import AudioMAEPlusPlus, attend
from audiomaepp.synthetic import generated, synthesize
from audiomaepp.train import Trainer

PRECISIONS = ("float32", "bf16")


def synchronize(device):
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


class Part(NamedTuple):
    """One of the things that a row compares."""

    run: Callable[[], Any]  # the work
    clips: int = 1  # clips or files that a call handles
    stages: dict | None = None  # seconds of the stages of the last call
    outside: bool = False  # whether it runs in another process


class Row(NamedTuple):
    """A line of the table."""

    name: str
    parts: dict[str, Callable[[], Part]]  # "ours" first, or sizes of one thing
    precision: str | None = None  # whose matrix rate is the limit
    check: Callable[[], dict[str, float]] = dict  # compares numbers: largest difference of each peer
    memory: bool = False  # whether the peak memory of each part is measured, in a process of its own
    repeats: int | None = None  # rounds; default: 7
    unit: str = "clip"  # of the speed


def cfg_of(size, batch=8, **changes):
    """The released recipe."""
    return Config.preset(f"official_{size}", batch_size=batch, **changes)


def vit_of(size, batch=8):
    """Plain blocks on square images, as ViTMAE and timm have them."""
    return cfg_of(size, batch, block="plain", decoder_pos="2d", img_size=(224, 224), patch_size=16, mask_ratio=0.75)


def train_part(kind, cfg, precision, device, compiled=False, half=False):
    """A training step: ours by `Trainer`, a peer by the same plain loop; `half`: float16, as released on a GPU."""
    torch.manual_seed(0)
    peer, spec = kind(cfg), torch.randn(cfg.batch_size, cfg.in_chans, *cfg.img_size, device=device)
    if kind is Ours:
        cfg = cfg.replace(precision="bf16" if precision == "bf16" else "fp32", compile=compiled)
        trainer = Trainer(cfg, peer.module, quiet=True)
        return Part(lambda: trainer.engine.step([{"spec": spec}], 0, cfg.lr), cfg.batch_size)
    peer.module.to(device).train()
    optimizer = torch.optim.AdamW(peer.module.parameters(), cfg.lr, cfg.betas, weight_decay=cfg.weight_decay)
    scaler = torch.amp.GradScaler(device, enabled=half)

    def step():
        with torch.autocast(device, torch.float16 if half else torch.bfloat16, enabled=precision == "bf16"):
            loss = peer.loss(spec)[0]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(peer.module.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return Part(step, cfg.batch_size)


def embed_part(kind, cfg, precision, device, compiled=False):
    """The tokens of a batch of unmasked spectrograms, as embeddings need them."""
    torch.manual_seed(0)
    peer, spec = kind(cfg), torch.randn(cfg.batch_size, cfg.in_chans, *cfg.img_size, device=device)
    peer.module.to(device).eval()
    tokens = torch.compile(peer.tokens) if compiled else peer.tokens

    def embed():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            tokens(spec)

    return Part(embed, cfg.batch_size)


def model_row(work, label, cfg, precision, peers, args, **how):
    """A training step or an embedding: ours, ours with other settings, ours compiled, and peers."""
    make = train_part if work == "train" else embed_part
    parts = {"ours": lambda: make(Ours, cfg, precision, args.device)}
    if work == "train" and args.set:
        other = cfg.from_dict({**cfg.to_dict(), **args.set})
        named = ", ".join(f"{k}={v}" for k, v in args.set.items())
        parts[f"ours, {named}"] = lambda: make(Ours, other, precision, args.device)
    if args.compile:
        parts["ours, compiled"] = lambda: make(Ours, cfg, precision, args.device, compiled=True)
    for name, kind in peers.items():
        half = dict(half=True) if work == "train" and args.device == "cuda" and precision == "bf16" else {}
        parts[name] = lambda kind=kind, half=half: make(kind, cfg, precision, args.device, **half)

    def check():
        return {name: check_model(name, kind, cfg, work == "train") for name, kind in peers.items()}

    return Row(f"{work} {label} {precision}", parts, precision, check, memory=work == "train", **how)


def model_rows(args):
    """Training and embedding: the released mathematics and, beside ViTMAE and timm, plain blocks."""
    same, vitmae, timm = found(Released, PlainReference), found(HuggingFace), found(Timm)
    full = dict(tiny=512, base=256) if args.device == "cuda" else dict(tiny=16, base=8)
    for work, batch in (("train", args.quick and dict(tiny=8) or full), ("embed", args.quick and dict(tiny=4) or full)):
        for size, n in batch.items():
            for precision in PRECISIONS:
                how = dict(repeats=3) if size == "base" else {}
                yield model_row(work, size, cfg_of(size, n), precision, same, args, **how)
        peers = vitmae if work == "train" else timm
        for precision in PRECISIONS if peers and not args.quick else ():
            yield model_row(work, "plain blocks", vit_of("tiny", 8), precision, peers, args)


def front_end_rows(args):
    """Spectrograms of a batch of clips, beside torchaudio."""
    ta = import_torchaudio()
    kaldi = importlib.import_module("torchaudio.compliance.kaldi")
    wav, ten = (0.1 * torch.randn(8, n, generator=torch.Generator().manual_seed(0)) for n in (32000, 160000))
    ours, bank = LogMel(), Fbank()
    mel = ta.transforms.MelSpectrogram(16000, 400, 400, 160, f_min=50, f_max=8000, n_mels=80, power=2)
    options = dict(htk_compat=True, sample_frequency=16000, use_energy=False, window_type="hanning", num_mel_bins=128,
                   dither=0.0, frame_shift=10)  # fmt: skip

    def module():
        spec = (mel(wav) + 1.1920929e-07).log().mT
        std, mean = torch.std_mean(spec, (1, 2), keepdim=True)
        return ((spec - mean) / std)[:, None, :200]

    def loop():
        rows = [kaldi.fbank(w[None] - w.mean(), **options) for w in ten]
        rows = [F.pad(row, (0, 0, 0, 1024 - len(row))) for row in rows]
        return ((torch.stack(rows) + 4.2677393) / (2 * 4.5689974))[:, None]

    def rivals(name, clips, ours, peer, theirs, **tolerance):
        parts = {"ours": lambda: Part(ours, clips), peer: lambda: Part(theirs, clips)}
        return Row(name, parts, check=lambda: {peer: need_equal(peer, theirs(), ours(), **tolerance)})

    lengths = torch.full((8,), ten.shape[1])
    yield rivals("log-mel", 8, lambda: ours(wav), "torchaudio", module)
    yield rivals("Kaldi fbank", 8, lambda: bank(ten, lengths), "torchaudio, in a loop", loop)
    qkv = [torch.randn(32, 4, 78, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def backward(way):
        def run():
            out = way(*qkv)
            out.sum().backward()
            return out.detach()

        return run

    fused = backward(F.scaled_dot_product_attention)
    yield rivals("attention, bf16, 78 tokens", 32, backward(attend), "PyTorch's fused", fused, tolerance=0.02)


def stage_part(preset, args):
    """A training step of a preset, from waveforms, with the seconds of its stages."""
    cfg = Config.preset(preset)
    trainer = Trainer(cfg, transform=Augment(cfg, build_frontend(cfg)), quiet=True)
    recordings = synthesize(n=-(-cfg.batch_size // 12), sample_rate=cfg.sample_rate)
    batch, stages = next(iter(ClipLoader(recordings, cfg))), {}

    def timed(stage, holder, name):
        inner = getattr(holder, name)

        def call(*inputs, **options):
            start = clock()
            out = inner(*inputs, **options)
            synchronize(args.device)
            stages[stage] = stages.get(stage, 0.0) + clock() - start
            return out

        setattr(holder, name, call)

    clock = time.perf_counter if args.clock == "wall" else time.process_time
    timed("front end, augmentation", trainer.transform, "forward")
    timed("forward", trainer.model, "forward")
    timed("backward", trainer.accelerator, "backward")
    timed("optimizer", trainer.optimizer, "step")

    def step():
        stages.clear()
        trainer.engine.step([batch], 0, cfg.lr, trainer.transform)

    return Part(step, len(batch["label"]), stages)


def generated_part(preset, n=8):
    """Two takes of n sound programs as spectra, on one core: what a step needs for as many clips."""
    cfg = Config.preset(preset)
    sounds, frontend = generated(10_000, 0, cfg.clip_seconds, cfg.sample_rate), build_frontend(cfg)
    rows = itertools.cycle(range(10_000))

    def compute():
        return [log_recording(frontend, sounds.wav(i, take)) for i in itertools.islice(rows, n) for take in range(2)]

    return Part(compute, n)


def write_wavs(folder, n, seconds=2):
    """A folder of n WAV files, 50 of them distinct."""
    rng, folder = np.random.default_rng(0), Path(folder)
    folder.mkdir(exist_ok=True)
    for i in range(n):
        if i < 50:
            soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(16000 * seconds), 16000)
        else:
            os.link(folder / f"{i % 50}.wav", folder / f"{i}.wav")
    return folder


def folder_row(args, folder):
    """Files to a Parquet table, beside the model alone on samples in memory, and decoding alone."""
    n = 64

    @functools.cache
    def ready():
        sounds = open_recordings(write_wavs(folder / "folder", n), 16000)
        generator = EmbeddingGenerator(AudioMAEPlusPlus(cfg_of("tiny")).eval(), args.device)
        return sounds, generator, torch.stack([sounds.wav(i) for i in range(n)])

    def table():
        return ready()[1].embed_folder(folder / "folder", folder / "table.parquet", quiet=True, overwrite=True)

    def model():
        _, generator, waves = ready()
        return np.concatenate([generator.encoder.embed(w, torch.full((32,), w.shape[1])) for w in waves.split(32)])

    def decode():
        sounds = ready()[0]
        return [sum(map(len, pieces)) for pieces in decode_ahead(sounds, range(n))]

    def check():
        found = model(), np.stack(table()["embedding"]).astype(float)
        return {"model alone": need_equal("the model alone", *map(torch.from_numpy, found))}

    parts = {"ours": table, "model alone": model, "decoding alone": decode}
    return Row("folder to Parquet", {name: lambda run=run: Part(run, n) for name, run in parts.items()}, check=check,
               unit="file")


def files_part(preset, folder, n):
    """A folder of n files to Parquet, with another file first, which loads what is loaded once."""
    generator = EmbeddingGenerator(AudioMAEPlusPlus(Config.preset(preset)).eval(), "cpu")
    generator.embed_folder(write_wavs(folder / "one", 1), quiet=True)
    sounds = write_wavs(folder / f"{n}", n)
    return Part(lambda: generator.embed_folder(sounds, folder / f"{n}.parquet", quiet=True, overwrite=True), n)


def import_part(code):
    return Part(lambda: subprocess.run([sys.executable, "-c", code], check=True), outside=True)


def growth_rows(args, folder):
    """Sizes of one thing: time and memory of each."""
    def sizes(what, work, cfgs, precision="bf16"):
        make = train_part if work == "train" else embed_part
        parts = {name: lambda cfg=cfg: make(Ours, cfg, precision, args.device) for name, cfg in cfgs.items()}
        return Row(f"growth of {work} with {what}", parts, precision, memory=True)

    batches = (2, 8) if args.quick else (4, 16, 64)
    yield sizes("batch", "train", {f"{n} clips": cfg_of("tiny", n) for n in batches})
    yield sizes("clip length", "embed", {f"{n} s": cfg_of("tiny", 8, img_size=(100 * n, 80)) for n in
                                         ((2, 4) if args.quick else (1, 2, 4, 8))})  # fmt: skip
    if not args.quick:
        yield sizes("width", "train", {f"{cfg_of(n).embed_dim} wide": cfg_of(n, 8) for n in ("tiny", "small", "base")})
    numbers = (20, 200) if args.quick else (200, 2000)
    yield Row("growth with files", {f"{n} files": lambda n=n: files_part("nano", folder, n) for n in numbers},
              memory=True, unit="file", repeats=3)  # fmt: skip


def all_rows(args, folder):
    """Every row; its parts are built when they are needed."""
    yield from model_rows(args)
    yield from front_end_rows(args)
    for preset in ("semantic", "semantic_unlabelled", "words", "words_unlabelled"):
        yield Row(f"step of {preset}", {"ours": lambda preset=preset: stage_part(preset, args)}, "bf16")
    steps = {"ours": lambda: stage_part("semantic_unlabelled", args)}
    yield Row("step on generated sounds", steps | {"their computation": lambda: generated_part("semantic_unlabelled")})
    yield folder_row(args, folder)
    codes = {"ours": "import audiomaepp", "ours, with Run": "from audiomaepp import Run", "torch": "import torch"}
    yield Row("import", {name: lambda code=code: import_part(code) for name, code in codes.items()},
              unit="import")
    yield from growth_rows(args, folder)
