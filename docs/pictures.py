"""Make the maps that are live on the site: `python docs/pictures.py RUN COMPARISON`.

RUN is the folder of a demo (its built-in sounds may be published), COMPARISON that of the tutorial about ESC-10 (whose
recordings may not).
"""

import json
import sys
from pathlib import Path

from audiomaepp.explorer import make_previews
from audiomaepp.lab import Comparison
from audiomaepp.run import Run

IMAGES = Path(__file__).resolve().parent.parent / "nbs/images"
QUIET = "The recordings are not part of this page."


def write(name, payload):
    "Write what a map shows; the build of the site makes a page of it."
    path = IMAGES / f"{name}.json"
    path.write_text(json.dumps(payload, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def demo(folder):
    "Write the map of a demo with short previews."
    run = Run(folder)
    sounds = make_previews(run.data.test, len(run.data.test), megabytes=0.35)
    write("demo_map", run.map(quiet=True).payload | {"previews": sounds.files, "sound": sounds.note})


def esc10(folder):
    "Write the map of a comparison without its sounds."
    comparison = Comparison.load(folder)
    rows = [name for name in comparison.table.index if " · " not in name or name.endswith(" · mean")]
    explorer = comparison.map(settings=[name for name in rows if name != "chance"])
    write("esc10_map", explorer.payload | {"previews": None, "sound": QUIET, "links": None})


if __name__ == "__main__":
    demo(sys.argv[1])
    esc10(sys.argv[2])
