"""`python -m engine.data split`: how the documents were split, and which of them are copies of each other."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from engine.config.schema_data import DataConfig
from engine.data.build.cache import SPLITS, TOKENIZER
from engine.data.command_line import WIDTH, data_config, parser_of, ready, require_corpus, run, within, write_report
from engine.data.report.duplicates import GRAM, HIGHEST, LOWEST, Copies, Near, NearPair, exact_copies, near_copies
from engine.data.report.sample_view import Decoder, printable, wrapped
from engine.data.report.statistics import Part, parts_of

_WORD_TOKENS = 24
_SPLIT_PAIRS = tuple(combinations_with_replacement(SPLITS, 2))


def split(argv: list[str]) -> int:
    """Print the shares of the splits and the duplicate and leakage report. Exit code 0, or 2 refused."""
    parser = parser_of("split", "The splits as they came out, and the documents that are copies of each other.")
    parser.add_argument("--threshold", type=float, default=0.8, help="near: least Jaccard similarity of token 5-grams")
    parser.add_argument("--sample", type=int, default=50_000, metavar="N", help="near: compare at most N documents")
    parser.add_argument("--seed", type=int, default=0, help="near: seed of the choice of documents")
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="near: list the N most similar pairs")
    parser.add_argument("--no-near", action="store_true", help="look for exact copies only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and all pairs to FILE")
    return run(parser, argv, _split)


def _split(options: argparse.Namespace, words: list[str]) -> int:
    cfg = data_config(words)
    within("--threshold", options.threshold, LOWEST, HIGHEST)
    within("--sample", options.sample, 2, 1 << 40)
    within("--seed", options.seed, 0, (1 << 63) - 1)
    within("--worst", options.worst, 0, 1 << 40)
    require_corpus(cfg, "documents to split")
    ready(cfg)
    parts = parts_of(cfg)
    decoder = Decoder(parts[0].folder / TOKENIZER)
    copies = exact_copies(parts)
    report: dict[str, Any] = {"splits": split_table(cfg, parts), "exact": exact_report(parts, copies, decoder)}
    if not options.no_near:
        near = near_copies(parts, copies.firsts, options.threshold, options.sample, options.seed)
        report["near"] = {"threshold": options.threshold, **near_report(parts, near, decoder)}
    print("\n".join(split_lines(report, options.worst)))
    if options.json is not None:
        write_report(options.json, report)
    return 0


def split_table(cfg: DataConfig, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """One row for each split of each source: documents, tokens, their shares, and the share that was asked for.

    `deviation`: standard deviation of the share of documents, sqrt(p (1 - p) / n), as a hash decides on each.
    """
    asked = {"valid": cfg.valid_fraction, "test": cfg.test_fraction}
    asked["train"] = 1 - asked["valid"] - asked["test"]
    rows = []
    for source in dict.fromkeys(part.source for part in parts):
        own = [part for part in parts if part.source == source]
        documents, tokens = (sum(getattr(p.stream, f"num_{what}") for p in own) for what in ("documents", "tokens"))
        for part in own:
            share = asked[part.split]
            rows.append(
                {
                    "source": source,
                    "split": part.split,
                    "documents": part.stream.num_documents,
                    "document_share": part.stream.num_documents / documents,
                    "asked": share,
                    "deviation": math.sqrt(max(share * (1 - share), 0) / documents),
                    "tokens": part.stream.num_tokens,
                    "token_share": part.stream.num_tokens / tokens,
                }
            )
    return rows


def exact_report(parts: Sequence[Part], copies: Copies, decoder: Decoder) -> dict[str, Any]:
    """Copies within each pair of splits: how many documents of the later split have a copy in the earlier one, and
    within one split how many repeat one that comes before. The largest groups first.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for group in copies.groups:
        found = Counter(parts[place].split for place, _ in group)
        for first, second in _SPLIT_PAIRS:
            if first == second:
                counts[first, second] += max(found[first] - 1, 0)
            elif found[first]:
                counts[first, second] += found[second]
    groups = sorted(copies.groups, key=lambda group: (-len(group), group[0]))
    return {
        "documents": sum(part.stream.num_documents for part in parts),
        "copies": _by_pair(parts, counts),
        "groups": [
            {"documents": [_name(parts, key) for key in group], "words": _words(parts, group[0], decoder)}
            for group in groups
        ],
    }


