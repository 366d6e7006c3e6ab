"""Bad files, honest splits, and batches that are the same every time."""

import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audiomaepp.audio
from audiomaepp.batches import Augment, ClipLoader, UnreadableError
from audiomaepp.config import Config
from audiomaepp.data import Recordings, Skipped, drop_unreadable, open_recordings, split
from audiomaepp.synthetic import synthesize

SHARED = Path(__file__).parents[2] / "shared" / "data"
RATE = 16000


def tone(seconds=0.5, rate=RATE, channels=1, hertz=440.0):
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, 1) if channels > 1 else wave


def write(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, *args, **kwargs)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Four classes of uneven size, clips of uneven length; one file a class of its own."
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for name, count in (("owl", 9), ("rain", 6), ("wind", 5), ("once", 1)):
        for i in range(count):
            seconds = rng.uniform(0.05, 1.2)
            write(root / name / f"{i}.wav", tone(seconds, hertz=rng.uniform(200, 2000)), RATE, subtype="FLOAT")
    return root


def config(**changes):
    return Config.preset("nano", **{"img_size": (48, 80), "batch_size": 6, **changes})


def batches_of(recordings, cfg, epoch=0, start=0, seed=0):
    loader = ClipLoader(recordings, cfg, seed=seed)
    loader.set_epoch(epoch, start)
    return list(loader)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


# ---- bad input


@pytest.fixture
def bad_folder(tmp_path):
    "Good and bad files side by side; returns the folder, the names of the good, the bad with a word of the reason."
    at = tmp_path / "sounds"
    write(at / "a" / "good.wav", tone(), RATE)
    write(at / "a" / "one sample.wav", np.array([0.5]), RATE)
    write(at / "b" / "six channels.wav", tone(0.2, 192000, 6), 192000)
    write(at / "b" / "Käuzchen im Wald — 梟.flac", tone(), RATE)
    (at / "a" / "empty.wav").touch()
    (at / "a" / "text.wav").write_text("this is a letter, not a sound")
    write(at / "a" / "zero samples.wav", np.zeros(0), RATE)
    write(at / "b" / "nan.wav", np.full(1000, np.nan), RATE, subtype="FLOAT")
    whole = write(at / "b" / "cut off.flac", np.random.default_rng(0).normal(0, 0.1, 3 * RATE), RATE)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (at / "b" / "broken link.wav").symlink_to(tmp_path / "nowhere.wav")
    write(at / "b" / "locked.wav", tone(), RATE)
    good = {"good.wav", "one sample.wav", "six channels.wav", "Käuzchen im Wald — 梟.flac"}
    bad = {
        "empty.wav": "empty", "text.wav": "not audio", "zero samples.wav": "sample", "nan.wav": "NaN",
        "cut off.flac": "", "broken link.wav": "link", "locked.wav": "Permission",
    }
    if hasattr(os, "mkfifo"):
        os.mkfifo(at / "a" / "pipe.wav")
        bad["pipe.wav"] = "is a pipe, not a regular file"
    return at, good, bad


def deny(monkeypatch, name):
    "Opening a file of this name fails, as it would for another user (root may open everything)."
    import builtins

    plain_open, plain_file = builtins.open, soundfile.SoundFile

    def refuse(plain):
        def opened(file, *args, **kwargs):
            if isinstance(file, str | bytes | os.PathLike) and os.fsdecode(file).endswith(name):
                raise PermissionError(13, "Permission denied", str(file))
            return plain(file, *args, **kwargs)

        return opened

    monkeypatch.setattr(builtins, "open", refuse(plain_open))
    monkeypatch.setattr(soundfile, "SoundFile", refuse(plain_file))


def test_every_bad_file_is_listed_and_every_good_one_stays(bad_folder, monkeypatch):
    at, good, bad = bad_folder
    deny(monkeypatch, "locked.wav")
    recordings = drop_unreadable(open_recordings(at), quiet=True)
    assert {os.path.basename(path) for path in recordings.paths} == good
    reasons = {os.path.basename(path): reason for path, reason in recordings.skipped}
    assert set(reasons) == set(bad) and len(recordings.skipped) == len(bad)
    for name, word in bad.items():
        assert reasons[name].strip() and word.lower() in reasons[name].lower(), (name, reasons[name])
    assert recordings.in_memory and all(wave.isfinite().all() for wave in recordings.waves)
    lengths = dict(zip((os.path.basename(p) for p in recordings.paths), map(len, recordings.waves), strict=True))
    assert lengths["one sample.wav"] == 1 and lengths["six channels.wav"] == 3200
    assert all(name in repr(recordings.skipped) and name in recordings.skipped._repr_html_() for name in bad)


