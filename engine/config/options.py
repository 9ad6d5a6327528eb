"""What can be set: every option of the schema with its type, default and docstring."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
import typing
from enum import Enum
from typing import Any

from omegaconf import MISSING

from engine.config import (
    schema,
    schema_checkpoint,
    schema_data,
    schema_hardware,
    schema_kernels,
    schema_launch,
    schema_search,
    schema_training,
)
from engine.config.schema import Config
from engine.errors import nearest


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One field of one section."""

    path: str
    """As typed on the command line, such as `model.num_layers`."""
    kind: Any
    """Type annotation."""
    default: object
    """Value when nobody sets it; `MISSING` when somebody must."""
    doc: str
    """Docstring of the field."""

    @property
    def words(self) -> str:
        """The expected type in words, such as `an integer or null`."""
        names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
        inner = [kind for kind in _union(self.kind) if kind is not type(None)][0]
        if inner is Any:
            return "an integer or auto"
        if inner in names:
            text = names[inner]
        elif isinstance(inner, type) and issubclass(inner, Enum):
            text = f"one of {', '.join(inner.__members__)}"
        elif typing.get_origin(inner) is list:
            text = "a list"
        else:
            text = "a mapping"
        return f"{text} or null" if type(None) in _union(self.kind) else text

    @property
    def is_mapping(self) -> bool:
        """Whether keys below it are free."""
        return typing.get_origin(self.kind) is dict


def _union(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


@functools.cache
def sections() -> dict[str, type[Any]]:
    """Section name -> dataclass, in the order of the schema."""
    return dict(typing.get_type_hints(Config))


@functools.cache
def options() -> dict[str, Option]:
    """Path -> option, for every section in order."""
    found = {}
    for section, cls in sections().items():
        found.update(_below(section, cls))
    return found


def _below(path: str, cls: type[Any]) -> dict[str, Option]:
    """The options of a section, and of the sections in it."""
    docs, kinds, found = _docstrings(), typing.get_type_hints(cls), dict[str, Option]()
    for field in dataclasses.fields(cls):
        name, kind = f"{path}.{field.name}", kinds[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found.update(_below(name, kind))
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        found[name] = Option(name, kind, default, docs.get((cls.__name__, field.name), ""))
    return found


def find(path: str) -> Option | None:
    """The option at `path`; a path below a mapping gives that mapping."""
    known, parts = options(), path.split(".")
    above = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    option = next((known[name] for name in above if name in known), None)
    return option if option and (option.path == path or option.is_mapping) else None


def similar(path: str) -> str:
    """Way out for a misspelt path: the same name in another section, or the nearest names where it was looked for."""
    section, _, name = path.partition(".")
    twins = [known for known in options() if known.split(".")[-1] == (name or section)]
    if twins:
        return f"Use {' or '.join(twins)}"
    if section in sections():
        return nearest(name, (known.partition(".")[2] for known in options() if known.startswith(f"{section}.")))
    return nearest(section, sections())


def is_missing(option: Option) -> bool:
    """Whether the option has no default."""
    return bool(option.default == MISSING)


@functools.cache
def _docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string that follows the field in the source; Python itself does not keep it."""
    found = {}
    modules = (
        schema,
        schema_checkpoint,
        schema_data,
        schema_hardware,
        schema_kernels,
        schema_launch,
        schema_search,
        schema_training,
    )
    sources = [inspect.getsource(module) for module in modules]
    for node in [node for source in sources for node in ast.parse(source).body]:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[node.name, field.target.id] = str(after.value.value)
    return found
