"""The nearest of many vectors: as exact as comparing all, in little memory, from keys that are kept and never stale."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiomaepp import cli, nearest, search
from audiomaepp.evaluate import standardize
from audiomaepp.nearest import cells_needed, find_cells, make_keys, nearest_rows, read_keys, recall_curve, scan
from audiomaepp.search import SoundIndex

RNG = np.random.default_rng(0)


def groups(n, width, count=50, rng=RNG):
    "Vectors in groups of different sizes that share a large direction."
    centers = np.random.default_rng(7).standard_normal((count, width))
    which = rng.choice(count, n, p=np.arange(1, count + 1) / sum(range(1, count + 1)))
    return (20 + centers[which] + 0.7 * rng.standard_normal((n, width))).astype(np.float32)


def brute_force(x, query, k):
    "Rows and similarities by comparing everything, as every version did for small tables."
    keys, key = standardize(x, query[None])
    keys, key = (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12) for a in (keys, key))
    similar = keys.astype(np.float64) @ key[0].astype(np.float64)
    rows = np.argsort(-similar.astype(np.float32), kind="stable")[:k]
    return rows, similar[rows]


def write(path, x, **columns):
    pd.DataFrame({"path": [f"{i}.wav" for i in range(len(x))], **columns, "embedding": list(x)}).to_parquet(path)
    return path


@pytest.fixture
def kept(monkeypatch):
    "Keys of small tables are kept too, and blocks have 40 rows of 32 numbers."
    monkeypatch.setattr(search, "SMALL", 0)
    monkeypatch.setattr(nearest, "BLOCK", 40 * 32 * 4)


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "x.parquet", groups(500, 32))


def keys_of(table):
    "Names of the files of keys beside a table."
    folder = Path(f"{table}.search")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- exact


@pytest.mark.parametrize("block", [1, 7, 40, 10_000])
def test_blocks_change_nothing(monkeypatch, block):
    """A row at the border of two blocks was lost, or counted twice."""
    x = groups(150, 32)
    monkeypatch.setattr(nearest, "BLOCK", block * 32 * 4)
    for query in (x[3], x[149], x.mean(axis=0) + 0.1, groups(1, 32)[0]):
        for k in (1, 10, 150, 200):
            (rows, similar), = nearest_rows(make_keys(x), query[None], k)
            expected, values = brute_force(x, query, k)
            assert np.allclose(similar, values, atol=1e-6) and len(rows) == min(k, 150)
            assert list(rows) == list(expected) or np.allclose(values[rows != expected].ptp(), 0, atol=1e-6)


def test_copies_come_in_the_order_of_the_table(monkeypatch):
    """Copies of a clip are equally similar; which of them is shown must not depend on where a block ends."""
    monkeypatch.setattr(nearest, "BLOCK", 64 * 768 * 4)
    keys = make_keys(groups(1000, 768)).vectors
    copies = np.r_[5, 63, 64, 65, 127, 128, 500:510, 999]
    keys[copies] = keys[5]
    for k in (1, 5, 12, len(copies)):
        (_, places), = scan(keys, keys[[5]], k)
        assert list(places) == list(copies[:k])
    many = scan(keys, keys[[5, 7, 5]], 12)
    assert list(many[0][1]) == list(many[2][1]) == list(copies[:12])


def test_copies_come_in_the_order_of_the_table_from_sorted_keys_too(monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", 16 * 32 * 4)
    keys, rows = make_keys(groups(300, 32)).vectors, RNG.permutation(300)
    copies = np.flatnonzero(rows >= 200)  # more than are computed again
    keys[copies] = keys[copies[0]]
    (_, places), = scan(keys, keys[copies[:1]], 10, rows=rows)
    assert list(rows[places]) == list(range(200, 210))


def test_several_queries_at_once_are_each_as_alone(monkeypatch):
    x, queries = groups(2000, 32), groups(40, 32)
    monkeypatch.setattr(nearest, "TOGETHER", 7)
    for query, (rows, similar) in zip(queries, nearest_rows(make_keys(x), queries, 10), strict=True):
        (alone, same), = nearest_rows(make_keys(x), query[None], 10)
        assert np.array_equal(rows, alone) and np.array_equal(similar, same)


def test_a_row_of_zeros_and_a_constant_dimension_are_no_fault():
    """A silent clip gave NaN, which was then the best hit of every search."""
    x = groups(100, 32)
    x[4], x[:, 9] = 0, 5
    x[7] = x.mean(axis=0)
    for query in (x[4], x[7], x[0]):
        (rows, similar), = nearest_rows(make_keys(x), query[None], 100)
        assert np.isfinite(similar).all() and sorted(rows) == list(range(100))
    same = np.tile(x[:1], (30, 1))  # all rows are one
    (rows, similar), = nearest_rows(make_keys(same), same[:1], 5)
    assert list(rows) == [0, 1, 2, 3, 4] and not similar.any()


# ---- kept keys


def test_keys_are_made_once_and_give_the_same_hits(kept, table, monkeypatch):
    x = np.stack(list(pd.read_parquet(table)["embedding"]))
    whole = SoundIndex(pd.read_parquet(table))
    SoundIndex(table)
    assert len(keys_of(table)) == 2
    monkeypatch.setattr(search.FileRows, "embeddings", lambda *a: pytest.fail("the embeddings were read again"))
    again = SoundIndex(table)
    for query in ("3.wav", x[8], x[:2].mean(axis=0), ["1.wav", x[2]], list(x[:3])):
        theirs, ours = whole.search(query, 20).table, again.search(query, 20).table
        pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    assert isinstance(again.keys, np.memmap) and again.search(x[0]).recall == 1


def test_a_changed_table_is_noticed(kept, table):
    """A search in a new table with the old keys shows the wrong clips."""
    x, facts = np.stack(list(pd.read_parquet(table)["embedding"])), os.stat(table)
    SoundIndex(table)
    before = keys_of(table)
    write(table, x[::-1])
    os.utime(table, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # a coarse clock, or a copy that keeps times
    assert SoundIndex(table).search(x[0], 1).table["path"].iat[0] == "499.wav"
    assert len(keys_of(table)) == 2 and keys_of(table) != before


def test_an_open_index_keeps_its_table(kept, table):
    """Embedding again while a search is open mixed the rows of two tables."""
    x = np.stack(list(pd.read_parquet(table)["embedding"]))
    index = SoundIndex(table)
    write(table.with_name("new.parquet"), x[::-1])
    os.replace(table.with_name("new.parquet"), table)
    SoundIndex(table)  # removes the keys of the first
    assert index.search(x[0], 1).table["path"].iat[0] == "0.wav" == index.table["path"].iat[0]


@pytest.mark.parametrize("harm", ["no facts", "short", "other shape", "facts of bytes", "empty", "no keys"])
def test_half_written_or_damaged_keys_are_made_again(kept, table, harm):
    x = np.stack(list(pd.read_parquet(table)["embedding"]))
    SoundIndex(table)
    facts, keys = sorted(Path(f"{table}.search").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (keys.suffix, facts.suffix) == (".npy", ".npz")
    if harm == "no facts":
        facts.unlink()
    elif harm == "short":
        keys.write_bytes(keys.read_bytes()[:-1000])
    elif harm == "other shape":
        np.save(keys, np.ones((3, 32), np.float32))
    elif harm == "facts of bytes":
        facts.write_bytes(b"PK\3\4 and something else")
    elif harm == "empty":
        facts.write_bytes(b"")
    else:
        keys.unlink()
    whole = SoundIndex(pd.read_parquet(table))
    assert SoundIndex(table).search("3.wav", 5).table.equals(whole.search("3.wav", 5).table)
    assert read_keys(keys.with_suffix(""), len(x)) is not None


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_writer_leaves_no_keys(table):
    """A process that is killed in the middle must not leave keys of which the second half is no keys."""
    code = f"""
        import os, signal
        from audiomaepp import cli, nearest, search
        from audiomaepp.search import SoundIndex
        search.SMALL, nearest.BLOCK, made = 0, 40 * 32 * 4, nearest.directions
        def directions(*args, calls=[]):
            calls.append(1)
            if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)
            return made(*args)
        nearest.directions = directions
        SoundIndex({str(table)!r})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not [name for name in keys_of(table) if not name.startswith(".")] and keys_of(table)
    search.SMALL, before = 0, search.SMALL
    try:
        SoundIndex(table)
    finally:
        search.SMALL = before
    assert [Path(name).suffix for name in keys_of(table)] == [".npy", ".npz"], "what the killed process left is gone"


