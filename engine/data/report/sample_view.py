"""Samples as people read them: tokens decoded, with documents, segments and what is predicted. S positions."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.model.batch import IGNORE

_INDENT = 32


class Decoder:
    """Text of token ids by the tokenizer in `folder`; without one (random tokens) the ids themselves."""

    def __init__(self, folder: Path | None) -> None:
        self._tokenizer: Any = None
        self.joint = " "
        """What stands between two texts that are decoded apart."""
        if folder is not None:
            from tokenizers import decoders

            from engine.data.tokenizer.folder import load_tokenizer

            self._tokenizer = load_tokenizer(folder)
            self.joint = "" if isinstance(self._tokenizer.decoder, decoders.ByteLevel) else " "

    def text(self, ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text of the ids, special tokens too."""
        plain = [int(token) for token in ids]
        if self._tokenizer is None:
            return " ".join(map(str, plain))
        decoded: str = self._tokenizer.decode(plain, skip_special_tokens=False)
        return decoded


@dataclass(frozen=True, slots=True)
class Sample:
    """One row. `tokens`, `labels`, `segments` int64 (S,); `borders` bool (S,): a document begins here. Positions from
    `length` on are padding. `causal`: the label of a position is the token after it, else the one that was there.
    `apart`: a document sees only itself.
    """

    number: int
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    segments: NDArray[np.int64]
    borders: NDArray[np.bool_]
    length: int
    causal: bool
    apart: bool = False
    sentence: int | None = None


def describe(sample: Sample, decoder: Decoder) -> dict[str, Any]:
    """The sample as runs of positions [start, stop) of one document, segment and role.

    Roles: `predicted`, `context` (read, not predicted), `text` (of a masked sample, whose predicted tokens stand in
    the run as {what was there -> what is seen}), `padding`. Of a causal sample a run says which tokens are predicted,
    not where: `after` is 1 when its last token is predicted at its last position, and is not read itself.
    """
    size = len(sample.tokens)
    predicted = sample.labels[: sample.length] != IGNORE
    runs = _causal_runs(sample, decoder) if sample.causal else _masked_runs(sample, decoder)
    if sample.length < size:
        text = decoder.text(sample.tokens[sample.length : sample.length + 1])
        document = runs[-1]["document"] if runs else 0
        runs.append(_run(sample.length, size, document, 0, "padding", f"{text} x {size - sample.length}"))
    return {
        "sample": sample.number,
        "positions": size,
        "padding": size - sample.length,
        "predicted": int(predicted.sum()),
        "documents": int(sample.borders[: sample.length].sum() + (not sample.borders[0])),
        "class": sample.sentence,
        "runs": runs,
    }


def _run(start: int, stop: int, document: int, segment: int, role: str, text: str) -> dict[str, Any]:
    facts = {"start": start, "stop": stop, "after": 0, "document": document, "segment": segment}
    return {**facts, "role": role, "text": text}


