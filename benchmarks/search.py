"""Search in tables of embeddings: seconds, memory and recall, beside the search that reads the whole table.

    python benchmarks/search.py                                   10,000 and 100,000 rows; a minute
    python benchmarks/search.py --rows 1000000                    needs 7 GB of disk
    python benchmarks/search.py --rows 3000000 --width 192 --cells --peers     as for more rows than are all compared

The vectors are made: groups of different sizes and widths, in fewer and fewer effective dimensions, as embeddings have
them (`--uniform`: independent numbers, the worst case). Each measurement is a process of its own: it opens a table,
searches for one of its clips and formats the hits. Seconds are without imports; memory is the peak above what imports
take. "whole table" reads the table into memory and compares all rows, as a search did before keys were kept. "first"
makes the keys, "again" finds them; "cold" finds them on the disk, not in the system's memory (Linux); "each of 100" is
one of a hundred clips that are searched together.

With --cells the rows are sorted into cells, as beyond a million rows. Recall is the share of the ten nearest rows that
is found, for 200 rows and for 200 other vectors; of equally near rows any counts. --peers searches the same vectors
with pynndescent, and with hnswlib and faiss where they are installed; each at its cheapest setting with a recall of
0.95. In these rows the time to build and to search is that of the processor, so that other work on the machine does not
count; all of them but "cells" need the whole index in memory.
"""

import argparse
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from speed import memory_now

from audiomaepp.tables import text_table

PEERS = ("pynndescent", "hnswlib", "faiss")
QUERIES, K = 200, 10


# ---- made tables


class Vectors:
    """Made vectors, in blocks."""

    def __init__(self, width, uniform, seed=0):
        self.rng, self.uniform, kinds = np.random.default_rng(seed), uniform, 1000
        self.decay = np.arange(1, width + 1) ** -0.5
        self.centers = self.rng.standard_normal((30, width))[self.rng.integers(30, size=kinds)]
        self.centers = self.centers + 0.7 * self.rng.standard_normal((kinds, width))
        self.sizes, self.common = self.rng.dirichlet(np.full(kinds, 0.5)), 5 * self.rng.standard_normal(width)

    def __call__(self, n):
        """(n, width) float32."""
        x = self.rng.standard_normal((n, len(self.decay)), dtype=np.float32)
        if not self.uniform:
            x *= self.rng.uniform(0.3, 1.0, (n, 1))
            x = (self.centers[self.rng.choice(len(self.sizes), n, p=self.sizes)] + x) * self.decay + self.common
        return x.astype(np.float32)


def write_table(path, rows, width, uniform):
    """Write a table as embed_folder writes it, and queries that are not in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made, kinds = Vectors(width, uniform), dict(path=pa.string(), label=pa.string(), start=pa.float64())
    schema = pa.schema([*kinds.items(), ("embedding", pa.list_(pa.float32()))])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, 4096):
            n = min(4096, rows - first)
            names = [f"/sounds/{i % 997}/clip-{i:08d}.wav" for i in range(first, first + n)]
            ends = np.arange(0, n * width + 1, width, dtype=np.int32)
            vectors = pa.ListArray.from_arrays(ends, pa.array(made(n).ravel()))
            writer.write_table(pa.table([names, ["sound"] * n, np.zeros(n), vectors], schema=schema))
    np.save(path.with_suffix(".queries.npy"), made(QUERIES))


# ---- one measurement, in a process of its own


def searched(path, exact=10**12, many=1):
    """Open a table and search for some of its clips; (seconds to open, seconds to search, the index)."""
    from audiomaepp.search import SoundIndex

    start = time.perf_counter()
    index = SoundIndex(path, exact=exact, quiet=True)
    opened = time.perf_counter()
    clips = [f"/sounds/{i % 997}/clip-{i:08d}.wav" for i in range(0, len(index), len(index) // many)[:many]]
    str(index.search_each(clips, K))
    return opened - start, (time.perf_counter() - opened) / many, index


def whole_table(path):
    """The search that reads everything."""
    from audiomaepp.evaluate import standardize
    from audiomaepp.files import read_parquet
    from audiomaepp.store import stacked

    start = time.perf_counter()
    table = read_parquet(path)
    x, query = standardize(x := stacked(table["embedding"], path), x[:1])
    keys = x / np.linalg.norm(x, axis=1, keepdims=True)
    opened = time.perf_counter()
    similar = keys @ (query[0] / np.linalg.norm(query[0]))
    str(table.iloc[np.argsort(-similar, kind="stable")[1 : K + 1]].drop(columns="embedding"))
    return opened - start, time.perf_counter() - opened


def forget(path):
    """Drop the files of a table from the system's memory."""
    for file in [path, *path.with_name(f"{path.name}.search").glob("*.np?")]:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def keys_and_queries(path):
    """The keys in the order of the table, the keys of the queries, and the similarity of their tenth neighbors."""
    from audiomaepp.nearest import directions, scan

    index = searched(path)[2]
    keys, (_, mean, scale, order, _) = index.keys, index.nearest
    if order is not None:
        keys = keys[np.argsort(order)]
    queries = directions(np.load(path.with_suffix(".queries.npy")), mean, scale)
    return keys, queries, np.array([similar[K - 1] for similar, _ in scan(keys, queries, K)])


