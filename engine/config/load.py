"""From the command line to one `Config`: YAML groups and overrides, composed by Hydra, typed by the schema.

Hydra and OmegaConf stay in this package: what leaves it are plain dataclasses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from engine.config import overrides, translate
from engine.config.help import help_text as _help_text
from engine.config.options import sections
from engine.config.schema import Config
from engine.errors import ConfigError


class HelpRequested(Exception):
    """The command line asks for a text (`--help`, `--cfg job`) instead of a run. `text` is what to print."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def load(argv: Sequence[str], *, config_name: str = "train", folder: Path | None = None) -> Config:
    """Compose `<config_name>.yaml` with the overrides in `argv` (without the program name).

    Accepts `section.option=value`, `group=choice`, `group=path/of/a.yaml`, `+x=y`, `~x`, `-h`, `--help`, `--cfg job`;
    drops the `--local_rank` that launchers append. `folder` is where the YAML files are, by default `conf_dir()`.

    Raises `HelpRequested`, or `ConfigError`: unknown option (101), wrong type (102), unknown group choice (103),
    missing value (104), malformed override (105), unknown flag (106), unreadable YAML file (107), no YAML files (108),
    anything else that Hydra refuses (109).
    """
    folder = conf_dir() if folder is None else folder.resolve()
    command = overrides.split(argv)
    if command.help:
        raise HelpRequested(help_text(folder))
    words = overrides.checked(command.overrides, folder)
    with _searched(overrides.files(command.overrides, folder)) as more:
        cfg = _compose([*more, *words], config_name, folder)
    if command.show:
        raise HelpRequested(resolved_yaml(cfg))
    return cfg


@contextmanager
def _searched(files: Mapping[str, Path]) -> Iterator[list[str]]:
    """The overrides that let Hydra find files which lie outside the folder of its groups."""
    if not files:
        yield []
        return
    with TemporaryDirectory(prefix="octant-conf-") as root:
        for name, path in files.items():
            copy = Path(root, f"{name}.yaml")
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        yield [f"hydra.searchpath=[file://{root}]"]


def _compose(checked: list[str], config_name: str, folder: Path) -> Config:
    """Compose, refuse missing values, convert to dataclasses."""
    _register_schema()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3", job_name="octant"):
            composed = compose(config_name, overrides=checked)
        missing = OmegaConf.missing_keys(composed)
        if missing:
            raise translate.missing(missing, folder)
        return cast(Config, OmegaConf.to_object(composed))
    except translate.REFUSALS as error:
        raise translate.refusal(error, folder) from error


def _register_schema() -> None:
    """Make the dataclasses known as `config_schema` and `<group>/<group>_schema`."""
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config, provider="schema")
    for name, cls in sections().items():
        store.store(group=name, name=f"{name}_schema", node=cls, provider="schema")


def conf_dir() -> Path:
    """Folder of the YAML files: inside the package when installed, beside it in a checkout.

    Raises `ConfigError` (108) when neither holds train.yaml.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "conf", package.parent / "conf")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise ConfigError.of(
        108,
        "conf",
        "(not found)",
        f"no train.yaml in {' or '.join(map(str, candidates))}",
        "Install with 'pip install .', or run from a full checkout",
    )


def to_dict(cfg: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values; enums become their names."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value.name if isinstance(value, Enum) else value for key, value in items}

    return dataclasses.asdict(cfg, dict_factory=plain)


def resolved_yaml(cfg: Config) -> str:
    """The full config as YAML text, every default written out."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))


def from_dict(content: object, where: str) -> Config:
    """The inverse of `to_dict`. Raises ConfigError 110: `content`, which is from `where`, is none."""
    try:
        if not isinstance(content, dict):
            raise ValueError(f"it is {content!r}")
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content)))
    except (*translate.REFUSALS, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        way_out = "Name what a run of this version wrote"
        raise ConfigError.of(110, "config", where, f"it holds no options of a run ({reason})", way_out) from error


def config_hash(cfg: Config) -> str:
    """16 hex digits that are equal for equal training runs: sha256 of canonical JSON, without `run`, `logging`,
    `launch`, `search` and `hardware`.
    """
    apart = ("run", "logging", "launch", "search", "hardware")
    content = {name: section for name, section in to_dict(cfg).items() if name not in apart}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def help_text(folder: Path | None = None) -> str:
    """Usage, groups with their choices, and every option with type, default and meaning."""
    return _help_text(conf_dir() if folder is None else folder)
