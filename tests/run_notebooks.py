"""Run notebooks top to bottom in a real Jupyter kernel, as a reader would, leaving the slow cells out.

    python tests/run_notebooks.py [--limit 60] [nbs/00_config.ipynb ...]

Exits 1 when a cell fails or a notebook needs more than the limit: seconds of one core's work, which another process on
the machine does not change as it does the clock's.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.test import nb_test_cells

ROOT = Path(__file__).parents[1]


def run(path):
    """Run the notebook's cells in a new kernel; return what went wrong, if anything, and its seconds of work."""
    nb = nbformat.read(path, as_version=4)
    runs = {cell.idx_ for cell in nb_test_cells(path, skip_flags=["slow"])}
    beside = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(nb, timeout=600, kernel_name="python3", resources=beside)
    client.extra_arguments = ["--log-level=ERROR"]
    with client.setup_kernel():
        kernel = psutil.Process(client.km.provisioner.pid)
        for i, cell in enumerate(nb.cells):
            if i in runs:
                try:
                    client.execute_cell(cell, i)
                except CellExecutionError as error:
                    return f"cell {i} failed:\n{error}", 0.0
        work = kernel.cpu_times()
    return "", work.user + work.system


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, default=sorted((ROOT / "nbs").rglob("*.ipynb")))
    parser.add_argument("--limit", type=float, default=60, help="seconds of work a notebook may take")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other would count as work
    bad = 0
    for path in args.paths:
        start = time.perf_counter()
        trouble, work = run(path.resolve())
        took = time.perf_counter() - start
        if work > args.limit:
            trouble = f"over {args.limit:g} s of work"
        bad += bool(trouble)
        print(f"{path.name:28} {took:6.1f} s, {work:5.1f} s of work  {trouble}", flush=True)
    print(f"{len(args.paths) - bad} of {len(args.paths)} notebooks run in a kernel.")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
