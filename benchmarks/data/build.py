"""Text to token files: Octant, `datasets.map` and megatron-core in alternation, with the same tokenizer and text.

python -m benchmarks.data.build OUT.jsonl --commit HASH [--workers 1,2] [--rounds 2] [--megabytes 24]

The text is the standard library as JSONL, one file a record. Each run is a process of its own that starts with nothing
cached. `MB/s` is input over wall time from the start of the process to its end; `MB/s per core` is input over the CPU
time of all its processes, which other work on the machine hardly changes. megatron-core has no command for this: its
part is the loop of Megatron-LM's tools/preprocess_data.py over its IndexedDatasetBuilder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import append, row
from engine.config.schema_data import DataConfig
from engine.data.build.prepare import prepare
from engine.data.corpus.documents import read_unit, units
from engine.data.tokenizer.folder import make_tokenizer

VOCAB = 16_000
SYSTEMS = ("octant", "datasets", "megatron")


def main(argv: list[str]) -> None:
    """Measure all systems, or be one of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--run", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run:
        _SYSTEMS[options.run](options.out, int(options.workers))
        return
    with tempfile.TemporaryDirectory(prefix="octant-build-") as name:
        folder = Path(name)
        size = _prepare(folder, int(options.megabytes * 1e6))
        for workers in map(int, options.workers.split(",")):
            found: dict[str, list[tuple[float, float]]] = {system: [] for system in SYSTEMS}
            for turn in range(options.rounds):
                for system in SYSTEMS if turn % 2 == 0 else reversed(SYSTEMS):
                    found[system].append(_measure(system, folder, workers))
                    wall, cpu = found[system][-1]
                    print(
                        f"{system:9} {workers} workers: {size / wall / 1e6:.2f} MB/s, {size / cpu / 1e6:.2f} per core"
                    )
            append(options.out, _rows(found, size, workers, options.commit))


def _prepare(folder: Path, limit: int) -> int:
    """Write FOLDER/text.jsonl and FOLDER/tokenizer; bytes of the text."""
    cfg = DataConfig(source="python", max_bytes=limit)
    texts = [document.parts[0] for unit in units(cfg, "python") for document in read_unit(unit, cfg, [])]
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "tokenizer").mkdir()
    make_tokenizer("bpe", VOCAB, lambda: iter(texts[::8]), folder / "tokenizer")
    return sum(len(text.encode()) for text in texts)


def _measure(system: str, folder: Path, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.data.build", str(folder), "--run", system, "--workers", str(workers)],
            check=True,
            env={**os.environ, "SCRATCH": scratch, "HF_HOME": scratch, "TOKENIZERS_PARALLELISM": "false"},
            stdout=subprocess.DEVNULL,
        )
        wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _octant(folder: Path, workers: int) -> None:
    cfg = DataConfig(
        source=str(folder / "text.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        vocab_size=VOCAB,
        seq_len=1024,
        valid_fraction=0.0,
        workers=workers,
        cache_dir=os.environ["SCRATCH"],
    )
    prepare(cfg, print)


def _datasets(folder: Path, workers: int) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=os.environ["SCRATCH"])

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [[*ids, 0] for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]]}

    text.map(encode, batched=True, num_proc=workers, remove_columns=["text"])


_tokenizer: Any = None


def _load_tokenizer(folder: Path) -> None:
    global _tokenizer
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")


def _encode_line(line: str) -> list[int]:
    return [*_tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], 0]


def _megatron(folder: Path, workers: int) -> None:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{os.environ['SCRATCH']}/text.bin", dtype=DType.optimal_dtype(VOCAB))
    assert builder.dtype is np.uint16
    with (
        multiprocessing.Pool(workers, initializer=_load_tokenizer, initargs=(folder,)) as pool,
        open(folder / "text.jsonl", encoding="utf-8") as lines,
    ):
        found: Iterator[list[int]] = pool.imap(_encode_line, lines, 32)
        for ids in found:
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{os.environ['SCRATCH']}/text.idx")


_SYSTEMS = {"octant": _octant, "datasets": _datasets, "megatron": _megatron}


def _rows(found: dict[str, list[tuple[float, float]]], size: int, workers: int, commit: str) -> list[dict[str, Any]]:
    case = f"{size / 1e6:.0f} MB of JSONL, byte-level BPE of {VOCAB} entries, {workers} workers"
    rows = []
    for system, runs in found.items():
        for metric, unit, values in (
            ("build rate", "MB/s", [size / wall / 1e6 for wall, _ in runs]),
            ("build rate per core", "MB/s of CPU time", [size / cpu / 1e6 for _, cpu in runs]),
        ):
            rows.append(
                row(
                    case=case,
                    system=system,
                    metric=metric,
                    unit=unit,
                    values=values,
                    hardware=f"CPU, {os.cpu_count()} cores ({platform.machine()})",
                    commit=commit,
                    command="python -m benchmarks.data.build",
                )
            )
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
