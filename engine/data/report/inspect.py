"""`python -m engine.data inspect`: what a corpus holds, and samples of it as training reads them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.schema import Config
from engine.config.schema_data import DataConfig
from engine.data.build.cache import RANDOM_SOURCE, SPLITS, TOKENIZER
from engine.data.command_line import WIDTH, full_config, parser_of, ready, run, with_folder, within, write_report
from engine.data.report.sample_view import Decoder, Sample, describe, sample_lines, token_lines
from engine.data.report.statistics import Part, length_statistics, parts_of, position_shares, spread, token_counts
from engine.data.report.text import report_lines
from engine.data.samples.batches import Split
from engine.data.source import Data, open_data
from engine.data.tokenizer.vocabulary import TOKENIZER_JSON, Vocabulary, entries_of, roles_of
from engine.errors import DataError
from engine.model.batch import IGNORE

_DECODED = 256
"""Documents that bytes per token are counted in."""
_FREQUENT = 20


def inspect(argv: list[str]) -> int:
    """Print the report and decoded samples. Exit code 0, or 2 refused."""
    parser = parser_of("inspect", "What a corpus holds, and samples of it as training reads them.")
    parser.add_argument("--split", choices=SPLITS, default="train", help="documents and samples of this split")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="show N samples")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first sample shown")
    parser.add_argument("--chars", type=int, default=800, metavar="N", help="at most N characters of each run of text")
    parser.add_argument("--tokens", action="store_true", help="list each position of the samples with its label")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="samples that shares are counted in")
    parser.add_argument("--count", type=int, default=100_000_000, metavar="N", help="tokens that are counted by id")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw one page of plots into FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report and the samples to FILE")
    return run(parser, argv, _inspect)


def _inspect(options: argparse.Namespace, words: list[str]) -> int:
    cfg = full_config(words)
    within("--samples", options.samples, 0, 1 << 20)
    within("--first", options.first, 0, 1 << 48)
    within("--chars", options.chars, 2, 1 << 40)
    within("--batch", options.batch, 1, 1 << 16)
    within("--count", options.count, 1, 1 << 48)
    ready(cfg.data)
    data = open_data(cfg.data, cfg.model)
    split = split_of(data, cfg.data, options.split)
    random = cfg.data.source == RANDOM_SOURCE and not cfg.data.blend
    parts = [] if random else [part for part in parts_of(cfg.data) if part.split == options.split]
    decoder = Decoder(None if random else data.folder / TOKENIZER)
    report = corpus_report(cfg, data, split, parts, decoder, options.count)
    report["split"] = options.split
    rows = read_samples(split, options.first, options.batch, data.vocabulary)
    report["batch"] = batch_report(rows)
    print("\n".join(report_lines(report)))
    shown = read_samples(split, options.first, options.samples, data.vocabulary) if options.samples else []
    report["samples"] = [describe(sample, decoder) for sample in shown]
    for sample, view in zip(shown, report["samples"], strict=True):
        print()
        head, *lines = sample_lines(view, WIDTH, options.chars)
        print("\n".join([head, *(token_lines(sample, decoder, WIDTH) if options.tokens else lines)]))
    if options.json is not None:
        write_report(options.json, report)
    if options.png is not None:
        from engine.data.report.plots import draw_corpus

        with_folder(options.png, "--png", lambda: draw_corpus(options.png, report, parts, rows[0]))
        print(f"wrote {options.png}")
    return 0


def split_of(data: Data, cfg: DataConfig, name: str) -> Split:
    """The split `name`. Raises DataError 472 when no documents were held out for it."""
    found: Split | None = getattr(data, name)
    if found is None:
        option = f"data.{name}_fraction"
        rule = f"no documents are in it, as {option} is {getattr(cfg, f'{name}_fraction')}"
        raise DataError.of(472, "--split", name, rule, "Use --split train, or set that option above 0")
    return found


def corpus_report(
    cfg: Config, data: Data, split: Split, parts: Sequence[Part], decoder: Decoder, most: int
) -> dict[str, Any]:
    """Vocabulary, documents and tokens of one split; `most`: tokens that are counted by id."""
    report: dict[str, Any] = {
        "model": cfg.model.name,
        "seq_len": cfg.data.seq_len,
        "samples_per_epoch": split.num_samples,
        "fingerprint": data.fingerprint,
        "vocabulary": _vocabulary(data.vocabulary, cfg.model.vocab_size),
        "notes": list(data.notes),
        "sources": [
            {
                "source": part.source,
                "share": part.share,
                "folder": str(part.folder),
                "documents": part.stream.num_documents,
                "tokens": part.stream.num_tokens,
            }
            for part in parts
        ],
    }
    if parts:
        counts = token_counts(parts, data.vocabulary.size, most)
        total = max(int(counts.sum()), 1)
        order = np.argsort(-counts, kind="stable")
        frequent = [token for token in order[:_FREQUENT].tolist() if counts[token]]
        report["document_tokens"] = length_statistics(np.concatenate([p.lengths for p in parts]), cfg.data.seq_len)
        report["bytes_per_token"] = bytes_per_token(parts, decoder, data.vocabulary.end)
        report["unknown"] = _unknown(parts[0].folder / TOKENIZER, data.vocabulary, counts)
        report["token_use"] = {
            "counted": int(counts.sum()),
            "used": int((counts > 0).sum()),
            "frequent": [{"id": t, "text": decoder.text([t]), "share": counts[t] / total} for t in frequent],
            "by_rank": [int(count) for count in counts[order] if count],
        }
    return report


def _vocabulary(found: Vocabulary, in_model: int) -> dict[str, Any]:
    ids = {name: getattr(found, name) for name in ("size", "end", "cls", "sep", "mask", "fim")}
    return {**ids, "text": int(found.text.sum()), "model": in_model}


def bytes_per_token(parts: Sequence[Part], decoder: Decoder, end: int) -> dict[str, Any]:
    """UTF-8 bytes of decoded text for each of its tokens, in up to 256 random documents; ends are not counted."""
    size = tokens = documents = 0
    for part in parts:
        for number in spread(part.stream.num_documents, max(_DECODED // len(parts), 1), seed=0).tolist():
            # A book is known by its first pages.
            text = part.document(number)[: 1 << 14]
            text = text[text != end]
            documents, tokens = documents + 1, tokens + len(text)
            size += len(decoder.text(text).encode("utf-8", "replace"))
    return {"value": size / max(tokens, 1), "documents": documents}


def _unknown(folder: Path, vocabulary: Vocabulary, counts: np.ndarray[Any, Any]) -> dict[str, Any] | None:
    """The token for what the tokenizer cannot spell, and its share. None: it spells everything."""
    name = roles_of(folder).get("unk_token", "")
    content = json.loads((folder / TOKENIZER_JSON).read_text(encoding="utf-8"))
    token = entries_of(content).get(name)
    if token is None or token == vocabulary.end:
        return None
    return {"token": name, "id": token, "share": float(counts[token] / max(counts.sum(), 1))}


def read_samples(split: Split, first: int, count: int, vocabulary: Vocabulary) -> list[Sample]:
    """Samples `first` .. `first` + `count` - 1 in the order of training, as one micro-batch of one replica."""
    (batch,) = split.micro_batches(first, dp_rank=0, dp=1, micro_batch=count, accum_steps=1)
    numbers = batch.samples_B.numpy()
    lengths = split.samples.read(split.indices_of(numbers), numbers).lengths
    tokens, labels = batch.tokens_BS.numpy(), batch.labels_BS.numpy()
    segments = np.zeros_like(tokens) if batch.token_types_BS is None else batch.token_types_BS.numpy()
    borders = np.zeros(tokens.shape, dtype=np.bool_)
    if batch.documents is not None:
        borders.reshape(-1)[batch.documents.starts[:-1].numpy()] = True
    elif vocabulary.end not in (vocabulary.sep, vocabulary.cls):
        borders[:, 1:] = tokens[:, :-1] == vocabulary.end
    borders &= np.arange(tokens.shape[1]) < lengths[:, None]
    return [
        Sample(
            number=int(number),
            tokens=tokens[row],
            labels=labels[row],
            segments=segments[row],
            borders=borders[row],
            length=int(lengths[row]),
            causal=split.samples.causal,
            apart=batch.documents is not None,
            sentence=None if batch.sentence_B is None else int(batch.sentence_B[row]),
        )
        for row, number in enumerate(numbers)
    ]


def batch_report(rows: Sequence[Sample]) -> dict[str, Any]:
    """What the positions of a micro-batch of these samples are."""
    shares = position_shares(np.stack([r.labels for r in rows]) != IGNORE, np.array([r.length for r in rows]))
    return {
        "samples": len(rows),
        "positions": len(rows[0].tokens),
        "context": shares.text,
        "predicted": shares.predicted,
        "padding": shares.padding,
    }
