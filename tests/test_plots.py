"""Plots and maps: imports, memory, messages, text from files, and what aligned maps promise."""

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from audiomaepp.evaluate import knn_accuracy
from audiomaepp.maps import (
    MapPanel,
    aligned_umap,
    plot_map,
    plot_maps,
    plot_shift,
    save_html_map,
    trustworthiness,
    umap_2d,
)
from audiomaepp.plots import (
    class_style,
    plot_confusion,
    plot_histories,
    plot_history,
    plot_masks,
    plot_reconstruction,
    plot_spectrogram,
)

HEAVY = ("matplotlib", "umap", "sklearn", "pandas")


def python(code):
    "Run code in an interpreter that has imported nothing yet."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["plots", "maps"])
def test_importing_is_cheap(module):
    assert python(f"import sys, audiomaepp.{module}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


def test_a_figure_shows_in_a_notebook_once_with_and_without_pyplot():
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from audiomaepp.plots import plot_masks
shell = InteractiveShell.instance()
for inline in (False, True):
    if inline: # what Jupyter does once somebody imports pyplot
        import matplotlib.pyplot
        select_figure_formats(shell, {"png"})
    data, _ = shell.display_formatter.format(plot_masks([0, 1], (1, 2)))
    assert data["image/png"][:4] == b"\\x89PNG" or data["image/png"].startswith("iVBOR")
    assert not [k for k in data if k not in ("image/png", "text/plain")]
    print("matplotlib.pyplot" in sys.modules)
"""
    assert python(code).split() == ["False", "True"]


def test_figures_are_not_kept():
    import gc
    import weakref

    figures = [weakref.ref(plot_map(np.eye(2), held_out="x")) for _ in range(3)]
    gc.collect()
    assert [f() for f in figures] == [None] * 3


def test_every_map_says_which_clips_it_shows(tmp_path):
    xy = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(TypeError, match="held_out"):
        plot_map(xy)
    with pytest.raises(ValueError, match="held_out must name the clips"):
        save_html_map(xy, {}, tmp_path / "map.html", held_out=" ")
    assert not list(tmp_path.iterdir())
    assert "held-out clips: fold 5" in plot_map(xy, held_out="fold 5")._suptitle.get_text()
    assert "TRAINING clips" in plot_confusion(np.eye(2), ["a", "b"], held_out=None)._suptitle.get_text()


@pytest.mark.parametrize(
    "labels",
    [None, [0] * 20, [-1] * 20, ["a", "b"] * 10, [None, "b"] * 10, np.arange(20) / 7, [np.nan, 1.0] * 10,
     [True, False] * 10, torch.arange(20), np.arange(20) * 3],
    ids=["none", "one", "unlabeled", "words", "gaps", "scale", "whole floats", "truth", "tensor", "uneven"],
)
def test_any_labels_can_be_drawn(labels, tmp_path):
    xy = np.random.default_rng(0).normal(size=(20, 2))
    panels = [MapPanel("left", xy, {"kNN-10": 0.5}), ("right", torch.tensor(xy))]
    assert plot_maps(panels, labels, "t", "c", held_out="x", legend="heading")._repr_png_()
    if labels is not None:
        save_html_map(xy, {"label": labels}, tmp_path / "map.html", held_out="x")


def test_legend_names_each_class_once_and_unlabeled_last():
    xy = np.random.default_rng(0).normal(size=(6, 2))
    fig = plot_maps([("a", xy), ("b", xy)], [0, 1, 2, 0, 1, -1], held_out="x", names=["dog", "rain", "sea"])
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == ["dog", "rain", "sea", "unlabeled"]
    assert len({tuple(ax.collections[1].get_facecolor()[0]) for ax in fig.axes}) == 1 # one color everywhere


def test_embeddings_that_umap_cannot_place_are_still_drawn():
    for x in (np.ones((30, 4)), np.zeros((3, 1)), np.eye(1)):
        xy = umap_2d(x)
        assert xy.shape == (len(x), 2) and np.isfinite(xy).all()


def test_bad_arguments_are_named(tmp_path):
    xy = np.zeros((4, 2))
    cases = [
        (lambda: plot_maps([], held_out="x"), "at least one map, got none"),
        (lambda: plot_map(np.zeros((0, 2)), held_out="x"), r"positions must have shape .*got \(0, 2\)"),
        (lambda: plot_map(np.full((4, 2), np.nan), held_out="x"), "NaN or infinity in 4 of 4 rows"),
        (lambda: plot_map(xy, [1, 2], held_out="x"), r"each of the 4 points, got shape \(2,\)"),
        (lambda: plot_masks(np.zeros(7), (2, 4)), "must have 8 patches, got 7; use masks of a 2 x 4 grid"),
        (lambda: plot_spectrogram(np.zeros((2, 3, 4, 5))), r"spec must have shape .*got \(2, 3, 4, 5\)"),
        (lambda: plot_reconstruction(np.ones((8, 8)), np.ones(4), np.ones((4, 9)), (4, 4)), r"got \(4,\) and \(4, 9\)"),
        (lambda: plot_history([]), "rows must have numbers in 'step' .*got the columns none"),
        (lambda: plot_confusion(np.eye(3), ["a"], held_out="x"), r"shape \(1, 1\) for 1 names, got \(3, 3\)"),
        (lambda: save_html_map(xy, {"name": ["a"]}, tmp_path / "m.html", held_out="x"), "'name' must .* got 1"),
        (lambda: save_html_map(xy, {}, tmp_path / "m.html", held_out="x", color="fold"), "color must be .* got 'fold'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_tensors_in_any_precision_on_the_tape_can_be_drawn():
    spec = torch.randn(1, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    pred, mask = torch.randn(1, 8, 16, requires_grad=True), torch.tensor([[0, 1] * 4])
    assert plot_reconstruction(spec, mask, pred, (4, 4), norm_pix=True)._repr_png_()
    assert plot_spectrogram(spec)._repr_png_()
    assert plot_spectrogram(torch.full((4, 4), -190.0))._repr_png_() # a silent clip has no range


def test_history_keeps_losses_and_held_out_scores_apart():
    rows = [{"epoch": e, "loss": 1 / e, "grad_norm": "", "knn": None if e % 2 else 0.5, "heldout_uniformity": -2.0}
            for e in range(1, 5)]
    fig = plot_history(rows, axis="epoch")
    shown = [ax.get_title() for ax in fig.axes if ax.get_visible()]
    assert shown == ["total loss", "kNN-10 accuracy\n(held-out clips)", "uniformity\n(held-out clips)"]


def test_pages_hold_no_foreign_markup(tmp_path):
    bad = "<img src=x onerror=alert(1)></script>"
    table, path = {bad: [bad, bad]}, tmp_path / "m.html"
    save_html_map(np.zeros((2, 2)), table, path, bad, held_out=bad, color=bad)
    assert "<img" not in path.read_text() and path.read_text().count("</script>") == path.read_text().count("<script")


AS_TEX = ("$x^{$", "$a$ $b_", r"\$5 \alpha$", "$$", "_$a$_")


def pictures(text):
    "Every picture with `text` wherever a picture has text."
    xy, spec = np.random.default_rng(0).normal(size=(8, 2)), np.random.default_rng(1).normal(size=(16, 8))
    rows = [{"epoch": e, "loss": 10.0 ** -e, text: 1e-6 * e, f"heldout_{text}": e} for e in (1, 2, 3)]
    said, labels = dict(title=text, held_out=text), [text, "b"] * 4
    yield plot_map(xy, labels, caption=text, numbers={text: 0.5}, legend=text, **said)
    yield plot_map(xy, np.linspace(0, 1, 8), legend=text, **said)
    yield plot_maps([(text, xy)], np.arange(8) % 2, names=[text, "b"], numbers={text: {text: 0.5}}, **said)
    yield plot_shift(xy, xy + 1, labels, caption=text, **said)
    yield plot_spectrogram(spec, text)
    yield plot_masks(np.zeros(8), (2, 4), [text])
    yield plot_reconstruction(spec, np.arange(8) % 2, np.ones((8, 16)), (4, 4), text)
    yield plot_history(rows, text, "epoch")
    yield plot_histories({text: rows, "b": [rows, rows]}, title=text, axis="epoch")
    yield plot_confusion(np.eye(2), [text, "b"], **said)


@pytest.mark.parametrize("text", AS_TEX)
def test_text_from_data_is_drawn_as_it_is_and_never_as_a_formula(text):
    from matplotlib.text import Text

    for fig in pictures(text):
        assert fig._repr_png_()
        drawn = [t for t in fig.findobj(Text) if r"\mathdefault{10^" not in t.get_text()] # of a logarithmic axis
        assert any(text in t.get_text().replace("\N{NO-BREAK SPACE}", " ") for t in drawn)
        assert not [t for t in drawn if "$" in t.get_text() and t.get_parse_math()]


def test_a_power_of_ten_stands_in_the_title_without_a_formula():
    fig = plot_history([{"epoch": e, "lr": 3e-6 * e, "steps": 2e12 * e} for e in (1, 2)], axis="epoch")
    assert {ax.get_title() for ax in fig.axes if ax.get_visible()} == {"learning rate (×10⁻⁶)", "steps (×10¹²)"}


def test_a_class_has_one_color_on_the_map_and_on_the_page(tmp_path):
    """Ten comes after two for a reader and before it for a computer; held-out clips need not show every class."""
    from matplotlib.colors import to_hex

    classes, shown = ["1", "2", "9", "10", "11"], ["10", None, "2", "11", "2"]
    xy, codes = np.arange(10.0).reshape(5, 2), [classes.index(c) if c else -1 for c in shown]
    fig = plot_map(xy, codes, held_out="x", names=classes)
    by_name = {h.get_label(): h for h in fig.axes[0].collections if len(h.get_offsets())}
    drawn = {name: to_hex(h.get_facecolor()[0]).upper() for name, h in by_name.items()}
    path = save_html_map(xy, {"label": shown}, tmp_path / "m.html", held_out="x", names=classes)
    data = json.loads(re.search(r"application/json[^>]*>(.*?)</script>", path.read_text(encoding="utf-8"), re.S)[1])
    (label,) = data["columns"]
    codes = np.frombuffer(base64.b64decode(label["codes"]), "<u2").tolist() # 65535: no class
    colors = {label["classes"][code]: data["styles"][code][0] for code in codes if code != 65535}
    assert colors | {"unlabeled": data["gray"]} == drawn
    assert [label["classes"][code] if code != 65535 else None for code in codes] == shown
    with pytest.raises(ValueError, match="'12'"):
        save_html_map(xy, {"label": ["12"] * 5}, tmp_path / "m.html", held_out="x", names=classes)


def test_a_class_has_one_color_and_one_shape_in_every_picture():
    "Maps and shifts; a reader who cannot tell two colors apart still has the shape."
    from matplotlib.colors import to_hex
    from matplotlib.markers import MarkerStyle

    def styles(artists): # color and outline of the marker
        return {(to_hex(a.get_facecolor()[0]).upper(), len(a.get_paths()[0].vertices)) for a in artists}

    codes, xy = np.arange(12), np.random.default_rng(0).normal(size=(12, 2))
    expected = {(color, len(MarkerStyle(marker).get_path().vertices)) for color, marker in map(class_style, codes)}
    on_map = [c for c in plot_map(xy, codes, held_out="x").axes[0].collections if len(c.get_offsets())]
    assert styles(on_map) == expected and len(expected) == 12
    shift = plot_shift(xy, xy + 1, codes, held_out="x").axes[0].collections
    assert styles(c for c in shift if c.get_zorder() == 4) == expected
    assert len({class_style(i) for i in range(60)}) == 60 and class_style(0)[1] != class_style(1)[1]


CLASSES = np.arange(120) % 4


def clouds(gap, seed=0, dimensions=16):
    "Four classes of thirty points each, `gap` apart."
    rng = np.random.default_rng(seed)
    return gap * rng.normal(size=(4, dimensions))[CLASSES] + rng.normal(size=(120, dimensions))


def median_move(maps, before, after):
    return float(np.median(maps.moved(before, after)))


def test_an_unchanged_embedding_stays_where_it_is_and_another_does_not():
    x, rng = clouds(2), np.random.default_rng(1)
    spin, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    maps = aligned_umap({"first": x, "stranger": rng.normal(size=(120, 7)), "same": x.copy(), "scaled": 1000 * x + 5,
                         "turned": x @ spin, "mirrored": -x})
    assert np.array_equal(maps["first"], maps["same"])
    near = [name for name in maps if median_move(maps, "first", name) < 0.05]
    assert near == ["first", "same", "scaled", "turned", "mirrored"]
    assert median_move(maps, "first", "stranger") > 0.2


def test_a_map_shows_no_classes_that_its_embedding_does_not_have():
    "A start full of classes must not shine through: that would be a lie."
    noise = {f"noise {i}": np.random.default_rng(9 + i).normal(size=(120, 32)) for i in range(4)}
    embeddings = {"good": clouds(3)} | noise
    maps = aligned_umap(embeddings)
    half = np.arange(120) < 60

    def found(name):
        xy = maps[name]
        return np.mean([knn_accuracy(xy[a], CLASSES[a], xy[~a], CLASSES[~a]) for a in (half, ~half)])

    assert found("good") > 0.95
    assert np.mean([found(name) for name in noise]) < 0.25 + 3 * np.sqrt(0.25 * 0.75 / 480)


def test_maps_depend_on_embeddings_alone_not_on_order_or_threads():
    embeddings = {"a": clouds(1), "b": clouds(2), "c": clouds(0)}
    first, state, threads = aligned_umap(embeddings), torch.random.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        second = aligned_umap(dict(reversed(embeddings.items())))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert list(second) == ["c", "b", "a"] and second.trustworthiness == first.trustworthiness
    assert all(np.array_equal(first[name], second[name]) for name in embeddings)
    assert torch.equal(state, torch.random.get_rng_state())


def test_trustworthiness_falls_with_the_map():
    x = clouds(2)
    maps = aligned_umap({"x": x})
    wrong = np.random.default_rng(0).permutation(maps["x"])
    assert maps.trustworthiness["x"] == trustworthiness(x, maps["x"]) > 0.9 > 0.6 > trustworthiness(x, wrong)


def test_a_collapsed_embedding_is_one_point_and_disturbs_no_other():
    x = clouds(2)
    maps = aligned_umap({"x": x, "collapsed": np.full((120, 5), 3.0)})
    assert not maps["collapsed"].any() and np.isnan(maps.trustworthiness["collapsed"])
    assert np.array_equal(maps["x"], aligned_umap({"x": x})["x"])
    alone = aligned_umap({"collapsed": np.full((120, 5), 3.0)})
    fig = plot_maps(alone, held_out="x")
    assert fig._repr_png_() and "trust" in fig.axes[0].get_xlabel() and "–" in fig.axes[0].get_xlabel()
    assert [t.get_text() for t in fig.axes[0].texts] == ["all clips in one point"]


@pytest.mark.parametrize("n", [1, 2, 3, 14, 15, 16])
def test_few_clips_are_drawn_and_aligned(n):
    x = np.random.default_rng(0).normal(size=(n, 8))
    maps = aligned_umap({"x": x, "wide": np.hstack([x, x]), "thin": x[:, :1]})
    assert all(xy.shape == (n, 2) and np.isfinite(xy).all() for xy in maps.values())
    if n < 15: # more are laid out step by step, where pure noise has no place of its own
        assert np.allclose(maps["x"], maps["wide"], atol=1e-4)


def test_more_than_a_thousand_clips_are_drawn_by_seed(monkeypatch):
    from audiomaepp import maps

    x = np.tile(clouds(2), (9, 1))[:1050] + 0.5 * np.random.default_rng(5).normal(size=(1050, 16))
    monkeypatch.setattr(maps._settle, "__defaults__", (60,)) # the count of steps is not in question
    maps = aligned_umap({"x": x, "same": x.copy(), "stranger": np.random.default_rng(6).permutation(x)})
    assert np.array_equal(maps["x"], maps["same"]) and median_move(maps, "x", "stranger") > 0.1


def test_aligned_maps_share_one_frame_and_carry_their_numbers():
    maps = aligned_umap({"left": clouds(1), "right": clouds(3)})
    fig = plot_maps(maps, CLASSES, held_out="x", numbers={"left": {"kNN-10": 0.5}})
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in fig.axes}) == 1
    fig._repr_png_() # drawing must not move the frame
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in fig.axes}) == 1
    low, high = np.transpose([fig.axes[0].get_xlim(), fig.axes[0].get_ylim()])
    assert all((xy > low).all() and (xy < high).all() for xy in maps.values())
    below = [ax.get_xlabel().replace("\N{NO-BREAK SPACE}", " ") for ax in fig.axes]
    assert below[0].startswith("kNN-10 0.50") and all("trust 0." in line for line in below)


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (4, 1, 4), (5, 2, 3), (8, 2, 4), (9, 3, 3), (16, 4, 4)])
def test_many_settings_make_a_grid(n, rows, columns):
    xy = np.random.default_rng(0).normal(size=(6, 2))
    fig = plot_maps([(f"mask_ratio=0.{i}", xy) for i in range(n)], [0, 1] * 3, held_out="x")
    assert fig.axes[0].get_gridspec().get_geometry() == (rows, columns)
    assert sum(ax.get_visible() for ax in fig.axes) == n and len(fig.legends) == 1


def test_shift_draws_the_clips_that_changed_most():
    before = np.random.default_rng(0).normal(size=(20, 2))
    after, moved = before.copy(), np.zeros(20)
    after[[3, 7]] += 5
    moved[[1, 2, 7]] = 1, 3, 2
    for given, most, expected in ((None, 30, [3, 7]), (moved, 2, [2, 7]), (moved, 30, [2, 7, 1])):
        fig = plot_shift(before, after, [0, 1] * 10, held_out="x", moved=given, most=most)
        (lines,) = (c for c in fig.axes[0].collections if hasattr(c, "get_segments"))
        starts = {tuple(segment[0]) for segment in lines.get_segments()}
        assert starts == {tuple(before[i]) for i in expected}
        assert fig._repr_png_()
    with pytest.raises(ValueError, match="20, 19 and 20 rows"):
        plot_shift(before, after[1:], held_out="x", moved=moved)


def history(gain=0.0, contrastive=True, epochs=4):
    "The rows of a run that is scored at odd epochs."
    rows = []
    for e in range(1, epochs + 1):
        row = {"epoch": e, "step": 9 * e, "lr": 0.1 / e, "loss": 1 / e, "grad_norm": 1.0, "reconstruction": 1 / e}
        row |= {"contrastive": 2 / e} if contrastive else {}
        scores = {"heldout_reconstruction": 1.0, "heldout_uniformity": -1 - gain, "knn": 0.1 * e + gain}
        rows.append(row | {"uniformity": -e / 2} | (scores if e % 2 else {}))
    return rows


def titles(fig):
    return [ax.get_title() for ax in fig.axes if ax.get_visible()]


def test_histories_show_a_panel_for_each_measure_and_a_line_for_each_setting():
    fig = plot_histories({"neither": history(contrastive=False), "both": [history(0.1), history(0.3)]})
    assert [title.replace("\n", " ") for title in titles(fig)] == [
        "reconstruction error", "uniformity loss", "contrastive loss",
        "kNN-10 accuracy (held-out clips)", "uniformity (held-out clips)", "reconstruction error (held-out clips)",
    ]
    panel = {ax.get_title(): ax for ax in fig.axes}
    assert len(panel["contrastive loss"].lines) == 3 # two thin, one thick
    knn = panel["kNN-10 accuracy\n(held-out clips)"].lines
    thick = [line for line in knn if line.get_linewidth() > 1]
    assert [len(knn), len(thick)] == [4, 2] and len({line.get_color() for line in knn}) == 2
    np.testing.assert_allclose(thick[1].get_ydata(), [0.3, 0.5]) # the mean of two seeds
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["neither", "both"]
    assert fig._repr_png_()


def test_histories_take_the_columns_that_are_asked_for():
    runs = {"slow": history(), "fast": [{**row, "lr": 2 * row["lr"]} for row in history()]}
    assert "learning rate" in titles(plot_histories(runs)) # it differs
    asked = plot_histories(runs, ["loss", "knn"], axis="epoch")
    assert titles(asked) == ["total loss", "kNN-10 accuracy\n(held-out clips)"]
    for call, message in [
        (lambda: plot_histories(runs, ["kNN"]), "among lr, reconstruction, .*, got kNN"),
        (lambda: plot_histories({}), "runs must have numbers in 'step'"),
        (lambda: plot_histories({"a": []}), "runs must have numbers in 'step'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_seeds_of_different_length_are_averaged_where_all_have_values():
    fig = plot_histories({"a": [history(epochs=4), history(epochs=2)], "b": history(epochs=1)}, ["reconstruction"])
    (ax,) = (ax for ax in fig.axes if ax.get_visible())
    assert [len(line.get_xdata()) for line in ax.lines if line.get_linewidth() > 1] == [2, 1]


def test_alignment_refuses_what_cannot_be_aligned():
    x = clouds(1)
    for embeddings, message in [
        ({}, "same clips as rows, got no embeddings"),
        ({"a": x, "b": x[1:]}, "'a': 120, 'b': 119"),
        ({"a": x, "b": np.full((120, 2), np.nan)}, "embedding 'b': .*NaN or infinity in 120 of 120 rows"),
        ({"a": x[:, 0]}, r"embedding 'a': .*must have shape .*got \(120,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            aligned_umap(embeddings)
