"""Notebooks as tests: a notebook is a file, each code cell a test; one shell per notebook runs its cells in order."""

import os
import re
import sys
from pathlib import Path
from traceback import TracebackException

import pytest

os.environ.update(MPLBACKEND="agg", TQDM_DISABLE="1", IN_TEST="1")  # IN_TEST: nbdev_export() in a cell does nothing
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count())))  # small models gain nothing from more
if (beside := Path(__file__).resolve().parent.parent / "shared/data").is_dir():  # recordings beside the project
    os.environ.setdefault("AUDIOMAEPP_DATA", str(beside))


def pytest_addoption(parser):
    default = os.environ.get("AUDIOMAEPP_SLOW", "0") not in ("", "0")
    parser.addoption("--slow", action="store_true", default=default, help="run the slow cells and tests too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def pytest_collect_file(file_path, parent):
    return Notebook.from_parent(parent, path=file_path) if file_path.suffix == ".ipynb" else None


class Notebook(pytest.File):
    def collect(self):
        from fastcore.nbio import read_nb

        self.cells = []
        for cell in read_nb(self.path).cells:
            code = [line.strip() for line in cell.source.splitlines() if re.match(r"\s*[^#\s]", line)]
            if cell.cell_type == "code" and code:
                item = Cell.from_parent(self, name=f"cell {cell.idx_} ({code[0][:50]})", cell=cell)
                if "slow" in cell.directives:
                    item.add_marker("slow")
                if cell.directives.get("eval", "").lower() == "false":
                    item.add_marker(pytest.mark.skip(reason="eval: false"))
                if (needs := cell.directives.get("needs")) and not self._has(needs):
                    item.add_marker(pytest.mark.skip(reason=f"needs {needs}, which is not there"))
                self.cells.append(item)
        return self.cells

    def _has(self, needs):
        "Return whether a file beside the notebook, or a public data set, is there."
        places = [self.path.parent, *filter(None, [os.environ.get("AUDIOMAEPP_DATA")])]
        return any((Path(place) / needs).exists() for place in places)

    def setup(self):
        from execnb.shell import CaptureShell

        self.failed, self.waiting = None, [c for c in self.cells if not c.get_closest_marker("skip")]
        self.cwd, self.main = os.getcwd(), sys.modules["__main__"]
        os.chdir(self.path.parent)
        self.shell = CaptureShell(mpl_format=None)

    def teardown(self):
        self.shell.close()
        sys.modules["__main__"] = self.main  # a shell puts its own there
        os.chdir(self.cwd)


class Cell(pytest.Item):
    def __init__(self, *, cell, **kwargs):
        super().__init__(**kwargs)
        self.source, self.idx = cell.source, cell.idx_

    def runtest(self):
        book = self.parent
        while self in book.waiting:  # with -k or --lf, the cells before this one run first
            if book.failed:
                pytest.skip(f"an earlier cell failed: {book.failed.name}")
            book.waiting.pop(0).run(book)

    def run(self, book):
        for out in book.shell.run(self.source):
            if out["output_type"] == "stream":
                print("".join(out["text"]), end="")
        if "matplotlib.pyplot" in sys.modules:  # as the inline backend does after each cell
            sys.modules["matplotlib.pyplot"].close("all")
        if exc := book.shell.exc:  # set by run(); run_cell() would leave it None
            book.failed = self if isinstance(exc, Exception) else None  # pytest.skip() in a cell is no failure
            raise exc

    def repr_failure(self, excinfo):
        if not (cell := self.parent.failed):
            return super().repr_failure(excinfo)
        report = TracebackException.from_exception(excinfo.value)
        inner = [n for n, frame in enumerate(report.stack) if frame.filename.startswith("<ipython-input")]
        del report.stack[: inner[0] if inner else None]  # pytest's and IPython's own frames
        at = report.stack[0].lineno if inner else int(getattr(excinfo.value, "lineno", None) or 0)
        source = [f"{'>' if n == at else ' '} {n:3} {line}" for n, line in enumerate(cell.source.splitlines(), 1)]
        return "\n".join([*source, "", *"".join(report.format()).splitlines()])

    def reportinfo(self):
        return self.path, 0, self.name
