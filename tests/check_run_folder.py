"""Does a run folder hold what a run must leave behind?   python tests/check_run_folder.py runs/demo"""

import csv
import json
import sys
from pathlib import Path

from safetensors import safe_open

import audiomaepp

run = Path(sys.argv[1])
problems = []


def check(ok, problem):
    if not ok:
        problems.append(problem)


check("site-packages" in audiomaepp.__file__ or "--editable" in sys.argv, f"not the wheel: {audiomaepp.__file__}")
for name in ("config.json", "model.safetensors", "checkpoint.safetensors", "history.csv", "data.json", "results.csv"):
    check((run / name).is_file() and (run / name).stat().st_size > 0, f"{name} is missing or empty")
if not problems:
    audiomaepp.Config.load(run / "config.json")
    check(json.loads((run / "data.json").read_text(encoding="utf-8")), "data.json says nothing")
    with safe_open(run / "model.safetensors", "pt") as weights:
        check(len(list(weights.keys())) > 10, "model.safetensors holds hardly any tensors")
    for name in ("history.csv", "results.csv"):
        rows = list(csv.reader((run / name).open(newline="", encoding="utf-8")))
        check(len(rows) >= 2, f"{name} has no rows under its heading")
pictures = sorted((run / "pictures").glob("*.png"))
check(len(pictures) >= 3, f"{len(pictures)} pictures; a map, reconstructions and the losses were expected")
check(all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for p in pictures), "a picture is not a PNG")
if problems:
    sys.exit("The run folder is not complete:\n- " + "\n- ".join(problems))
print(f"{run}: complete, with {', '.join(p.name for p in pictures)}")