def recall_of(keys, queries, tenth, found):
    """The share of the nearest rows that was found; of equally near rows any counts."""
    return np.mean([(keys[rows[:K]] @ q >= t - 1e-6).mean() for rows, q, t in zip(found, queries, tenth, strict=True)])


def all_rows(path):
    """Seconds of a search among all rows."""
    from audiomaepp.nearest import nearest_rows

    opened, _, index = searched(path)
    queries = np.load(path.with_suffix(".queries.npy"))[:10]
    nearest_rows(index.nearest, queries[:1], K)  # from the disk, if they are not in memory
    start = time.process_time()
    for query in queries:
        nearest_rows(index.nearest, query[None], K)
    ms, size = (time.process_time() - start) / len(queries) * 1000, index.keys.nbytes >> 20
    return {"open, s": opened, "ms, rows": ms, "recall, rows": 1, "ms, others": ms, "recall, others": 1, "share": 1,
            "peak MB": memory_now(peak=True), "disk MB": size}


def cells(path, exact):
    """Sort into cells; then recall and seconds of a search."""
    from audiomaepp.nearest import nearest_rows

    start = time.process_time()
    searched(path, exact)
    built, (opened, _, index) = time.process_time() - start, searched(path, exact)
    peak, grouped = memory_now(peak=True), index.nearest
    outside = np.load(path.with_suffix(".queries.npy"))
    rows = np.arange(0, len(index), max(1, len(index) // QUERIES))[:QUERIES]
    inside, facts = index.source.take(rows, ["embedding"])["embedding"], {}
    for name, x in (("rows", np.stack(list(inside))), ("others", outside)):
        nearest_rows(grouped, x, K)  # from the disk, if it is not in memory
        begin = time.process_time()
        found = nearest_rows(grouped, x, K)
        facts[f"ms, {name}"] = (time.process_time() - begin) / len(x) * 1000
        wanted = nearest_rows(grouped._replace(cells=None), x, K)
        facts[f"recall, {name}"] = np.mean([(got[1] >= all_[1][-1] - 1e-6).mean()
                                            for got, all_ in zip(found, wanted, strict=True)])
    share = float(grouped.cells.share) if grouped.cells is not None else 1.0
    return {"build, CPU s": built, "open, s": opened, "share": share, "peak MB": peak, **facts}


def peer(name, path):
    """Build, write, read and search an index of another library."""
    keys, queries, tenth = keys_and_queries(path)
    keys, (n, width) = np.array(keys), keys.shape
    file, before, start = path.with_suffix(f".{name}"), memory_now(), time.process_time()
    if name == "pynndescent":
        from pynndescent import NNDescent

        NNDescent(keys[:1000], metric="dot", random_state=0).prepare()  # compiles
        start = time.process_time()
        graph = NNDescent(keys, metric="dot", random_state=0)
        graph.prepare()
        write, read = lambda: file.write_bytes(pickle.dumps(graph, 4)), lambda: pickle.loads(file.read_bytes())
        settings = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)

        def search(g, q, e):
            return g.query(q[None], k=K, epsilon=e)[0][0]
    elif name == "hnswlib":
        import hnswlib

        graph = hnswlib.Index("ip", width)
        graph.init_index(n, ef_construction=200, M=16)
        graph.add_items(keys)

        def read():
            index = hnswlib.Index("ip", width)
            index.load_index(str(file))
            index.set_num_threads(1)
            return index

        def search(g, q, e):
            g.set_ef(e)
            return g.knn_query(q, K)[0][0]

        write, settings = lambda: graph.save_index(str(file)), (10, 20, 40, 80, 160, 320)
    else:
        import faiss

        count = round(n**0.5)
        graph = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, count)
        graph.train(keys[np.random.default_rng(0).choice(n, min(n, 64 * count), replace=False)])
        graph.add(keys)

        def search(g, q, e):
            g.nprobe = e
            return g.search(q[None], K)[1][0]

        write, read = lambda: faiss.write_index(graph, str(file)), lambda: faiss.read_index(str(file))
        settings = (1, 2, 4, 8, 16, 32, 64, 128)
    built = time.process_time() - start
    peak = memory_now(peak=True) - before
    write()
    start = time.perf_counter()
    index = read()
    opened = time.perf_counter() - start
    for setting in settings:
        search(index, queries[0], setting)
        start = time.process_time()
        found = [search(index, q, setting) for q in queries]
        ms = (time.process_time() - start) / len(queries) * 1000
        recall = recall_of(keys, queries, tenth, found)
        if recall >= 0.95:
            break
    size = os.path.getsize(file) >> 20
    file.unlink()
    facts = {"build, CPU s": built, "open, s": opened, "ms, others": ms, "recall, others": recall}
    return facts | {"peak MB": peak, "disk MB": size}


