"""Speed beside peers: training steps, embedding, front ends, folders; each against the measured limit of the machine.

    make bench                                  a table; about half an hour on two idle cores
    make bench ARGS="--quick"                   a few minutes, small models only
    make bench ARGS="--only 'train tiny' --out runs/speed"

All figures are medians over rounds in one process. A round runs every part of a row once, in turn (the matrix product,
ours, each peer), so that other work on the machine slows all parts alike. The limit of a row is its counted operations
divided by the rate of a large square matrix product in the same precision; the share of the limit is that time divided
by the measured one. It can be above 1: products that fit into the cache are faster, in bf16 on a CPU several times.
"products" is the time of a step's own matrix products, run alone: what is left if all else were free. A peer must give
the same numbers as ours before it is timed.

Peers: the released AudioMAE++ (--peer-path FOLDER, a checkout of github.com/SarthakYadav/audiomae-plusplus-official;
needs timm, einops and rotary-embedding-torch), Hugging Face's ViTMAE (transformers 5) and timm where they are
installed, torchaudio, and a plain reference, the released mathematics written out in speed_peers.py.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from speed_peers import Released
from speed_rows import PRECISIONS, Part, all_rows, synchronize
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from audiomaepp.files import write_atomic
from audiomaepp.tables import text_table

ALONE = ("matrix", "products")  # parts that are limits, not peers


# ---- measuring


def matrix_part(precision, device):
    """A large square matrix product, and its operations."""
    n = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return Part(lambda: a @ b), 2 * n**3


class Products(TorchDispatchMode):
    """Notes the matrix products of a piece of work, to run them alone."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.shapes[tuple((x.shape, x.stride(), x.dtype, x.device) for x in args[-2:])] += 1
        return func(*args, **(kwargs or {}))

    def part(self, clips):
        """The products alone, on random numbers."""
        pairs = [([torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()
                   for shape, stride, dtype, device in pair], n) for pair, n in self.shapes.items()]  # fmt: skip
        return Part(lambda: [a @ b for (a, b), n in pairs for _ in range(n)], clips)


def counted(run):
    """The operations of a piece of work, and its matrix products."""
    with sdpa_kernel(SDPBackend.MATH), Products() as products, FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops(), products


def interleaved(parts, rounds, seconds, args):
    """{name: seconds of a call in each round}, and {name: seconds of its stages}; a round runs every part in turn."""
    loops, times, stages = {}, {name: [] for name in parts}, {name: [] for name in parts}

    def timed(part, calls):
        clock = time.perf_counter if part.outside or args.clock == "wall" else time.process_time
        start = clock()
        for _ in range(calls):
            part.run()
        synchronize(args.device)
        return (clock() - start) / calls

    for name, part in parts.items():
        took = timed(part, 1)  # the first call allocates
        took = timed(part, 1) if took < 2 else took
        loops[name] = 1 if part.stages is not None else max(1, round(seconds / took))
    for _ in range(rounds):
        for name, part in parts.items():
            times[name].append(timed(part, loops[name]))
            if part.stages is not None:
                stages[name].append(dict(part.stages))
    return times, stages


