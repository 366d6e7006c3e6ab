"""Sets of recordings as tar files: they are trained on, embedded and scored as a folder is, and nothing is lost."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from audiomaepp import data, pieces, shards, source
from audiomaepp.audio import AudioError, load_audio, probe
from audiomaepp.batches import ClipLoader, _plan, _shuffled
from audiomaepp.cli import main
from audiomaepp.config import Config
from audiomaepp.data import NoRecordings, open_recordings
from audiomaepp.embed import EmbeddingGenerator
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.pieces import Piece, piece_of
from audiomaepp.run import Run
from audiomaepp.shards import open_shards, shard
from audiomaepp.synthetic import synthesize

TINY = dict(embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2,
            img_size=(96, 80), patch_size=(16, 16), epochs=2, warmup_epochs=0.5)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty-four clips of four classes as files of three formats, one in a name with a dot and a space."""
    at, made = tmp_path_factory.mktemp("shards") / "sounds", synthesize(n=6, classes=4, seconds=1.0)
    for i, (label, wave) in enumerate(zip(made.table["label"], made.waves, strict=True)):
        (at / label).mkdir(parents=True, exist_ok=True)
        ending = ("wav", "flac", "ogg")[i % 3]
        soundfile.write(at / label / f"clip {i}.v2.{ending}", np.asarray(wave), made.sample_rate)
    return at


@pytest.fixture(scope="module")
def made(folder):
    """The same clips as three shards."""
    shard(folder, folder.parent / "shards", clips=10, quiet=True)
    return folder.parent / "shards"


# ---- the same as a folder


def test_each_recording_is_there_byte_for_byte(folder, made):
    files, inside = open_recordings(folder), open_recordings(made)
    assert len(inside) == 24 and sorted(p.name for p in made.glob("*.tar")) == [f"{k:06d}.tar" for k in range(3)]
    for path, piece in zip(files.paths, inside.paths, strict=True):
        with pieces.open_file(piece) as file:
            assert file.read() == Path(path).read_bytes()
        assert os.path.basename(piece) == os.path.basename(path)
        assert probe(piece) == probe(path)
    assert inside.table["label"].tolist() == files.table["label"].tolist()
    assert torch.equal(inside.crop(3, 4000, 0.5), files.crop(3, 4000, 0.5))


def test_a_training_on_shards_is_the_same_bit_for_bit(folder, made, tmp_path):
    runs = [Run.train(data, out=tmp_path / name, quiet=True, **TINY) for name, data in (("a", folder), ("b", made))]
    first, second = (AudioMAEPlusPlus.from_pretrained(run.path).state_dict() for run in runs)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    digests = [pd.read_csv(run.path / "recordings.csv")["digest"].tolist() for run in runs]
    assert digests[0] == digests[1]  # a copy of a training clip is known, whatever it is in
    assert str(runs[0].evaluate(quiet=True)) == str(runs[1].evaluate(quiet=True))
    assert runs[1].resume(epochs=3, quiet=True).epochs == 3  # the clips are found again, and are the same


def test_embeddings_of_shards_are_those_of_the_folder(folder, made, tmp_path):
    torch.manual_seed(0)
    embed = EmbeddingGenerator(AudioMAEPlusPlus(Config.preset("nano", **TINY)))
    x, z = (embed.embed_folder(data, tmp_path / f"{i}.parquet", quiet=True) for i, data in enumerate((folder, made)))
    np.testing.assert_array_equal(np.stack(x["embedding"]), np.stack(z["embedding"]))
    assert embed.embed_folder(made, tmp_path / "1.parquet", quiet=True).attrs["new"] == 0
    part = embed.embed_folder(f"{made}/{{000001..000002}}.tar", tmp_path / "2.parquet", quiet=True)
    np.testing.assert_array_equal(np.stack(part["embedding"]), np.stack(z["embedding"])[10:])


def test_columns_survive_so_that_a_fold_can_be_held_out(folder, tmp_path):
    files = open_recordings(folder).table.assign(fold=[1 + i % 3 for i in range(24)], site="north")
    files = files.assign(size=range(24), first="x", name="n")  # a column may have any name
    files.loc[4, "site"] = None
    files.to_csv(tmp_path / "list.csv", index=False)
    main(["shard", str(tmp_path / "list.csv"), str(tmp_path / "out"), "--clips", "7", "--quiet"])
    table = open_shards(tmp_path / "out").table
    for name in ("fold", "size", "first", "name"):
        assert table[name].tolist() == files[name].tolist()
    assert table["site"].isna().tolist() == [i == 4 for i in range(24)]
    run = Run.train(f"{tmp_path}/out/{{000000..000003}}.tar", fold=2, out=tmp_path / "run", quiet=True, **TINY)
    assert "fold 2" in str(run.evaluate(quiet=True))


