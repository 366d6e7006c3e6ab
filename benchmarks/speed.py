"""Clips per second and their ratios: front end, training step (with and without the extra losses), embedding.

    make bench            python benchmarks/speed.py [--presets nano tiny] [--batch 32] [--device cpu] [--seconds 3]
"""

import argparse
import platform

import torch
from torch.utils.benchmark import Timer

from audiomaepp import AudioMAEPlusPlus, Config
from audiomaepp.features import build_frontend
from audiomaepp.model import attend


def clips_per_second(work, batch, seconds):
    """Median over repeated runs of `work`, which handles `batch` clips."""
    work()  # the first call allocates
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return batch / timer.blocked_autorange(min_run_time=seconds).median


def measure(preset, batch, device, seconds):
    """{what: clips per second} of one preset."""
    cfg = Config.preset(preset)
    wav = 0.1 * torch.randn(batch, cfg.clip_samples, device=device)
    labels = torch.arange(batch, device=device) // 2
    frontend = build_frontend(cfg).to(device)
    spec = frontend(wav)
    rows = {"front end": clips_per_second(lambda: frontend(wav), batch, seconds)}
    for what, on in (("train, plain", False), ("train, both losses", True)):
        model = AudioMAEPlusPlus(cfg.replace(use_contrastive_loss=on, use_uniformity_loss=on)).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters())

        def step(model=model, optimizer=optimizer):
            model(spec, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        rows[what] = clips_per_second(step, batch, seconds)
    model.eval()
    with torch.inference_mode():
        rows["embed"] = clips_per_second(lambda: model.get_embedding(spec), batch, seconds)
    return rows


def attention_ratio(batch, tokens=78, heads=4, width=32):
    """How many times as long PyTorch's fused attention takes as ours, forward and backward, in bf16 on a CPU."""
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    seconds = []
    for way in (torch.nn.functional.scaled_dot_product_attention, attend):
        timer = Timer("way(q, k, v).sum().backward()", globals=dict(way=way, q=q, k=k, v=v),
                      num_threads=torch.get_num_threads())
        seconds.append(timer.blocked_autorange(min_run_time=2).median)
    return seconds[0] / seconds[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["nano", "tiny"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3, help="time each measurement takes at least")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {platform.machine()}, {args.device} ({name}), batch {args.batch}")
    print("clips per second:")
    for preset in args.presets:
        rows = measure(preset, args.batch, args.device, args.seconds)
        print(f"{preset:8}" + "".join(f"  {what} {rate:8.1f}" for what, rate in rows.items()))
        plain = rows["train, plain"]
        print("  of plain training's speed: " + ", ".join(
            f"{what} {rate / plain:.2f}" for what, rate in rows.items() if what != "train, plain"))
    if args.device == "cpu":
        print(f"fused attention takes {attention_ratio(args.batch):.1f} times as long as ours (bf16, 78 tokens)")


if __name__ == "__main__":
    main()
