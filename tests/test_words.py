"""What the pages say: the names in them are there, and their figures are those of the files beside them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
ELSEWHERE = {"Pipeline", "GridSearchCV"}  # scikit-learn's


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
