"""The site shows the whole book: every exported cell in its place. A small project is built with the real builder."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from fastcore.nbio import mk_cell, new_nb, write_nb

ROOT = Path(__file__).parents[1]
HELPER = '''#| exporti
def halve(
    x: float, # number to halve
) -> float: # half of it
    "Return half of a number."
    return x / 2'''
PUBLIC = '''#| export
def quarter(
    x: float, # number to quarter
) -> float: # a fourth of it
    "Return a fourth of a number."
    return halve(halve(x))'''


def build(folder, *cells):
    "Build the site of a project with one chapter; return the finished process and the chapter's HTML."
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "nbs").mkdir()
    (folder / "small").mkdir()
    (folder / "small/__init__.py").write_text('__version__ = "0.0.1"\n')
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "small"\nversion = "0.0.1"\n[project.urls]\nRepository = "https://github.com/a/small"\n'
        '[tool.nbdev]\nlib_path = "small"\n'
    )
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (folder / name).write_text(f"# {name}\n")
    home = [mk_cell(text, "markdown") for text in ("# small\n\n> A small book", "See [`halve`](numbers.html#halve).")]
    write_nb(new_nb(home), folder / "nbs/index.ipynb")
    head = [mk_cell("# Numbers\n\n> Parts of numbers", "markdown"), mk_cell("#| default_exp numbers")]
    write_nb(new_nb([*head, *cells]), folder / "nbs/00_numbers.ipynb")
    env = {**os.environ, "PYTHONPATH": str(folder)}
    env.pop("IN_TEST", None)
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    for command in (["-c", export], ["docs/build.py", "site"]):
        built = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    html = folder / "_site/numbers.html"
    return built, html.read_text(encoding="utf-8") if html.exists() else ""


class Shown(HTMLParser):
    "The visible text of a page, and that of its closed folds."

    def __init__(self, html):
        super().__init__()
        self.open, self.closed, self.folds, self.summary = [], [], 0, False
        self.feed(html[html.index("<article") : html.index("</article>")])

    def handle_starttag(self, tag, attrs):
        self.folds += tag == "details" and "open" not in dict(attrs)
        self.summary |= tag == "summary"

    def handle_endtag(self, tag):
        self.folds -= tag == "details"
        self.summary &= tag != "summary"

    def handle_data(self, data):
        (self.closed if self.folds and not self.summary else self.open).append(data)


def test_every_exported_cell_can_be_read_where_it_stands(tmp_path):
    built, html = build(
        tmp_path, mk_cell("First helpers.", "markdown"), mk_cell(HELPER), mk_cell("Then the rest.", "markdown"),
        mk_cell("#| export\nimport math"), mk_cell(PUBLIC), mk_cell("quarter(4)"), mk_cell("#| export\n_LIMIT = 3"),
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    page = Shown(html)
    seen, folded = "".join(page.open), "".join(page.closed)
    assert "halve: Return half of a number." in seen, "the fold says what is in it"
    assert "return x / 2" in folded and "return halve(halve(x))" in folded and "_LIMIT = 3" in folded
    assert "return x / 2" not in seen
    order = ["First helpers.", 'id="halve"', "Then the rest.", 'id="quarter"', 'id="_limit"']
    assert order == sorted(order, key=html.index)
    source = (tmp_path / "small/numbers.py").read_text().splitlines()
    line = int(re.search(r'href="https://github.com/a/small/blob/main/small/numbers.py#L(\d+)"', html)[1])
    assert source[line - 1].startswith("def halve("), "the source link points to the definition"
    home = (tmp_path / "_site/index.html").read_text()
    assert 'href="numbers.html#halve"' in home, "a link to a helper opens its fold"
