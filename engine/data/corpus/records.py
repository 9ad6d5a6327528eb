"""From a record (an object of JSONL, a row of a table) to a document, as data.kind wants it."""

from __future__ import annotations

import math
from typing import Any

from engine.config.enums import SampleKind
from engine.config.schema_data import DataConfig
from engine.data.corpus.units import BadInputError, Document

_MISSING = object()
_MAX_INTEGER = 2**53
"""Labels are stored as float64, which holds all integers up to here."""


def fields(cfg: DataConfig) -> list[str]:
    """Names of the fields that data.kind reads."""
    if cfg.kind is SampleKind.text:
        return [cfg.text_field]
    if cfg.kind is SampleKind.completion:
        return [cfg.prompt_field, cfg.completion_field]
    return [cfg.text_field, *([cfg.pair_field] if cfg.pair_field else []), cfg.label_field]


def document_of(record: Any, name: str, cfg: DataConfig, integers: bool | None) -> Document:
    """The document in `record`. `integers`: whether its label must be an integer; None: any number.

    Raises BadInputError: not an object, a field is missing or of a wrong type, a text is empty, a bad label.
    """
    if not isinstance(record, dict):
        raise BadInputError(f"is {_kind(record)}, not an object")
    if cfg.kind is SampleKind.text:
        return Document(name, (_text(record, cfg.text_field),))
    if cfg.kind is SampleKind.completion:
        prompt = _text(record, cfg.prompt_field, may_be_empty=True)
        return Document(name, (prompt, _text(record, cfg.completion_field)))
    first = _text(record, cfg.text_field)
    parts = (first,) if cfg.pair_field is None else (first, _text(record, cfg.pair_field))
    return Document(name, parts, _label(record, cfg.label_field, integers))


def settled(integers: bool | None, document: Document) -> bool | None:
    """`integers` for the records after `document`: the first label decides for all."""
    return isinstance(document.label, int) if integers is None and document.label is not None else integers


def has_field(record: Any, field: str) -> bool:
    """Whether `record` is an object with `field`."""
    return isinstance(record, dict) and _get(record, field) is not _MISSING


def _get(record: dict[str, Any], field: str) -> Any:
    """The value at `field`: of that very name, or reached through nested objects where the name has dots."""
    if field in record:
        return record[field]
    value: Any = record
    for step in field.split("."):
        if not isinstance(value, dict) or step not in value:
            return _MISSING
        value = value[step]
    return value


def _text(record: dict[str, Any], field: str, *, may_be_empty: bool = False) -> str:
    value = _required(record, field)
    if not isinstance(value, str):
        raise BadInputError(f"field {field!r} is {_kind(value)}, not a text")
    if not value and not may_be_empty:
        raise BadInputError(f"field {field!r} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # "\\ud800" is legal JSON, but no character
            raise BadInputError(f"field {field!r} has half of a surrogate pair at character {error.start}") from error
    return value


def _label(record: dict[str, Any], field: str, integers: bool | None) -> int | float:
    value = _required(record, field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = f" ({value[:40]!r})" if isinstance(value, str) else ""
        raise BadInputError(f"label {field!r} is {_kind(value)}{shown}, neither an integer nor a float")
    if not math.isfinite(value) or (isinstance(value, int) and abs(value) > _MAX_INTEGER):
        raise BadInputError(f"label {field!r} is {value}, not a number that can be learned")
    if integers is not None and integers is not isinstance(value, int):
        here, first = ("a float", "an integer") if integers else ("an integer", "a float")
        raise BadInputError(f"label {field!r} is {here} ({value}), the first label of the corpus is {first}")
    return value


def _required(record: dict[str, Any], field: str) -> Any:
    value = _get(record, field)
    if value is _MISSING:
        have = ", ".join(str(key) for key in list(record)[:8]) or "none"
        raise BadInputError(f"has no field {field!r}; its fields: {have}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
