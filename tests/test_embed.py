"""Any recording gives one answer; a folder of them survives being killed; an hour takes no more memory than minutes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import cache

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomaepp.audio import AudioError
from audiomaepp.config import Config
from audiomaepp.data import Recordings
from audiomaepp.embed import EmbeddingGenerator, whiten_model
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.synthetic import generated, synthesize

SMALL = dict(embed_dim=32, depth=1, num_heads=4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4,
             img_size=(50, 16), patch_size=(10, 8))  # windows of half a second


@cache
def generator(**changes) -> EmbeddingGenerator:
    torch.manual_seed(0)
    return EmbeddingGenerator(AudioMAEPlusPlus(Config(**SMALL | changes)), device="cpu", batch_size=4)


recordings = st.lists(
    st.tuples(st.integers(1, 40_000), st.sampled_from([8000, 11_025, 16_000, 44_100]), st.integers(1, 3)),
    min_size=1, max_size=6,
)


@settings(deadline=None, max_examples=25)
@given(recordings, st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from(["cls", "mean", "cls+mean", "frame"]),
       st.booleans())
def test_one_answer_whatever_the_company(shapes, seed, batch_size, pooling, masked):
    """An index that holds another vector than the query's, because of what else was in the list, finds nothing."""
    rng, generate = np.random.default_rng(seed), generator(mask_padding=masked, grid_shifts=2)
    clips = [(rng.uniform(-1, 1, (channels, n) if channels > 1 else n).astype(np.float32), rate)
             for n, rate, channels in shapes]
    alone = [generate.extract_embedding(clip, rate, pooling) for clip, rate in clips]
    for rate in {rate for _, rate in clips}:
        rows = rng.permutation([i for i, (_, r) in enumerate(clips) if r == rate])
        generate.batch_size = batch_size
        together = generate.extract_embedding([clips[i][0] for i in rows], rate, pooling)
        generate.batch_size = 4
        for i, vector in zip(rows, together, strict=True):
            assert np.isfinite(vector).all()
            np.testing.assert_allclose(vector, alone[i], atol=1e-5)
    again = [generate.extract_embedding(clip, rate, pooling) for clip, rate in clips]
    assert all(np.array_equal(a, b) for a, b in zip(alone, again, strict=True))


def test_padding_has_no_part():
    """A short clip's vector would drift towards silence with every sample that it lacks."""
    clip = torch.randn(3200, generator=torch.Generator().manual_seed(0)) * 0.1
    longer = Config(**SMALL | dict(img_size=(100, 16)), normalize="dataset")
    torch.manual_seed(0)
    model = AudioMAEPlusPlus(longer)
    short = AudioMAEPlusPlus(longer.replace(img_size=(50, 16)))
    short.load_state_dict(model.state_dict())
    # the same weights with half the window: positions of the steps that are left are the same
    a, b = (EmbeddingGenerator(m, device="cpu").extract_embedding(clip) for m in (model, short))
    np.testing.assert_allclose(a, b, atol=1e-4)
    counted = AudioMAEPlusPlus(longer.replace(mask_padding=False))
    counted.load_state_dict(model.state_dict())
    assert np.abs(EmbeddingGenerator(counted, device="cpu").extract_embedding(clip) - a).max() > 0.01


