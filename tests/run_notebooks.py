"""Run notebooks top to bottom in a real Jupyter kernel, as a reader would, leaving the slow cells out.

    python tests/run_notebooks.py [--limit 60] [nbs/00_config.ipynb ...]

Prints the seconds each took; exits 1 when a cell fails or a notebook needs more than the limit.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.test import nb_test_cells

ROOT = Path(__file__).parents[1]


def run(path):
    """Run the notebook's cells in a new kernel; return what went wrong, or an empty string."""
    nb = nbformat.read(path, as_version=4)
    runs = {cell.idx_ for cell in nb_test_cells(path, skip_flags=["slow"])}
    beside = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources=beside)
    client.extra_arguments = ["--log-level=ERROR"]
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if i in runs:
                try:
                    client.execute_cell(cell, i)
                except CellExecutionError as error:
                    return f"cell {i} failed:\n{error}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, default=sorted((ROOT / "nbs").rglob("*.ipynb")))
    parser.add_argument("--limit", type=float, default=60, help="seconds a notebook may take")
    args = parser.parse_args()
    bad = 0
    for path in args.paths:
        start = time.perf_counter()
        trouble = run(path.resolve())
        took = time.perf_counter() - start
        if not trouble and took > args.limit:
            trouble = f"over {args.limit:g} s"
        bad += bool(trouble)
        print(f"{path.name:28} {took:6.1f} s  {trouble}", flush=True)
    print(f"{len(args.paths) - bad} of {len(args.paths)} notebooks run in a kernel.")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