def near_report(parts: Sequence[Part], near: Near, decoder: Decoder) -> dict[str, Any]:
    """`pairs` of each pair of splits, and `copies`: documents of the later split with a near copy in the earlier one
    (within one split: with one before it). `worst`: pairs of two splits first, each the most similar first.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    later: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for pair in near.pairs:
        splits = parts[pair.a[0]].split, parts[pair.b[0]].split
        pairs[splits] += 1
        later.setdefault(splits, set()).add(pair.b)
    compared: Counter[str] = Counter()
    for part, count in zip(parts, near.compared, strict=True):
        compared[part.split] += count
    worst = sorted(near.pairs, key=lambda pair: parts[pair.a[0]].split == parts[pair.b[0]].split)
    return {
        "gram": GRAM,
        "compared": dict(compared),
        "short": near.short,
        "capped": near.capped,
        "pairs": _by_pair(parts, pairs),
        "copies": _by_pair(parts, Counter({splits: len(found) for splits, found in later.items()})),
        "worst": [_pair(parts, pair, decoder) for pair in worst],
    }


def _by_pair(parts: Sequence[Part], counts: Counter[tuple[str, str]]) -> dict[str, int]:
    there = {part.split for part in parts}
    return {f"{a}-{b}": counts[a, b] for a, b in _SPLIT_PAIRS if a in there and b in there}


def _name(parts: Sequence[Part], key: tuple[int, int]) -> dict[str, Any]:
    part = parts[key[0]]
    return {"source": part.source, "split": part.split, "document": key[1]}


def _words(parts: Sequence[Part], key: tuple[int, int], decoder: Decoder) -> str:
    return decoder.text(parts[key[0]].document(key[1])[:_WORD_TOKENS])


def _pair(parts: Sequence[Part], pair: NearPair, decoder: Decoder) -> dict[str, Any]:
    a, b = ({**_name(parts, key), "words": _words(parts, key, decoder)} for key in (pair.a, pair.b))
    return {"similarity": pair.similarity, "a": a, "b": b}


def split_lines(report: dict[str, Any], worst: int) -> list[str]:
    """The report for a terminal; of near copies the `worst` first pairs."""
    lines = []
    source = None
    for row in report["splits"]:
        if row["source"] != source:
            source = row["source"]
            lines += [f"{source}", f"  {'':6}{'documents':>13} {'share':>8} {'asked':>8} {'tokens':>16} {'share':>8}"]
        lines.append(
            f"  {row['split']:6}{row['documents']:>13,} {row['document_share']:>8.2%} {row['asked']:>8.2%} "
            f"{row['tokens']:>16,} {row['token_share']:>8.2%}  asked +- {row['deviation']:.2%} by chance"
        )
    exact = report["exact"]
    lines += ["", f"exact copies (same tokens) among {exact['documents']:,} documents"]
    lines += [f"  {_of(name):44}{count:>10,}" for name, count in exact["copies"].items()]
    for group in exact["groups"][:worst]:
        head = f"  {len(group['documents'])} x {_place(group['documents'][0])}: "
        lines.append(_cut(head, group["words"]))
    return lines + _near_lines(report["near"], worst) if "near" in report else lines


def _near_lines(near: dict[str, Any], worst: int) -> list[str]:
    compared = ", ".join(f"{count:,} {name}" for name, count in near["compared"].items())
    lines = ["", f"near copies (Jaccard of token {near['gram']}-grams >= {near['threshold']}) of {compared} documents"]
    lines += [f"  {_of(name):44}{near['copies'][name]:>10,}   {count:,} pairs" for name, count in near["pairs"].items()]
    if near["short"]:
        lines.append(f"  {near['short']:,} documents have fewer than {near['gram']} tokens and were not compared")
    if near["capped"]:
        lines.append(f"  {near['capped']:,} documents are like so many others that not all were compared")
    for pair in near["worst"][:worst]:
        lines.append(f"  {pair['similarity']:.3f}")
        lines += [_cut(f"    {_place(pair[side])}: ", pair[side]["words"]) for side in ("a", "b")]
    return lines


def _of(pair: str) -> str:
    first, second = pair.split("-")
    return f"{first} that repeat another of {first}" if first == second else f"{second} with a copy in {first}"


def _place(document: dict[str, Any]) -> str:
    return f"{document['split']} {document['document']}"


def _cut(head: str, words: str) -> str:
    return wrapped(head + printable(words), WIDTH)[0]
