"""The commands of `python -m engine.checkpoint`."""

from __future__ import annotations

import argparse
import re
import time
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.checkpoint.compare import compare, logical_hashes
from engine.checkpoint.export import export
from engine.checkpoint.hf_reader import tensor_files
from engine.checkpoint.initial import WEIGHTS, is_theirs
from engine.checkpoint.manifest import is_complete
from engine.checkpoint.reader import Reader
from engine.checkpoint.restore import candidates
from engine.config import entry
from engine.config.enums import DType
from engine.errors import CheckpointError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_SOURCE = "a run (its newest checkpoint), a checkpoint, or the weights of a run"


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 `diff` found differences, 2 refused (the reason is on stderr), 130 interrupted."""
    args = _parser().parse_args(argv)
    return entry.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.command == "inspect":
        inspect_hf(args.folder) if is_theirs(args.folder) else inspect(opened(args.folder), hashes=args.hashes)
    elif args.command == "verify":
        verify(args.folder)
    elif args.command == "diff":
        return diff(args.first, args.second, limit=args.limit)
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


def opened(folder: Path, option: str = "FOLDER") -> Reader:
    """The checkpoint that `folder` means: itself, the newest of a run, or a run's final weights.

    Raises:
        CheckpointError: see `Reader` and `candidates`.
    """
    try:
        found = candidates(folder, option)[0]
    except CheckpointError:
        found = folder / WEIGHTS
        if not is_complete(found):
            raise
    return Reader(found, option)


def inspect(reader: Reader, *, hashes: bool = False) -> None:
    """Print what a checkpoint is, and its tensors. `hashes`: with a SHA-256 of each, equal in every layout.

    Raises:
        CheckpointError: 632 `hashes` of a damaged checkpoint.
    """
    if hashes:
        reader.verify()
    manifest, facts = reader.manifest, reader.manifest.facts
    model, optim = (facts.get("config", {}).get(name, {}).get("name", "?") for name in ("model", "optim"))
    grid = " ".join(f"{axis}{size}" for axis, size in facts.get("grid", {}).items())
    print(f"{reader.folder}: step {manifest.step}, sample {facts['samples']}, {facts.get('time', '')}")
    print(f"model {model}, optimizer {optim}, written by {len(manifest.files)} ranks of {grid or '?'}")
    for name, value in {**facts.get("metrics", {}), **facts["numbers"]}.items():
        print(f"{name} {value}")
    sums = logical_hashes(reader) if hashes else {}
    for kind, shapes in manifest.shapes.items():
        for name, shape in shapes.items():
            size = "x".join(map(str, shape)) or "scalar"
            parts = len(manifest.parts[kind, name])
            print(f"{kind:16} {name:48} {size:>16} {parts:>5} parts  {sums.get((kind, name), '')}".rstrip())
    count = sum(map(len, manifest.shapes.values()))
    print(f"{count} tensors, {manifest.size:,} bytes in {len(manifest.files)} files")


def inspect_hf(folder: Path) -> None:
    """Print dtype, shape, bytes and file of every tensor of a Hugging Face folder.

    Raises:
        CheckpointError: 616 only pickles, 617 no tensors, 622 a file is missing or damaged.
    """
    try:
        files, total = tensor_files(folder), 0
        for name, file in files.items():
            with safe_open(folder / file, "pt") as shard:
                part = shard.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
            size = prod(shape) * _BYTES.get(dtype, 1)
            total += size
            print(f"{name:60} {dtype:5} {'x'.join(map(str, shape)) or 'scalar':>16} {size:>16,}  {file}")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"a file is missing or damaged ({error})"
        raise CheckpointError.of(622, "FOLDER", folder, rule, "Copy the folder again") from error
    print(f"{len(files)} tensors, {total:,} bytes")


def verify(folder: Path) -> None:
    """Compare every byte of a checkpoint, or of all checkpoints and weights of a run, with its checksum.

    Raises:
        CheckpointError: 631 to 634, for the first that is damaged.
    """
    try:
        paths = candidates(folder, "FOLDER")
    except CheckpointError:
        if not is_complete(folder / WEIGHTS):
            raise
        paths = []
    if is_complete(folder / WEIGHTS):
        paths = [*paths, folder / WEIGHTS]
    for path in paths:
        started = time.perf_counter()
        reader = Reader(path, "FOLDER")
        reader.verify()
        took = time.perf_counter() - started
        print(f"{path}: {reader.manifest.size:,} bytes are as they were written, {took:.1f} s")


def diff(first: Path, second: Path, *, limit: int) -> int:
    """Print the options, facts and tensors that differ between two checkpoints of any layouts. 1: some tensors do."""
    one, other = opened(first, "FIRST"), opened(second, "SECOND")
    one.verify()
    other.verify()
    found = compare(one, other)
    for line in found.facts:
        print(line)
    for line in found.tensors[:limit]:
        print(line)
    if len(found.tensors) > limit:
        print(f"and {len(found.tensors) - limit} more; --limit shows more")
    print(f"{found.equal} tensors are equal, {len(found.tensors)} differ")
    return 1 if found.tensors else 0


def size_of(text: str) -> int:
    """Bytes from 5GB, 200MB or a plain number; units are powers of 1000, as in transformers."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use bytes, or 200MB, 5GB")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.checkpoint", description="State and weights, in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="what a checkpoint or a Hugging Face folder holds")
    look.add_argument("folder", type=Path, metavar="FOLDER", help=f"{_SOURCE}, or a Hugging Face folder")
    look.add_argument("--hashes", action="store_true", help="with a SHA-256 of each logical tensor")
    check = commands.add_parser("verify", help="compare every byte with its checksum")
    check.add_argument("folder", type=Path, metavar="FOLDER", help="a run (all that it holds), or a checkpoint")
    both = commands.add_parser("diff", help="what differs between two checkpoints, in whatever layouts")
    both.add_argument("first", type=Path, metavar="FIRST", help=_SOURCE)
    both.add_argument("second", type=Path, metavar="SECOND", help=_SOURCE)
    both.add_argument("--limit", type=int, default=20, metavar="N", help="most tensors to list (20)")
    out = commands.add_parser("export", help="write a run as a Hugging Face folder")
    out.add_argument("source", type=Path, metavar="SOURCE", help="a run (its final weights), or a checkpoint")
    out.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    out.add_argument("--dtype", choices=[d.name for d in DType], default="fp32")
    out.add_argument("--shard-size", type=size_of, default="5GB", metavar="SIZE", help="most bytes of one file (5GB)")
    out.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="instead of the one in the run's data cache")
    out.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser
