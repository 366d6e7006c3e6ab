"""The speed benchmark: its rows, ratios and files; a peer with other numbers is not timed. No time is asserted."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from audiomaepp.config import Config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import speed  # noqa: E402
import speed_peers  # noqa: E402
import speed_rows  # noqa: E402


@pytest.fixture(scope="module")
def small():
    "One block and four clips: the benchmark's own code, in seconds."
    with pytest.MonkeyPatch.context() as patch:
        sizes = dict(depth=1, decoder_depth=1, embed_dim=64, num_heads=2, decoder_embed_dim=64, decoder_num_heads=2)
        patch.setattr(speed_rows, "cfg_of", lambda size, batch=2, **changes: Config.preset(
            "official_tiny", **{**sizes, "batch_size": min(batch, 2), **changes}))  # fmt: skip
        yield patch


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    "Rows by name, and the folder of one run."
    out, only = tmp_path_factory.mktemp("speed"), "(train|embed) tiny|log-mel|growth of train with batch"
    speed.main(["--quick", "--rounds", "2", "--only", only, "--out", str(out), "--set", "mask_ratio=0.5",
                "--device", "cpu"])  # fmt: skip
    return {row["name"]: row for row in json.loads((out / "speed.json").read_text())["rows"]}, out


def test_every_row_that_was_asked_for_is_measured(run):
    rows, _ = run
    assert set(rows) == {f"{work} tiny {precision}" for work in ("train", "embed") for precision in
                         ("float32", "bf16")} | {"log-mel", "growth of train with batch"}  # fmt: skip
    parts = {"matrix", "ours", "ours, mask_ratio=0.5", "plain reference", "products"}
    assert parts == set(rows["train tiny bf16"]["rounds"])
    assert all(len(times) == 2 for row in rows.values() for times in row["rounds"].values())


def test_ratios_and_shares_follow_from_the_medians_of_the_rounds(run):
    for row in run[0].values():
        assert row["median"] == {name: statistics.median(times) for name, times in row["rounds"].items()}
        per_clip = {name: seconds / row["clips"][name] for name, seconds in row["median"].items()}
        first = next(name for name in per_clip if name != "matrix")
        for name, ratio in row["ratio"].items():
            assert ratio == pytest.approx(per_clip[name] / per_clip[first])
        if row["precision"]:
            rate = 2 * 2048**3 / row["median"]["matrix"]
            assert row["matrix_gflops"] == pytest.approx(rate / 1e9)
            for name, count in row["operations"].items():
                assert row["share"][name] == pytest.approx(count / rate / row["median"][name])


def block(tokens, width):
    "Operations of a forward pass of a block, by formula: two per multiplication and addition."
    ffn, attention = 2 * 4 * width**2 + 3 * width * int(8 * width / 3), 4 * width**2 + 2 * tokens * width
    return 2 * tokens * (ffn + attention)


def test_the_counted_operations_are_those_of_the_formula(run):
    encoder = 2 * 250 * 64 * 64 + block(251, 64)
    assert run[0]["embed tiny bf16"]["operations"]["ours"] == 2 * encoder
    forward = block(51, 64) + 2 * 51 * 64 * 64 + block(251, 64) + 2 * 251 * 64 * 64
    first = 2 * 50 * 64 * 64  # the patch embedding: no gradient of its input
    assert run[0]["train tiny float32"]["operations"]["ours"] == 2 * (3 * forward + 2 * first)


def test_peers_were_compared_before_they_were_timed(run):
    assert run[0]["train tiny bf16"]["equal"]["plain reference"] < speed_peers.TOLERANCE
    assert run[0]["log-mel"]["equal"]["torchaudio"] < speed_peers.TOLERANCE


@pytest.mark.parametrize("only", ["train tiny float32", "embed tiny float32"])
def test_a_peer_with_other_numbers_stops_the_benchmark(small, monkeypatch, only):
    right = speed_peers.PlainReference.linear
    monkeypatch.setattr(speed_peers.PlainReference, "linear", lambda self, name, x: right(self, name, 0 * x) if
                        name.endswith("ffn2.gate") else right(self, name, x))  # fmt: skip
    monkeypatch.setattr(speed, "interleaved", lambda *args: pytest.fail("was timed"))
    with pytest.raises(speed_peers.OtherNumbers, match="plain reference must give our numbers within 0.001, got"):
        speed.main(["--quick", "--only", only, "--device", "cpu"])


def test_a_round_runs_every_part_once_in_turn():
    order = []
    parts = {name: speed_rows.Part(lambda name=name: order.append(name), stages={}) for name in "abc"}
    speed.interleaved(parts, 3, 1.0, speed.arguments(["--device", "cpu"]))
    assert "".join(order) == "aabbcc" + 3 * "abc"  # two calls each before: they allocate


def test_the_table_says_which_bars_are_missed(run):
    figures = dict(share={"ours": 0.5}, ratio={"released": 1.25}, memory_mb={"ours": 6, "released": 10})
    row = dict(run[0]["train tiny bf16"], **figures)
    assert speed.bars_of(row) == [("share 0.50 (≥ 0.85)", False), ("vs released 1.25 (≥ 1)", True),
                                  ("memory released 0.60 (≤ 0.7)", True)]  # fmt: skip
    assert "MISSED share 0.50 (≥ 0.85)" in speed.table([row])


def test_on_a_gpu_the_compiled_step_is_compared():
    row = dict(name="train base bf16", device="cuda", share={"ours": 0.2, "ours, compiled": 0.5},
               median={"ours": 1.0, "ours, compiled": 0.5, "released": 1.2},
               ratio={"ours, compiled": 0.5, "released": 1.2})  # fmt: skip
    assert speed.bars_of(row) == [("share compiled 0.50 (≥ 0.45)", True), ("compiled vs released 2.40 (≥ 3)", False)]


def test_the_chart_is_a_picture_of_every_ratio(run):
    chart = (run[1] / "speed.svg").read_text()
    assert chart.lstrip().startswith("<?xml") and "time / ours" in chart and "train tiny bf16: plain reference" in chart


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_counts_what_was_freed_again():
    code = ("import speed, torch; before = speed.memory_now(); torch.ones(40, 2**20).sum(); "
            "print(speed.memory_now(peak=True) - before)")  # fmt: skip
    made = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    assert float(made.stdout) > 100  # in this process, memory that other tests have freed would be used again


def test_a_part_alone_reports_its_peak_memory_to_its_parent():
    args = speed.arguments(["--quick", "--device", "cpu"])
    row = next(row for row in speed_rows.all_rows(args, None) if row.name == "log-mel")
    memory = speed.memory_of(row, args)
    assert memory.keys() == {"ours", "torchaudio"} and all(0 < mb < 1000 for mb in memory.values())
