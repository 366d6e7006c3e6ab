"""What does not read as a story about `audiomaepp.plots`: what it imports, leaves behind, and refuses."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from audiomaepp.plots import (
    MapPanel,
    plot_confusion,
    plot_history,
    plot_map,
    plot_maps,
    plot_masks,
    plot_reconstruction,
    plot_spectrogram,
    save_html_map,
    umap_2d,
)

HEAVY = ("matplotlib", "umap", "plotly", "sklearn", "pandas")


def python(code):
    "Run code in an interpreter that has imported nothing yet."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_is_cheap():
    assert python(f"import sys, audiomaepp.plots; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


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
    with pytest.raises(ValueError, match="say which clips these are"):
        save_html_map(xy, {}, tmp_path / "map.html", held_out=" ")
    assert not list(tmp_path.iterdir())
    assert "held-out clips: fold 5" in plot_map(xy, held_out="fold 5")._suptitle.get_text()
    assert "training SAW" in plot_confusion(np.eye(2), ["a", "b"], held_out=None)._suptitle.get_text()


@pytest.mark.parametrize(
    "labels",
    [None, [0] * 20, [-1] * 20, ["a", "b"] * 10, [None, "b"] * 10, np.arange(20) / 7, [np.nan, 1.0] * 10,
     [True, False] * 10, torch.arange(20), np.arange(20) * 3],
    ids=["none", "one", "unlabelled", "words", "gaps", "scale", "whole floats", "truth", "tensor", "uneven"],
)
def test_any_labels_can_be_drawn(labels, tmp_path):
    xy = np.random.default_rng(0).normal(size=(20, 2))
    panels = [MapPanel("left", xy, {"kNN-10": 0.5}), ("right", torch.tensor(xy))]
    assert plot_maps(panels, labels, "t", "c", held_out="x", legend="heading")._repr_png_()
    if labels is not None:
        save_html_map(xy, {"label": labels}, tmp_path / "map.html", held_out="x", plotlyjs="cdn")


def test_legend_names_each_class_once_and_unlabelled_last():
    xy = np.random.default_rng(0).normal(size=(6, 2))
    fig = plot_maps([("a", xy), ("b", xy)], [0, 1, 2, 0, 1, -1], held_out="x", names=["dog", "rain", "sea"])
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == ["dog", "rain", "sea", "unlabelled"]
    assert len({tuple(ax.collections[1].get_facecolor()[0]) for ax in fig.axes}) == 1 # one colour everywhere


def test_embeddings_that_umap_cannot_place_are_still_drawn():
    for x in (np.ones((30, 4)), np.zeros((3, 1)), np.eye(1)):
        xy = umap_2d(x)
        assert xy.shape == (len(x), 2) and np.isfinite(xy).all()


def test_bad_arguments_are_named(tmp_path):
    xy = np.zeros((4, 2))
    cases = [
        (lambda: plot_maps([], held_out="x"), "no panels"),
        (lambda: plot_map(np.zeros((0, 2)), held_out="x"), r"shape \(0, 2\)"),
        (lambda: plot_map(np.full((4, 2), np.nan), held_out="x"), "NaN or infinity in 4 of 4 rows"),
        (lambda: plot_map(xy, [1, 2], held_out="x"), r"labels have shape \(2,\)"),
        (lambda: plot_masks(np.zeros(7), (2, 4)), "7 patches, a grid of 2 x 4 has 8"),
        (lambda: plot_spectrogram(np.zeros((2, 3, 4, 5))), r"spec has shape \(2, 3, 4, 5\)"),
        (lambda: plot_reconstruction(np.ones((8, 8)), np.ones(4), np.ones((4, 9)), (4, 4)), r"and \(4, 16\) fit"),
        (lambda: plot_history([]), "no curve to draw over 'step'; rows hold nothing"),
        (lambda: plot_confusion(np.eye(3), ["a"], held_out="x"), r"shape \(3, 3\) for 1 names"),
        (lambda: save_html_map(xy, {"name": ["a"]}, tmp_path / "m.html", held_out="x"), "'name' has 1 values"),
        (lambda: save_html_map(xy, {}, tmp_path / "m.html", held_out="x", colour="fold"), "no column 'fold'"),
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
    assert shown == ["total loss", "kNN-10 accuracy\n(held-out clips)", "heldout uniformity\n(held-out clips)"]


def test_pages_hold_no_foreign_markup(tmp_path):
    bad = "<img src=x onerror=alert(1)></script>"
    table, path = {bad: [bad, bad]}, tmp_path / "m.html"
    save_html_map(np.zeros((2, 2)), table, path, bad, held_out=bad, colour=bad, plotlyjs="cdn")
    assert "<img" not in path.read_text() and path.read_text().count("</script>") == path.read_text().count("<script")
