"""`python -m engine.data verify`: check every file of the prepared corpora, or of indexed files anywhere."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from engine.data.command_line import data_config, parser_of, require_corpus, run, within, write_report
from engine.data.report.checks import Check, config_checks, prefix_checks
from engine.errors import DataError


def verify(argv: list[str]) -> int:
    """Check all files. Exit code: 0 all ok, 1 damages were found (each is printed), 2 refused."""
    parser = parser_of("verify", "Check every file of the prepared corpora, or PREFIX.bin and .idx alone.", "[PREFIX]")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="with PREFIX: every id must be below N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all checks to FILE")
    return run(parser, argv, _verify)


def _verify(options: argparse.Namespace, words: list[str]) -> int:
    bare = [word for word in words if _is_file(word) or ("=" not in word and not word.startswith(("~", "-", "+")))]
    if bare:
        checks = _bare(bare, words, options.vocab_size)
    else:
        cfg = data_config(words)
        if options.vocab_size is not None:
            rule = "with options of training the vocabulary is that of their tokenizer"
            raise DataError.of(471, "--vocab-size", options.vocab_size, rule, "Leave it out, or give PREFIX alone")
        require_corpus(cfg, "files to verify")
        checks = config_checks(cfg)
    found = []
    for check in checks:
        print(check.line(), flush=True)
        found.append(check)
    damages, size = sum(len(check.damages) for check in found), sum(check.size for check in found)
    seconds = sum(check.seconds for check in found)
    outcome = f"damages: {damages}" if damages else "all ok"
    print(f"{len(found)} files, {size / 1e6:,.3f} MB in {seconds:.1f} s: {outcome}")
    if options.json is not None:
        write_report(options.json, {"ok": not damages, "checks": [asdict(check) for check in found]})
    return 1 if damages else 0


def _stem(word: str) -> str:
    return word.removesuffix(".bin").removesuffix(".idx")


def _is_file(word: str) -> bool:
    return any(os.path.exists(f"{_stem(word)}{suffix}") for suffix in (".bin", ".idx"))


def _bare(prefixes: list[str], words: list[str], vocab_size: int | None) -> Iterator[Check]:
    if vocab_size is not None:
        within("--vocab-size", vocab_size, 1, 1 << 31)
    others = [word for word in words if word not in prefixes]
    if others:
        rule = f"{prefixes[0]} is a file to verify alone, and {others[0]} is an option of training"
        raise DataError.of(471, "PREFIX", prefixes[0], rule, "Give one or the other")
    stems = [_stem(prefix) for prefix in prefixes]
    for stem in stems:
        if not _is_file(stem):
            rule = f"there is neither {stem}.bin nor {stem}.idx"
            raise DataError.of(471, "PREFIX", stem, rule, "Give the path of a token file without its suffix")
    return (check for stem in stems for check in prefix_checks(Path(stem), "data.source", vocab_size, foreign=True))
