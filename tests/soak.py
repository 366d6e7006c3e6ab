"""Break everything that can be broken, count what survives: kills, full disks, vanishing data, rivals, mutated files.

    python tests/soak.py            about 15 minutes on two cores
    python tests/soak.py --quick    about a minute

Every trial is a forked child that runs a command of `audiomaepp`. A trial is lost if the command that continues it does
not finish the work, if the work ends differently from the work that nobody disturbed, or if the last word is not one
line for a person. The exit status is 0 if nothing was lost.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="agg", CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1")

import soundfile  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from audiomaepp.cli import main  # noqa: E402

torch.set_num_threads(1)
TINY = """--embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32 --decoder-num-heads 2 --img-size 48 80
    --patch-size 16 16 --batch-size 8 --warmup-epochs 0 --eval-every 1 --precision fp32""".split()


# ---- one trial


@dataclass
class Ended:
    "How a child ended."

    status: int  # exit status; negative: the signal
    said: str  # what it printed
    seconds: float
    megabytes: float  # most memory above what the parent had

    @property
    def one_line(self) -> bool:
        "Whether the last word was one line for a person, not a traceback."
        return "Traceback" not in self.said


@contextlib.contextmanager
def _child(folder: Path):
    "Where a forked child works; it never returns to the parent's code."
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = io.TextIOWrapper(io.FileIO(1, "w"), "utf-8", write_through=True), sys.__stderr__
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), "utf-8", write_through=True)
        warnings.simplefilter("ignore")
        yield
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run(
    folder: Path,  # where the child's log goes
    work: Callable[[], None],
    disturb: Callable[[int], None] | None = None,  # gets the child's process id, in a thread of the parent
    limit: float = 120.0,  # seconds after which the child counts as hanging
) -> Ended:
    "Fork a child for some work."
    (folder / "log").unlink(missing_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        with _child(folder):
            work()
    if disturb:
        threading.Thread(target=disturb, args=(pid,), daemon=True).start()
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > limit:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its loader processes
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = (folder / "log").read_text(errors="replace") if (folder / "log").exists() else ""
    return Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - began, (usage.ru_maxrss - base) / 1024)


# ---- what is counted


@dataclass
class Tally:
    "A line of the table."

    name: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0
    megabytes: float = 0.0

    def add(self, problem: str, *ended: Ended):
        "Count a trial; an empty problem is one that survived."
        self.tried += 1
        if problem:
            self.lost.append(problem)
        for one in ended:
            self.seconds, self.megabytes = max(self.seconds, one.seconds), max(self.megabytes, one.megabytes)

    def __str__(self):
        survived = self.tried - len(self.lost)
        most = f"{self.seconds:9.1f} {self.megabytes:9.0f}"
        return f"{self.name:44} {self.tried:6} {survived:9} {len(self.lost):5} {most}"


HEAD = f"{'what':44} {'tried':>6} {'survived':>9} {'lost':>5} {'longest s':>9} {'most MB':>9}"


# ---- the commands that are disturbed


def sounds(folder: Path, n: int = 24, classes: int = 4) -> Path:
    "A folder of short sounds, in folders of classes."
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"class{i % classes}" / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(2 * np.pi * 200 * (1 + i % classes) * np.arange(8000) / 16000)
        soundfile.write(path, 0.3 * tone + rng.normal(0, 0.05, 8000), 16000)
    return folder


class Job:
    "A command, how it is continued, and whether it ended as it should."

    def __init__(self, name: str, begin: list[str], go_on: Callable[[Path], list[str]], result: Callable[[Path], dict]):
        self.name, self._begin, self._go_on, self.result = name, begin, go_on, result
        self.whole: dict = {}

    def begin(self, out: Path) -> list[str]:
        "Its command line."
        return [part.replace("OUT", str(out)) for part in self._begin]

    def go_on(self, out: Path) -> list[str]:
        "The command line that continues it."
        return [part.replace("OUT", str(out)) for part in self._go_on(out)] or self.begin(out)

    def problem(self, out: Path) -> str:
        "What is wrong with a finished work; empty if nothing."
        try:
            found = self.result(out)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        wrong = [k for k, v in self.whole.items() if k not in found or not np.array_equal(found[k], v, equal_nan=True)]
        return f"differs in {wrong[:3]}" if wrong else ""


def weights(*names: str) -> Callable[[Path], dict]:
    "All tensors of some files of a folder."
    return lambda out: {f"{n}:{k}": v for n in names for k, v in load_file(out / n).items()}


def vectors(out: Path) -> dict:
    "The embeddings of a Parquet file."
    import pandas as pd

    table = pd.read_parquet(out / "e.parquet")
    return {Path(path).name: vector for path, vector in zip(table["path"], table["embedding"], strict=True)}


def numbers(out: Path) -> dict:
    "The table of a comparison."
    import pandas as pd

    table = pd.read_csv(out / "table.csv", index_col=0)
    return {"table": table.drop(columns=[c for c in table if "seconds" in c]).select_dtypes("number").to_numpy()}


def jobs(base: Path) -> list[Job]:
    "What is disturbed; `base` holds the sounds and a trained model."
    data, model = str(base / "sounds"), str(base / "model")

    def resumed(out):
        begun = (out / "checkpoint.safetensors").exists()
        return ["train", "--resume", "--out", "OUT"] if begun else []

    train = ["train", "--data", data, "--out", "OUT", "--epochs", "3", *TINY]
    tuned = ["finetune", model, "--data", data, "--out", "OUT", "--epochs", "2", "--batch-size", "8"]
    lab = ["lab", "--data", data, "--out", "OUT", "--axis", "mask_ratio=0.5,0.75", "--epochs", "2", "--no-maps", *TINY]
    embed = ["embed", model, "--data", data, "--out", "OUT/e.parquet", "--workers", "1"]
    return [
        Job("train", train, resumed, weights("checkpoint.safetensors", "model.safetensors")),
        Job("embed", embed, lambda out: [], vectors),
        Job("finetune", tuned, lambda out: [], weights("model.safetensors", "head.safetensors")),
        Job("lab", lab, lambda out: [], numbers),
    ]


# ---- kills


def kill_at(number: int):
    "Kill this process right before its `number`-th change of the file system: between any two writes."
    count = 0

    def watch(event, args):
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            if isinstance(args[0], int) or str(args[0]).startswith(("/dev", "/proc")):
                return
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kills(job: Job, base: Path, points: range | list[int], tally: Tally):
    "Kill at each point in turn, continue, compare."
    for point in points:
        out = base / "trial"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        first = run(base, lambda: (kill_at(point), main(job.begin(out))))  # noqa: B023
        if first.status == 0:  # it has fewer points than that
            break
        if first.status != -signal.SIGKILL:
            tally.add(f"{job.name}: before point {point} it ended with {first.status}: {first.said[-400:]}", first)
            continue
        again = run(base, lambda: main(job.go_on(out)))  # noqa: B023
        complete = again.status == 0 or "that is complete" in again.said  # it was killed behind its last write
        wrong = job.problem(out) if complete else again.said[-400:]
        tally.add(f"{job.name}, killed at point {point}: {wrong}" if wrong else "", first, again)


def random_kills(job: Job, base: Path, trials: int, rng: random.Random, tally: Tally):
    "Kill at random times, again and again, until it comes to its end."
    for trial in range(trials):
        out, ended = base / "trial", []
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for _ in range(12):
            after = rng.uniform(0.1, 1.6)
            which = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])

            def disturb(pid, after=after, which=which):
                time.sleep(after)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, which)

            calm = len(ended) == 11
            ended.append(run(base, lambda: main(job.go_on(out)), None if calm else disturb))  # noqa: B023
            complete = ended[-1].status == 0 or "that is complete" in ended[-1].said
            if complete or "Traceback" in ended[-1].said:
                break
        wrong = job.problem(out) if complete else ended[-1].said[-400:]
        tally.add(f"{job.name}, trial {trial}, after {len(ended)} starts: {wrong}" if wrong else "", *ended)


# ---- disks


def limited(size: int) -> None:
    "No file of this process may grow beyond `size` bytes: what a full disk does to a write."
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disks(job: Job, base: Path, trials: int, rng: random.Random, tally: Tally):
    "A write fails at some size; the message names the file, and with room the work goes on."
    for trial in range(trials):
        out, size = base / "trial", int(2 ** rng.uniform(8, 19))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        first = run(base, lambda: (limited(size), main(job.begin(out))))  # noqa: B023
        fine = first.status == 0 or (first.one_line and "cannot be written" in first.said)
        problem = "" if fine else first.said[-400:]
        again = run(base, lambda: main(job.go_on(out))) if first.status else first  # noqa: B023
        wrong = problem or (again.said[-400:] if again.status else job.problem(out))
        tally.add(f"{job.name}, {size} bytes a file, trial {trial}: {wrong}" if wrong else "", first, again)


def small_disk(job: Job, base: Path, sizes: list[int], tally: Tally):
    "A file system of some kilobytes, where that may be mounted."
    for size in sizes:
        disk = base / "disk"
        disk.mkdir(exist_ok=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], capture_output=True)
        if made.returncode:
            return print("  (no tmpfs may be mounted here: small disks are left out)")
        try:
            first = run(base, lambda: main(job.begin(disk / "run")))  # noqa: B023
            fine = first.status == 0 or (first.one_line and "cannot be written" in first.said)
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            again = run(base, lambda: main(job.go_on(disk / "run"))) if first.status else first  # noqa: B023
            wrong = first.said[-400:] if not fine else again.said[-400:] if again.status else job.problem(disk / "run")
            tally.add(f"{job.name} on {size} kB: {wrong}" if wrong else "", first, again)
        finally:
            subprocess.run(["umount", disk], check=False)


# ---- data that vanish


def vanishing(base: Path, trials: int, rng: random.Random, tally: Tally):
    "Some or all files go while a set too large for memory is trained on: listed, or stopped with a list."
    import audiomaepp.data as loading

    usable = loading.usable

    for trial in range(trials):
        data, out = base / "vanishing", base / "trial"
        for folder in (data, out):
            shutil.rmtree(folder, ignore_errors=True)
        sounds(data, 40)
        files = sorted(data.rglob("*.wav"))
        gone = rng.sample(files, rng.choice([1, len(files) // 2, len(files)]))

        def work(data=data, out=out, gone=gone):
            def lose(*args, **options):
                found = usable(*args, **options | dict(keep=1))  # bytes: its headers are read, and nothing is decoded
                threading.Timer(0.5, lambda: [path.unlink() for path in gone]).start()
                return found

            loading.usable = lose
            os.environ["AUDIOMAEPP_DATA"] = str(base / "home")
            main(["train", "--data", str(data), "--out", str(out), "--epochs", "40", *TINY])

        ended = run(base, work)
        listed = (out / "skipped.csv").read_text() if (out / "skipped.csv").exists() else ""
        missed = [p.name for p in gone if str(p) not in listed]
        few = len(gone) == 1
        if few and ended.status:
            wrong = f"{len(gone)} of 40 went, and it stopped: {ended.said[-300:]}"
        elif not few and (not ended.status or "cannot be read any more" not in ended.said):
            wrong = f"{len(gone)} of 40 went, and it ended with {ended.status}: {ended.said[-300:]}"
        else:
            wrong = "nothing in skipped.csv" if len(missed) == len(gone) and ended.status else ""
        tally.add(f"vanishing data, trial {trial}: {wrong}" if wrong else "", ended)


# ---- rivals


def rivals(job: Job, base: Path, trials: int, tally: Tally):
    "Two processes on one output: one is refused in a line, the other's work is whole."
    for trial in range(trials):
        out = base / "trial"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        ended = [None, None]
        logs = [base / f"log{i}" for i in (0, 1)]
        for log in logs:
            log.mkdir(exist_ok=True)

        def one(i, out=out, ended=ended, logs=logs):
            ended[i] = run(logs[i], lambda: main(job.begin(out)))

        threads = [threading.Thread(target=one, args=(i,)) for i in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        fine = [e for e in ended if e.status == 0]
        words = ("is being written by", "already holds a run")
        refused = [e for e in ended if e.status and e.one_line and any(word in e.said for word in words)]
        good = fine and len(fine) + len(refused) == 2
        wrong = job.problem(out) if good else "\n".join(e.said[-300:] for e in ended)
        tally.add(f"{job.name} twice, trial {trial}: {wrong}" if wrong else "", *ended)


# ---- other numbers of processes


def other_worlds(base: Path, pairs: list[tuple[int, int]], tally: Tally):
    "A run that began on some processes goes on with others, or is refused with the numbers that can."
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}

    def launch(n, *args):
        began = time.monotonic()
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), "-m"]
        line = [*program, "audiomaepp", *args] if n > 1 else [sys.executable, "-m", "audiomaepp", *args]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
        return Ended(done.returncode, done.stdout + done.stderr, time.monotonic() - began, 0.0)

    for first, then in pairs:
        out = base / "trial"
        shutil.rmtree(out, ignore_errors=True)
        launch(first, "train", "--data", "synthetic", "--synthetic-clips", "4", "--out", str(out), *TINY,
               "--epochs", "2")
        again = launch(then, "train", "--resume", "--out", str(out), "--epochs", "4")
        from audiomaepp.checkpoints import read_progress

        progress = read_progress(out / "checkpoint.safetensors")
        steps = progress["rows"][1]["step"]
        if again.status:
            good = "cannot share equally; resume it on" in again.said and progress["step"] == steps
        else:
            rates = [row["lr"] for row in progress["rows"]]
            good = progress["step"] == 2 * steps and progress["world"] == first and max(rates[2:]) <= max(rates)
        wrong = f"{first} → {then}: {progress['step']} steps of {2 * steps}: {again.said[-400:]}"
        tally.add("" if good else wrong, again)


# ---- mutated files


def fuzz(name: str, check: Callable[[int, Path], None], seeds: range, base: Path, tally: Tally, each: int = 50):
    "Seeds in children of `each`, so that a crash of one is counted and the others go on."
    for first in range(seeds.start, seeds.stop, each):
        group, folder = range(first, min(first + each, seeds.stop)), base / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        def work(group=group, folder=folder):
            for seed in group:
                began = time.monotonic()
                try:
                    check(seed, folder)
                    print("ok", seed, round(time.monotonic() - began, 3))
                except Exception as error:
                    print("LOST", seed, f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " "))

        ended = run(base, work, limit=300)
        lines = [line.split(" ", 2) for line in ended.said.splitlines() if line.startswith(("ok ", "LOST "))]
        for word, seed, rest in lines:
            tally.add("" if word == "ok" else f"{name}, seed {seed}: {rest}")
            tally.seconds = max(tally.seconds, float(rest) if word == "ok" else 0.0)
        tally.megabytes = max(tally.megabytes, ended.megabytes)
        for seed in list(group)[len(lines):][:1]:
            tally.add(f"{name}, seed {seed}: the process ended with {ended.status}: {ended.said[-200:]}")


# ---- all of it


def soak(base: Path, quick: bool, seed: int) -> list[Tally]:
    "Every kind of trouble; a line of the table each."
    rng, table = random.Random(seed), []

    def line(name: str) -> Tally:
        table.append(Tally(name))
        return table[-1]

    def told(tally: Tally):
        print(tally, flush=True)
        for problem in tally.lost[:5]:
            print("   LOST", problem.replace("\n", "\n        "), flush=True)

    sounds(base / "sounds")
    places = ["--data", str(base / "sounds"), "--out", str(base / "model")]
    made = run(base, lambda: main(["train", *places, "--epochs", "1", *TINY]))
    assert made.status == 0, made.said
    todo = jobs(base)
    for job in todo:
        out = base / f"whole-{job.name}"
        out.mkdir()
        ended = run(base, lambda: main(job.begin(out)))  # noqa: B023
        assert ended.status == 0, (job.name, ended.said)
        job.whole = job.result(out)

    print(HEAD, flush=True)
    for job in todo:
        every = {"train": 1, "embed": 1, "finetune": 4, "lab": 10}[job.name]
        points = sorted(rng.sample(range(1, 40), 3)) if quick else range(1, 400, every)
        kills(job, base, points, tally := line(f"{job.name}: killed between two writes"))
        told(tally)
        random_kills(job, base, 1 if quick else 5, rng, tally := line(f"{job.name}: killed at random times"))
        told(tally)
        full_disks(job, base, 1 if quick else 10, rng, tally := line(f"{job.name}: no room for a file"))
        told(tally)
    sizes = [800] if quick else [60, 300, 800, 1100, 1400, 1800, 2500]
    small_disk(todo[0], base, sizes, tally := line("train: a small disk"))
    told(tally)
    vanishing(base, 1 if quick else 8, rng, tally := line("train: data vanish"))
    told(tally)
    for job in todo[:2]:
        rivals(job, base, 1 if quick else 5, tally := line(f"{job.name}: two on one output"))
        told(tally)
    pairs = [(2, 1)] if quick else [(2, 1), (1, 2), (2, 3), (1, 3)]
    other_worlds(base, pairs, tally := line("train: resumed on another number of processes"))
    told(tally)
    import fuzz_artefacts
    import fuzz_audio

    def audio(seed: int, folder: Path):
        fuzz_audio.check(fuzz_audio.mutated(seed, folder))

    def artefact(seed: int, folder: Path):
        name, _ = fuzz_artefacts.mutate(seed, whole.at, whole.names)
        fuzz_artefacts.check(whole.at, name)
        whole.restore()

    fuzz("audio", audio, range(100 if quick else 2000), base, tally := line("audio files, mutated"))
    told(tally)
    whole = fuzz_artefacts.Folder(base / "artefacts")
    fuzz("artefact", artefact, range(50 if quick else 1000), base, tally := line("artefacts, mutated"))
    told(tally)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        table = soak(Path(place), args.quick, args.seed)
    lost = sum(len(tally.lost) for tally in table)
    tried = sum(tally.tried for tally in table)
    print(f"\n{tried} tried, {lost} lost, {time.monotonic() - began:.0f} s")
    sys.exit(lost > 0)
