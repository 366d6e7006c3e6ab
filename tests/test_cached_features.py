"""Log spectra that are computed once and augmented: the same sounds, the same faults, the same run after a resume."""

import errno
import math
import os
import tempfile

import pandas as pd
import pytest
import soundfile
import torch

import audiomaepp.batches as batches
import audiomaepp.shelf as shelf
from audiomaepp.batches import Augment, ClipLoader, UnreadableError
from audiomaepp.config import PRESETS, Config
from audiomaepp.data import Recordings, drop_unreadable, open_recordings
from audiomaepp.embed import fingerprint
from audiomaepp.features import build_frontend, frames_of_clip, log_clip, log_recording
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.synthetic import generated, synthesize
from audiomaepp.train import Trainer

HOP, FRAMES = 160, 96
RATE = 16000
FRONTENDS = [
    dict(normalize="dataset"), dict(normalize="dataset", frontend="fbank"), dict(normalize="band", top_db=45.0),
    dict(normalize="dataset", n_fft=512, win_length=200, hop_length=80),
]  # fmt: skip


def config(**changes):
    small = dict(
        img_size=(FRAMES, 80), embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2,
        batch_size=6, use_labels=False, views=2, epochs=3, warmup_epochs=1, precision="fp32",
    )  # fmt: skip
    return Config.preset("nano", **{**small, **changes})


CACHED = dict(cache_features=True)
LOUD = dict(roll=True, mix=0.5, gain_db=6.0, spec_filter=0.3, stretch_time=0.2, stretch_mel=0.1, spec_time_mask=20)


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_memory(*waves):
    return Recordings(pd.DataFrame({"path": [f"{i}" for i in range(len(waves))]}), waves=list(waves))


def logs(cfg, waves):
    frontend = build_frontend(cfg)
    return torch.stack([log_clip(frontend, log_recording(frontend, wave)) for wave in waves])


def batches_of(recordings, cfg, epoch=0, start=0):
    loader = ClipLoader(recordings, cfg)
    loader.set_epoch(epoch, start)
    return list(loader)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


# ---- the same spectrograms


@pytest.mark.parametrize("settings", FRONTENDS, ids=str)
def test_a_clip_has_the_spectrogram_that_its_waveform_has(settings):
    "A whole recording, a crop at a whole frame, and a short recording at a whole frame."
    cfg = config(**settings)
    frontend, size, hop = build_frontend(cfg), cfg.clip_samples, cfg.hop_length
    fits, edge = frames_of_clip(frontend), frontend.edge
    long, short = noise(3 * size), noise(30 * hop)
    whole = log_recording(frontend, long)
    free = len(whole) - 2 * edge - fits
    for first in (0, 1, 100, free):
        clip = log_clip(frontend, whole, where=(first + 0.5) / (free + 1))
        wave = frontend.log_spectrum(long[None, first * hop :][:, :size], torch.tensor([size]))[0, :FRAMES]
        inside = slice(0 if first == 0 else edge, fits if first == free else fits - edge)
        torch.testing.assert_close(clip[inside], wave[inside], atol=1e-3, rtol=0)
        assert (clip[fits:] == frontend.padding).all()
    part = log_recording(frontend, short)
    places = fits - (len(part) - 2 * edge) + 1
    for first in (0, 20, places - 1):
        clip = log_clip(frontend, part, offset=(first + 0.5) / places)
        placed = torch.zeros(1, size)
        placed[0, first * hop :][: len(short)] = short
        wave = frontend.log_spectrum(placed, torch.tensor([size]))[0, :FRAMES]
        if edge:  # also the frames around the recording, which see a part of it
            torch.testing.assert_close(clip[edge:-edge], wave[edge:-edge], atol=1e-3, rtol=0)
        else:  # Kaldi's frames lie in the recording; the others are missing
            frames = slice(first, first + len(part))
            torch.testing.assert_close(clip[frames], wave[frames], atol=1e-3, rtol=0)
            assert (clip[: frames.start] == 0).all() and (clip[frames.stop :] == 0).all()


