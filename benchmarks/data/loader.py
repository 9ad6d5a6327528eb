"""How many tokens a second one process on one core reads: `python -m benchmarks.data.loader OUT.jsonl`.

A synthetic corpus of documents of unequal length lies in a temporary folder, so in the page cache; micro-batches are
read at random places of it, up to and with their torch tensors. Each value is the rate over one global batch, in
seconds of CPU time, which other work on the machine does not change much: nothing waits here.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.rows import append, row
from engine.config.enums import Family, SentenceHead
from engine.config.schema import ModelConfig
from engine.config.schema_data import DataConfig
from engine.data.samples.batches import Split
from engine.data.samples.make import Maker
from engine.data.samples.sampler import Shuffle
from engine.data.samples.stream import Stream
from engine.data.storage.indexed import IndexedFile, IndexedWriter
from engine.data.tokenizer.vocabulary import Vocabulary

TOKENS = 1 << 26
VOCAB = 50_000
MEAN_DOCUMENT = 700
MICRO_BATCH, ACCUM = 8, 8
SECONDS = 2.0
CASES: dict[str, tuple[Family, dict[str, object]]] = {
    "gpt": (Family.gpt, {"seq_len": 1024}),
    "gpt, documents masked": (Family.gpt, {"seq_len": 1024, "document_mask": True}),
    "gpt, samples end with their document": (Family.gpt, {"seq_len": 1024, "variable_length": True}),
    "gpt, half rearranged for fill-in-the-middle": (Family.gpt, {"seq_len": 1024, "fim_rate": 0.5}),
    "bert, sentence pairs": (Family.bert, {"seq_len": 512}),
    "bert, sentence pairs, whole words": (Family.bert, {"seq_len": 512, "whole_words": True}),
}


def vocabulary() -> Vocabulary:
    """Every third id begins a word; the first seven are special."""
    ids = np.arange(VOCAB)
    return Vocabulary(VOCAB, 0, 1, 2, 3, (4, 5, 6), ids >= 7, (ids < 7) | (ids % 3 == 0))


def write_corpus(prefix: Path) -> None:
    """`TOKENS` random tokens in documents of exponentially distributed length."""
    draw = np.random.default_rng(0)
    left = TOKENS
    with IndexedWriter(prefix, VOCAB) as writer:
        while left > 0:
            size = min(left, 2 + int(draw.exponential(MEAN_DOCUMENT)))
            document = draw.integers(7, VOCAB, size)
            document[-1] = 0
            writer.add_document([document])
            left -= size


def rates(split: Split) -> Iterator[float]:
    """Tokens a second of each global batch, for `SECONDS`. Padding counts as no token."""
    first, end = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start, tokens = time.process_time(), 0
        for batch in split.micro_batches(first, dp_rank=0, dp=1, micro_batch=MICRO_BATCH, accum_steps=ACCUM):
            tokens += batch.tokens_BS.numel() if batch.lengths_B is None else int(batch.lengths_B.sum())
        yield tokens / (time.process_time() - start)
        first += MICRO_BATCH * ACCUM


def opened(prefix: Path, family: Family, options: dict[str, object]) -> Split:
    """The samples of a case, shuffled."""
    bert = family is Family.bert
    model = ModelConfig(
        name="m",
        family=family,
        num_layers=1,
        hidden_size=8,
        num_heads=1,
        vocab_size=VOCAB,
        max_positions=1024,
        token_types=2 if bert else 0,
        sentence_head=SentenceHead.next_sentence if bert else SentenceHead.none,
    )
    cfg = DataConfig(source=str(prefix), vocab_size=VOCAB, **options)  # type: ignore[arg-type]
    maker = Maker(cfg, model, vocabulary())
    samples = maker.samples(Stream(IndexedFile.open(prefix)), 0, own=True, labels=prefix)
    return Split(samples, Shuffle(0, "", samples.num_samples), finite=False, end=0)


def main(argv: list[str]) -> None:
    """Measure every case and append the rows to the file."""
    out = Path(argv[0])
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "corpus")
        write_corpus(prefix)
        for case, (family, options) in CASES.items():
            # The first global batches fill caches.
            values = list(rates(opened(prefix, family, options)))[2:]
            entry = row(
                case=f"{case}, seq_len {options['seq_len']}, micro-batch {MICRO_BATCH}",
                system="octant",
                metric="tokens_per_s",
                unit="tokens/s",
                values=values,
                hardware=f"{platform.machine()}, 1 core",
                commit=commit.stdout.strip(),
                command="python -m benchmarks.data.loader",
                corpus_tokens=TOKENS,
            )
            append(out, [entry])
            print(f"{case}: {entry['p50'] / 1e6:.1f} million tokens/s")


if __name__ == "__main__":
    main(sys.argv[1:])