@pytest.mark.parametrize("why", ["no folder", "no room", "a full disk", "another writer"])
def test_without_a_place_for_keys_a_search_goes_on(kept, table, monkeypatch, why):
    """A table on a read-only disk could be searched before there were keys."""
    x, holding = np.stack(list(pd.read_parquet(table)["embedding"])), None
    if why == "no folder":
        Path(f"{table}.search").write_text("a file")
    elif why == "no room":
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    elif why == "a full disk":
        def full(*args):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(nearest, "_begin", full)
    else:
        code = "import sys; from audiomaepp.files import only_writer\nwith only_writer(sys.argv[1]): print(); input()"
        command = [sys.executable, "-uc", code, f"{table}.search"]
        holding = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holding.stdout.readline()
    with pytest.warns(UserWarning, match=r"x\.parquet cannot be kept in a file, so searches take longer: .*; "):
        index = SoundIndex(table)
    if holding:
        holding.communicate(b"\n")
    assert index.search(x[3], 1).table["path"].iat[0] == "3.wav"
    assert [name for name in (keys_of(table) if why != "no folder" else []) if "np" in name] == []


def test_a_small_table_gets_no_folder(table):
    SoundIndex(table).search("3.wav")
    assert os.listdir(table.parent) == ["x.parquet"]


