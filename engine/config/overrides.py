"""The words of a command line, checked one by one before Hydra sees them, so that all mistakes are reported at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from engine.config.options import find, sections, similar
from engine.errors import ConfigError, Violation, nearest

_YAML = (".yaml", ".yml")
FLAGS = ("--help", "-h", "--cfg job")


@dataclass(frozen=True, slots=True)
class Command:
    """A command line taken apart."""

    overrides: tuple[str, ...]
    help: bool
    show: bool
    """`--cfg job`: print the resolved config."""


def split(argv: Sequence[str]) -> Command:
    """Separate flags from overrides. Raises `ConfigError` (106) naming every flag that is not known."""
    words, found, rest = list(argv), list[Violation](), list[str]()
    help_asked = show = False
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            rest.append(word)
        elif word in ("-h", "--help"):
            help_asked = True
        elif re.fullmatch(r"--local[_-]rank(=.*)?", word):
            if "=" not in word and words:
                words.pop(0)
        elif word == "--cfg=job" or (word == "--cfg" and words[:1] == ["job"]):
            show = True
            if word == "--cfg":
                words.pop(0)
        else:
            name, _, value = word.partition("=")
            found.append(_flag_violation(name, value))
    if found:
        raise ConfigError(found)
    return Command(overrides=tuple(rest), help=help_asked, show=show)


def _flag_violation(name: str, value: str) -> Violation:
    bare = name.lstrip("-").replace("-", "_")
    return Violation(
        code=106,
        option=name,
        value=value or "(flag)",
        rule="no such flag; options are written without dashes, as section.option=value",
        way_out=f"Write {bare}={value or 'VALUE'}" if find(bare) else f"Flags: {', '.join(FLAGS)}",
    )


def choices(folder: Path, group: str) -> list[str]:
    """Names of the YAML files of a group."""
    root = folder / group
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def groups(folder: Path) -> list[str]:
    """Group folders beside the root YAML files."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and choices(folder, path.name))


def files(raw: Sequence[str], folder: Path) -> dict[str, Path]:
    """The YAML files that are chosen by their path, as in `experiment=runs/search/best.yaml`: "group/name" -> path.

    `raw` has passed `checked`, which uses the same names.
    """
    found = {}
    for text in raw:
        override = OverridesParser.create().parse_override(text)
        key, value = override.key_or_group, str(override.value())
        if is_file(value) and (key in groups(folder) or key in sections()):
            found[f"{key}/{_name(key, value, folder)}"] = Path(value).absolute()
    return found


def is_file(value: str) -> bool:
    """Whether a choice is the path of a YAML file."""
    return value.endswith(_YAML) and Path(value).is_file()


def _name(group: str, path: str, folder: Path) -> str:
    """Name of a choice that is a file, unlike those of `folder`."""
    stem = Path(path).stem
    return f"{stem}-file" if stem in choices(folder, group) else stem


def choice_violation(group: str, value: object, folder: Path) -> Violation:
    """`group=value` names no YAML file."""
    known = choices(folder, group)
    value = "null" if value is None else value
    path = str(value).endswith(_YAML)
    return Violation(
        code=103,
        option=group,
        value=value,
        rule=f"there is no file {value}" if path else f"no such choice, there is no {group}/{value}.yaml",
        way_out=nearest(str(value), known) if known else f"Set options of {group} one by one",
    )


def checked(raw: Sequence[str], folder: Path) -> list[str]:
    """The overrides in Hydra's spelling. Raises `ConfigError` (101, 103, 105) with one violation per bad override."""
    known_groups = groups(folder)
    results = [_checked(text, folder, known_groups) for text in raw]
    found = [result for result in results if isinstance(result, Violation)]
    if found:
        raise ConfigError(found)
    return [result for result in results if isinstance(result, str)]


def _checked(text: str, folder: Path, known_groups: list[str]) -> str | Violation:
    """One override in Hydra's spelling, or what is wrong with it."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        return _malformed(text, str(error).splitlines()[0])
    key = override.key_or_group
    if override.package is not None or not key:
        return _malformed(text, "the part before '=' is no option")
    if override.is_sweep_override():
        return _malformed(text, "several values for one run")
    bare = text.lstrip("+")
    if key in known_groups or ("." not in key and key in sections()):
        return _checked_group(override, bare, folder)
    option = find(key)
    if option is None:
        return _unknown(key, override, known_groups)
    below_mapping = option.path != key
    if override.is_delete():
        default = f"Its default is {option.default}"
        return text if below_mapping else _malformed(text, "an option cannot be removed, only set", default)
    # Hydra wants a plus for keys that are not there yet; a mapping has no keys of its own.
    return f"++{bare}" if below_mapping or isinstance(override.value(), dict) else bare


def _checked_group(override: Override, bare: str, folder: Path) -> str | Violation:
    """`group=choice`, or `~group` for a group that is not a section."""
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        if group in sections():
            return _malformed(f"~{group}", "a section cannot be removed", f"Choose with {group}=CHOICE")
        return f"~{group}"
    if value is None and group not in sections():
        return f"~{group}"
    if is_file(str(value)):
        return f"{bare.partition('=')[0]}={_name(group, str(value), folder)}"
    return bare if str(value) in choices(folder, group) else choice_violation(group, value, folder)


def _unknown(key: str, override: Override, known_groups: list[str]) -> Violation:
    """No section or option of this name."""
    section, _, name = key.partition(".")
    if not name:
        rule, way_out = f"no section, group or option is called {key}", similar(key)
        if not way_out.startswith("Use "):
            way_out = nearest(key, {*sections(), *known_groups})
    elif section in sections():
        rule, way_out = f"section {section} has no option {name}", similar(key)
    else:
        rule, way_out = f"there is no section {section}", similar(key)
    value = "(delete)" if override.is_delete() else override.value()
    return Violation(code=101, option=key, value=value, rule=rule, way_out=way_out)


def _malformed(text: str, reason: str, way_out: str = "") -> Violation:
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        reason = "not an override, it has no '='"
    return Violation(
        code=105,
        option=key or "(nothing)",
        value=value or "(nothing)",
        rule=f"cannot be read: {reason}",
        way_out=way_out
        or "Write section.option=value; quote a value with spaces, commas, brackets or other signs: \"option='a, b'\"; "
        "in a mapping, put a backslash before them: 'option={a\\=b:1}'",
    )
