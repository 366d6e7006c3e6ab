"""The notebook collector of conftest.py: what is red must look red."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
DIRECTIVES = ["#| export\nx = 1", "#| default_exp it", "# words", "#| eval: false\n1/0", "#| slow\nx = 2"]
DIRECTIVES += ["assert x == 1"]
NEEDS = ["x = 1", "#| slow\n#| needs: ../recordings\nx = 2", "#| needs: .\nx = 3", "assert x == 3"]
BOOKS = {
    "red": ["x = 1", "def half(v):\n    return v / 0", "y = 2\nhalf(x)", "assert y == 2", "z = 1"],
    "assertion": ["x = 1", "assert 1 == 2"],
    "syntax": ["x = 1", "x = ("],
    "magic": ["x = 1", "%no_such_magic"],
    "coroutine": ["x = 1", "await nothing()"],
    "exit": ["x = 1", "raise SystemExit(1)"],
    "directives": DIRECTIVES,
    "needs": NEEDS,
    "shell": [
        "from pathlib import Path\nhere = Path.cwd()",
        "assert (here / 'shell.ipynb').exists()",
        "import matplotlib, os\nassert matplotlib.get_backend().lower() == 'agg' and os.environ['TQDM_DISABLE']",
        "import asyncio\nawait asyncio.sleep(0)\nprint('out of a cell')",
        "import pytest\npytest.skip('not here')",
        "assert here",
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run pytest in a process of its own; return its output and {notebook: {outcome: number of cells}}."""
    here = tmp_path_factory.mktemp("books")
    shutil.copy(ROOT / "conftest.py", here)
    (here / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    for name, cells in BOOKS.items():
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(nb, here / f"{name}.ipynb")

    def _run(*args, **env):
        env = {k: v for k, v in os.environ.items() if k != "AUDIOMAEPP_SLOW" and not k.startswith("PYTEST")} | env
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rA", *args]
        out = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=300).stdout
        counts = {}
        for book, outcome in re.findall(r"^(\w+)\.ipynb::cell .* (PASSED|FAILED|SKIPPED|ERROR)", out, re.M):
            counts.setdefault(book, {}).setdefault(outcome, 0)
            counts[book][outcome] += 1
        return out, counts

    return _run


@pytest.fixture(scope="module")
def result(run):
    return run()


def test_a_failing_cell_is_red_and_what_follows_is_skipped(result):
    out, counts = result
    assert counts["red"] == {"PASSED": 2, "FAILED": 1, "SKIPPED": 2}
    assert "FAILED red.ipynb::cell 2 (y = 2)" in out
    assert ">   2 half(x)" in out and "return v / 0" in out and "ZeroDivisionError" in out
    assert "interactiveshell.py" not in out.split("cell 2 (y = 2)")[2].split("____")[0]
    assert "an earlier cell failed: cell 2 (y = 2)" in out


@pytest.mark.parametrize("book", ["assertion", "syntax", "magic", "coroutine", "exit"])
def test_every_kind_of_failure_counts(result, book):
    assert result[1][book] == {"PASSED": 1, "FAILED": 1}


def test_cells_share_a_shell_that_stands_beside_the_notebook(result):
    out, counts = result
    assert counts["shell"] == {"PASSED": 5, "SKIPPED": 1}
    assert "out of a cell" in out and "not here" in out


def test_directives(run, result):
    out, counts = result
    assert counts["directives"] == {"PASSED": 2, "SKIPPED": 2}
    assert "eval: false" in out and "slow: runs with --slow" in out
    slow = {"directives": {"PASSED": 2, "SKIPPED": 1, "FAILED": 1}}  # the slow cell ran: x is 2
    assert run("--slow", "directives.ipynb")[1] == slow
    assert run("directives.ipynb", AUDIOMAEPP_SLOW="1")[1] == slow


def test_a_cell_that_needs_files_beside_the_clone_says_so_where_they_are_not(run):
    out, counts = run("--slow", "needs.ipynb")
    assert counts["needs"] == {"PASSED": 3, "SKIPPED": 1} and "needs ../recordings, which is not there" in out


def test_a_cell_chosen_alone_brings_the_cells_before_it(run):
    out, counts = run("-k", "assert")
    assert counts["directives"] == {"PASSED": 1}  # `assert x == 1` needs the first cell
    assert counts["red"] == {"FAILED": 1} and "> 2 half(x)" in re.sub(" +", " ", out)