def test_a_bad_row_is_named_before_keys_are_kept(kept, tmp_path):
    x = groups(300, 32)
    x[211, 3] = np.nan
    with pytest.raises(ValueError, match=r"x\.parquet .*NaN or infinity in row 211"):
        SoundIndex(write(tmp_path / "x.parquet", x))
    rows = [*groups(299, 32), groups(1, 16)[0]]
    with pytest.raises(ValueError, match=r"x\.parquet .*16 numbers in row 299"):
        SoundIndex(write(tmp_path / "x.parquet", rows))
    assert not os.path.exists(tmp_path / "x.parquet.search")
    with pytest.raises(ValueError, match="query must hold finite numbers, got NaN or infinity; use"):
        SoundIndex(pd.DataFrame({"path": ["a"] * 3, "embedding": list(np.eye(3))})).search([np.nan, 0, 0] * np.ones(3))


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 32)])
def test_any_list_of_numbers_is_an_embedding(kept, tmp_path, kind):
    x = groups(300, 32)
    columns = dict(path=pa.array([f"{i}.wav" for i in range(300)]), embedding=pa.array(list(map(list, x)), kind))
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=77)
    index = SoundIndex(tmp_path / "x.parquet")
    assert np.allclose(index.x, x) and list(index.search("3.wav", 300).table["path"])[-1:] != ["3.wav"]
    assert index.search(x[250], 1).table["path"].iat[0] == "250.wav"


def test_the_columns_of_hits_are_those_of_the_table(kept, tmp_path):
    """Rows come from several row groups, in the order of their similarity, with every column but the embedding."""
    x = groups(300, 32)
    frame = pd.DataFrame({"path": [f"{i}.wav" for i in range(300)], "label": pd.Categorical(["a", None, "c"] * 100),
                          "start": np.arange(300) / 2, "embedding": list(x)}, index=pd.Index(range(300), name="number"))
    frame.to_parquet(tmp_path / "x.parquet", row_group_size=11)
    ours = SoundIndex(tmp_path / "x.parquet").search(x[9], 40).table
    theirs = SoundIndex(frame).search(x[9], 40).table
    for name in ("path", "label"):
        assert list(ours[name].astype(object).fillna("")) == list(theirs[name].astype(object).fillna(""))
    assert list(ours["start"]) == list(theirs["start"]) and "embedding" not in ours
    assert np.allclose(ours["similarity"], theirs["similarity"])


def test_many_paths_are_found_in_one_pass(kept, tmp_path):
    x = groups(300, 32)
    names = [f"{'/one' if i % 2 else '/two'}/{i // 2}.wav" for i in range(300)]
    pq.write_table(pa.table(dict(path=names, embedding=list(x))), tmp_path / "x.parquet", row_group_size=50)
    index = SoundIndex(tmp_path / "x.parquet")
    for some in (names[:3], names[:60]):
        for name, hits in zip(some, index.search_each(some, 5), strict=True):
            alone = index.search(name, 5).table
            assert hits.table.equals(alone) and name not in set(alone["path"]) and len(alone) == 5
    assert index.search_each([], 5) == []


