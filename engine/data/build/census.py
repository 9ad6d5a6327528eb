"""How many documents each split got, and what to do when one got none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.config.schema_data import DataConfig
from engine.data.build.cache import SPLITS
from engine.errors import DataError

_NAMES = {"train": "training", "valid": "validation", "test": "test"}
_STEP = 1e-6


@dataclass(slots=True)
class Census:
    """`counts`: documents of each split; `ranges`: the lowest and highest place, between 0 and 1, among them."""

    counts: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def count(self, split: str, lowest: float, highest: float, documents: int = 1) -> None:
        """Count documents whose places lie between `lowest` and `highest`."""
        self.counts[split] = self.counts.get(split, 0) + documents
        low, high = self.ranges.get(split, (1.0, 0.0))
        self.ranges[split] = min(low, lowest), max(high, highest)

    def add(self, other: Census) -> None:
        """Count the documents of `other` too."""
        for split, documents in other.counts.items():
            self.count(split, *other.ranges[split], documents)

    def to_json(self) -> dict[str, Any]:
        """`from_json` of it gives an equal census."""
        return {split: [self.counts[split], *self.ranges[split]] for split in SPLITS if split in self.counts}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Census:
        """What `to_json` gave. Raises ValueError or TypeError."""
        census = cls()
        for split, (documents, lowest, highest) in content.items():
            census.count(split, float(lowest), float(highest), int(documents))
        return census

    def check(self, cfg: DataConfig, source: str) -> None:
        """Raise DataError when a split that was asked for got no document: 415 held out, 416 training."""
        if not self.counts.get("train"):
            raise self._no_training(cfg, source)
        if cfg.valid_fraction > 0 and not self.counts.get("valid"):
            raise self._not_held_out(cfg, source, "valid", 0.0)
        if cfg.test_fraction > 0 and not self.counts.get("test"):
            raise self._not_held_out(cfg, source, "test", cfg.valid_fraction)

    def _no_training(self, cfg: DataConfig, source: str) -> Exception:
        last = "test" if "test" in self.counts else "valid"
        option, start = f"data.{last}_fraction", cfg.valid_fraction if last == "test" else 0.0
        lowest = min(low for low, _ in self.ranges.values())
        highest = self.ranges[last][1]
        way_out = "Nearest legal: data.valid_fraction=0 data.test_fraction=0 train.eval_batches=0 (nothing held out)"
        if lowest < highest and highest - start > _STEP:
            way_out = f"Nearest legal: {option}={highest - start - _STEP:.6f}; {_without(last)} means no {_NAMES[last]}"
        rule = f"{self._all(source)} out of the training split, the training split is empty"
        return DataError.of(416, option, getattr(cfg, f"{last}_fraction"), rule, way_out)

    def _not_held_out(self, cfg: DataConfig, source: str, split: str, start: float) -> Exception:
        option = f"data.{split}_fraction"
        way_out = f"Nearest legal: {_without(split)} (no {_NAMES[split]})"
        # The lowest document of the next split that has any comes over.
        after = next(name for name in ("test", "train") if name != split and name in self.counts)
        low, high = self.ranges[after]
        if low < high:
            way_out = f"Nearest legal: {option}={low - start + _STEP:.6f}; {_without(split)} means no {_NAMES[split]}"
        rule = f"{self._all(source)} out of the {_NAMES[split]} split, the {_NAMES[split]} split is empty"
        return DataError.of(415, option, getattr(cfg, f"{split}_fraction"), rule, way_out)

    def _all(self, source: str) -> str:
        count = sum(self.counts.values())
        which = "the only document" if count == 1 else f"all {count} documents"
        return f"the content hash puts {which} of {source}"


def _without(split: str) -> str:
    """Options that hold out nothing for `split`; training then has nothing to validate on."""
    return f"data.{split}_fraction=0" + (" train.eval_batches=0" if split == "valid" else "")
