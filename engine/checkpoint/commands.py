"""The commands of `python -m engine.checkpoint`."""

from __future__ import annotations

import argparse
import json
import re
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.checkpoint.export import export
from engine.checkpoint.hf_reader import tensor_files
from engine.checkpoint.weights import INDEX
from engine.config import entry
from engine.config.enums import DType
from engine.errors import CheckpointError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 refused (the reason is on stderr), 130 interrupted."""
    args = _parser().parse_args(argv)
    return entry.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.command == "inspect":
        inspect(args.folder)
    else:
        export(
            args.source,
            args.out,
            dtype=DType[args.dtype],
            shard_size=args.shard_size,
            tokenizer=args.tokenizer,
            overwrite=args.overwrite,
        )
    return 0


def size_of(text: str) -> int:
    """Bytes from 5GB, 200MB or a plain number; units are powers of 1000, as in transformers."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use bytes, or 200MB, 5GB")
    return size


def inspect(folder: Path) -> None:
    """Print dtype, shape, bytes and file of every tensor of a run's weights or of a Hugging Face folder.

    Raises:
        CheckpointError: 616 only pickles, 617 no tensors, 622 a file is missing or damaged.
    """
    root = folder / "weights" if (folder / "weights" / INDEX).is_file() else folder
    try:
        files = json.loads((root / INDEX).read_text())["weight_map"] if (root / INDEX).is_file() else tensor_files(root)
        total = 0
        for name, file in files.items():
            with safe_open(root / file, "pt") as shard:
                part = shard.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
            size = prod(shape) * _BYTES.get(dtype, 1)
            total += size
            print(f"{name:60} {dtype:5} {'x'.join(map(str, shape)) or 'scalar':>16} {size:>16,}  {file}")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"a file is missing or damaged ({error})"
        raise CheckpointError.of(622, "FOLDER", root, rule, "Copy the folder again") from error
    print(f"{len(files)} tensors, {total:,} bytes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.checkpoint", description="Weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a run as a Hugging Face folder")
    out.add_argument("source", type=Path, metavar="SOURCE", help="folder of a run, such as runs/mine")
    out.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    out.add_argument("--dtype", choices=[d.name for d in DType], default="fp32")
    out.add_argument("--shard-size", type=size_of, default="5GB", metavar="SIZE", help="most bytes of one file (5GB)")
    out.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="instead of the one in the run's data cache")
    out.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    look = commands.add_parser("inspect", help="list tensors, shapes, dtypes and bytes")
    look.add_argument("folder", type=Path, metavar="FOLDER", help="a run, its weights, or a Hugging Face folder")
    return parser