@pytest.mark.parametrize("samples", [1, 100, 399, 5000, FRAMES * HOP - 1, FRAMES * HOP, FRAMES * HOP + 1, 50_000])
@pytest.mark.parametrize("frontend", ["logmel", "fbank"])
def test_a_recording_of_any_length_makes_a_clip(frontend, samples):
    cfg = config(frontend=frontend, **CACHED)
    (batch,) = ClipLoader(in_memory(noise(samples)), cfg, pairs=False)
    spec = batch["logmel"]
    assert spec.shape == (1, FRAMES, 80) and spec.dtype == torch.float16 and spec.isfinite().all()
    sound = (spec[0] != torch.tensor(build_frontend(cfg).padding).half()).any(1).sum()
    assert sound >= min(frames_of_clip(build_frontend(cfg)), max(1, samples // HOP - 2))


def test_a_training_gets_the_clips_that_it_gets_without_the_cache():
    "Same rows, same places up to a frame; what is looked at beside the training is a waveform."
    waves = [noise(n, seed=n) for n in (9000, FRAMES * HOP, 40_000, 16_000, 5000, 30_000)]
    plain = config(normalize="dataset")
    frontend = build_frontend(plain)
    for epoch in range(3):
        (kept,), (wave,) = (batches_of(in_memory(*waves), cfg, epoch) for cfg in (plain.replace(**CACHED), plain))
        assert torch.equal(kept["index"], wave["index"]) and "wav" not in kept
        below, above = (frontend(wave["wav"].roll(-shift, 1)) for shift in (-HOP, HOP))
        apart = (frontend(kept["logmel"]) - frontend(wave["wav"])).abs().mean((1, 2, 3))
        assert apart.max() < 0.35 * min((frontend(kept["logmel"]) - other).abs().mean() for other in (
            frontend(wave["wav"].roll(20 * HOP, 1)), below.roll(1, 0), above.roll(1, 0)))
    assert set(next(iter(ClipLoader(in_memory(*waves), plain.replace(**CACHED), train=False)))) >= {"wav", "index"}


# ---- the same augmentations


@pytest.mark.parametrize("settings", FRONTENDS, ids=str)
def test_a_gain_is_that_of_the_waveform(settings):
    cfg = config(gain_db=6.0, **settings)
    waves = noise(8, cfg.clip_samples)
    waves[:, 4000:6000] *= 0.001  # quiet, where ε is felt
    augment = Augment(cfg, build_frontend(cfg))
    torch.manual_seed(1)
    louder = augment(logs(cfg, waves))
    torch.manual_seed(1)
    gains = 10 ** (6.0 * (2 * torch.rand(8, 1) - 1) / 20)
    assert gains.max() > 1.5 and gains.min() < 0.7
    within = 0.1 if cfg.frontend == "fbank" else 2e-3  # Kaldi takes the larger of power and ε, and not the sum
    torch.testing.assert_close(louder, augment.frontend(logs(cfg, waves * gains)), atol=within, rtol=0)


def test_a_roll_is_that_of_the_waveform():
    cfg = config(roll=True, normalize="dataset")
    waves, frontend = noise(16, FRAMES * HOP), build_frontend(cfg)
    torch.manual_seed(1)
    rolled = Augment(cfg, frontend)(logs(cfg, waves))
    torch.manual_seed(1)
    firsts = (torch.rand(16) * FRAMES).long()
    for spec, wave, first in zip(rolled, waves, firsts.tolist(), strict=True):
        seam = FRAMES - first
        away = [t for t in range(2, FRAMES - 2) if abs(t - seam) > 2]
        torch.testing.assert_close(spec[0, away], frontend(wave.roll(-first * HOP)[None])[0, 0, away])


def test_a_roll_leaves_missing_frames_at_the_end():
    cfg = config(roll=True, frontend="fbank", normalize="dataset", spec_mean=0.0, spec_std=0.5)
    rolled = Augment(cfg, build_frontend(cfg))(logs(cfg, noise(16, FRAMES * HOP)))
    assert ((rolled[:, 0] == 0).all(2).sum(1) == 2).all() and (rolled[:, 0, -2:] == 0).all()


@pytest.mark.parametrize("frontend", ["logmel", "fbank"])
def test_a_mixed_clip_has_the_level_that_is_drawn(frontend):
    cfg = config(mix=1.0, normalize="dataset", spec_mean=0.0, spec_std=0.5, frontend=frontend)
    waves = noise(64, FRAMES * HOP) * torch.logspace(-2, 0, 64)[:, None]
    spec, augment = logs(cfg, waves), Augment(cfg, build_frontend(cfg))
    torch.manual_seed(1)
    mixed = augment(spec.half())[:, 0]
    torch.manual_seed(1)
    torch.randint(1, 64, ())
    wanted = -(3 + 9 * torch.rand(2, 64, 1)[0, :, 0])
    inside = slice(0, FRAMES - 2)
    added = 10 * (mixed[:, inside].exp().mean((1, 2)) / spec[:, inside].exp().mean((1, 2)) - 1).log10()
    assert (added - wanted).abs().mean() < 0.5 and abs((added - wanted).mean()) < 0.2


@pytest.mark.parametrize("frontend", ["logmel", "fbank"])
def test_silence_stays_silent_and_missing_frames_stay_missing(frontend):
    cfg = config(gain_db=60.0, mix=1.0, roll=True, frontend=frontend, normalize="dataset", spec_mean=0.0, spec_std=0.5)
    augment = Augment(cfg, build_frontend(cfg))
    silence = augment(logs(cfg, torch.zeros(4, FRAMES * HOP)).half())
    eps = math.log(torch.finfo(torch.float32).eps)
    missing = FRAMES - frames_of_clip(augment.frontend)
    torch.testing.assert_close(silence[:, :, : FRAMES - missing], torch.full((4, 1, FRAMES - missing, 80), eps))
    assert (silence[:, :, FRAMES - missing :] == 0).all()
    short = augment(logs(cfg, noise(4, 20 * HOP)).half())  # each is mixed with another one that is as short
    heard = (short[:, 0] - augment.frontend.padding).abs().amax(2) > 1e-3
    assert (heard.sum(1) <= 2 * (20 + 2 * augment.frontend.edge)).all() and (heard.sum(1) >= 18).all()


@pytest.mark.parametrize("frontend", ["logmel", "fbank"])
def test_a_longer_sound_is_heard_where_a_short_one_has_ended(frontend):
    cfg = config(mix=1.0, frontend=frontend, normalize="dataset")
    augment = Augment(cfg, build_frontend(cfg))
    mixed = augment(logs(cfg, [noise(20 * HOP), noise(FRAMES * HOP, seed=1)]).half())[0, 0]
    padding = augment.frontend(logs(cfg, [noise(20 * HOP)]))[0, 0, -1]
    heard = (mixed[: frames_of_clip(augment.frontend)] - padding).abs().amax(1) > 0.1
    assert heard.all()


def test_augmenting_leaves_the_batch_as_it_was():
    cfg = config(**LOUD)
    for spec in (logs(cfg, noise(8, FRAMES * HOP)), logs(cfg, noise(8, FRAMES * HOP)).half()):
        before, augment = spec.clone(), Augment(cfg, build_frontend(cfg))
        one, two = augment(spec), augment(spec)
        assert torch.equal(spec, before) and ((one - two).abs().amax((1, 2, 3)) > 0.5).all(), "two views are the same"
        assert torch.equal(augment.eval()(spec), augment.frontend(spec))


def test_with_the_same_seed_both_ways_look_alike():
    "All augmentations together: the same numbers are drawn for the same purposes."
    cfg = config(**LOUD, normalize="dataset", spec_mean=-5.0, spec_std=3.0)
    waves = torch.stack([wave[: FRAMES * HOP] for wave in synthesize(n=2).waves])
    both = []
    for clips in (waves, logs(cfg, waves).half()):
        torch.manual_seed(1)
        both.append(Augment(cfg, build_frontend(cfg))(clips))
    apart, others = ((both[0] - other).abs().mean((1, 2, 3)) for other in (both[1], both[1].roll(1, 0)))
    assert apart.median() < 0.1 and apart.median() < 0.2 * others.median()
    torch.manual_seed(1)
    Augment(cfg, build_frontend(cfg))(waves)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    Augment(cfg, build_frontend(cfg))(logs(cfg, waves))
    assert torch.equal(state, torch.get_rng_state())


# ---- computed once, wherever it is kept


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        for i in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            wave = noise(7000 + 5000 * i, seed=ord(name) + i).numpy()
            soundfile.write(tmp_path / name / f"{i}.wav", wave, RATE, subtype="FLOAT")
    return tmp_path


def test_each_spectrum_is_computed_once_in_a_training(folder, monkeypatch):
    rows, plain = [], batches.log_recording
    monkeypatch.setattr(batches, "log_recording", lambda front, wav: rows.append(len(wav)) or plain(front, wav))
    recordings = open_recordings(folder)
    decoded, load = [], recordings.wav
    monkeypatch.setattr(recordings, "wav", lambda row: decoded.append(row) or load(row))
    cfg = config(epochs=4, batch_size=8, **CACHED, **LOUD)
    Trainer(cfg, transform=Augment(cfg, build_frontend(cfg)), quiet=True).fit(ClipLoader(recordings, cfg))
    assert len(rows) == 16 and sorted(decoded) == list(range(16))


def test_in_a_file_as_in_memory(folder):
    cfg, recordings = config(batch_size=4, **CACHED), drop_unreadable(open_recordings(folder), quiet=True)
    before = [batches_of(recordings, cfg, epoch) for epoch in range(2)]
    loader, names = ClipLoader(open_recordings(folder), cfg), set(os.listdir(tempfile.gettempdir()))
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert same(list(loader), before[epoch])
    assert all(loader._batches.dataset.cut.shelf.get(row) is not None for row in range(16))
    left = {n for n in set(os.listdir(tempfile.gettempdir())) - names if n.startswith("audiomaepp-")}
    assert not left, "the file has a name and would outlive the process"


def test_workers_compute_each_spectrum_once_for_all(folder):
    """A set that is not in memory was decoded by the process that trains, one clip after the other."""
    cfg, recordings = config(batch_size=4, num_workers=2, **CACHED), open_recordings(folder)
    before = [batches_of(recordings, cfg.replace(num_workers=0), epoch) for epoch in range(3)]
    loader = ClipLoader(recordings, cfg)
    assert loader._batches.num_workers == 2
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert same(list(loader), before[epoch])
        for path in recordings.paths if epoch == 0 else ():  # from now on, no file is read
            os.unlink(path)
    assert not loader.skipped
    small = ClipLoader(in_memory(*[noise(8000)] * 8), cfg)
    assert small._batches.num_workers == 0


@pytest.mark.parametrize("room", [0, 16 * 16, 16 * 16 + 50_000])
def test_a_full_disk_costs_time_and_no_recording(folder, monkeypatch, room):
    """A cache that found no room ended the training; what cannot be kept is computed again."""
    recordings, cfg, plain = open_recordings(folder), config(batch_size=4, **CACHED), shelf._write_at
    before = batches_of(recordings, cfg)
    monkeypatch.setattr(shelf, "_write_at", lambda file, data, first: plain(file, data[: max(0, room - first)], first))
    loader = ClipLoader(recordings, cfg)
    assert same(list(loader), before) and same(list(loader), before) and not loader.skipped
    kept = sum(loader._batches.dataset.cut.shelf.get(row) is not None for row in range(16))
    assert 0 < kept < 16 if room > 16 * 16 else kept == 0


def test_the_cache_takes_no_more_of_the_disk_than_it_is_told(folder):
    """Several trainings on one machine took half of what was free each, and then nothing of it for the others."""
    cfg, recordings = config(batch_size=4, **CACHED), open_recordings(folder)
    before, loader = batches_of(recordings, cfg), ClipLoader(recordings, cfg.replace(cache_gb=50e-6))
    assert same(list(loader), before)
    shelf = loader._batches.dataset.cut.shelf
    assert 0 < sum(shelf.get(row) is not None for row in range(16)) < 16
    assert 20_000 < os.fstat(shelf.file.fileno()).st_size <= 50_000
    with pytest.raises(ValueError, match="cache_gb must be .* use 100 for 100 GB"):
        cfg.replace(cache_gb=-1)


def test_a_disk_without_locks_is_no_fault_of_the_recordings(folder, monkeypatch):
    """Every recording was listed as one that cannot be read."""
    def refused(file):
        raise OSError(errno.ENOLCK, "No locks available")

    recordings, cfg = open_recordings(folder), config(batch_size=4, **CACHED)
    before = batches_of(recordings, cfg)
    monkeypatch.setattr(shelf, "_locked", refused)
    loader = ClipLoader(recordings, cfg)
    assert same(list(loader), before) and not loader.skipped


def test_generated_sounds_are_not_kept_in_the_memory_of_each_worker():
    cfg = config(views=1, num_workers=2, **CACHED)
    assert isinstance(ClipLoader(generated(20, 3, 1.0), cfg)._batches.dataset.cut.shelf, shelf.Shelf)


# ---- faults and resume


def test_a_damaged_file_is_replaced_and_listed_as_without_the_cache(folder):
    sets, found = [open_recordings(folder) for _ in range(3)], []
    (folder / "b" / "2.wav").write_bytes(b"")
    (folder / "c" / "1.wav").unlink()
    for recordings, changes in zip(sets, ({}, CACHED), strict=False):
        cfg = config(batch_size=8, max_unreadable=0.2, **changes)
        loader, rows = ClipLoader(recordings, cfg), []
        for epoch in range(2):
            loader.set_epoch(epoch)
            rows += [batch["index"].tolist() for batch in loader]
        found.append((rows, sorted(recordings.skipped)))
    assert found[0] == found[1] and len(found[0][1]) == 2
    with pytest.raises(UnreadableError, match="2 of 16 training clips cannot be read any more"):
        batches_of(sets[2], config(batch_size=8, max_unreadable=0.1, **CACHED))


def test_a_file_that_is_gone_later_is_still_there(folder):
    cfg, recordings = config(batch_size=4, **CACHED), open_recordings(folder)
    loader = ClipLoader(recordings, cfg)
    first = list(loader)
    (folder / "a" / "0.wav").unlink()
    assert same(list(loader), first) and not loader.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_bit_for_bit(folder, tmp_path_factory, workers):
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    cfg = config(batch_size=4, epochs=3, eval_every=1, eval_steps=2, num_workers=workers, **CACHED, **LOUD)

    class Stop(Exception):
        pass

    def stops(row):
        if row["step"] == 8:  # the last checkpoint was written at step 6
            raise Stop

    options = dict(transform=Augment(cfg, build_frontend(cfg)), quiet=True, save_minutes=0)
    whole = Trainer(cfg, **options)
    whole.fit(ClipLoader(open_recordings(folder), cfg))
    with pytest.raises(Stop):
        Trainer(cfg, out_dir=out, callback=stops, **options).fit(ClipLoader(open_recordings(folder), cfg))
    torch.manual_seed(99)
    resumed = Trainer.resume(out, **options)
    assert 0 < resumed.state.step < whole.state.step and resumed.state.batch, "it is in the middle of an epoch"
    resumed.fit(ClipLoader(open_recordings(folder), cfg))
    torch.set_num_threads(threads)
    for (name, value), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(value, other), name


def test_tables_of_embeddings_are_not_stale_because_of_the_setting():
    torch.manual_seed(0)
    model = AudioMAEPlusPlus(config())
    before = fingerprint(model)
    model.cfg = model.cfg.replace(**CACHED)
    assert fingerprint(model) == before


def test_the_cache_is_off_by_default_and_on_in_the_presets_for_small_sets():
    own = {"semantic", "semantic_unlabelled", "words", "words_unlabelled"}
    assert {name for name in PRESETS if Config.preset(name).cache_features} == own and not Config().cache_features
