"""The benchmarks that take hours must not fail in the last of them."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale
import starter

from audiomaepp.batches import ClipLoader
from audiomaepp.config import Config
from audiomaepp.data import Recordings, open_recordings, split
from audiomaepp.store import EmbeddingStore
from audiomaepp.synthetic import generated


def test_growth_is_measured_in_processes_of_their_own(tmp_path):
    done = subprocess.run([sys.executable, scale.__file__, "--recordings", "20", "60", "--only", "open", "embed",
                           "search, first", "--out", tmp_path], text=True, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "scale.json").read_text())
    assert report["kind"] == "shards" and [row[:2] for row in report["rows"]] == [
        [name, n] for n in (20, 60) for name in ("open", "embed", "search, first")]  # fmt: skip
    assert all(seconds > 0 for _, _, seconds, _ in report["rows"])
    assert done.stdout.count("embed") == 2 and "60" in done.stdout


def test_growth_is_the_ratio_to_the_smaller_set():
    said = scale.table([("open", 10, 2.0, 50.0), ("open", 100, 5.0, 60.0)])
    assert "2.5" in said and "1.2" in said


def test_loading_is_compared_with_the_rate_of_the_model():
    """Else nobody knows from the seconds of a worker whether a training would wait for it."""
    rows = [("load 960", 10, 1.0, 1.0), ("load 960", 90, 2.0, 1.0), ("train 960", 90, 4.0, 1.0)]
    (said,) = scale.loading_beside_training(rows)
    assert said == "90 recordings: one worker loads 480 clips/s, 2.00 times the 240 of the model"


def test_a_small_set_is_loaded_again_until_960_clips_are_there():
    cfg = Config.preset("nano", batch_size=32, num_workers=0)
    loaded = list(scale.batches_of(ClipLoader(generated(70, 3, 0.1), cfg)))
    assert sum(len(batch["index"]) for batch in loaded) == 960
    assert not torch.equal(loaded[0]["index"], loaded[2]["index"])  # the next epoch has another order


ROWS = 20_000


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A manifest of recordings, none of which is there."""
    folder = tmp_path_factory.mktemp("large")
    digests = [f"{i:032x}" for i in range(ROWS)]
    paths = [f"{i // 1000:06d}.tar@{i}+9/sounds of the wood/{i:07d}.flac" for i in range(ROWS)]
    table = pd.DataFrame(dict(path=paths, label=[f"bird {i % 9}" for i in range(ROWS)], seconds=1.0, digest=digests))
    table.to_parquet(folder / "manifest.parquet", index=False)
    return folder


def objects(work):
    """Bytes of Python objects and of arrays for each row: what stays, and the peak; and the result."""
    work()
    tracemalloc.start()
    try:
        result = work()
        return *(size / ROWS for size in tracemalloc.get_traced_memory()), result
    finally:
        tracemalloc.stop()


def test_an_opened_set_has_no_objects_for_its_rows(large):
    """They were 200 bytes for each row, and each loader worker got a copy of its own."""
    stay, peak, recordings = objects(lambda: open_recordings(large))
    assert stay < 40 and peak < 120
    assert len(pickle.dumps(recordings)) < 1.3 * len(pickle.dumps(recordings.table))


def test_a_split_does_not_copy_all_paths(large):
    """It took 1.1 GB for a million recordings."""
    recordings = open_recordings(large)
    stay, peak, (train, test, _) = objects(lambda: split(recordings))
    assert stay < 60 and peak < 250 and len(train) + len(test) == ROWS
    assert not {*train.paths} & {*test.paths}


def test_the_order_of_an_epoch_is_numbers(large):
    """As keys of Python it took 200 MB for a million recordings, in each process of a training."""
    loader = ClipLoader(open_recordings(large), Config.preset("nano", num_workers=0))
    stay, peak, (order, _) = objects(lambda: (order := iter(loader.schedule), next(order)))
    assert stay < 60 and peak < 120
    assert len({row for batch in order for _, row, _ in batch}) > ROWS - 2 * loader.schedule.batch_size