def sounds(folder, n, seconds=0.7, rate=8000):
    """A folder of short files in two classes."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / ("dog", "rain")[i % 2] / f"{i:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * rate)), rate)
    return folder


def test_a_folder_is_not_embedded_twice_unless_it_changed(tmp_path):
    folder, out, generate = sounds(tmp_path / "in", 6), tmp_path / "out" / "x.parquet", generator()
    first = generate.embed_folder(folder, out, quiet=True)
    assert list(first["label"]) == ["dog"] * 3 + ["rain"] * 3 and (first["end"] == 0.7).all()
    embedded = []
    plain, generate.encoder.embed = generate.encoder.embed, lambda *a: embedded.append(len(a[0])) or plain(*a)
    try:
        again = generate.embed_folder(folder, out, quiet=True)
        assert not embedded and again["embedding"].map(tuple).equals(first["embedding"].map(tuple))
        changed, gone, broken = (folder / "dog" / f"{i:05d}.wav" for i in (0, 2, 4))
        soundfile.write(changed, np.zeros(8000), 8000)
        gone.unlink()
        broken.write_bytes(b"no sound any more")
        table = generate.embed_folder(folder, out, quiet=True)
    finally:
        del generate.encoder.embed
    assert sum(embedded) == 2 and len(table) == 4  # two windows of one second
    assert table.set_index("path").loc[str(changed), "end"] == 1.0 and str(gone) not in set(table["path"])
    assert [path for path, _ in table.attrs["skipped"]] == [str(broken)]
    with pytest.raises(ValueError, match="must hold embeddings with rows windows, got rows recordings"):
        generate.embed_folder(folder, out, quiet=True, windows=True)
    with pytest.raises(ValueError, match="must hold embeddings with model"):
        generator(depth=2).embed_folder(folder, out, quiet=True)


def test_windows_have_their_places(tmp_path):
    folder, generate = sounds(tmp_path, 3, seconds=1.3), generator()
    table = generate.embed_folder(folder, quiet=True, windows=True)
    assert table.groupby("path")["start"].apply(list).map(tuple).unique().tolist() == [(0.0, 0.5, 1.0)]
    np.testing.assert_allclose(table["end"] - table["start"], [0.5, 0.5, 0.3] * 3)
    whole = generate.embed_folder(folder, quiet=True)
    mean = np.average(np.stack(table["embedding"][:3]), axis=0, weights=[0.5, 0.5, 0.3])
    np.testing.assert_allclose(mean, whole["embedding"][0], atol=1e-6)


def test_what_holds_no_sound_is_said(tmp_path):
    """It would vanish, and every label behind it would belong to another clip."""
    soundfile.write(tmp_path / "whole.flac", 0.1 * np.random.default_rng(0).standard_normal(4000), 8000)
    data = bytearray((tmp_path / "whole.flac").read_bytes())
    data[21] &= 0xF0  # the header's count of samples: unknown
    data[22:26] = bytes(4)
    (tmp_path / "header.flac").write_bytes(bytes(data[:86]))
    with pytest.raises(AudioError):
        generator().extract_embedding([tmp_path / "header.flac", tmp_path / "whole.flac"])
    table = generator().embed_folder(tmp_path, quiet=True)
    assert len(table) == 1 and len(table.attrs["skipped"]) == 1


def test_sounds_in_memory_are_told_apart_by_their_samples(tmp_path):
    """Two made sets have the same names; the second would get the first one's vectors."""
    made = [synthesize(n=1, classes=2, seed=seed) for seed in (0, 1)]
    found = [generator().embed_folder(sounds, tmp_path / "x.parquet", quiet=True) for sounds in made]
    right = [generator().embed_folder(sounds, quiet=True) for sounds in made]
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(np.stack(a["embedding"]), np.stack(b["embedding"]), atol=1e-6)
    assert np.abs(np.stack(found[0]["embedding"]) - np.stack(found[1]["embedding"])).max() > 0.01


def test_the_table_is_as_it_is_now(tmp_path):
    """Corrected labels, a new column, a path with two labels: none is lost, and nothing is embedded again."""
    folder, out, generate = sounds(tmp_path / "in", 3), tmp_path / "x.parquet", generator()
    paths = sorted(map(str, folder.rglob("*.wav")))
    pd.DataFrame({"path": paths, "label": ["dog", "cat", "rain"]}).to_csv(tmp_path / "a.csv", index=False)
    generate.embed_folder(tmp_path / "a.csv", out, quiet=True)
    late = pd.DataFrame({"path": [*paths, paths[0]], "label": ["dog", "dog", "rain", "bark"]})
    late.assign(site=["a", "1", None, "2.5"]).to_csv(tmp_path / "b.csv", index=False)
    generate.encoder.embed = lambda *a: pytest.fail("embedded again")
    try:
        table = generate.embed_folder(tmp_path / "b.csv", out, quiet=True)
    finally:
        del generate.encoder.embed
    ours, given = (sorted(zip(t["path"], t["label"], strict=True)) for t in (table, late))
    assert ours == given and sorted(table["site"].dropna()) == ["1", "2.5", "a"]
    with pytest.raises(ValueError, match="only recordings of this call, got 2 from elsewhere"):
        late[:1].to_csv(tmp_path / "c.csv", index=False)
        generate.embed_folder(tmp_path / "c.csv", out, quiet=True)
    with pytest.raises(ValueError, match="must have no column 'start', which is added here"):
        late.assign(start=0.0).to_csv(tmp_path / "d.csv", index=False)
        generate.embed_folder(tmp_path / "d.csv", quiet=True)


