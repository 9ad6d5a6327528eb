"""The commands of `python -m engine.data`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from engine.config import entry
from engine.data.build.cache import SPLITS, entries, read_meta
from engine.data.build.prepare import prepare
from engine.data.command_line import data_config


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 1 damages were found, 2 refused (the reasons are on stderr), 130 interrupted."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    print(_USAGE, file=sys.stdout if argv[:1] in (["-h"], ["--help"]) else sys.stderr)
    return 0 if argv[:1] in (["-h"], ["--help"]) else 2


def say(line: str) -> None:
    """Print `line` at once. A stdout that nobody reads, as after `| head`, or on a full disk, ends no build."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build(argv: list[str]) -> int:
    """Build what training would build; tell where it is and how much it holds."""
    last = "interrupted: the next build goes on with the finished shards"
    return entry.run(lambda: _build(argv), usage=_USAGE, interrupted=last)


def _build(argv: list[str]) -> int:
    started = time.monotonic()
    cfg = data_config(argv)
    prepare(cfg, say)
    found = entries(cfg)
    size = 0
    for folder, share in found:
        meta = read_meta(folder)
        size += meta["bytes"]
        say(f"{folder}" + (f" ({share:.1%} of the samples)" if len(found) > 1 else ""))
        for name in (split for split in SPLITS if split in meta["splits"]):
            split = meta["splits"][name]
            say(f"  {name:5}  {split['documents']:>12,} documents  {split['tokens']:>15,} tokens")
    took = time.monotonic() - started
    say(f"{size:,} bytes of input in {took:.1f} s, {size / took / 1e6:.1f} MB/s")
    return 0


def inspect(argv: list[str]) -> int:
    """See `engine.data.report.inspect`."""
    from engine.data.report import inspect as report

    return report.inspect(argv)


def split(argv: list[str]) -> int:
    """See `engine.data.report.split`."""
    from engine.data.report import split as split_report

    return split_report.split(argv)


def verify(argv: list[str]) -> int:
    """See `engine.data.report.verify`."""
    from engine.data.report.verify import verify

    return verify(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "build": build,
    "inspect": inspect,
    "split": split,
    "verify": verify,
}

_USAGE = """\
usage: python -m engine.data COMMAND [group=choice ...] [option=value ...]

  build     make tokenizer and token files ready, as the first thing that training does
  inspect   statistics and plots of a corpus, and samples of it as training reads them
  split     sizes of train, valid and test, and the documents that are copies of each other
  verify    read every file to the end and list all damages; also `verify PREFIX` of a .bin and .idx

The other words are those of training; `data.` may be left out: source=texts vocab_size=8000
inspect, split and verify have options of their own: `python -m engine.data inspect --help`
"""
