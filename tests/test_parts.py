"""Several processes embed into one file: nothing is lost, whoever ends last, is killed or comes again."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from test_embed import SMALL, generator, sounds

from audiomaepp.files import OutputError, only_writer
from audiomaepp.shards import shard
from audiomaepp.store import folder_of_part

pytestmark = pytest.mark.filterwarnings("ignore:all recordings of")


def embed(folder, out, part=None, **how):
    return generator().embed_folder(folder, out, quiet=True, part=part, **how)


def rows_of(path):
    table = pd.read_parquet(path).sort_values("path", ignore_index=True)
    return list(table["path"]), np.stack(table["embedding"])


def check_same(out, folder, tmp_path):
    embed(folder, tmp_path / "alone.parquet")
    (paths, found), (names, wanted) = rows_of(out), rows_of(tmp_path / "alone.parquet")
    assert paths == names
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_give_what_one_process_gives(tmp_path, order):
    """Also with more parts than recordings in one of them, and files that cannot be decoded."""
    folder, out = sounds(tmp_path / "sounds", 7), tmp_path / "out" / "x.parquet"
    for name in ("bad.wav", "worse.wav"):
        (folder / name).write_text("no sound")
    left = [embed(folder, out, (number, 3)).attrs["left"] for number in order]
    assert left == [sorted(order[1:]), [order[2]], []]
    check_same(out, folder, tmp_path)
    assert os.listdir(out.parent) == ["x.parquet"]


def test_the_last_process_lists_all_that_was_skipped(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 5), tmp_path / "x.parquet"
    bad = [folder / f"bad{i}.wav" for i in range(6)]
    for path in bad:
        path.write_text("no sound")
    for number in range(4):
        table = embed(folder, out, (number, 4))
    assert sorted(path for path, _ in table.attrs["skipped"]) == sorted(map(str, bad))


def test_many_parts_of_few_recordings(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 2), tmp_path / "x.parquet"
    for number in range(9):
        embed(folder, out, (number, 9))
    check_same(out, folder, tmp_path)


def test_a_recording_keeps_its_part_when_others_come(tmp_path):
    """Else a process that is started again would embed everything again, or meet rows that are not its own."""
    folder, out = sounds(tmp_path / "sounds", 6), tmp_path / "x.parquet"
    embed(folder, out, (0, 2))
    for i in range(40):
        soundfile.write(folder / f"late{i}.wav", np.full(4000, 0.02 * i), 8000)
    again = embed(folder, out, (0, 2))
    assert 0 < again.attrs["new"] < 40 and again.attrs["left"] == [1]
    embed(folder, out, (1, 2))
    check_same(out, folder, tmp_path)


def test_a_finished_table_grows_by_parts(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 8), tmp_path / "x.parquet"
    embed(folder, out)
    soundfile.write(folder / "late.wav", np.full(4000, 0.5), 8000)
    new = [embed(folder, out, (number, 2)).attrs["new"] for number in range(2)]
    assert sorted(new) == [0, 1]
    check_same(out, folder, tmp_path)


def test_recordings_of_one_tar_file_stay_together(tmp_path):
    """A process that reads a tar file on a network disk should read it alone, and from its beginning to its end."""
    shard(sounds(tmp_path / "sounds", 12), tmp_path / "shards", clips=3, quiet=True)
    out = tmp_path / "x.parquet"
    tars = []
    for number in range(2):
        table = embed(tmp_path / "shards", out, (number, 2))
        tars.append({path.split("@")[0] for path in table["path"]})
    assert not tars[0] & tars[1] and len(tars[0] | tars[1]) == 4
    assert len(pd.read_parquet(out)) == 12


def test_one_process_takes_over_what_others_left(tmp_path):
    """After a night in which two of three machines went down, the plain command ends the job."""
    folder, out = sounds(tmp_path / "sounds", 9), tmp_path / "x.parquet"
    done = len(embed(folder, out, (1, 3)))
    assert embed(folder, out).attrs["new"] == 9 - done
    check_same(out, folder, tmp_path)
    assert not Path(f"{out}.parts").exists()


def test_one_process_waits_until_others_have_ended(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 3), tmp_path / "x.parquet"
    embed(folder, out, (0, 2))
    code = f"""
        import time
        from audiomaepp.files import only_writer
        with only_writer({str(folder_of_part(out, 0, 2))!r}):
            print("held", flush=True)
            time.sleep(60)
        """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"is being written by process {other.pid}"):
            embed(folder, out)
        with pytest.raises(OutputError, match=f"is being written by process {other.pid}"):
            embed(folder, out, (0, 2))
        assert embed(folder, out, (1, 2)).attrs["left"] == [0]  # it may still change
    finally:
        other.kill()
        other.wait()
    embed(folder, out, (0, 2))
    check_same(out, folder, tmp_path)


def test_two_processes_that_end_together_merge_once(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 60), tmp_path / "x.parquet"
    (folder / "bad.wav").write_text("no sound")
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_parts import embed
        table = embed({str(folder)!r}, {str(out)!r}, (int(sys.argv[1]), 2))
        print(table.attrs["left"], table.attrs["merged"], len(table.attrs["skipped"]))
        """
    both = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(number)], stdout=subprocess.PIPE,
                             text=True) for number in range(2)]  # fmt: skip
    homes = [folder_of_part(out, number, 2) for number in range(2)]
    while not all(home.exists() for home in homes):  # both are at work
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    with only_writer(out, folder=False):  # neither may merge before both have embedded their part
        while not all((home / "skipped.json").exists() for home in homes):
            assert all(process.poll() is None for process in both)
            time.sleep(0.05)
    said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
    assert all(process.returncode == 0 for process in both)
    assert sorted("True 1" in text for text in said) == [False, True]  # one merges, and lists what both have skipped
    check_same(out, folder, tmp_path)
    assert not Path(f"{out}.parts").exists()