def test_commands_take_shards(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [(f"--{name.replace('_', '-')}", *map(str, np.ravel(value))) for name, value in TINY.items()]
    main(["train", f"{made}/*.tar", "--out", "run", "--quiet", *sum(flags, ())])
    main(["evaluate", "run", "--json"])
    assert "untrained network" in capsys.readouterr().out
    main(["map", "run", "--quiet"])
    assert ".v2." in Path("run/pictures/map.html").read_text("utf-8")
    with pytest.raises(SystemExit, match="000003.tar does not exist"):
        main(["train", f"{made}/{{000000..000009}}.tar", "--out", "other"])
    assert not Path("other").exists()


# ---- writing


def test_a_bad_file_is_left_out_and_listed_and_nothing_else_is_lost(folder, tmp_path):
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.wav"))[:5]):
        (tmp_path / "in" / f"{i}.wav").write_bytes(path.read_bytes())
    (tmp_path / "in" / "2.wav").write_bytes(b"no sound")
    whole = sorted(folder.rglob("*.flac"))[0].read_bytes()  # two with a good header: a training trusts the shards
    (tmp_path / "in" / "5.flac").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    soundfile.write(tmp_path / "in" / "6.wav", np.zeros(0, np.float32), 16000)
    table = shard(tmp_path / "in", tmp_path / "out", clips=2, quiet=True)
    assert [os.path.basename(path) for path in table["path"]] == ["0.wav", "1.wav", "3.wav", "4.wav"]
    skipped = {os.path.basename(path): reason for path, reason in table.attrs["skipped"]}
    assert "not audio" in skipped.pop("2.wav")
    assert "cut off or damaged" in skipped.pop("5.flac") and "no samples" in skipped.pop("6.wav") and not skipped
    assert "2.wav" in (tmp_path / "out" / "skipped.csv").read_text()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.wav").write_bytes(b"no sound")
    with pytest.raises(NoRecordings, match="no recording that can be opened"):
        shard(tmp_path / "bad", tmp_path / "none", quiet=True)


@pytest.mark.parametrize("at", [0, 0.5, 1.5])  # in the first reading of the file, and in a second one, if there is one
def test_a_drive_that_fails_inside_a_recording_loses_it_alone(at, folder, tmp_path, monkeypatch):
    """The shard stays whole: what is not in the manifest is listed, and what is in it has its own bytes."""

    class Failing(io.FileIO):
        reads = 0

        def readinto(self, buffer):
            Failing.reads += 1
            if Failing.reads > at * os.path.getsize(self.name) / 1000:
                raise OSError(5, "Input/output error")
            return super().readinto(memoryview(buffer)[:1000])

        def readall(self):
            return b"".join(iter(lambda: self.read(1000), b""))

        def read(self, size=-1):
            buffer = bytearray(1000)
            return self.readall() if size < 0 else bytes(buffer[: self.readinto(buffer)])

    def opened(path):
        return Failing(path) if path.endswith("clip 4.v2.flac") else pieces.open_file(path)

    monkeypatch.setattr(shards, "open_file", opened)
    table = shard(folder, tmp_path, clips=10, quiet=True)
    skipped = [os.path.basename(path) for path, _ in table.attrs["skipped"]]
    assert skipped == (["clip 4.v2.flac"] if at < 1 else []) and len(table) + len(skipped) == 24
    for piece in (f"{tmp_path}/{path}" for path in table["path"]):
        with pieces.open_file(piece) as file:
            assert file.read() == (folder / piece_of(piece).name).read_bytes()


def test_a_damaged_part_is_written_again(folder, tmp_path):
    shard(folder, tmp_path, clips=10, quiet=True)
    whole = (tmp_path / "000001.tar").read_bytes()
    (tmp_path / "parts" / "000001.json").write_bytes(b'{"plan": ')
    assert len(shard(folder, tmp_path, clips=10, quiet=True)) == 24 and (tmp_path / "000001.tar").read_bytes() == whole


def test_a_killed_command_goes_on_and_the_shards_are_the_same(folder, made, tmp_path):
    code = f"""
import os, sys, time
from audiomaepp import shards
write = shards._write_shard
def slow(out, number, *rest):
    part = write(out, number, *rest)
    print(number, flush=True)
    time.sleep(60)
shards._write_shard = slow
shards.shard({str(folder)!r}, {str(tmp_path / "out")!r}, clips=10, workers=1, quiet=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.kill()
    process.wait()
    written = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    shard(folder, tmp_path / "out", clips=10, quiet=True)
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == written
    for path in made.glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out" / "shards.json").read_text()) == json.loads((made / "shards.json").read_text())


def test_a_changed_recording_is_written_again_and_a_shorter_set_leaves_no_old_shard(folder, tmp_path):
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.wav"))[:6]):
        (tmp_path / "in" / f"{i}.wav").write_bytes(path.read_bytes())
    shard(tmp_path / "in", tmp_path / "out", clips=2, quiet=True)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    soundfile.write(tmp_path / "in" / "3.wav", np.zeros(500) + 0.1, 16000)
    table = shard(tmp_path / "in", tmp_path / "out", clips=2, quiet=True)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["000001.tar"]
    assert len(load_audio(str(tmp_path / "out" / table["path"][3]))) == 500
    for i in (4, 5):
        (tmp_path / "in" / f"{i}.wav").unlink()
    assert len(shard(tmp_path / "in", tmp_path / "out", clips=2, quiet=True)) == 4
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["000000.tar", "000001.tar"]


def test_files_of_others_are_not_overwritten(folder, tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds mine.tar, which audiomaepp shard did not make"):
        shard(folder, tmp_path, quiet=True)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["mine.tar"]


def test_generated_sounds_become_shards(tmp_path):
    from audiomaepp.synthetic import generated

    table = shard(generated(5, 3, 1.0), tmp_path, clips=3, quiet=True)
    found = open_shards(tmp_path)
    assert len(table) == 5 and not found.has_takes
    assert (found.wav(4) - generated(5, 3, 1.0).wav(4)).abs().max() < 2**-14
    shard(generated(5, 4, 1.0), tmp_path, clips=3, quiet=True)  # other programs of the same names
    assert (open_shards(tmp_path).wav(4) - generated(5, 4, 1.0).wav(4)).abs().max() < 2**-14


# ---- shards of others, damaged ones, and ones that are far away


def test_webdataset_shards_without_a_manifest(folder, tmp_path):
    sounds = sorted(folder.rglob("*.flac"))[:4]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, path in enumerate(sounds):
            tar.add(path, f"{i:04d}.flac")
            ending, text = (".cls", "73"[i]) if i < 2 else (".json", '{"label": "dog", "fold": 2}')
            info = tarfile.TarInfo(f"{i:04d}{ending}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    found = open_shards(tmp_path / "a.tar")
    assert found.table["label"].tolist() == ["7", "3", "dog", "dog"] and found.table["fold"].tolist()[2:] == [2, 2]
    assert torch.equal(found.wav(1), load_audio(sounds[1]))


def test_a_cut_shard_names_the_recordings_that_are_lost(made, tmp_path):
    for path in made.glob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    data = (tmp_path / "000001.tar").read_bytes()
    (tmp_path / "000001.tar").write_bytes(data[: len(data) // 2])
    found = open_shards(tmp_path)
    problems = {}
    for i in range(len(found)):
        try:
            found.wav(i)
        except AudioError as error:
            problems[i] = error.reason
    assert problems and set(problems) <= set(range(10, 20)) and 19 in problems and 10 not in problems
    assert all("cut off" in reason for reason in problems.values())
    (tmp_path / "000001.tar").unlink()
    with pytest.raises(AudioError, match="does not exist"):
        found.wav(10)
    assert len(found.wav(9)) and len(found.wav(20))


@pytest.mark.parametrize("damage", [b"", b"no tar file" * 100, b"\0" * 20480])
def test_what_is_no_tar_file_is_named(damage, tmp_path):
    (tmp_path / "x.tar").write_bytes(damage)
    with pytest.raises(ValueError, match="x.tar"):
        open_shards(tmp_path / "x.tar")


def test_a_damaged_manifest_is_named(made, tmp_path):
    (tmp_path / "manifest.parquet").write_bytes((made / "manifest.parquet").read_bytes()[:-7])
    with pytest.raises(ValueError, match="manifest.parquet"):
        open_shards(tmp_path)


def test_shards_at_an_address(made, folder, tmp_path):
    there = open_recordings(f"file://{made}")
    assert len(there) == 24 and torch.equal(there.wav(7), open_recordings(folder).wav(7))
    assert len(open_recordings(f"file://{made}/{{000000..000001}}.tar")) == 20
    run = Run.train(f"file://{made}", out=tmp_path / "run", quiet=True, **TINY)
    assert run.resume(epochs=3, quiet=True).epochs == 3
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        open_recordings(f"file://{tmp_path}/nowhere")


def test_a_clip_at_an_address_costs_its_own_bytes(made, monkeypatch):
    """A file opened at an address reads megabytes ahead: of a bucket, hundreds of times the bytes of the clips."""
    import fsspec

    there, fetched = fsspec.filesystem("file"), []
    monkeypatch.setattr(there, "cat_file", lambda path, start, end: fetched.append(end - start) or type(there).cat_file(
        there, path, start, end))
    recordings = open_recordings(f"file://{made}")
    sizes = [piece_of(path).size for path in recordings.paths[:5]]
    monkeypatch.setattr(pieces, "_open_whole", lambda path: pytest.fail(f"{path} was opened"))
    for i in range(5):
        recordings.wav(i)
    assert fetched == sizes
    monkeypatch.setattr(there, "cat_file", lambda path, start, end: type(there).cat_file(there, path))  # all of it
    with pytest.raises(data.AudioError, match="its server sends no parts of files"):
        recordings.wav(5)


def test_commands_take_an_address_alone(made, tmp_path, capsys, monkeypatch):
    """It means sounds, as a folder does, and the model is the one that the package brings."""
    monkeypatch.chdir(tmp_path)
    main(["embed", f"file://{made}", "--quiet"])
    assert len(pd.read_parquet("embeddings.parquet")) == 24
    main(["map", f"file://{made}", "--quiet"])
    assert [path.suffix for path in sorted(Path("runs/starter/embeddings").iterdir())].count(".html") == 1
    main(["search", f"file://{made}", open_recordings(made).paths[3], "--json"])
    assert json.loads(capsys.readouterr().out)["hits"]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_shard_that_is_missing_at_an_address_is_named_and_not_left_out(manifest, made, tmp_path):
    """Else a training would go on with three of ten shards, and nothing would say so."""
    for path in made.glob("*.tar" if not manifest else "*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="000003.tar"):
        open_shards(f"file://{tmp_path}/{{000000..000009}}.tar")
    assert len(open_shards(f"file://{tmp_path}/{{000001..000002}}.tar")) == 14
    assert len(open_shards(f"file://{tmp_path}/*.tar")) == 24 and len(open_shards(f"file://{tmp_path}/*1.tar")) == 10
    with pytest.raises(FileNotFoundError, match="matches no tar file"):
        open_shards(f"file://{tmp_path}/x*.tar")


def test_a_shard_without_a_recording_is_no_missing_one(folder, tmp_path):
    """Its recordings could not be opened, so the manifest does not name it."""
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.wav"))[:2]):
        (tmp_path / "in" / f"{i}.wav").write_bytes(path.read_bytes() if i else b"no sound")
    shard(tmp_path / "in", tmp_path / "out", clips=1, quiet=True)
    assert len(open_shards(f"file://{tmp_path}/out/{{000000..000001}}.tar")) == 1


@pytest.mark.parametrize("failures", [1, 1000])
def test_a_network_that_fails_does_not_end_a_training(failures, made, monkeypatch):
    """Its libraries raise errors of their own, which are no OSError; what the second try reads is not lost."""
    there, plain, left = open_recordings(f"file://{made}"), data.Recordings.crop, [failures]
    cfg = Config.preset("nano", **TINY, batch_size=8, max_unreadable=0.05, num_workers=0)
    whole = list(ClipLoader(there, cfg))

    class PayloadError(Exception):
        reason = OSError(104, "Connection reset by peer")

    def crop(self, row, *args):
        if row == 13 and left[0]:
            left[0] -= 1
            raise PayloadError("payload is not completed")
        return plain(self, row, *args)

    monkeypatch.setattr(data.Recordings, "crop", crop)
    batches = list(ClipLoader(there, cfg))
    assert len(batches) == len(whole) == 3
    assert there.skipped == [(there.paths[13], "PayloadError: payload is not completed")] * (failures > 1)
    same = [torch.equal(a["wav"], b["wav"]) for a, b in zip(batches, whole, strict=True)]
    assert same.count(False) == (failures > 1)


# ---- many of them


def test_nothing_is_read_when_shards_are_opened(tmp_path, monkeypatch):
    n = 20_000
    paths = [str(Piece(f"{i // 1000:06d}.tar", 512, 1000, f"{i}.wav")) for i in range(n)]
    pd.DataFrame(dict(path=paths, label="a", seconds=1.0)).to_parquet(tmp_path / "manifest.parquet")
    opened = []
    monkeypatch.setattr(pieces, "_open_whole", lambda path: opened.append(path) or open(path, "rb"))
    found = open_recordings(tmp_path)
    assert len(found) == n and found.seconds(n - 1) == 1.0
    assert [os.path.basename(path) for path in opened] in ([], ["manifest.parquet"])


def test_shards_are_not_decoded_before_the_training(folder, tmp_path, monkeypatch):
    """The first step starts at once; a recording that cannot be decoded is replaced and listed when it is needed."""
    table = shard(folder, tmp_path / "out", clips=10, quiet=True)
    row = 13
    piece = piece_of(str(tmp_path / "out" / table["path"][row]))
    with open(piece.tar, "r+b") as file:
        file.seek(piece.first)
        file.write(b"x" * piece.size)
    asked, hashed = [], []
    monkeypatch.setattr(source, "digest_of", hashed.append)
    monkeypatch.setattr(data, "drop_unreadable", lambda *args, **how: asked.append(args))
    how = TINY | dict(max_unreadable=0.1)
    run = Run.train(tmp_path / "out", held_out=[0, 6, 20], out=tmp_path / "run", quiet=True, **how)
    assert not asked and not hashed and run.epochs == 2
    assert os.path.basename(table["path"][row]) in (run.path / "skipped.csv").read_text()


def test_an_epoch_has_each_clip_once_and_reads_few_shards_at_a_time():
    numbers = np.arange(50_000) // 1000
    order = _shuffled(50_000, np.random.default_rng(0), numbers)
    assert np.array_equal(np.sort(order), np.arange(50_000))
    assert max(len(set(numbers[order[i : i + 1000]])) for i in range(0, 50_000, 1000)) <= 11
    keys = [_plan(np.full(50_000, -1), 64, 0, epoch, False, numbers) for epoch in (0, 0, 1)]
    assert np.array_equal(keys[0], keys[1]) and not np.array_equal(keys[0], keys[2])
    few = _shuffled(5000, np.random.default_rng(0), numbers[:5000])
    assert np.array_equal(few, np.random.default_rng(0).permutation(5000))


def test_a_signal_ends_the_writing_and_the_same_command_continues(folder, tmp_path):
    code = """
import sys
from audiomaepp import shards
from audiomaepp.cli import main
write = shards._write_shard
def told(*args):
    part = write(*args)
    print("one", flush=True)
    import time
    time.sleep(0.5)
    return part
shards._write_shard = told
main(["shard", sys.argv[1], sys.argv[2], "--clips", "2", "--workers", "1"])
"""
    process = subprocess.Popen([sys.executable, "-c", code, folder, tmp_path / "out"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "one\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "The same command continues" in process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM and not (tmp_path / "out" / "manifest.parquet").exists()
    assert len(shard(folder, tmp_path / "out", clips=2, quiet=True)) == 24


def test_a_name_inside_a_shard_leads_nowhere_else(tmp_path, folder):
    """A hostile tar file names its members ../../x: they are read from the tar file and shown."""
    sound = next(folder.rglob("*.wav"))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(sound, "../../etc/passwd.wav")
        tar.add(sound, "/etc/<b>.wav")
    found = open_shards(tmp_path / "x.tar")
    assert [piece_of(path).tar for path in found.paths] == [str(tmp_path / "x.tar")] * 2
    assert torch.equal(found.wav(0), load_audio(sound)) and "<b>" not in found[1]._repr_html_()
    assert shards.expand("a{b}c.tar") == ["abc.tar"]