# ---- memory


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_does_not_grow_with_the_table(tmp_path):
    """A search in a table of 3 GB must not take 3 GB: what NumPy and Arrow hold is counted, as the memory of the
    process depends on when they return it."""
    code = """
        import tracemalloc, numpy as np, pyarrow as pa, pyarrow.parquet as pq
        from audiomaepp import nearest
        from audiomaepp.search import SoundIndex
        width, rng, nearest.BLOCK = 1024, np.random.default_rng(0), 2**22
        schema = pa.schema([("path", pa.string()), ("embedding", pa.list_(pa.float32()))])
        with pq.ParquetWriter("x.parquet", schema) as file:
            for first in range(0, 40_000, 2000):
                x = rng.standard_normal(2000 * width, dtype=np.float32)
                x = pa.ListArray.from_arrays(np.arange(0, len(x) + 1, width, dtype=np.int32), pa.array(x))
                file.write_table(pa.table([[f"{i}.wav" for i in range(first, first + 2000)], x], schema=file.schema))
        query, pool = rng.standard_normal((100, width)), pa.system_memory_pool()
        pa.set_memory_pool(pool)
        tracemalloc.start()
        for _ in range(2):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            index = SoundIndex("x.parquet", quiet=True)
            index.search("7.wav"), index.search_each(list(query))
            peak = tracemalloc.get_traced_memory()[1] - before
            print(index.keys.nbytes >> 20, peak / 2**20, pool.max_memory() / 2**20)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path)
    assert not run.returncode, run.stderr
    lines = [list(map(float, line.split())) for line in run.stdout.splitlines()]
    assert len(lines) == 2
    for size, arrays, arrow in lines:
        assert size > 150 and arrays < 90 and 5 < arrow < 70, lines


def test_keys_are_made_in_little_memory():
    """The first search in a table would take 100 MB beside its vectors."""
    x = np.random.default_rng(0).standard_normal((70_000, 64), dtype=np.float32)
    make_keys(x[:9].copy())
    tracemalloc.start()
    try:
        make_keys(x, x)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


# ---- cells


def test_cells_find_what_is_near(kept, tmp_path, monkeypatch):
    """Rows of the table, vectors that are not in it, and means of two rows."""
    x = groups(20_000, 32, 200)
    monkeypatch.setattr(nearest, "BLOCK", 2**19)
    path = write(tmp_path / "x.parquet", x)
    exact, fast = SoundIndex(path), SoundIndex(path, exact=5000)
    cells, rng = fast.nearest.cells, np.random.default_rng(3)
    assert len(keys_of(path)) == 2 and cells.recall >= 0.95 and cells.share < 0.3 and "recall 0.9" in repr(fast)
    some = rng.choice(len(x), 200)
    for queries in (x[some], groups(200, 32, 200, rng), (x[some] + x[some[::-1]]) / 2):
        found = [hits.table for hits in fast.search_each(list(queries))]
        wanted = [hits.table for hits in exact.search_each(list(queries))]
        recall = np.mean([np.isin(f["path"], w["path"]).mean() for f, w in zip(found, wanted, strict=True)])
        assert recall >= 0.94, recall  # two standard errors of this sample below 0.95
    assert fast.search(x[0]).recall == float(cells.recall)
    hits = fast.search("77.wav", 15_000).table  # more than the cells hold
    assert len(hits) == 15_000 and "77.wav" not in set(hits["path"]) and hits["path"].is_unique


def test_cells_are_built_once(kept, tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", groups(3000, 32))
    first = SoundIndex(path, exact=1000).search("5.wav").table
    monkeypatch.setattr(nearest, "find_cells", lambda *a: pytest.fail("built again"))
    assert SoundIndex(path, exact=1000).search("5.wav").table.equals(first)
    exact = SoundIndex(path)  # sorted keys serve an exact search too
    assert exact.search("5.wav").table.equals(SoundIndex(pd.read_parquet(path)).search("5.wav").table)
    assert exact.search("5.wav").recall == 1 and len(keys_of(path)) == 2


def test_the_command_says_that_not_all_rows_are_compared(kept, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "x.parquet", groups(3000, 32))
    cli.main(["search", str(path), "5.wav", "--json"])
    whole = capsys.readouterr()
    monkeypatch.setattr(SoundIndex.__init__, "__defaults__", (None, 1000, True))
    cli.main(["search", str(path), "5.wav", "--json"])
    some = capsys.readouterr()
    assert json.loads(whole.out)["recall"] == 1 and "not all" not in whole.err
    assert 0.95 <= json.loads(some.out)["recall"] < 1 and re.search(r"not all rows are compared; 9\d% of", some.err)


def test_cells_are_not_used_where_they_do_not_help(kept, tmp_path, monkeypatch):
    """Independent numbers in many dimensions have no near rows; an index that skips rows would lose most of them."""
    x = np.random.default_rng(0).standard_normal((3000, 256)).astype(np.float32)
    path = write(tmp_path / "x.parquet", x)
    monkeypatch.setattr(nearest, "BLOCK", 2**19)
    index = SoundIndex(path, exact=1000)
    assert index.search("5.wav").recall == 1 and "recall" not in repr(index)
    assert index.search("5.wav").table.equals(SoundIndex(pd.read_parquet(path)).search("5.wav").table)
    monkeypatch.setattr(nearest, "find_cells", lambda *a: pytest.fail("tried again"))
    SoundIndex(path, exact=1000)


def test_the_curve_says_what_a_search_finds():
    """The number of cells is chosen without a search in them, so the ranks of cells must be those of the search."""
    x = groups(5000, 32)
    keys = make_keys(x)
    centers, cell = find_cells(keys.vectors, 70)
    share, recall = recall_curve(keys.vectors, centers, cell)
    assert share[-1] == 1 and (recall[:, -1] == 1).all() and (np.diff(recall, axis=1) >= 0).all()
    order = np.argsort(cell, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=70))])
    chosen = np.random.default_rng(1).integers(5000, size=(256, 1)).ravel()
    for count in (1, 4, 12):
        cells = nearest.Cells(centers, bounds, count, 0.0, 0.0)
        grouped = keys._replace(vectors=keys.vectors[order], rows=order, cells=cells)
        found, wanted = nearest_rows(grouped, x[chosen], 11), nearest_rows(keys, x[chosen], 11)
        hit = [np.isin([r for r in w if r != row][:10], f).mean()
               for (f, _), (w, _), row in zip(found, wanted, chosen, strict=True)]
        assert 0 <= np.mean(hit) - recall[:, count - 1].mean() < 0.03  # small cells are searched together
    half = np.array([0.9, 0.96, 1]) + np.array([[0.04], [-0.04]]) * [1, 1, 0]
    assert cells_needed([(np.array([0.1, 0.2, 1]), half.repeat(128, axis=0))])[0] == 2
    assert cells_needed([(np.array([0.1, 0.2, 1]), half.repeat(8, axis=0))])[0] == 3  # too few queries to be sure


def test_no_room_for_cells_leaves_the_exact_search(kept, tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", groups(3000, 32))
    SoundIndex(path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.warns(UserWarning, match="cannot be sorted into cells, so searches take longer: .*free some space"):
        index = SoundIndex(path, exact=1000)
    assert index.search("5.wav").recall == 1 and len(keys_of(path)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoundIndex(path)


def test_the_folder_of_keys_holds_what_others_put_there(kept, table):
    SoundIndex(table)
    other = Path(f"{table}.search/notes.txt")
    other.write_text("mine")
    nearest.remove_keys(other.parent)
    assert os.listdir(other.parent) == ["notes.txt"]
    other.unlink()
    nearest.remove_keys(other.parent)
    assert not other.parent.exists()
    assert os.listdir(table.parent) == ["x.parquet"]


@pytest.mark.slow
def test_the_benchmark_runs():
    script = Path(__file__).parents[1] / "benchmarks/search.py"
    command = [sys.executable, script, "--rows", "500", "--width", "16", "--cells"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    lines = {line.split("  ")[0] for line in run.stdout.splitlines()}
    assert {"whole table", "first", "again", "each of 100", "all rows", "cells"} <= lines, run.stdout