def test_a_killed_part_goes_on(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 40), tmp_path / "x.parquet"
    code = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_parts import embed, generator
        encoder = generator().encoder
        inner = encoder.embed
        encoder.embed = lambda *args: (time.sleep(0.1), inner(*args))[1]
        embed({str(folder)!r}, {str(out)!r}, (0, 2), save_seconds=0.0)
        """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    parts = folder_of_part(out, 0, 2) / "rows.parquet.parts"
    while not list(parts.glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(parts.glob("0*.parquet")))
    again = embed(folder, out, (0, 2))
    assert kept and again.attrs["new"] <= len(again) - kept
    embed(folder, out, (1, 2))
    check_same(out, folder, tmp_path)


def test_another_model_is_refused_before_the_work(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 4), tmp_path / "x.parquet"
    embed(folder, out)
    other = generator(depth=SMALL["depth"] + 1)
    with pytest.raises(ValueError, match="must hold embeddings with model"):
        other.embed_folder(folder, out, quiet=True, part=(0, 2))
    with pytest.raises(ValueError, match="cannot overwrite it.*remove an old one"):
        other.embed_folder(folder, out, quiet=True, part=(0, 2), overwrite=True)
    out.unlink()
    embed(folder, out, (0, 2))
    with pytest.raises(ValueError, match="must hold embeddings with model"):  # of the other process
        other.embed_folder(folder, out, quiet=True, part=(1, 2))


def test_what_was_touched_since_keeps_its_row(tmp_path):
    """A tagger that runs in the same night would make the process that merges throw away what others have done."""
    folder, out = sounds(tmp_path / "sounds", 12), tmp_path / "x.parquet"
    embed(folder, out, (0, 2))
    for path in folder.rglob("*.wav"):
        os.utime(path, (1, 1))
    table = embed(folder, out, (1, 2))
    assert table.attrs["merged"] and table.attrs["missing"] == 0 and len(pd.read_parquet(out)) == 12


def test_a_part_that_was_started_again_is_not_complete(tmp_path, monkeypatch):
    """Its table of the first time has no row of what came later."""
    folder, out = sounds(tmp_path / "sounds", 12), tmp_path / "x.parquet"
    embed(folder, out, (0, 2))
    for i in range(12):
        soundfile.write(folder / f"late{i}.wav", np.full(4000, 0.02 * i), 8000)
    with monkeypatch.context() as patch:
        patch.setattr(generator().encoder, "embed", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # as if it were killed
            embed(folder, out, (0, 2))
    assert embed(folder, out, (1, 2)).attrs["left"] == [0] and not out.exists()
    embed(folder, out, (0, 2))
    check_same(out, folder, tmp_path)


def test_recordings_that_come_later_are_counted(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 4), tmp_path / "x.parquet"
    embed(folder, out, (0, 2))
    for i in range(30):
        soundfile.write(folder / f"late{i}.wav", np.full(4000, 0.02 * i), 8000)
    table = embed(folder, out, (1, 2))
    assert 0 < table.attrs["missing"] < 30 and len(pd.read_parquet(out)) == 34 - table.attrs["missing"]
    assert sum(embed(folder, out, (number, 2)).attrs["new"] for number in range(2)) == table.attrs["missing"]
    check_same(out, folder, tmp_path)


def test_sounds_at_another_path_are_told(tmp_path):
    """On a machine that mounts the disk elsewhere, a recording has another path, and another part."""
    folder, out = sounds(tmp_path / "sounds", 12), tmp_path / "x.parquet"
    embed(folder, out, (0, 2))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="part 0/2 must hold recordings of this call.*by the same path"):
        embed(tmp_path / "elsewhere", out, (1, 2))
    assert not out.exists() and len(pd.read_parquet(folder_of_part(out, 0, 2) / "rows.parquet"))


def test_what_a_killed_part_has_done_is_taken_over(tmp_path, monkeypatch):
    folder, out, generate = sounds(tmp_path / "sounds", 40), tmp_path / "x.parquet", generator()
    inner, calls = generate.encoder.embed, []  # eight batches are embedded before their rows come
    with monkeypatch.context() as patch:
        patch.setattr(generate.encoder, "embed", lambda *args: inner(*args) if not calls.append(1) and len(calls) < 12
                      else 1 / 0)  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            embed(folder, out, (0, 1))
    again = embed(folder, out)
    assert 0 < again.attrs["new"] < 40 and not Path(f"{out}.parts").exists()
    check_same(out, folder, tmp_path)


@pytest.mark.parametrize("parts", [None, 2])
def test_a_path_that_comes_twice_has_two_rows(tmp_path, parts):
    """Each time the table was written again, rows of a recording with two labels were multiplied."""
    folder, out = sounds(tmp_path / "sounds", 3), tmp_path / "x.parquet"
    paths = sorted(map(str, folder.rglob("*.wav")))
    pd.DataFrame(dict(path=paths + paths[:2], label=list("abcde"))).to_csv(tmp_path / "sounds.csv", index=False)
    for labels in ("abcde", "abcdef"):
        for number in range(parts or 1):
            embed(tmp_path / "sounds.csv", out, parts and (number, parts))
        assert sorted(pd.read_parquet(out)["label"]) == list(labels)
        soundfile.write(folder / "late.wav", np.full(4000, 0.5), 8000)
        with open(tmp_path / "sounds.csv", "a") as file:
            file.write(f"{folder / 'late.wav'},f\n")


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_cannot_be_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match="the parts of two processes are 0/2 and 1/2"):
        embed(sounds(tmp_path / "sounds", 1), tmp_path / "x.parquet", part)


def test_a_part_needs_an_output(tmp_path):
    with pytest.raises(ValueError, match="a part needs an output"):
        embed(sounds(tmp_path / "sounds", 1), None, (0, 2))


def test_torchrun_embeds_in_parts(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 6), tmp_path / "x.parquet"
    generator().model.write(tmp_path / "model")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "audiomaepp", "embed",
               str(tmp_path / "model"), "--data", str(folder), "--out", str(out)]  # fmt: skip
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"all parts are in {out}" in done.stdout
    check_same(out, folder, tmp_path)