def test_the_good_ones_train(bad_folder, tmp_path):
    at, good, _ = bad_folder
    recordings = drop_unreadable(open_recordings(at).select("label == 'a'"), quiet=True)
    (batch,) = ClipLoader(recordings, config())
    assert batch["wav"].shape == (2, 48 * 160) and batch["wav"].isfinite().all()
    recordings.skipped.to_csv(tmp_path / "skipped.csv")
    assert "empty.wav" in (tmp_path / "skipped.csv").read_text(encoding="utf-8")


def test_any_error_of_one_file_is_one_line(folder, monkeypatch):
    "Also one that nobody foresaw."
    plain = audiomaepp.audio.load_audio

    def odd(source, *args, **kwargs):
        if str(source).endswith("owl/3.wav"):
            raise RuntimeError("a decoder's bad day")
        return plain(source, *args, **kwargs)

    monkeypatch.setattr("audiomaepp.data.load_audio", odd)
    recordings = drop_unreadable(open_recordings(folder), quiet=True)
    assert len(recordings) == 20
    assert recordings.skipped == [(str(folder / "owl/3.wav"), "RuntimeError: a decoder's bad day")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_goes_bad_while_training_is_not_fatal(tmp_path, workers):
    for name in "abcd":
        for i in range(4):
            write(tmp_path / name / f"{i}.wav", tone(), RATE)
    recordings = drop_unreadable(open_recordings(tmp_path), keep=0, quiet=True)
    (tmp_path / "b" / "2.wav").write_bytes(b"")
    train = ClipLoader(recordings, config(batch_size=8, num_workers=workers))
    batches = list(train)
    assert [len(b["label"]) for b in batches] == [8, 8]
    assert all(recordings.labels[i] == label for b in batches for i, label in zip(b["index"], b["label"], strict=True))
    assert all(b["wav"].abs().amax(1).min() > 0.1 for b in batches)
    gone = recordings.paths.index(str(tmp_path / "b" / "2.wav"))
    assert gone not in torch.cat([b["index"] for b in batches])
    assert [os.path.basename(path) for path, _ in recordings.skipped] == ["2.wav"]
    seen = torch.cat([b["index"] for b in ClipLoader(recordings, config(num_workers=workers), train=False)])
    assert seen.tolist() == [i for i in range(16) if i != gone]


def test_a_batch_of_nothing_but_bad_files(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.wav", tone(), RATE)
    recordings = open_recordings(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.wav").write_bytes(b"")
    with pytest.raises(UnreadableError, match="3 of 3 training clips cannot be read any more"):
        list(ClipLoader(recordings, config()))
    assert list(ClipLoader(recordings, config(), train=False)) == []


def test_what_lasts_long_is_decoded_whole_and_not_kept(tmp_path):
    "A table may say that an hour lasts five seconds; and the last minute of it may be broken."
    import pandas as pd

    for name in ("good", "cut"):
        write(tmp_path / f"{name}.flac", np.random.default_rng(0).normal(0, 0.1, 700 * 1000), 1000)
    data = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) * 99 // 100])
    table = pd.DataFrame({"path": [str(tmp_path / name) for name in ("good.flac", "cut.flac")], "seconds": 5.0})
    found = drop_unreadable(Recordings(table), quiet=True)
    assert found.table["seconds"].tolist() == [700] and found.waves == [None]
    assert [os.path.basename(path) for path, _ in found.skipped] == ["cut.flac"] and "cut off" in found.skipped[0][1]


def test_what_does_not_fit_into_memory_is_not_kept(folder):
    recordings = drop_unreadable(open_recordings(folder), keep=100_000, quiet=True)
    assert not recordings.in_memory and not any(w is not None for w in recordings.waves)
    assert recordings.table.seconds.between(0.05, 1.2).all()


# ---- opening


def test_no_such_place_and_no_audio(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone does not exist; use"):
        open_recordings(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"contains no audio file; use a folder with files that .*\.flac .*\.wav"):
        open_recordings(tmp_path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match="data must be a folder or a .csv or .parquet table"):
        open_recordings(tmp_path / "x.txt")
    (tmp_path / "x.wav").symlink_to("gone.wav")
    with pytest.raises(ValueError, match="that can be opened .*is a link to gone.wav"):
        open_recordings(tmp_path)


def test_links(tmp_path):
    write(tmp_path / "elsewhere" / "x.wav", tone(), RATE)
    write(tmp_path / "set" / "b" / "y.wav", tone(), RATE)
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b" / "z.wav").symlink_to(tmp_path / "elsewhere" / "x.wav")
    (tmp_path / "set" / "b" / "round").symlink_to(tmp_path / "set")
    recordings = open_recordings(tmp_path / "set")
    assert sorted(recordings.table.label) == ["a", "b", "b"]
    train, test, words = split(recordings, held_out=[0])
    assert len(train) == 1 and train.paths[0].endswith("y.wav") and words.endswith("the same files are held out: 1)")


def test_links_to_what_is_no_file_are_called_by_name(tmp_path):
    "Said to be missing, they are looked for where they are."
    write(tmp_path / "good.wav", tone(), RATE)
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "list.csv")
    (tmp_path / "pipe.wav").symlink_to("list.csv")
    reasons = {os.path.basename(path): reason for path, reason in open_recordings(tmp_path).skipped}
    assert reasons["zero.wav"] == "is a link to /dev/zero, which is a device, not a regular file"
    assert reasons["pipe.wav"] == "is a link to list.csv, which is a pipe, not a regular file"
    with pytest.raises(ValueError, match=r"list.csv is a pipe"): # not opened: it would wait for ever
        open_recordings(tmp_path / "list.csv")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest(tmp_path, kind):
    import pandas as pd

    for name in ("x.wav", "deep er/y.wav"):
        write(tmp_path / name, tone(), RATE)
    paths = ["x.wav", "deep er/y.wav", "gone.wav"]
    table = pd.DataFrame({"path": paths, "label": ["01", None, "2"], "fold": [1, 2, 2], "dB": [1.5, 2, 3]})
    path = tmp_path / f"list.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    recordings = open_recordings(path)
    assert recordings.classes == ["01"] and recordings.labels.tolist() == [0, -1]
    assert recordings.table["dB"].tolist() == [1.5, 2]
    assert [reason for _, reason in recordings.skipped] == ["does not exist"]
    assert len(recordings.wav(1)) == 8000 and split(recordings, fold=2)[1].labels.tolist() == [-1]
    table = table.rename(columns={"path": "file"})
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    with pytest.raises(ValueError, match="must have the column 'path', got file, label, fold, dB;"):
        open_recordings(path)


@pytest.mark.parametrize("content", ["", "path,label\n", "\0\0\0\0", 'path\n"unclosed'])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_broken_manifest_is_a_value_error(tmp_path, content, kind):
    path = tmp_path / f"list.{kind}"
    path.write_text(content)
    with pytest.raises(ValueError, match="list"):
        open_recordings(path)


def test_integer_labels_keep_their_names_and_order(tmp_path):
    import pandas as pd

    for i in range(3):
        write(tmp_path / f"{i}.wav", tone(), RATE)
    pd.DataFrame({"path": ["0.wav", "1.wav", "2.wav"], "label": [10, 2, None]}).to_parquet(tmp_path / "list.parquet")
    recordings = open_recordings(tmp_path / "list.parquet")
    assert recordings.classes == ["2", "10"] and recordings.labels.tolist() == [1, 0, -1]


def test_bad_patterns(folder):
    with pytest.raises(ValueError, match="label_from must be a regular expression"):
        open_recordings(folder, label_from="(")
    with pytest.raises(ValueError, match="must match at least one file name"):
        open_recordings(folder, group_from="speaker")


@pytest.mark.skipif(not (SHARED / "esc10").is_dir(), reason="needs the ESC-10 recordings")
def test_esc50_layout():
    recordings = open_recordings(SHARED / "esc10")
    assert len(recordings) == 400 and len(recordings.classes) == 10 and not recordings.skipped
    for fold in range(1, 6):
        train, test, words = split(recordings, fold=fold)
        assert words == f"fold {fold} held out: 320 train / 80 test"
        assert np.bincount(test.labels).tolist() == [8] * 10 and train.classes == test.classes == recordings.classes
        assert not set(train.table.src_file) & set(test.table.src_file)
    with pytest.raises(ValueError, match="fold must be a value in the column 'fold', got 6; use one of 1, 2, 3, 4, 5"):
        split(recordings, fold=6)
    assert split(recordings)[2].startswith("fold 5 held out")
    assert len(recordings.wav(0)) == 5 * RATE


@pytest.mark.skipif(not (SHARED / "fsdd").is_dir(), reason="needs the spoken digits")
def test_labels_and_groups_from_file_names():
    recordings = open_recordings(SHARED / "fsdd", label_from=r"^(\d)_", group_from=r"_([a-z]+)_")
    assert len(recordings) == 3000 and recordings.classes == list("0123456789")
    assert recordings.table.group.nunique() == 6 and not recordings.skipped
    train, test, words = split(recordings, group="theo")
    assert words == "group theo held out: 2500 train / 500 test" and set(test.table.group) == {"theo"}
    with pytest.raises(ValueError, match="group must be a value in the column 'group', got bob; use one of george, "):
        split(recordings, group="bob")
    one, two = split(recordings)[:2]
    assert not set(one.table.group) & set(two.table.group) and len(two) == 500


# ---- choosing rows


@pytest.fixture
def listed():
    import pandas as pd

    table = {"path": list("abcdef"), "label": ["owl", "rain", None] * 2, "fold": [1, 2, 3] * 2}
    table |= {"pitch": [1.5, -2, 0, 4, np.nan, 3], "wet": [True, False] * 3}
    table |= {"when": pd.date_range("2026-01-01", periods=6)}
    return Recordings(pd.DataFrame(table))


@pytest.mark.parametrize(
    "query, rows",
    [
        ("fold == 2", "be"), ("2 == fold", "be"), ("label == 'owl'", "ad"), ("label != 'owl'", "bcef"),
        ("1 < fold <= 3 and pitch < 1", "bc"), ("label in ['owl', 'rain'] and not fold == 1", "be"),
        ("fold not in (1, 2)", "cf"), ("fold == [1, 3]", "acdf"), ("pitch >= -2 or label == 'rain'", "abcdef"),
        ("(fold == 1) & (pitch > 2) | ~(fold < 3)", "cdf"), ("wet", "ace"), ("not wet and fold == 2", "b"),
        ("pitch == pitch", "abcdf"), ("when > '2026-01-04'", "ef"), ("  fold == 2\n", "be"), ("label == 'a@b`c'", ""),
    ],
)
def test_queries(listed, query, rows):
    assert listed.select(query).paths == list(rows)


@pytest.mark.parametrize(
    "query",
    [
        "@__import__('os').system('touch ran')", "@ran()", "__import__('os').system('touch ran')", "`fold` == 1",
        "label.str.len() > 3", "fold.__class__ == 1", "(lambda: 1)() == fold", "[x for x in fold] == fold",
        "fold if wet else pitch", "f'{fold}' == label", "(x := fold) == 1", "fold[0] == 1", "fold == 9 ** 9 ** 9",
        "fold", "1 == 1", "nothing == 1", "fold is None", "'o' in label", "fold in pitch", "fold in [wet]", "label > 3",
        "", "fold ==", "fold == 1 &", "fold == 1; 2", "fold == 'x\0'  \0", "not " * 5_000 + "wet", "(" * 5_000,
        "fold and wet", "yield fold", "open == 1", "index == 1", "wet == (wet, [fold])",
    ],
)  # fmt: skip
def test_a_query_runs_nothing(listed, query, tmp_path, monkeypatch):
    "A query may come out of a file or off a web page."
    monkeypatch.chdir(tmp_path)
    ran = lambda: Path("ran").touch() # noqa: E731, F841 pandas' own queries can see it
    with pytest.raises(ValueError, match="query must compare columns"):
        listed.select(query)
    with pytest.raises(ValueError, match="query must compare columns"):
        split(listed, held_out=query)
    assert not list(tmp_path.iterdir())


# ---- splits


@pytest.mark.parametrize(
    "options", [{}, {"seed": 3}, {"fraction": 0.5}, {"held_out": [1, 4, 7]}, {"held_out": "label == 'rain'"}]
)
def test_no_file_is_on_both_sides(folder, options):
    recordings = open_recordings(folder)
    train, test, words = split(recordings, **options)
    assert len(train) + len(test) == len(recordings) and not set(train.paths) & set(test.paths)
    assert f"{len(train)} train / {len(test)} test" in words
    assert split(recordings, **options)[1].paths == test.paths


def test_a_file_that_is_listed_twice_is_not_in_both(folder):
    import pandas as pd

    files = [str(folder / f"owl/{i}.wav") for i in (0, 1, 2, 2)]
    recordings = Recordings(pd.DataFrame({"path": files, "label": "owl", "split": ["train", "train", "train", "test"]}))
    train, test, words = split(recordings)
    assert train.paths == files[:2] and test.paths == files[2:3] and words.endswith("held out: 1)")


def test_validation_is_left_alone_when_there_is_a_test_part(folder):
    import pandas as pd

    paths = [str(folder / f"owl/{i}.wav") for i in range(3)]
    table = pd.DataFrame({"path": paths, "split": ["Train", "valid", "test"]})
    assert split(Recordings(table))[2] == "the part 'test' held out: 1 train / 1 test"
    with pytest.raises(ValueError, match="must have a part 'train' and a part 'test', got train;"):
        split(Recordings(table.assign(split="train")))


def test_bad_splits(folder):
    recordings = open_recordings(folder)
    for options, words in (
        ({"fold": 1}, "must have the column 'fold' to hold out a fold, got the columns path, label;"),
        ({"group": "x"}, "must have the column 'group'"),
        ({"fold": 1, "group": "x"}, "one of fold, held_out and group, got fold and group;"),
        ({"fraction": 1.0}, "fraction must be between 0 and 1"),
        ({"held_out": np.ones(21, bool)}, "both parts must have clips, got 0 to train on"),
        ({"held_out": [99]}, "between 0 and 20, got 99"),
        ({"held_out": np.ones(3, bool)}, "one for each recording, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            split(recordings, **options)


# ---- batches


@pytest.mark.parametrize("batch_size", [4, 6, 7])
def test_no_anchor_without_a_positive(folder, batch_size):
    recordings = drop_unreadable(open_recordings(folder), quiet=True)
    for epoch in range(5):
        batches = batches_of(recordings, config(batch_size=batch_size), epoch)
        for batch in batches:
            assert len(batch["label"]) == batch_size // 2 * 2
            assert all((batch["label"] == label).sum() >= 2 for label in batch["label"])
        counts = np.bincount(torch.cat([b["index"] for b in batches]), minlength=len(recordings))
        assert counts.max() <= 2 and (counts == 0).sum() <= batch_size # what a dropped last batch holds


def test_a_class_of_one_clip_comes_as_two_crops(tmp_path):
    write(tmp_path / "a" / "x.wav", np.random.default_rng(0).normal(0, 0.1, 2 * RATE), RATE)
    write(tmp_path / "b" / "x.wav", tone(2), RATE)
    (batch,) = ClipLoader(open_recordings(tmp_path), config())
    one, two = batch["wav"][batch["label"] == 0]
    assert batch["index"].sort().values.tolist() == [0, 0, 1, 1] and not torch.equal(one, two)


def test_every_clip_comes_once_when_the_contrastive_loss_is_off(folder):
    recordings = drop_unreadable(open_recordings(folder), quiet=True)
    batches = batches_of(recordings, config(use_contrastive_loss=False, batch_size=7))
    assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(21))


def test_unlabeled_clips(folder):
    recordings = open_recordings(folder / "owl")
    assert recordings.classes == []
    batches = batches_of(recordings, config(batch_size=3))
    assert [b["label"].tolist() for b in batches] == [[-1] * 3] * 3
    assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(9))


@pytest.mark.parametrize("contrastive", [True, False])
def test_same_seed_same_batches(folder, contrastive):
    recordings, cfg = drop_unreadable(open_recordings(folder), quiet=True), config(use_contrastive_loss=contrastive)
    state = torch.get_rng_state()
    first = batches_of(recordings, cfg, epoch=2)
    assert torch.equal(torch.get_rng_state(), state), "loading drew from torch's generator"
    torch.manual_seed(99)
    assert same(first, batches_of(recordings, cfg, epoch=2))
    assert not same(first, batches_of(recordings, cfg, epoch=3))
    assert not same(first, batches_of(recordings, cfg, epoch=2, seed=1))


def test_worker_count_does_not_matter(folder):
    recordings = open_recordings(folder)
    runs = [batches_of(recordings, config(num_workers=n), epoch=1) for n in (0, 1, 2)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    cached = drop_unreadable(recordings, quiet=True)
    assert same(runs[0], batches_of(cached, config(num_workers=2), epoch=1))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_run_begins_in_the_middle_of_an_epoch(folder, workers):
    """A new loader, whose first batches these are: with workers it began the epoch again."""
    recordings, cfg = open_recordings(folder), config(num_workers=workers, batch_size=4)
    whole = batches_of(recordings, cfg, epoch=1)
    loader = ClipLoader(recordings, cfg, seed=0)
    loader.set_epoch(1, 2)
    assert same(list(loader), whole[2:])
    assert same(list(loader), whole), "the next pass is a whole one"


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_is_exact(folder, workers):
    recordings, cfg = open_recordings(folder), config(num_workers=workers, batch_size=4)
    loader = ClipLoader(recordings, cfg)
    for epoch in range(3):
        loader.set_epoch(epoch)
        whole = list(loader)
        assert len(whole) == len(loader)
        for start in (0, 1, len(whole) - 1, len(whole)):
            loader.set_epoch(epoch, start)
            assert same(list(loader), whole[start:])
        loader.set_epoch(epoch)
        next(iter(loader)) # a pass that is given up
        assert same(list(loader), whole)
    began = time.perf_counter()
    del loader
    gc.collect()
    assert time.perf_counter() - began < 4, "the workers were waited for"


def test_skipped_batches_are_not_loaded(folder, monkeypatch):
    recordings, rows = open_recordings(folder), []
    plain = recordings.crop
    monkeypatch.setattr(recordings, "crop", lambda row, *rest: rows.append(row) or plain(row, *rest))
    loader = ClipLoader(recordings, config(batch_size=4))
    loader.set_epoch(0, len(loader) - 1)
    (batch,) = loader
    assert rows == batch["index"].tolist() and len(rows) == 4


def test_one_clip_depends_on_nothing_but_seed_epoch_and_row(folder):
    "The same clip in other batches."
    recordings = drop_unreadable(open_recordings(folder), quiet=True)
    clips = []
    for size in (2, 5, 21):
        batches = batches_of(recordings, config(batch_size=size, use_contrastive_loss=False), epoch=4)
        clips.append({int(i): w for b in batches for i, w in zip(b["index"], b["wav"], strict=True)})
    for one in clips[:2]:
        assert all(torch.equal(wave, clips[2][i]) for i, wave in one.items())


def test_crops_cover_the_clip_and_short_clips_stand_in_zeros():
    import pandas as pd

    waves = [torch.arange(1.0, 20001), torch.ones(100)]
    recordings = Recordings(pd.DataFrame({"path": ["long", "short"]}), waves=waves)
    firsts, places = [], []
    loader = ClipLoader(recordings, config())
    for epoch in range(200):
        loader.set_epoch(epoch)
        (batch,) = loader
        long, short = (batch["wav"][batch["index"] == i][0] for i in (0, 1))
        assert torch.equal(long.diff(), torch.ones(7679)) and short.sum() == 100
        firsts.append(int(long[0]))
        places.append(int(short.argmax()))
    assert min(firsts) < 700 and max(firsts) > 11600 and max(firsts) <= 20001 - 7680
    assert min(places) < 400 and max(places) > 7100 and max(places) <= 7580
    for loader in (ClipLoader(recordings, config(random_crop=False)), ClipLoader(recordings, config(), train=False)):
        (batch,) = loader
        long, short = (batch["wav"][batch["index"] == i][0] for i in (0, 1))
        assert long[0] == 1 and short[:100].sum() == 100 and short.sum() == 100


def test_a_crop_from_a_file_is_the_crop_of_the_file(tmp_path):
    write(tmp_path / "x.wav", np.random.default_rng(0).normal(0, 0.1, 3 * RATE), RATE, subtype="FLOAT")
    streamed = open_recordings(tmp_path)
    cached = drop_unreadable(streamed, quiet=True)
    for place in (0, 0.1, 1 / 3, 0.999, 1.0):
        assert torch.equal(streamed.crop(0, 7680, place), cached.crop(0, 7680, place))


def test_another_sample_rate(tmp_path):
    write(tmp_path / "x.wav", tone(1.0, 8000), 8000)
    cfg = config(sample_rate=8000, f_max=4000.0)
    for recordings in (open_recordings(tmp_path), synthesize(n=1, classes=2)):
        (batch,) = ClipLoader(recordings, cfg, train=False)
        assert batch["wav"].shape == (len(recordings), 7680)
    assert len(ClipLoader(synthesize(n=1, classes=1), cfg).recordings.wav(0)) == 16000


def test_processes_share_the_batches(folder):
    recordings = drop_unreadable(open_recordings(folder), quiet=True)
    cfg = config(batch_size=4, use_contrastive_loss=False) # 21 clips
    whole = batches_of(recordings, cfg)
    loader, shares = ClipLoader(recordings, cfg), []
    for rank in (0, 1):
        loader.set_epoch(0, 2, rank, 2)
        shares.append(list(loader))
    assert len(whole) == len(loader) == 5 and len(shares[0]) == len(shares[1]) == 1
    assert same([shares[0][0], shares[1][0]], whole[2:4]), "the fifth has no partner"
    with pytest.raises(ValueError, match="world_size must be at most 5"):
        loader.set_epoch(0, rank=0, world_size=6)


def test_nothing_to_load(folder):
    with pytest.raises(ValueError, match="no recordings to load"):
        ClipLoader(open_recordings(folder).select([]), config())


# ---- the built-in set


def test_a_synthetic_clip_depends_on_seed_class_and_number_alone():
    large, small = synthesize(n=4, seconds=1.0), synthesize(n=2, seconds=1.0, classes=["struck", "falling glide"])
    for name in small.classes:
        one, other = (r.select(f"label == '{name}'") for r in (large, small))
        assert all(torch.equal(one.wav(i), other.wav(i)) for i in range(2))
        assert one.table.pitch.tolist()[:2] == other.table.pitch.tolist()
    assert len({wave.numpy().tobytes() for wave in large.waves}) == 48
    assert large.table[["pitch", "tempo", "level", "noise", "onset"]].notna().all(axis=None)


def test_bad_synthetic_sets():
    with pytest.raises(ValueError, match="use some of rising glide"):
        synthesize(classes=["dog"])
    with pytest.raises(ValueError, match="seconds must be at least 0.5"):
        synthesize(seconds=0.1)


# ---- augmentation


def test_switched_off_draws_nothing_and_changes_nothing():
    module = Augment(Config())
    wav, spec = torch.randn(4, 100), torch.randn(4, 1, 200, 80)
    state = torch.get_rng_state()
    assert module.wav(wav) is wav and module.spec(spec) is spec and torch.equal(torch.get_rng_state(), state)
    on = Augment(Config(mix=1.0, gain_db=6.0, spec_time_mask=20, spec_freq_mask=8)).eval()
    assert on.wav(wav) is wav and on.spec(spec) is spec and torch.equal(torch.get_rng_state(), state)


def test_what_the_augmentations_do():
    torch.manual_seed(0)
    wav, spec = torch.randn(512, 100), torch.randn(512, 1, 200, 80)
    gains = 20 * torch.log10((Augment(Config(gain_db=6.0)).wav(wav) / wav).mean(1))
    assert -6.01 < gains.min() < -5.8 and 5.8 < gains.max() < 6.01
    mixed = (Augment(Config(mix=0.3)).wav(wav) - wav).abs().amax(1) > 0
    assert 0.2 < mixed.float().mean() < 0.4
    silent = torch.zeros(2, 100)
    assert torch.equal(Augment(Config(mix=1.0)).wav(silent), silent)
    blank = (Augment(Config(spec_time_mask=20)).spec(spec) != spec)[:, 0]
    widths = 200 - blank.logical_not().all(2).sum(1)
    assert widths.min() == 0 and widths.max() == 20 and torch.equal(blank.any(2), blank.all(2))
    assert (Augment(Config(spec_freq_mask=8)).spec(spec) != spec)[:, 0].all(1).sum(1).max() == 8


def test_lists_of_skipped_print(tmp_path):
    assert repr(Skipped()) == "0 left out" and "0 left out" in Skipped()._repr_html_()
    odd = Skipped([(os.fsdecode(b"/x/\xff.wav"), "<b>"), ("y.wav", "gone")])
    repr(odd).encode(), odd._repr_html_().encode(), odd.to_csv(tmp_path / "odd.csv")
    assert "&lt;b&gt;" in odd._repr_html_()
