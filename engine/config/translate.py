"""Hydra's and OmegaConf's refusals in Octant's words: option, value, expected type, file, nearest names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from engine.config.options import Option, find, sections, similar
from engine.config.overrides import choice_violation, choices
from engine.errors import ConfigError, EngineError, Violation

REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""What composing a config can raise."""


def missing(keys: Iterable[str], folder: Path) -> EngineError:
    """The error for options that nobody set (104), one violation each."""
    return ConfigError(
        [
            Violation(code=104, option=key, value="(not set)", rule=f"a value is needed: {_doc(key)}", way_out=out)
            for key in sorted(keys)
            for out in (_how_to_set(key, folder),)
        ]
    )


def _doc(key: str) -> str:
    option = find(key)
    text = option.doc if option else (sections()[key].__doc__ or "") if key in sections() else ""
    return text.split(".")[0].strip() or key


def _how_to_set(key: str, folder: Path) -> str:
    option = find(key)
    if option:
        return f"Add {key}=VALUE, {option.words}"
    return f"Add {key}=CHOICE, one of {', '.join(choices(folder, key))}"


def refusal(error: Exception, folder: Path) -> EngineError:
    """The error for what Hydra, OmegaConf or the YAML reader refused (101..103, 107, 109)."""
    if isinstance(error, yaml.MarkedYAMLError):
        return _yaml_error(error)
    where = re.match(r"In '([^']+)': ", str(error))
    file = f"{where[1]}.yaml" if where else ""
    if isinstance(error, MissingConfigException):
        return _missing_file(error, file, folder)
    cause = _cause(error)
    if cause is None or not cause.full_key:
        reason = " ".join(str(error).split()).rstrip(".")
        where_to = file or "(command line)"
        return ConfigError.of(
            109, where_to, "(composed)", f"Hydra refuses: {reason}", "See --help for groups and options"
        )
    source = f"{file}: " if file else ""
    option = find(cause.full_key)
    if isinstance(cause, ConfigKeyError) or option is None:
        return _unknown_key(cause, source)
    return ConfigError(_wrong_type(option, cause, source))


def _cause(error: BaseException | None) -> OmegaConfBaseException | None:
    """OmegaConf's exception below Hydra's: it knows the key and the value."""
    while error is not None and not isinstance(error, OmegaConfBaseException):
        error = error.__cause__ or error.__context__
    return error


def _yaml_error(error: yaml.MarkedYAMLError) -> EngineError:
    mark = error.problem_mark
    file = Path(mark.name).name if mark else "(unknown)"
    folder = Path(mark.name).parent.name if mark else ""
    line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return ConfigError.of(
        107, f"{folder}/{file}", "(file)", f"not valid YAML{line}: {error.problem}", "Mend the file; indent with spaces"
    )


def _missing_file(error: MissingConfigException, file: str, folder: Path) -> EngineError:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if group and not name.endswith("_schema"):
        return ConfigError(choice_violation(group, name, folder))
    return ConfigError.of(
        107,
        file or f"{name}.yaml",
        "(file)",
        f"there is no {error.missing_cfg_file} in {folder}",
        f"Start the file with 'defaults: [<section>_schema, _self_]', sections: {', '.join(sections())}"
        if name.endswith("_schema")
        else f"Root files: {', '.join(sorted(path.name for path in folder.glob('*.yaml')))}",
    )


def _unknown_key(cause: OmegaConfBaseException, source: str) -> EngineError:
    key = str(cause.full_key)
    section, _, name = key.partition(".")
    rule = f"section {section} has no option {name}" if name else f"there is no section {section}"
    return ConfigError.of(101, key, _given(cause), f"{source}{rule}", similar(key))


def _given(cause: OmegaConfBaseException) -> str:
    return "(set)" if cause.value is None else str(cause.value)


def _wrong_type(option: Option, cause: OmegaConfBaseException, source: str) -> Violation:
    """A value that the option's type cannot hold."""
    value = cause.value
    reason = str(cause.msg or cause).splitlines()[0]
    if "nterpolation" in type(cause).__name__:
        rule = f"{source}{reason}"
    else:
        given = "null" if "not Optional" in reason else f"{value!r} ({_kind_of(value)})"
        rule = f"{source}expected {option.words}, got {given}"
    if isinstance(value, float) and "an integer" in option.words:
        way_out = f"Use {option.path}={round(value)}"
    elif isinstance(value, bool) and "one of" in option.words:
        way_out = f"Give {option.words}; in a YAML file on and off need quotes"
    else:
        way_out = f"Give {option.words}"
    return Violation(code=102, option=option.path, value="null" if value is None else value, rule=rule, way_out=way_out)


def _kind_of(value: object) -> str:
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "list": "list",
        "dict": "mapping",
    }
    return names.get(type(value).__name__, type(value).__name__)
