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
from audiomaepp.store import file_of_part

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
    assert [len(some) for some in left] == [2, 1, 0] and not left[1] == [order[0]]
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
        with only_writer({str(file_of_part(out, 0, 2).parent)!r}):
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
    folder, out = sounds(tmp_path / "sounds", 20), tmp_path / "x.parquet"
    with only_writer(out, folder=False):  # both have embedded their part before one of them may merge
        code = f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_parts import embed
            print(embed({str(folder)!r}, {str(out)!r}, (int(sys.argv[1]), 2)).attrs["left"])
            """
        both = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(number)], stdout=subprocess.PIPE,
                                 text=True) for number in range(2)]  # fmt: skip
        while not all(file_of_part(out, number, 2).with_name("skipped.json").exists() for number in range(2)):
            assert all(process.poll() is None for process in both)
            time.sleep(0.05)
    said = [process.communicate(timeout=60)[0].strip() for process in both]
    assert "[]" in said and all(process.returncode == 0 for process in both)
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
    parts = Path(f"{file_of_part(out, 0, 2)}.parts")
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
    for number in range(2):
        other.embed_folder(folder, out, quiet=True, part=(number, 2), overwrite=True)
    other.embed_folder(folder, tmp_path / "other.parquet", quiet=True)
    np.testing.assert_allclose(rows_of(out)[1], rows_of(tmp_path / "other.parquet")[1], atol=1e-6)


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_a_part_that_cannot_be_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match="the parts of two processes are 0/2 and 1/2"):
        embed(sounds(tmp_path / "sounds", 1), tmp_path / "x.parquet", part)


def test_a_part_needs_an_output(tmp_path):
    with pytest.raises(ValueError, match="out must name a file"):
        embed(sounds(tmp_path / "sounds", 1), None, (0, 2))


def test_torchrun_embeds_in_parts(tmp_path):
    folder, out = sounds(tmp_path / "sounds", 6), tmp_path / "x.parquet"
    generator().model.write(tmp_path / "model")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "audiomaepp", "embed",
               str(tmp_path / "model"), "--data", str(folder), "--out", str(out)]  # fmt: skip
    done = subprocess.run([sys.executable, *command], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"all parts are in {out}" in done.stdout and "left: " not in done.stdout.split("all parts")[1]
    check_same(out, folder, tmp_path)