def test_a_file_that_is_touched_meanwhile_stays(tmp_path):
    """A tagger that runs at the same time would make recordings vanish without a word."""
    folder, generate = sounds(tmp_path / "in", 3), generator()
    plain = generate.encoder.embed

    def touching(*args):
        os.utime(folder / "dog" / "00000.wav", ns=(1, 1))
        return plain(*args)

    generate.encoder.embed = touching
    try:
        assert len(generate.embed_folder(folder, tmp_path / "x.parquet", quiet=True)) == 3
    finally:
        del generate.encoder.embed


WORK = """
    import sys, torch
    from audiomaepp.config import Config
    from audiomaepp.embed import EmbeddingGenerator
    from audiomaepp.model import AudioMAEPlusPlus
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = AudioMAEPlusPlus(Config(**{small!r}))
    print("begun", flush=True)
    generate = EmbeddingGenerator(model, device="cpu")
    generate.embed_folder({folder!r}, {out!r}, quiet=True, windows=True, save_seconds=0.05)
"""


def killed_twice(tmp_path, n):
    """Embed a folder in a process that is killed twice on the way; the table, and how many parts the kills left."""
    folder, out = sounds(tmp_path / "in", n), tmp_path / "x.parquet"
    code = textwrap.dedent(WORK.format(small=SMALL, folder=str(folder), out=str(out)))
    left = []
    for goal in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        while process.poll() is None and len(list(tmp_path.glob("x.parquet.parts/*.parquet"))) < goal:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left.append(len(list(tmp_path.glob("x.parquet.parts/*.parquet"))))
    assert not out.exists(), "it was finished before it was killed; use more files"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return folder, pd.read_parquet(out), left


def check_killed(tmp_path, n):
    folder, table, left = killed_twice(tmp_path, n)
    assert 0 < left[0] < left[1]
    assert len(table) == 2 * n and not table.duplicated(["path", "start"]).any()
    assert set(table["path"]) == {str(path) for path in folder.rglob("*.wav")}
    assert sorted(os.listdir(tmp_path)) == ["in", "x.parquet"]  # the parts are gone
    whole = generator().embed_folder(folder, quiet=True, windows=True).sort_values(["path", "start"])
    ours = table.sort_values(["path", "start"])
    np.testing.assert_allclose(np.stack(ours["embedding"]), np.stack(whole["embedding"]), atol=1e-5)


def test_killed_twice_one_row_for_each_window(tmp_path):
    """A night's work would be lost, or counted twice."""
    check_killed(tmp_path, 600)


@pytest.mark.slow
def test_killed_twice_in_ten_thousand_files(tmp_path):
    check_killed(tmp_path, 10_000)