EVALUATE = """
import numpy as np
from speed import memory_now
from audiomaepp.evaluate import evaluate_embeddings
rng = np.random.default_rng(0)
y = rng.integers(0, 4, 66_000)
x = rng.standard_normal((len(y), 128), dtype=np.float32) + (y[:, None] % 2).astype(np.float32)
evaluate_embeddings(x[:300], y[:300], x[-100:], y[-100:])
before = memory_now()
evaluate_embeddings(x[:-4000], y[:-4000], x[-4000:], y[-4000:])
print((memory_now(peak=True) - before) * 2**20 / x.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is not known")
def test_an_evaluation_needs_little_more_than_one_copy_of_the_vectors():
    """It needed six: 6 GB for a million vectors of 256 numbers."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", EVALUATE], text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4.5  # with 80 MB that do not grow with their number


def test_few_embeddings_wait_in_memory_for_the_next_part(tmp_path):
    """A fast machine embeds 300,000 recordings in the minute between two parts: a gigabyte."""
    store = EmbeddingStore(tmp_path / "x.parquet", {"model": "m"}, {})
    facts = dict(start=0.0, end=1.0, size=1, modified=1)
    for i in range(10_000):
        store.add([dict(path=f"{i}.wav", embedding=np.zeros(2, np.float32), **facts)])
        assert len(store.rows) < 9000
    store.close()
    assert len(store.done) == 10_000


def test_paths_are_used_like_a_list():
    """Programs of users index, slice, join and compare them."""
    names = ["a.wav", "caf\udce9.wav", "b.wav"]
    table = pd.DataFrame(dict(path=pd.Series(names, dtype=object), label=["x", None, "x"]))
    recordings = Recordings(table)
    for sounds in (recordings, pickle.loads(pickle.dumps(recordings))):
        paths = sounds.paths
        assert paths == names == [*paths] and names == paths and paths != names[:2] and paths != "abc"
        assert paths[-2] == names[1] and paths[1:] == names[1:] and paths[np.int64(2)] == "b.wav"
        assert names[1] in paths and paths.index("b.wav") == 2 and paths + paths == names + paths == names * 2
        assert [*sounds.table["path"]] == ["a.wav", r"caf\xe9.wav", "b.wav"]
        assert [*sounds.table["label"]] == ["x", None, "x"]
        assert sounds.select([2, 1]).paths == names[:0:-1]
        assert paths[np.array(1)] == paths[torch.tensor(1)] == names[1]
    with pytest.raises(IndexError):
        recordings.paths[3]
    recordings.table.loc[0, "path"] = "other.wav"  # a worker reads the files that this process reads
    assert pickle.loads(pickle.dumps(recordings)).paths == recordings.paths == names


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    cfg = Config.preset("semantic_unlabelled", batch_size=8)
    sounds = generated(24, 3, cfg.clip_seconds, cfg.sample_rate)
    return cfg, sounds, tmp_path_factory.mktemp("pool")


def test_a_pool_holds_two_takes_of_each_program(pool):
    cfg, sounds, folder = pool
    takes = starter.pool_of(sounds, cfg, folder, processes=2)
    assert takes.shape == (24, 2, *cfg.img_size) and np.isfinite(takes).all()
    assert (takes[:, 0] != takes[:, 1]).any((1, 2)).all()
    np.testing.assert_array_equal(takes[5], starter.takes_of(sounds, cfg, [5])[0])
    assert len(starter.pool_of(sounds.select(range(9)), cfg, folder, 1)) == 9  # a training on fewer programs
    with pytest.raises(ValueError, match="choose another --pool"):
        starter.pool_of(generated(24, 4, cfg.clip_seconds, cfg.sample_rate), cfg, folder, 1)


def test_an_epoch_of_a_pool_has_each_program_once_in_a_new_order(pool):
    """A resumed training must see the batches that the interrupted one would have seen."""
    cfg, sounds, folder = pool
    takes = starter.pool_of(sounds, cfg, folder, processes=2)
    loader, orders = starter.PoolLoader(takes, range(24), cfg, two=True), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = list(loader)
        orders.append([batch["index"].tolist() for batch in batches])
        loader.set_epoch(epoch, start=2)
        (last,) = loader
        assert last["index"].tolist() == orders[-1][2]
    assert all(sorted(sum(order, [])) == list(range(24)) for order in orders) and orders[0] != orders[1]
    some = [2, 3, 5, 7, 11, 13, 17, 19]
    (batch,) = starter.PoolLoader(takes, some, cfg, two=True)
    assert sorted(batch["index"].tolist()) == some
    np.testing.assert_array_equal(last["logmel"], takes[last["index"], 0])
    np.testing.assert_array_equal(last["view2"]["logmel"], takes[last["index"], 1])
