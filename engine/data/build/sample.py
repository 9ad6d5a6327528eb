"""The text that a tokenizer is trained on: an even sample of the training documents of all sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from engine.config.schema_data import DataConfig
from engine.data.build.progress import Progress
from engine.data.corpus.documents import read_unit, split_of, split_position, units
from engine.data.corpus.units import Problem, Unit

SAMPLE_BYTES = 16_000_000
"""About so many bytes are given to the trainer."""
READ_BYTES = 16 * SAMPLE_BYTES
"""About so many bytes of the sources are read for them."""
_BLOCK_CHARS = 16_384


def sample_texts(cfg: DataConfig, sources: Sequence[str], say: Callable[[str], None]) -> Iterator[str]:
    """Blocks of training documents at even distances, in the order of the sources: a function of their content."""
    found = [unit for source in sources for unit in units(cfg, source)]
    chosen = even_units(found, READ_BYTES)
    total = sum(unit.size for unit in chosen)
    rate = min(SAMPLE_BYTES / max(total, 1), 1.0)
    progress = Progress(say, "text for the tokenizer", total, 1)
    problems: list[Problem] = []  # the build lists them
    due = 0.0
    for unit in chosen:
        for document in read_unit(unit, cfg, problems):
            if split_of(split_position(document), cfg) != "train":
                continue
            for text in document.parts:
                for start in range(0, len(text), _BLOCK_CHARS):
                    block = text[start : start + _BLOCK_CHARS]
                    due += len(block) * rate
                    if due >= len(block):
                        due -= len(block)
                        yield block
        progress.add(unit.size)
    progress.end()


def even_units(found: Sequence[Unit], limit: int) -> list[Unit]:
    """Units at even distances that make about `limit` bytes: all where there are fewer, at least one."""
    rate = limit / max(sum(unit.size for unit in found), 1)
    if rate >= 1:
        return list(found)
    chosen: list[Unit] = []
    due = 0.0
    for unit in found:
        due += unit.size * rate
        if due >= unit.size or (not chosen and unit is found[-1]):
            due -= unit.size
            chosen.append(unit)
    return chosen
