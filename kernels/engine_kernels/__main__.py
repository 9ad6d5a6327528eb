"""`python -m engine_kernels`: which implementation of each operation runs here, and why not the others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from engine_kernels import ops  # noqa: F401  (registers the implementations)
from engine_kernels.registry import Situation, choose, operations

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: Sequence[str]) -> int:
    """Print a paragraph for each operation: what `auto` takes, then the others with the reasons."""
    situation = _parse(argv)
    print(f"on {_device(situation.device)}, {situation.dtype}:".replace("torch.", ""))
    for op in operations():
        choice = choose(op, "auto", situation)
        print(f"\n{op:<22}{choice.impl.name}")
        for name, reason in choice.passed_over:
            print(f"  not {name:<16}{reason}")
    return 0


def _device(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _parse(argv: Sequence[str]) -> Situation:
    parser = argparse.ArgumentParser(prog="python -m engine_kernels", description=__doc__)
    parser.add_argument("--head-dim", type=int, default=128, help="width of a head (default 128)")
    parser.add_argument("--length", type=int, default=4096, help="positions of a row (default 4096)")
    parser.add_argument("--width", type=int, default=4096, help="hidden size (default 4096)")
    parser.add_argument("--groups", type=int, default=1, help="query heads for each key head (default 1)")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bf16", help="default bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--full", action="store_true", help="attention to what comes after, too")
    parser.add_argument("--documents", action="store_true", help="attention inside the documents of packed rows")
    parser.add_argument("--padded", action="store_true", help="rows end in padding")
    parser.add_argument("--dropout", action="store_true", help="attention weights are dropped")
    parser.add_argument("--window", action="store_true", help="a sliding window")
    parser.add_argument("--deterministic", action="store_true", help="the same inputs give the same bits")
    parser.add_argument("--compiled", action="store_true", help="torch.compile compiles what stands around")
    asked = parser.parse_args(argv)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    return Situation(
        device,
        _DTYPES[asked.dtype],
        head_dim=asked.head_dim,
        length=asked.length,
        groups=asked.groups,
        causal=not asked.full,
        dropout=asked.dropout,
        documents=asked.documents,
        padded=asked.padded,
        window=asked.window,
        deterministic=asked.deterministic,
        compiled=asked.compiled,
        width=asked.width,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