def memory_now(peak=False):
    """MB of this process (Linux); the peak since the last call with peak=False."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / (2**20 if sys.platform == "darwin" else 2**10)
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is used now
    name = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) / 1024


def child(args, folder):
    """In a process of its own: peak memory (MB, above what imports take) of one part of one row."""
    row = next(row for row in all_rows(args, folder) if row.name == args.child[0])
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = memory_now()
    part = row.parts[args.child[1]]()
    for _ in range(1 if "files" in args.child[1] else 2):  # in the second step, the optimizer has its state
        part.run()
    used = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else memory_now(peak=True) - before
    print(json.dumps(used))


def memory_of(row, args):
    """{part: MB}, each from a fresh process."""
    own, found = [a for a in args.argv if a != "--compile"], {}
    for name in (n for n in row.parts if "compiled" not in n):
        command = [sys.executable, __file__, *own, "--child", row.name, name]
        run = subprocess.run(command, text=True, capture_output=True)
        if run.returncode:
            raise RuntimeError(f"the process that measures the memory of {row.name}, {name} failed:\n{run.stderr}")
        found[name] = round(json.loads(run.stdout.splitlines()[-1]), 1)
    return found


def measure(row, args):
    """One row as plain data; raises `OtherNumbers` before anything is timed."""
    equal = row.check()
    parts, counts = {name: make() for name, make in row.parts.items()}, {}
    if row.precision:
        for name, part in list(parts.items()):
            if name == "ours" or "ours" not in parts or name.startswith("ours,") and "compiled" not in name:
                counts[name], products = counted(part.run)
                if name == "ours":
                    parts["products"] = products.part(part.clips)
        matrix, matrix_count = matrix_part(row.precision, args.device)
        parts = {"matrix": matrix, **parts}
    rounds = row.repeats or (3 if args.quick else 7)
    times, stages = interleaved(parts, min(rounds, args.rounds or rounds), 0.05 if args.quick else 0.2, args)
    median = {name: statistics.median(some) for name, some in times.items()}
    first = next(name for name in parts if name not in ALONE)
    clips = {name: part.clips for name, part in parts.items()}
    done = dict(name=row.name, device=args.device, precision=row.precision, unit=row.unit, clips=clips, rounds=times,
                median=median, equal=equal)
    done["spread"] = {name: (max(some) - min(some)) / median[name] for name, some in times.items()}
    done["ratio"] = {name: median[name] / clips[name] / (median[first] / clips[first]) for name in median
                     if name not in (first, "matrix")}  # fmt: skip
    if row.precision:
        rate = matrix_count / median["matrix"]
        done |= dict(matrix_gflops=rate / 1e9, operations=counts)
        done["share"] = {name: counts.get(name, counts.get("ours", 0)) / rate / median[name] for name in median
                         if name not in ALONE}  # fmt: skip
    if stages.get(first):
        totals = [dict(s, other=t - sum(s.values())) for s, t in zip(stages[first], times[first], strict=True)]
        done["stages"] = {k: statistics.median(s[k] / sum(s.values()) for s in totals) for k in totals[0]}
    if row.memory and not args.quick and not args.no_memory:
        done["memory_mb"] = memory_of(row, args)
    return done


# ---- the report


BARS = (  # row, figure, part, lowest (or, for memory, stages and growth, highest) value: what issue 12 asks for
    ("train (tiny|base)", "share", "ours", 0.85), ("train (tiny|base)", "ratio", "released", 1.0),
    ("train (tiny|base)", "memory", "released", 0.7), ("embed .*bf16", "share", "ours", 0.85),
    ("log-mel", "ratio", "torchaudio", 1.5), ("Kaldi", "ratio", "torchaudio, in a loop", 3.0),
    ("step of semantic", "stages", "front end, augmentation", 0.15), ("folder", "ratio", "model alone", 0.9),
    ("growth with files", "growth", "", 10.5),
)  # fmt: skip
BARS_GPU = (  # the same, in bf16 and compiled
    ("train base bf16", "share", "ours, compiled", 0.45), ("train (tiny|base) bf16", "compiled", "released", 3.0),
)  # fmt: skip


def bars_of(row):
    """[(text, whether it is reached)] of the bars that apply to a row."""
    names, rows = [n for n in row["median"] if n not in ALONE], []
    memory = row.get("memory_mb", {})
    figures = {"share": row.get("share", {}), "ratio": row["ratio"], "stages": row.get("stages", {}),
               "memory": {n: memory["ours"] / mb for n, mb in memory.items() if "ours" in memory},
               "growth": {"": row["median"][names[-1]] / row["median"][names[0]]},
               "compiled": {n: r / row["ratio"].get("ours, compiled", r) for n, r in row["ratio"].items()}}  # fmt: skip
    for pattern, figure, part, bar in BARS_GPU if row["device"] == "cuda" else BARS:
        if re.search(pattern, row["name"]) and (value := figures[figure].get(part)) is not None:
            least = figure in ("share", "ratio", "compiled")
            what = f"{figure} {part}".replace("ratio", "vs").replace("compiled rel", "compiled vs rel")
            what = what.replace("stages", "").replace("ours, ", "").replace("ours", "").strip()
            text = f"{what} {value:.2f} ({'≥' if least else '≤'} {bar:g})"
            rows.append((text, value >= bar if least else value <= bar))
    return rows


def table(rows):
    """The rows as text for a terminal."""
    cells = [["work", "part", "per second", "±", "time / ours", "share of limit", "MB", "asked for"]]
    for row in rows:
        bars = [("" if reached else "MISSED ") + text for text, reached in bars_of(row)]
        notes = bars + [f"{stage} {share:.0%}" for stage, share in row.get("stages", {}).items()]
        names = [n for n in row["median"] if n != "matrix"]
        for i, name in enumerate(names):
            rate = f"{row['clips'][name] / row['median'][name]:.4g} {row['unit']}s"
            share, mb = row.get("share", {}).get(name), row.get("memory_mb", {}).get(name)
            cells.append([row["name"] if i == 0 else "", name, rate, f"{row['spread'][name] / 2:.0%}",
                          f"{row['ratio'].get(name, 1):.2f}",
                          "" if share is None else f"{share:.2f}", "" if mb is None else f"{mb:.0f}",
                          notes[i] if i < len(notes) else ""])
        cells += [[""] * 7 + [note] for note in notes[len(names):]]
    return text_table("", cells)


def chart(rows, path):
    """Ratios as bars: the share of the limit, and the time of each peer divided by ours."""
    import matplotlib
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text

    shares = [(row["name"], row["share"]["ours"]) for row in rows if "ours" in row.get("share", {})]
    ratios = [(f"{row['name']}: {peer}", r) for row in rows if "ours" in row["median"] for peer, r in
              row["ratio"].items() if peer not in ALONE]  # fmt: skip
    panels = [(t, x) for t, x in (("share of the counted limit", shares), ("time / ours", ratios)) if x]
    heights = [len(x) + 1 for _, x in panels] or [1]
    figure, axes = plt.subplots(len(heights), 1, figsize=(8, 0.28 * sum(heights) + 1), squeeze=False,
                                height_ratios=heights, layout="constrained", facecolor="white")  # fmt: skip
    for axis, (title, bars) in zip(axes[:, 0], panels, strict=False):
        names, values = zip(*bars, strict=True)
        colors = ["#3b6ea5" if v >= 1 or title[0] == "s" else "#c9822b" for v in values]
        axis.bar_label(axis.barh(range(len(bars)), values, color=colors), fmt="%.2f", padding=3, fontsize=8)
        axis.set_yticks(range(len(bars)), names, fontsize=8)
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set(title=title, xlim=(0, 1.12 * max(1, *values)), ylim=(len(bars) - 0.4, -0.6))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def machine(args):
    """What the figures depend on."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu[1] if cpu else platform.processor()
    return dict(machine=platform.machine(), device=args.device, name=name, cores=os.cpu_count(), clock=args.clock,
                torch=torch.__version__, threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"))  # fmt: skip


def setting(text):
    """A setting of `Config` from NAME=VALUE."""
    name, _, value = text.partition("=")
    return name, json.loads(value) if re.fullmatch(r"[\d.e-]+|true|false", value) else value


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, fewer rounds, no peak memory")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name this regular expression finds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for speed.json and speed.svg")
    parser.add_argument("--peer-path", type=Path, metavar="FOLDER", help="checkout of the released AudioMAE++")
    parser.add_argument("--compile", action="store_true", help="torch.compile as a further part; minutes on a CPU")
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE",
                        help="settings of Config: a further part of the training rows")  # fmt: skip
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: a process for each part")
    parser.add_argument("--rounds", type=int, help="largest number of rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: time of the processor, for one thread on a machine with other work")  # fmt: skip
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv, args.set = argv, dict(args.set)
    if args.peer_path:
        Released.folder = args.peer_path.resolve()
    return args


def save(out, where, rows):
    """Write speed.json and the chart; after every row, so that an interrupted run leaves what it has."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "speed.json", json.dumps(dict(machine=where, rows=rows), indent=1).encode())
    chart(rows, out / "speed.svg")


def main(argv=None):
    args = arguments(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.child:
            return child(args, Path(folder))
        where = machine(args)
        print(", ".join(f"{k} {v}" for k, v in where.items()))
        rows = []
        for row in all_rows(args, Path(folder)):
            if re.search(args.only, row.name):
                rows.append(measure(row, args))
                print(f"  {row.name}: done", file=sys.stderr)
                if args.out:
                    save(args.out, where, rows)
    print(table(rows))
    for precision in PRECISIONS:
        rates = [row["matrix_gflops"] for row in rows if row["precision"] == precision]
        if rates:
            low, middle, high = min(rates), statistics.median(rates), max(rates)
            print(f"matrix rate, {precision}: {middle:.0f} GFLOP/s ({low:.0f} to {high:.0f} in different rows)")
    if args.out:
        print(f"wrote {args.out}/speed.json and speed.svg")


if __name__ == "__main__":
    main()
