"""Two checkpoints side by side, whatever layouts wrote them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.checkpoint.reader import Reader

_FACTS = ("step", "samples", "numbers", "data", "config", "grid")


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs, a line each."""

    facts: list[str]
    tensors: list[str]
    equal: int
    """Tensors that are equal to the last bit."""


def logical_hashes(reader: Reader) -> dict[tuple[str, str], str]:
    """SHA-256 of every logical tensor, row after row in fp32, by kind and name: equal in every layout."""
    return {
        (kind, name): hashlib.sha256(reader.tensor(kind, name).numpy().tobytes()).hexdigest()
        for kind, shapes in reader.manifest.shapes.items()
        for name in shapes
    }


def compare(first: Reader, second: Reader) -> Difference:
    """Facts and tensors that differ. One tensor of each is in memory at a time."""
    facts = [
        f"{name}: {one} | {other}"
        for name, one, other in unequal(
            {name: first.manifest.facts.get(name) for name in _FACTS},
            {name: second.manifest.facts.get(name) for name in _FACTS},
        )
    ]
    keys = [{(kind, name) for kind, named in r.manifest.shapes.items() for name in named} for r in (first, second)]
    lines = [f"{kind} {name}: only in the first" for kind, name in sorted(keys[0] - keys[1])]
    lines += [f"{kind} {name}: only in the second" for kind, name in sorted(keys[1] - keys[0])]
    equal = 0
    for kind, name in sorted(keys[0] & keys[1]):
        one, other = first.tensor(kind, name), second.tensor(kind, name)
        if one.shape != other.shape:
            lines.append(f"{kind} {name}: shape {list(one.shape)} | {list(other.shape)}")
            continue
        share = float((one.view(torch.int32) != other.view(torch.int32)).float().mean())
        if share == 0:
            equal += 1
        else:
            distance = (one - other).abs()
            scale = float(one.abs().max())
            lines.append(
                f"{kind} {name}: {share:.2%} of it, by up to {float(distance.max()):.3g} (values to {scale:.3g})"
            )
    return Difference(facts, lines, equal)


def unequal(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path and both values of each leaf that differs."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in sorted(first.keys() | second.keys()):
            yield from unequal(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    elif first != second:
        yield path, first, second