PEAK = """
    import resource, sys, numpy as np, torch
    from audiomaepp.config import Config
    from audiomaepp.embed import EmbeddingGenerator
    from audiomaepp.model import AudioMAEPlusPlus
    torch.set_num_threads(1)
    generate = EmbeddingGenerator(AudioMAEPlusPlus(Config(**{small!r})), device="cpu")
    assert np.isfinite(generate.extract_embedding({path!r})).all()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_an_hour_takes_the_memory_of_ten_minutes(tmp_path):
    peaks = []
    for minutes in (10, 60):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 44_100, 1) as file:
            for i in range(minutes):
                file.write(0.1 * np.random.default_rng(i).standard_normal(60 * 44_100))
        code = textwrap.dedent(PEAK.format(small=SMALL, path=str(path)))
        peaks.append(int(subprocess.check_output([sys.executable, "-c", code])))
        path.unlink()
    print(f"peak memory: {peaks[0] / 1024:.0f} MB for ten minutes, {peaks[1] / 1024:.0f} MB for an hour")
    assert peaks[1] < 1.1 * peaks[0]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    generator().model.write(folder)
    return str(folder)


def test_scikit_learns_own_checks(model_folder):
    """With one window at a time: in larger batches float32 sums differ by 1e-7, and one check allows 1e-9."""
    from sklearn.utils.estimator_checks import check_estimator

    from audiomaepp.estimator import AudioMAEEmbedder

    found = check_estimator(AudioMAEEmbedder(model_folder, device="cpu", batch_size=1), on_skip=None)
    assert {check["check_name"] for check in found if check["status"] != "passed"} <= {"check_array_api_input"}
    assert len(found) > 40


def test_in_a_pipeline_and_a_grid_search(tmp_path, model_folder):
    """The pooling is chosen like any other parameter; what is fitted can be pickled and goes on elsewhere."""
    import joblib
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from audiomaepp.estimator import AudioMAEEmbedder

    folder = sounds(tmp_path / "in", 24)
    for path in folder.rglob("rain/*.wav"):  # a class that can be told: it is low
        wave, rate = soundfile.read(path)
        soundfile.write(path, np.convolve(wave, np.ones(8) / 8, "same"), rate)
    paths = sorted(map(str, folder.rglob("*.wav")))
    labels = ["rain" in path for path in paths]
    embedder = AudioMAEEmbedder(model_folder, device="cpu")
    pipeline = make_pipeline(embedder, StandardScaler(), LogisticRegression())
    grid = {"audiomaeembedder__pooling_mode": ["cls", "frame"]}
    search = GridSearchCV(pipeline, grid, cv=3, n_jobs=2).fit(paths, labels)
    assert search.best_score_ > 0.9 and clone(embedder).get_params() == embedder.get_params()
    joblib.dump(search.best_estimator_, tmp_path / "fitted.joblib")
    assert list(joblib.load(tmp_path / "fitted.joblib").predict(paths)) == list(search.predict(paths))
    waves = [soundfile.read(path, dtype="float32")[0] for path in paths[:3]]
    by_array = AudioMAEEmbedder(model_folder, sample_rate=8000, device="cpu").fit_transform(waves)
    np.testing.assert_allclose(by_array, embedder.fit_transform(paths[:3]), atol=1e-5)


def test_a_table_in_another_precision_is_not_continued(tmp_path):
    model, sounds = AudioMAEPlusPlus(Config.preset("nano")).eval(), synthesize(n=1, seed=0, sample_rate=16000)
    for first, then in (("fp32", "bf16"), ("bf16", "fp32")):
        out = tmp_path / f"{first}.parquet"
        EmbeddingGenerator(model, precision=first).embed_folder(sounds, out, quiet=True)
        with pytest.raises(ValueError, match=f"precision {then}, got precision {first}"):
            EmbeddingGenerator(model, precision=then).embed_folder(sounds, out, quiet=True)
    a, b = (np.stack(pd.read_parquet(tmp_path / f"{name}.parquet")["embedding"]) for name in ("fp32", "bf16"))
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_the_whitening_of_a_large_set_takes_a_sample_of_it(monkeypatch):
    """All clips of a million would take an hour in one process, while the others wait; every class must take part."""
    model, seen = AudioMAEPlusPlus(Config.preset("nano", whiten=True)).eval(), []

    def embed(self, recordings, **how):
        seen.append(recordings)
        return np.random.default_rng(0).standard_normal((64, model.cfg.embedding_dim)), None, None

    monkeypatch.setattr(EmbeddingGenerator, "embed_recordings", embed)
    table = pd.DataFrame({"path": [f"{i}" for i in range(60_000)], "label": [f"{i % 12}" for i in range(60_000)]})
    made = Recordings(table, 16000, sorted(set(table["label"])), [torch.zeros(16000)] * 60_000)
    for whole in (made, generated(10_000, 0, 1.0, 16000)):
        whiten_model(model, whole)
        part = seen.pop()
        assert len(part) == len(set(part.paths)) == (5000 if whole.has_takes else 50_000)
        assert model.whitening is not None
    assert part.paths[:24] == generated(24, 0, 1.0, 16000).paths, "one in two would leave out half the sources"