def _cuts(changes: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Begin and end of each stretch without a change before its positions."""
    return list(pairwise([0, *(np.flatnonzero(changes[1:]) + 1).tolist(), len(changes)]))


def _changed(values: NDArray[Any]) -> NDArray[np.bool_]:
    out = np.zeros(len(values), dtype=np.bool_)
    out[1:] = values[1:] != values[:-1]
    return out


def _causal_runs(sample: Sample, decoder: Decoder) -> list[dict[str, Any]]:
    borders = sample.borders[: sample.length]
    documents = np.cumsum(borders) - int(borders[0])
    runs = []
    for start, stop in _cuts(borders) if sample.apart else [(0, sample.length)]:
        tokens, labels = sample.tokens[start:stop], sample.labels[start:stop]
        target = np.append(False, labels != IGNORE)
        changes = np.append(borders[start:stop], False) | _changed(target)
        tokens = np.append(tokens, labels[-1])
        for low, high in _cuts(changes):
            # The last one is no position: it is there as a label alone, or there is nothing to predict.
            after = high == len(tokens)
            if after and not target[-1]:
                high -= 1
            if high > low:
                role = "predicted" if target[low] else "context"
                document = int(documents[min(start + low, stop - 1)])
                text = decoder.text(tokens[low:high])
                run = _run(start + low, min(start + high, stop), document, 0, role, text)
                runs.append({**run, "after": int(start + high > stop)})
    return runs


def _masked_runs(sample: Sample, decoder: Decoder) -> list[dict[str, Any]]:
    length = sample.length
    borders, segments = sample.borders[:length], sample.segments[:length]
    documents = np.cumsum(borders) - int(borders[0])
    runs = []
    for start, stop in _cuts(borders | _changed(segments)):
        text = _marked(sample.tokens[start:stop], sample.labels[start:stop], decoder)
        runs.append(_run(start, stop, int(documents[start]), int(segments[start]), "text", text))
    return runs


def _marked(tokens: NDArray[np.int64], labels: NDArray[np.int64], decoder: Decoder) -> str:
    """Text with the predicted tokens as {was -> seen}."""
    predicted = labels != IGNORE
    pieces = []
    for start, stop in _cuts(_changed(predicted) | predicted):
        seen = decoder.text(tokens[start:stop])
        pieces.append(f"{{{decoder.text(labels[start:stop])} -> {seen}}}" if predicted[start] else seen)
    return decoder.joint.join(pieces)


def printable(text: str) -> str:
    """`text` with line ends and other invisible characters escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns; East Asian wide characters take two, combining ones none."""
    lines, line, used = [], "", 0
    for char in text:
        columns = 0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        if used + columns > width:
            lines.append(line)
            line, used = "", 0
        line, used = line + char, used + columns
    return [*lines, line]


def shortened(text: str, most: int) -> str:
    """`text`, or its beginning and end when it has more than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {len(text) - 2 * half} more ... {text[-half:]}"


def sample_lines(view: dict[str, Any], width: int, most: int) -> list[str]:
    """`describe`'s answer for a terminal of `width` columns, at most `most` characters of each run."""
    counts = f"{view['positions']} positions, {view['predicted']} predicted, {view['padding']} padding"
    of_class = "" if view["class"] is None else f", class {view['class']}"
    lines = [f"sample {view['sample']}: {counts}, documents {view['documents']}{of_class}"]
    lines.append(f"  {'positions':>13}  {'role':9} seg  text")
    document = 0
    for run in view["runs"]:
        if run["document"] != document:
            lines.append(f"  {'':13}  {'-- document border ':-<{width - 17}}")
            document = run["document"]
        place = f"{run['start']}-{run['stop'] - 1}" if run["stop"] > run["start"] else ""
        place += "+1" if run["after"] else ""
        head = f"  {place:>13}  {run['role']:9} {run['segment']:>3}  "
        text = wrapped(printable(shortened(run["text"], most)), width - _INDENT)
        lines += [f"{head if number == 0 else '':{_INDENT}}{line}" for number, line in enumerate(text)]
    return lines


def token_lines(sample: Sample, decoder: Decoder, width: int) -> list[str]:
    """One line for each position: id, text, label and its text; a line between documents."""
    room = (width - 44) // 2
    lines = [f"  {'position':>8} {'seg':>3} {'id':>8}  {'text':{room}}  {'label':>8}  text of the label"]
    for place in range(len(sample.tokens)):
        token, label = int(sample.tokens[place]), int(sample.labels[place])
        if sample.borders[place] and 0 < place < sample.length:
            lines.append(f"  {'-- document border ':-<{width - 2}}")
        shown = _cell(decoder.text([token]), room) if place < sample.length else "(padding)"
        target = ("", "") if label == IGNORE else (str(label), _cell(decoder.text([label]), room))
        line = f"  {place:>8} {sample.segments[place]:>3} {token:>8}  {shown:{room}}  {target[0]:>8}  {target[1]}"
        lines.append(line.rstrip())
    return lines


def _cell(text: str, width: int) -> str:
    first, *rest = wrapped(f"'{printable(text)}'", width - 2)
    return f"{first}.." if rest else first
