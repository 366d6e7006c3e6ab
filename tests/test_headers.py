"""A folder that does not fit into memory: its headers are read, and nothing is decoded before the first step."""

import csv
import hashlib
import io
import os
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from safetensors.torch import load_file

from audiomaepp import Run, batches, data, headers, source
from audiomaepp.config import Config
from audiomaepp.data import open_recordings, usable
from audiomaepp.embed import fingerprint
from audiomaepp.files import printable
from audiomaepp.pieces import piece_of
from audiomaepp.run import in_training
from audiomaepp.shards import shard
from audiomaepp.shelf import SHARED
from audiomaepp.source import trained_on
from audiomaepp.train import LoaderError, Trainer

TINY = dict(
    embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_num_heads=2, batch_size=8, warmup_epochs=0,
    epochs=1, precision="fp32", num_workers=0, max_unreadable=0.1,
)  # fmt: skip
SECOND = 16000 * 4  # bytes of decoded samples


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOMAEPP_DATA", str(tmp_path / "home"))
    return tmp_path / "home" / "headers"


@pytest.fixture
def folder(tmp_path):
    """Twenty FLAC files of a second in two classes, one empty file, and one whose middle is damaged."""
    for i in range(20):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i:02d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(i).standard_normal(16000) / 9, 16000)
    (tmp_path / "set" / "a" / "none.flac").touch()
    with open(tmp_path / "set" / "b" / "07.flac", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 3)
        file.write(bytes(size // 2))
    return tmp_path / "set"


@pytest.fixture
def large(monkeypatch):
    """Five seconds of sound do not fit into memory; nothing may be decoded before a training."""
    monkeypatch.setattr(data, "usable", partial(usable, keep=5 * SECOND))
    monkeypatch.setattr(source, "_WHOLE", 5 * SECOND)
    monkeypatch.setattr(data, "drop_unreadable", lambda *args, **how: pytest.fail("the set was decoded"))


def skipped(run):
    with open(run.path / "skipped.csv", newline="") as file:
        return [os.path.basename(path) for path, _ in csv.reader(file)][1:]


def parts_of(run):
    return dict(pd.read_csv(run.path / "recordings.csv").set_index("path")["part"])


def test_a_large_folder_is_trained_on_without_decoding_it_first(folder, large, tmp_path):
    """Damage is found by the training, which replaces and lists the clip; every later call finds the same rows."""
    rows = [0, 1, 2, 3]
    first = Run.train(folder, held_out=rows, out=tmp_path / "first", quiet=True, **TINY)
    assert skipped(first) == ["none.flac", "07.flac"] and parts_of(first)["b/07.flac"] == "train"
    again = first.resume(epochs=2, quiet=True)
    assert again.epochs == 2 and again.evaluate(quiet=True).rows


def test_headers_are_read_once(folder, home, monkeypatch):
    paths = open_recordings(folder).paths
    first = headers.headers_of(paths, str(folder), quiet=True)
    assert first["seconds"].notna().sum() == 20 and first["reason"][paths.index(str(folder / "a/none.flac"))]
    read = []
    plain = headers._header
    monkeypatch.setattr(headers, "_header", lambda path: read.append(path) or plain(path))
    pd.testing.assert_frame_equal(headers.headers_of(paths, str(folder), quiet=True), first)
    some = headers.headers_of(paths[3:], str(folder), quiet=True)
    pd.testing.assert_frame_equal(some, first[3:].reset_index(drop=True))
    empty = str(folder / "a/none.flac")  # may be readable the next time
    assert read == [empty, empty]
    os.utime(paths[4], ns=(1, 1))
    headers.headers_of([*paths, "missing.wav"], str(folder), quiet=True)
    assert read[2:] == [*sorted({paths[4], empty}, key=paths.index), "missing.wav"]
    written = {file: file.stat().st_mtime_ns for file in home.iterdir()}
    headers.headers_of(paths, str(folder), quiet=True)  # nothing new: of a million files, nothing is written again
    assert written == {file: file.stat().st_mtime_ns for file in home.iterdir()}
    for file in home.iterdir():  # a damaged file of headers is no error: they are read again
        file.write_bytes(b"PAR1")
    read.clear()
    headers.headers_of(paths, str(folder), quiet=True)
    assert read == paths


def test_digests_of_a_large_set_are_computed_once(folder, large, tmp_path, monkeypatch):
    """A second training on a million files began only after all of them had been opened again."""
    read, plain = [], source._Row.digest
    monkeypatch.setattr(source._Row, "digest", lambda row, *args, **how: read.append(row) or plain(row, *args, **how))

    def digests(name):
        read.clear()
        run = Run.train(folder, held_out=[0, 1], out=tmp_path / name, quiet=True, **TINY)
        return dict(pd.read_csv(run.path / "recordings.csv").set_index("path")["digest"])

    first = digests("first")
    assert len(read) == len(first) == 20 and all(text.startswith("samples:") for text in first.values())
    (folder / "b" / "07.flac").unlink()  # damaged: a later training leaves it out
    del first["b/07.flac"]
    assert digests("second") == first and not read
    soundfile.write(folder / "a" / "00.flac", np.ones(16000) / 9, 16000)
    third = digests("third")
    assert len(read) == 1 and {name for name in first if third[name] != first[name]} == {"a/00.flac"}


def test_a_folder_of_headers_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUDIOMAEPP_DATA", str(tmp_path / "file"))
    assert len(headers.headers_of(open_recordings(folder).paths, str(folder), quiet=True)) == 21


def test_a_set_that_fits_into_memory_is_decoded(folder, home):
    found = usable(open_recordings(folder), str(folder), quiet=True)
    assert found.in_memory and len(found) == 19 and not home.exists()


def test_a_large_set_is_loaded_by_workers_unless_the_settings_say_otherwise(folder, large, tmp_path, monkeypatch):
    """Decoding in the process that trains takes several times as long as the step."""
    asked, first = [], batches.DataLoader.__init__

    def init(self, *args, num_workers=0, **how):
        asked.append(num_workers)
        first(self, *args, num_workers=num_workers, **how)

    monkeypatch.setattr(batches.DataLoader, "__init__", init)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    for name, workers, expected in (("a", 0, 2 * SHARED), ("b", 1, 1)):
        Run.train(folder, held_out=[0, 1], out=tmp_path / name, quiet=True, **TINY | dict(num_workers=workers))
        assert max(asked) == expected, name
        asked.clear()


def test_a_digest_of_an_earlier_version_is_still_understood(folder, large, tmp_path):
    """Else a copy of a training clip would count as held out, and a touched file as changed."""
    run = Run.train(folder, held_out=[0, 1], out=tmp_path / "run", quiet=True, **TINY)
    table = pd.read_csv(run.path / "recordings.csv")
    for i, name in enumerate(table["path"]):
        data = (folder / name).read_bytes()
        ends = b"%d " % len(data) + data[:65536] + data[max(65536, len(data) - 65536) :]
        table.loc[i, "digest"] = "ends:" + hashlib.blake2b(ends, digest_size=16).hexdigest()
    table.to_csv(run.path / "recordings.csv", index=False)
    (tmp_path / "other").mkdir()
    for name, of in (("copy.flac", "b/05.flac"), ("held.flac", "a/00.flac")):
        (tmp_path / "other" / name).write_bytes((folder / of).read_bytes())
    assert trained_on(run.path, open_recordings(tmp_path / "other")) == [True, False]
    os.utime(folder / "b/05.flac")
    run.resume(epochs=2, quiet=True)
    damaged = (run.path / "recordings.csv").read_text().replace("ends:", "odds:")
    (run.path / "recordings.csv").write_text(damaged)
    with pytest.raises(ValueError, match=r"b/05\.flac has other contents"):
        run.resume(epochs=3, quiet=True)


def test_a_run_on_a_large_set_notices_other_contents(folder, large, tmp_path):
    """Only the ends of its files are digested; a copy is still found, and a file that was replaced."""
    run = Run.train(folder, held_out=[0, 1], out=tmp_path / "run", quiet=True, **TINY)
    assert set(pd.read_csv(run.path / "recordings.csv")["digest"].str[:8]) == {"samples:"}
    (tmp_path / "other").mkdir()
    sounds = [Path(path).read_bytes() for path in (folder / "b/05.flac", folder / "a/00.flac")]
    for name, sound in zip(("copy.flac", "held.flac"), sounds, strict=True):
        (tmp_path / "other" / name).write_bytes(sound)
    shard(tmp_path / "other", tmp_path / "shards", quiet=True)
    model, other = fingerprint(run.model), [str(tmp_path / "other" / name) for name in ("copy.flac", "held.flac")]
    assert in_training(run.path, model, other).tolist() == [True, False]
    for place in ("other", "shards"):  # a manifest lists digests of whole files
        assert trained_on(run.path, open_recordings(tmp_path / place)) == [True, False]
    (folder / "b/05.flac").write_bytes(sounds[0])  # another time, the same contents
    run.resume(epochs=2, quiet=True)
    soundfile.write(folder / "b/05.flac", np.zeros(16000), 16000)
    with pytest.raises(ValueError, match=r"b/05\.flac has other contents"):
        run.resume(epochs=3, quiet=True)


# ---- damaged contents are remembered


def all_of(run):
    return [tensor.numpy().tobytes() for _, tensor in sorted(load_file(run.path / "model.safetensors").items())]


def test_a_damaged_recording_is_found_once(folder, large, tmp_path, monkeypatch):
    """Else every training finds it anew, and its batches hold another clip twice."""
    lost, add = [], batches._Lost.add
    monkeypatch.setattr(batches._Lost, "add", lambda self, failed: lost.extend(failed) or add(self, failed))
    how = dict(held_out=[0, 1], quiet=True, **TINY)
    first = Run.train(folder, out=tmp_path / "first", **how)
    assert lost and "b/07.flac" in parts_of(first)
    copy = Run(shutil.copytree(first.path, tmp_path / "copy"))
    lost.clear()
    second = Run.train(folder, out=tmp_path / "second", **how)
    assert not lost and parts_of(first).keys() - parts_of(second).keys() == {"b/07.flac"}
    listed = dict(pd.read_csv(second.path / "skipped.csv").to_numpy().tolist())
    assert "samples can be decoded" in listed[str(folder / "b/07.flac")] and str(folder / "a/none.flac") in listed
    first.resume(epochs=2, quiet=True)  # with the recordings that it began with
    assert lost
    with monkeypatch.context() as elsewhere:  # where nothing is remembered
        elsewhere.setenv("AUDIOMAEPP_DATA", str(tmp_path / "nothing"))
        copy.resume(epochs=2, quiet=True)
        second.resume(epochs=2, quiet=True)
    assert all_of(first) == all_of(copy)
    soundfile.write(folder / "b/07.flac", np.random.default_rng(7).standard_normal(16000) / 9, 16000)
    third = Run.train(folder, out=tmp_path / "third", **how)
    assert parts_of(third).keys() == parts_of(first).keys() and skipped(third) == ["none.flac"]
    assert second.resume(epochs=3, quiet=True).evaluate(quiet=True).rows  # still without the file that was replaced


def test_a_damaged_recording_that_is_held_out_is_found_by_the_first_evaluation(folder, large, tmp_path):
    """A training decodes no held-out clip, so no training would find it."""
    shutil.copy(folder / "b/07.flac", os.fsencode(folder) + b"/b/caf\xe9.flac")  # in the training part
    first = Run.train(folder, held_out=[0, 1, 14], out=tmp_path / "first", quiet=True, **TINY)
    assert skipped(first) == ["none.flac", "caf\\xe9.flac"] and parts_of(first)["b/07.flac"] == "test"
    first.evaluate(quiet=True)
    second = Run.train(folder, held_out=[0, 1, 14], out=tmp_path / "second", quiet=True, **TINY)
    assert skipped(second) == ["none.flac", "07.flac", "caf\\xe9.flac"] and first.evaluate(quiet=True).rows
    assert parts_of(second).items() < parts_of(first).items()  # row numbers still count all recordings
    tuned = second.finetune(tmp_path / "tuned", quiet=True, epochs=1, batch_size=8)
    (tmp_path / "home" / "headers").rename(tmp_path / "gone")
    for run in (first, second, tuned):  # a folder of headers may be deleted at any time
        names = {printable(os.path.relpath(path, folder)) for part in run.data[:2] for path in part.paths}
        assert names == parts_of(run).keys() and ("b/07.flac" in names) == (run is first)


def test_a_training_with_too_many_damaged_recordings_is_begun_again_without_them(folder, large, tmp_path):
    """Else a person has to take them out of the folder by hand."""
    shutil.copy(folder / "b/07.flac", folder / "b/09.flac")
    how = dict(held_out=[0, 1], quiet=True, **TINY | dict(max_unreadable=0.0))
    with pytest.raises(batches.UnreadableError, match="2 of"):
        Run.train(folder, out=tmp_path / "first", **how)
    assert skipped(Run.train(folder, out=tmp_path / "second", **how)) == ["none.flac", "07.flac", "09.flac"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_recording_whose_bytes_cannot_be_read_is_not_remembered(error, folder, large, tmp_path, monkeypatch):
    """A network disk that is away for a moment would take recordings out of every later training."""

    class Away(io.BytesIO):
        def readinto(self, buffer):
            if self.tell() > 8192:
                raise error
            return super().readinto(buffer)

    monkeypatch.setattr(headers, "open_file", lambda path: Away(Path(path).read_bytes()))
    first = Run.train(folder, held_out=[0, 1], out=tmp_path / "first", quiet=True, **TINY)
    assert skipped(first) == ["none.flac", "07.flac"]
    assert source.known_damage(source.Source(str(folder))) == {}


def test_what_is_damage(folder, tmp_path):
    """Whatever the opening of a set that fits into memory refuses, and no more."""
    silence, broken = np.zeros(16000, np.float32), tmp_path / "nan.wav"
    soundfile.write(broken, np.where(np.arange(16000) == 9000, np.nan, silence), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "whole.wav", silence, 16000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "whole.wav").read_bytes()[:-4000])
    os.mkfifo(tmp_path / "pipe.wav")
    bad = [broken, tmp_path / "cut.wav", folder / "b/07.flac"]
    fine = [tmp_path / "whole.wav", folder / "b/05.flac"]
    no_header = [folder / "a/none.flac", tmp_path / "missing.wav", tmp_path, tmp_path / "pipe.wav"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in (*bad, *fine):
            tar.add(path, path.name)
    inside = open_recordings(tmp_path / "x.tar").paths
    for path in map(str, (*bad, *fine, *no_header, *inside)):
        assert bool(headers.damage(path)) == (Path(path).name in {path.name for path in bad}), path
    table = pd.DataFrame(dict(path=[str(path) for path in (*bad, *fine)]))
    refused = data.drop_unreadable(data.Recordings(table), quiet=True).skipped
    assert refused == [(str(path), headers.damage(str(path))) for path in bad]


def test_what_several_trainings_remember_is_kept(folder, home, monkeypatch):
    """Of two that end together, the second must not undo what the first has found."""
    bad = [str(folder / f"b/{name}.flac") for name in ("07", "café \udce9")]
    Path(bad[1]).write_bytes(Path(bad[0]).read_bytes())
    plain = headers.damage

    def meanwhile(path, end):
        if path == bad[0]:
            headers.remember(str(folder), bad[1:])
        return plain(path, end)

    monkeypatch.setattr(headers, "damage", meanwhile)
    headers.remember(str(folder), bad[:1])
    headers.remember(str(folder), [])
    assert sorted(path for path, _ in headers.damaged_in(str(folder))) == sorted(bad)
    names = [os.path.relpath(path, folder) for path in bad]
    assert sorted(source.known_damage(source.Source(str(folder)))) == sorted(names)
    monkeypatch.setattr(headers, "damage", lambda path, end: pytest.fail("what is known was decoded again"))
    headers.remember(str(folder), bad)
    os.remove(bad[0])
    assert [path for path, _ in headers.damaged_in(str(folder))] == bad[1:]


def test_a_damaged_memory_is_no_error(folder, home, monkeypatch, tmp_path):
    """What is damaged is found again, and that is all."""
    bad, place = str(folder / "b/07.flac"), str(folder)
    headers.remember(place, [bad])
    (kept,) = home.glob("*-damaged.parquet")
    good = pd.read_parquet(kept)
    for broken in (good.drop(columns="reason"), good.assign(size="x"), good.assign(size=np.nan), good.assign(path="a"),
                   good.assign(path=1), good.assign(reason=None), good[:0], pd.concat([good, good])):  # fmt: skip
        broken.to_parquet(kept)
        assert [path for path, _ in headers.damaged_in(place)] == [bad] * (len(broken) == 2)
        headers.remember(place, [bad])
        assert [path for path, _ in headers.damaged_in(place)] == [bad]
    kept.write_bytes(b"PAR1")
    assert headers.damaged_in(place) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUDIOMAEPP_DATA", str(tmp_path / "file"))
    headers.remember(place, [bad])
    assert headers.damaged_in(place) == []


def test_a_damaged_recording_in_a_shard_is_found_once(folder, large, tmp_path):
    """A tar file can be damaged after it was written."""
    (folder / "b/07.flac").unlink()
    shard(folder, tmp_path / "shards", quiet=True)
    (tar,) = (tmp_path / "shards").glob("*.tar")
    (piece,) = (path for path in open_recordings(tmp_path / "shards").paths if path.endswith("/05.flac"))
    at, size = piece_of(piece)[1:3]
    with open(tar, "r+b") as file:
        file.seek(at + size // 3)
        file.write(bytes(size // 2))
    for name, before in (("first", 0), ("second", 1)):
        run = Run.train(tmp_path / "shards", held_out=[0, 1], out=tmp_path / name, quiet=True, **TINY)
        assert skipped(run) == ["05.flac"] and len(parts_of(run)) == 19 - before
    os.utime(tar)
    assert source.known_damage(source.Source(str(tmp_path / "shards"))) == {}


def test_what_is_remembered_does_not_change_what_is_held_out(folder, large, tmp_path):
    """A random split of one file less is another split: half of what a model was trained on would be held out later."""
    damaged = {"b/07.flac": "cannot be decoded"}
    for seed in range(5):
        cfg = Config.preset("nano", seed=seed)
        before, after = (source.open_source(source.Source(str(folder)), cfg, True, None, out) for out in ({}, damaged))
        for part in (0, 1):
            assert set(before[part].paths) - set(after[part].paths) <= {str(folder / "b/07.flac")}
            assert set(after[part].paths) <= set(before[part].paths), seed
        assert len(before.train) + len(before.test) - len(after.train) - len(after.test) == 1
        assert f"{len(after.train)} train / {len(after.test)} test" in after.protocol


def test_after_an_error_of_the_loader_no_file_is_opened(folder, large, tmp_path, monkeypatch):
    """The disk may hang, and the message that says so would never appear."""
    def hangs(*args):
        raise LoaderError("the disk hangs")

    monkeypatch.setattr(Trainer, "fit", hangs)
    monkeypatch.setattr(headers, "remember", lambda *args: pytest.fail("a file was opened"))
    with pytest.raises(LoaderError, match="the disk hangs"):
        Run.train(folder, out=tmp_path / "run", quiet=True, **TINY)


def test_a_piece_at_an_address_is_not_remembered(monkeypatch):
    """It has no modification time: a shard that was repaired would stay left out."""
    monkeypatch.setattr(headers, "damage", lambda *args: "cannot be decoded")
    for modified, found in ((0, []), (7, ["a.tar::b.wav"])):
        monkeypatch.setattr(headers, "state_of", lambda path, modified=modified: (9, modified))
        headers.remember("memory://set", ["a.tar::b.wav"])
        assert [path for path, _ in headers.damaged_in("memory://set")] == found