def child(mode, path, exact):
    """Print one measurement as JSON."""
    import pandas  # noqa: F401 - imports are not measured
    import pyarrow.parquet  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import sklearn.preprocessing  # noqa: F401

    import audiomaepp.search  # noqa: F401

    np.ones((8, 8)) @ np.ones((8, 8))
    before = memory_now()
    if mode in PEERS:
        facts = peer(mode, path)
    elif mode in ("all rows", "cells"):
        facts = all_rows(path) if mode == "all rows" else cells(path, exact)
        facts["peak MB"] -= before
    else:
        if mode == "cold":
            forget(path)
        run = whole_table if mode == "whole table" else searched
        opened, took, *_ = run(path, many=100) if "each" in mode else run(path)
        facts = dict(open=opened, search=took, peak=memory_now(peak=True) - before)
    print(json.dumps(facts))


# ---- the table


def measured(mode, path, exact=0):
    """One measurement; None if its process was killed."""
    command = [sys.executable, __file__, "--child", mode, str(path), str(exact)]
    run = subprocess.run(command, text=True, capture_output=True)
    if run.returncode > 0:
        raise RuntimeError(f"the process that measures {mode!r} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1]) if not run.returncode else None


def measure(rows, args, folder):
    """Print what was measured for one number of rows."""
    path = Path(folder) / f"{rows}.parquet"
    write_table(path, rows, args.width, args.uniform)
    keys = 4 * rows * args.width >> 20
    modes = ["whole table"] * (rows <= args.whole) + ["first", "again", "cold", "each of 100"]
    modes = [mode for mode in modes if mode != "cold" or hasattr(os, "posix_fadvise")]
    lines, naive = [], None
    for mode in modes:
        facts = measured(mode, path)
        total = facts["open"] + facts["search"]
        naive = naive or (total if mode == "whole table" else None)
        ratio = naive / total if naive and mode not in ("whole table", "each of 100") else None
        lines.append([mode, facts["open"], facts["search"], ratio, round(facts["peak"])])
    title = f"{rows:,} rows of {args.width} numbers, {os.path.getsize(path) >> 20} MB of Parquet, {keys} MB of keys"
    print(text_table(title, [["", "open, s", "search, s", "times faster", "peak MB"], *lines]), flush=True)
    if args.cells or args.peers:
        names = ["build, CPU s", "open, s", "ms, rows", "recall, rows", "ms, others", "recall, others"]
        names += ["share", "peak MB", "disk MB"]
        modes = ["all rows", *(name for name in PEERS if args.peers and importlib.util.find_spec(name))]
        found = {name: measured(name, path) for name in modes}
        found["cells"] = measured("cells", path, rows - 1)  # they replace the keys, so they come last
        size = sum(file.stat().st_size for file in path.with_name(f"{path.name}.search").iterdir())
        found["cells"]["disk MB"] = size >> 20
        lines = [[name, *((facts or {}).get(key) for key in names)] for name, facts in found.items()]
        print(text_table("", [["", *names], *lines]), flush=True)
    print()
    for file in (path.with_name(f"{path.name}.search").glob("*")):
        file.unlink()
    path.unlink()


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="numbers of rows")
    parser.add_argument("--width", type=int, default=768, help="numbers in an embedding")
    parser.add_argument("--uniform", action="store_true", help="independent numbers instead of groups")
    parser.add_argument("--cells", action="store_true", help="also sort the rows into cells")
    parser.add_argument("--peers", action="store_true", help="also search with other libraries, in cells too")
    parser.add_argument("--whole", type=int, default=100_000, help="most rows for the search that reads everything")
    parser.add_argument("--folder", help="folder for the tables; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for rows in args.rows:
            measure(rows, args, folder)


if __name__ == "__main__":
    main()
