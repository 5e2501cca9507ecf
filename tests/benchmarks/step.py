"""What one training step costs, ours and others', on the same model and pairs: `python -m tests.benchmarks.step`."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}

import torch

from axolotl_mopo.logprobs.trees import pack

from .contestants import STEPS, cache_seconds
from .measuring import Measurement, gemm_rate, measure
from .models import SHAPES, build
from .pairs import KINDS, draw_pairs, typical_pair


def main() -> None:
    """Measure and print."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = build(options.shape, dtype, options.device, options.attention, options.lora, options.checkpointing)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    dimensions = options.dimensions if options.method == "amopo" else 1
    if options.pairs == "typical":
        pairs = [typical_pair(dimensions, vocabulary)] * options.micro_batch
    else:
        pairs = draw_pairs(options.pairs, options.micro_batch, dimensions, vocabulary)

    contestants = [STEPS[name](model, pairs, options.method, options.device) for name in options.steps]
    measurements = measure(model, contestants, options.rounds, options.device)
    report = _report(options, measurements, _floor_seconds(model, pairs, options, dtype), pairs)
    if options.method == "modpo":
        report["cache_seconds"], report["naive_forward_seconds"] = cache_seconds(model, pairs, options.device)
    _print(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["amopo", "modpo"], default="amopo")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="the last is the measure")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-34m", help="of the model, with random weights")
    parser.add_argument("--pairs", choices=["typical", *KINDS], default="typical", help="kind of data")
    parser.add_argument("--micro-batch", type=int, default=1, help="pairs")
    parser.add_argument("--dimensions", type=int, default=4, help="AMoPO's prompts of a pair")
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of adapters on all linear layers; 0 trains all weights"
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; all where 0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    return parser.parse_args()


def _floor_seconds(model: Any, pairs: list, options: argparse.Namespace, dtype: torch.dtype) -> float:
    """The matrix products that no step can do without, at this machine's rate: forward and twice that backward.

    Each distinct token once through the body, each distinct predicting position once through the head. Attention's own
    products are left out. Frozen weights need one backward product, not two.
    """
    shape = SHAPES[options.shape]
    batch = pack(pairs)
    head = shape["vocab_size"] * shape["hidden_size"]
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "lora_" not in name)
    body = weights - head * (1 if shape.get("tie_word_embeddings") else 2)
    passes = 2 if options.lora else 3
    operations = 2 * passes * (body * batch["input_ids"].numel() + head * len(batch["logits_to_keep"]))
    return operations / gemm_rate(shape["hidden_size"], shape["intermediate_size"], dtype, options.device)


def _report(options: argparse.Namespace, measurements: list[Measurement], floor: float, pairs: list) -> dict[str, Any]:
    measure = measurements[-1]
    useful = pack(pairs)["input_ids"].numel()
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": f"{device}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "useful_tokens": useful,
        "floor_seconds": floor,
        "steps": [
            {
                "name": m.name,
                "seconds": m.seconds,
                "median_seconds": m.median,
                "times_last": m.median / measure.median,
                "peak_mib": m.peak_bytes / 2**20,
                "memory_times_last": m.peak_bytes / measure.peak_bytes,
                "useful_token_share": useful / m.tokens,
                "times_floor": m.median / floor,
            }
            for m in measurements
        ],
    }


def _print(report: dict[str, Any]) -> None:
    print(f"{report['options']['method']}, {report['options']['shape']}, {report['machine']}")
    print(f"{report['useful_tokens']:,} distinct tokens; floor {report['floor_seconds']:.3f} s")
    print(f"{'':18}{'seconds':>9}{'x last':>8}{'MiB':>9}{'x last':>8}{'useful':>8}{'x floor':>9}")
    for step in report["steps"]:
        print(
            f"{step['name']:18}{step['median_seconds']:9.3f}{step['times_last']:8.2f}{step['peak_mib']:9.0f}"
            f"{step['memory_times_last']:8.2f}{step['useful_token_share']:8.0%}{step['times_floor']:9.2f}"
        )
    if "cache_seconds" in report:
        print(
            f"Reference and margin of these pairs, once: {report['cache_seconds']:.3f} s; the naive step's forward "
            f"passes, every time: {report['naive_forward_seconds']:.3f} s"
        )


if __name__ == "__main__":
    main()
