"""What the pages say: the names in them are there, and their figures are those of the files beside them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
ELSEWHERE = {"ConfusionMatrixDisplay", "Pipeline", "GridSearchCV"}  # scikit-learn's


def cells(book, kind):
    "The sources of a notebook's cells of one kind."
    return ["".join(c["source"]) for c in json.loads(book.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.fixture(scope="module")
def code():
    return "\n".join(source for book in BOOKS for source in cells(book, "code"))


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_a_name_in_the_prose_is_in_the_code(book, code):
    quoted = re.findall(r"`([A-Za-z_][A-Za-z_\d.]*)(?:\(\))?`", "\n".join(cells(book, "markdown")))
    gone = {name for name in quoted if not all(part in code for part in name.split("."))}
    assert not gone - ELSEWHERE


# ---- figures


def scored(name):
    "The sets of a file that quality.py wrote."
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text("utf-8"))["data"]


QUALITY = scored("quality")
SCORED = QUALITY | scored("coswara")
TUTORIAL = ROOT / "nbs" / "tutorials" / "what_each_loss_does.ipynb"
PLACES = {
    "README": (ROOT / "README.md").read_text("utf-8"),
    "tutorial": "\n".join(cells(TUTORIAL, "markdown")),
    "quality.py": (ROOT / "benchmarks" / "quality.py").read_text("utf-8"),
}


def figures(data, row):
    "kNN-10 and linear probe as the pages write them."
    return " / ".join(f"{SCORED[data]['table'][row][score]:.2f}" for score in ("knn", "linear"))


def best_baseline(data):
    "The best baseline of each score, as the pages write it."
    rows = [row for name, row in SCORED[data]["table"].items() if name not in ("with labels", "without labels")]
    return " / ".join(f"{max(row[score] for row in rows):.2f}" for score in ("knn", "linear"))


def test_the_table_of_the_first_page_is_that_of_the_benchmark():
    """Every row of it, each baseline too; what is bold is the best baseline of each score."""
    lines, bold = PLACES["README"].splitlines(), {data: set() for data in QUALITY}
    (head,) = (i for i, line in enumerate(lines) if line.startswith("| | ESC-10"))
    assert re.findall(r"\| (ESC-10|FSDD|the built-in)", lines[head]) == ["ESC-10", "FSDD", "the built-in"]
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in lines[head + 2 : head + 11]]
    assert [row[0] for row in rows] == list(QUALITY["esc10"]["table"])
    for name, *shown in rows:
        for data, cell in zip(("esc10", "fsdd", "synthetic"), shown, strict=True):
            assert cell.replace("**", "") == figures(data, name)
            bold[data] |= {(i, score.strip("*")) for i, score in enumerate(cell.split(" / ")) if "*" in score}
    assert bold == {data: set(enumerate(best_baseline(data).split(" / "))) for data in QUALITY}


def test_the_set_that_chose_nothing_is_told_as_it_was_scored():
    text, best = " ".join(PLACES["README"].split()), best_baseline("coswara")
    assert f"gave {figures('coswara', 'with labels')} with labels and {figures('coswara', 'without labels')}" in text
    assert f"the untrained network, its best baseline, has {best}" in text
    assert best == figures("coswara", "untrained network, without labels")


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_tells_the_digits_scores_tells_who_chose_the_cut(place):
    """Every speaker judged trials that chose `top_db`: without this, the scores look as if nobody had."""
    text = " ".join(PLACES[place].split())
    assert "`top_db`" in text and "six speakers" in text
    assert "0.80 / 0.80 with labels and 0.54 / 0.62 without" in text
    assert not re.search("(nothing|none) (is|was|of them) chosen? by the held-out clips", text, re.I)


def lost():
    "(data, how it was trained, our figure, that of the best baseline) wherever a preset is not above it."
    return [(data, mode, ours, theirs) for data in QUALITY for mode in ("with labels", "without labels")
            for ours, theirs in zip(figures(data, mode).split(" / "), best_baseline(data).split(" / "), strict=True)
            if float(ours) <= float(theirs)]  # fmt: skip


@pytest.mark.parametrize("place", ["README", "tutorial"])
def test_no_place_hides_where_a_baseline_is_as_good(place):
    """Both figures stand in one sentence, and the sentence is there only while it is true."""
    text = " ".join(PLACES[place].split())
    for _, mode, ours, theirs in lost():
        assert re.search(rf"{ours}[^.|]*{theirs}|{theirs}[^.|]*{ours}", text), (mode, ours, theirs)
    assert bool(lost()) == bool(re.search("points? below", text))
    if re.search("[Ww]ith labels[*,]* the presets are above (it|every baseline) on all three sets", text):
        assert not [mode for _, mode, *_ in lost() if mode == "with labels"]


def test_what_the_tutorial_shows_of_the_files_beside_it_is_what_they_hold():
    import pandas as pd

    shown = [c["outputs"] for c in json.loads(TUTORIAL.read_text("utf-8"))["cells"]
             if c["cell_type"] == "code" and "benchmarks/" in "".join(c["source"])]  # fmt: skip
    texts = ["".join(out["text"] if "text" in out else out["data"]["text/plain"]) for outs in shown for out in outs]
    trials = pd.read_csv(ROOT / "benchmarks" / "trials.csv")
    assert any(f"{len(trials)} trials" in text for text in texts), "the plot of the trials is older than their table"
    numbers = re.findall(r"\d\.\d\d ± \d\.\d\d", "\n".join(texts))
    rows = [row for part in QUALITY.values() for row in part["table"].values()]
    want = [f"{row[k]:.2f} ± {row[k + '_sd_parts']:.2f}" for row in rows for k in ("knn", "linear")]
    assert numbers == want
