"""The explorer without a browser: what its page holds, what it refuses, and what survives bad input."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from audiomaepp.data import Recordings
from audiomaepp.explorer import explore, own_neighbors, page_parts, render_page, save_atlas
from audiomaepp.maps import AlignedMaps, aligned_umap
from audiomaepp.plots import class_style

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype(np.float32)
WAVE = 0.5 * np.sin(np.arange(16000) / 5).astype(np.float32)


def read(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def data_of(page):
    "The JSON of a page, as a browser reads it."
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])


def test_the_page_holds_the_neighbors_of_each_embedding():
    settings = {"a": X, "b": RNG.normal(size=(40, 3))}
    payload = explore(settings, held_out="x").payload
    for setting, x in zip(payload["settings"], settings.values(), strict=True):
        x = (x - x.mean(0)) / x.std(0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        distances = 1 - x @ x.T
        np.fill_diagonal(distances, 9)
        rows = read(setting["neighbors"], "<u2").reshape(40, 10)
        np.testing.assert_array_equal(rows, np.argsort(distances, axis=1)[:, :10])
        far = read(setting["distances"], "<u2").reshape(40, 10) / 32767
        np.testing.assert_allclose(far, np.sort(distances, axis=1)[:, :10], atol=1e-4)


def test_settings_are_aligned_and_their_numbers_and_roles_arrive():
    names = ["plain", "log-mel", "epoch 1", "epoch 2"]
    settings = {name: X + 0.1 * i for i, name in enumerate(names)}
    numbers = {"plain": {"kNN-10": 0.5, "linear": float("nan")}, "chance": {"kNN-10": 0.1}}
    explorer = explore(settings, held_out="x", numbers=numbers, baselines=["log-mel"], steps=["epoch 2", "epoch 1"])
    payload, maps = explorer.payload, aligned_umap(settings)
    assert [s["name"] for s in payload["settings"]] == ["plain", "log-mel", "epoch 2", "epoch 1"]
    assert [s["baseline"] for s in payload["settings"]] == [False, True, False, False]
    assert [s["step"] for s in payload["settings"]] == [False, False, True, True]
    assert payload["first"] == 0 and explore(settings, held_out="x", steps=names[1:]).payload["first"] == 0
    assert explore(settings, held_out="x", steps=names, baselines=["plain"]).payload["first"] == 3, "the last step"
    for s in payload["settings"]:
        np.testing.assert_array_equal(read(s["xy"], "<f4").reshape(-1, 2), maps[s["name"]])
    first = payload["settings"][0]["numbers"]
    assert first["kNN-10"] == "0.50" and first["linear"] == "–" and "trust" in first
    assert payload["references"] == {"chance": {"kNN-10": "0.10"}}
    assert [ax.get_title() for ax in explorer.plot().axes] == names  # of many steps, three are drawn


def test_a_class_has_the_same_color_and_shape_as_on_the_figure():
    table = {"label": np.array(["b", "a"] * 20)}
    payload = explore(X, table, held_out="x", names=["c", "b", "a"]).payload
    (label,) = payload["columns"]
    assert label["classes"] == ["c", "b", "a"] and read(label["codes"], "<u2")[:2].tolist() == [1, 2]
    assert [tuple(style) for style in payload["styles"]] == [class_style(i) for i in range(60)]


class Elements(HTMLParser):
    "The elements of a page, and the scripts that a browser would run."

    def __init__(self, page):
        super().__init__()
        self.tags, self.runs = [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.runs += tag == "script" and dict(attrs).get("type") != "application/json"


@pytest.mark.parametrize("text", [
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>", "\u2028\u2029", '"\\', "]]>",
    "{{ 7*7 }}{% raw %}", "&lt;b&gt;", "caf\udce9",
])  # fmt: skip
def test_no_text_from_a_file_becomes_markup(text):
    plain = Elements(render_page(explore(X, {"name": ["a"] * 40, "b": ["a"] * 40}, held_out="a", title="a").payload))
    settings, column = {text: X}, np.array([text, "b"] * 20, dtype=object)
    numbers = {text: {text: 0.5}, f"{text} too": {text: 0.5}}
    explorer = explore(
        settings, {"name": column, text: column}, held_out=text + "x", color=text, numbers=numbers, title=text
    )
    page = render_page(explorer.payload)
    page.encode()
    found = Elements(page)
    assert found.tags == plain.tags and found.runs == 1
    shown = text.encode("utf-8", "backslashreplace").decode() if "\udce9" not in text else "caf\\xe9"
    data = data_of(page)
    assert data["names"][0] == shown and data["columns"][0]["classes"][0] in (shown, "b") and data["title"] == shown


def test_the_policy_of_the_page_allows_its_own_script_alone():
    page = render_page(explore(X, held_out="x", title="t").payload)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy
    html, script, style = page_parts({"n": 0})
    assert "</script" not in script.lower() and "</style" not in style.lower()  # they stand in elements of that name
    with pytest.raises(ValueError, match="key must be letters"):
        page_parts({}, key='"><script>')


def test_the_loudest_second_of_a_long_clip_is_heard():
    wave = 0.01 * RNG.normal(size=8 * 16000)
    wave[6 * 16000 : 7 * 16000] = 0.8 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    explorer = explore(X[:20], audio=[(wave, 16000)] * 20, held_out="x", preview_megabytes=0.09)
    seconds = float(re.search(r"at most ([\d.]+) s", explorer.payload["sound"])[1])
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(explorer.payload["previews"][0])))
    assert 0.7 < seconds < 2 and abs(len(heard) / rate - seconds) < 0.2
    spectrum = np.abs(np.fft.rfft(heard))
    assert abs(np.fft.rfftfreq(len(heard), 1 / rate)[spectrum.argmax()] - 1000) < 5 and np.std(heard) > 0.3


def test_an_unreadable_recording_is_counted_and_nothing_else_is_lost(tmp_path):
    for i in range(20):
        soundfile.write(tmp_path / f"{i}.wav", WAVE, 16000)
    (tmp_path / "3.wav").write_bytes(b"RIFF and nothing else")
    (tmp_path / "4.wav").unlink()
    paths = [tmp_path / f"{i}.wav" for i in range(20)]
    for audio in (paths, Recordings(pd.DataFrame({"path": list(map(str, paths))}))):
        payload = explore(X[:20], audio=audio, held_out="x").payload
        assert [i for i, preview in enumerate(payload["previews"]) if not preview] == [3, 4]
        assert "2 recordings could not be read" in payload["sound"]
    clips = [*paths[:3], (WAVE, 16000), (torch.from_numpy(np.stack([WAVE, WAVE])), 16000), None]
    clips += [(np.zeros(0), 8000), (np.full(900, np.nan), 8000)]
    payload = explore(X[:8], audio=clips, held_out="x").payload
    assert [bool(p) for p in payload["previews"][:7]] == [True] * 5 + [False] * 2
    assert "1 recording could not be read" in payload["sound"]
    silent = explore(X[:3], audio=[None] * 3, held_out="x").payload
    assert silent["previews"] is None and silent["sound"] == ""


def test_two_thousand_clips_stay_below_ten_megabytes(tmp_path):
    x, clips = RNG.normal(size=(2000, 8)), [(WAVE[:8000].repeat(6), 16000)] * 2000
    maps = AlignedMaps({"a": RNG.normal(size=(2000, 2))}, {})
    explorer = explore({"a": x}, {"label": ["a", "b"] * 1000}, clips, held_out="x", maps=maps)
    assert all(explorer.payload["previews"])
    assert explorer.save(tmp_path / "map.html").stat().st_size < 10e6


def test_beyond_the_budget_the_page_links_to_the_recordings_and_says_so(tmp_path):
    (tmp_path / "sounds").mkdir()
    paths = [tmp_path / "sounds" / f"a #{i} ü.wav" for i in range(19)] + [None]
    for path in paths[:-1]:
        soundfile.write(path, WAVE, 16000)
    explorer = explore(X[:20], audio=paths, held_out="x", preview_megabytes=0.01)
    data = data_of(explorer.save(tmp_path / "map.html").read_text("utf-8"))
    assert data["previews"] is None and data["links"][-1] == "" and data["links"][3] == "sounds/a%20%233%20%C3%BC.wav"
    assert "20 clips do not fit into 0.01 MB" in data["sound"] and "at their place" in data["sound"]
    silent = explore(X[:20], audio=[(WAVE, 16000)] * 20, held_out="x", preview_megabytes=0.01)
    assert data_of(silent.save(tmp_path / "map.html").read_text("utf-8"))["links"] is None


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = explore(X, held_out="x").save(tmp_path / "map.html")
    before = path.read_bytes()
    broken = explore(X, held_out="x")
    broken.payload["title"] = float("nan")  # not JSON
    with pytest.raises(ValueError):
        broken.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["map.html"]


def test_the_sentence_says_which_clips_are_held_out():
    flags = np.arange(40) < 10
    payload = explore(X, held_out=flags).payload
    assert read(payload["held"], "u1").tolist() == flags.tolist()
    assert "10 held-out clips" in payload["note"] and "hollow points are 30 training clips" in payload["note"]
    assert "TRAINING clips" in explore(X, held_out=None).payload["note"]
    figure = explore(X, held_out=flags).plot()
    assert "held-out clips: 10 clips" in figure._suptitle.get_text()
    assert sum(len(c.get_offsets()) for c in figure.axes[0].collections) == 10


def test_a_table_of_unknown_origin_claims_nothing():
    "A map of the training's own clips would pass for one of held-out clips."
    explorer = explore(X, held_out="unknown")
    payload, title = explorer.payload, explorer.plot()._suptitle.get_text()
    assert payload["note"] == "It is not known which of these clips the training saw." and "not known" in title
    assert "held" not in title and set(read(payload["held"], "u1")) == {2}


def test_wrong_input_is_named():
    table = {"label": ["a"] * 40}
    for call, message in [
        (lambda: explore(np.zeros((50_001, 8)), held_out="x"), "at most 50,000 clips, got 50,001; use save_atlas"),
        (lambda: explore({"a": X, "b": X[1:]}, held_out="x"), "'a': 40, 'b': 39"),
        (lambda: explore({}, held_out="x"), "got no embeddings"),
        (lambda: explore(X, {"label": ["a"]}, held_out="x"), "'label' must .* 40 points, got 1"),
        (lambda: explore(X, table, held_out="x", color="fold"), "color must be .* got 'fold'; use label"),
        (lambda: explore(X, table, held_out="x", names=["b"]), "labels must be among the 1 names, got 'a'"),
        (lambda: explore(X, held_out=" "), "held_out must name the clips"),
        (lambda: explore(X, held_out=[True] * 39), r"40 times True or False, got shape \(39,\)"),
        (lambda: explore({"a": X}, held_out="x", steps=["b"]), "steps must be settings of vectors, got 'b'"),
        (lambda: explore(X, audio=["a.wav"], held_out="x"), "one recording for each of the 40 clips, got 1"),
        (lambda: explore(np.full((40, 6), np.nan), held_out="x"), "NaN or infinity"),
        (lambda: explore({"a": X}, held_out="x", maps=AlignedMaps({"b": X[:, :2]}, {})), "got none for 'a'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_clips_make_a_page(n, tmp_path):
    explorer = explore({"a": X[:n], "collapsed": np.ones((n, 4))}, audio=[(WAVE, 16000)] * n, held_out="x")
    assert data_of(explorer.save(tmp_path / "map.html").read_text("utf-8"))["n"] == n
    assert explorer.plot()._repr_png_()


def test_a_copy_is_the_nearest_clip_and_no_clip_is_its_own():
    rows, far = own_neighbors(np.repeat(RNG.normal(size=(30, 5)), 3, axis=0), k=2)
    assert (
        (rows != np.arange(90)[:, None]).all() and (rows // 3 == np.arange(90)[:, None] // 3).all() and far.max() < 1e-5
    )


def test_the_atlas_table_has_what_embedding_atlas_reads(tmp_path):
    table = pd.DataFrame({"path": [f"a/{i}.wav" for i in range(40)], "label": ["a", "b"] * 20, "x": 1.0})
    frame = pd.read_parquet(save_atlas(X, table, tmp_path / "clips.parquet"))
    assert {"x", "y", "neighbors", "name", "label"} <= set(frame) and frame["name"][3] == "3.wav"
    rows, far = own_neighbors(X)
    np.testing.assert_array_equal(np.stack([n["ids"] for n in frame["neighbors"]]), rows)
    np.testing.assert_allclose(np.stack([n["distances"] for n in frame["neighbors"]]), far, atol=1e-6)
    assert frame["x"].std() > 0  # the positions, not the column of the table


def test_where_there_is_no_widget_a_picture_and_a_text_remain(monkeypatch):
    from audiomaepp import explorer as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    explorer = explore(X, held_out="x")
    shown = explorer._repr_mimebundle_()
    assert set(shown) == {"image/png", "text/plain"} and base64.b64decode(shown["image/png"])[:4] == b"\x89PNG"
    assert explorer.selection.dtype == np.int64 and not len(explorer.selection)


def test_the_widget_has_the_payload_and_gives_the_selection_back():
    pytest.importorskip("anywidget", reason="the extra jupyter is not installed")
    explorer = explore(X, held_out="x")
    shown = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(shown)
    assert shown["text/plain"] == "Explorer: 40 clips"
    explorer.widget.selection = [3, 1]
    assert explorer.selection.tolist() == [3, 1] and explorer.widget.payload is explorer.payload
