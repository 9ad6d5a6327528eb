"""Shards of Hugging Face `datasets`: Arrow streams, in a folder of `save_to_disk` or in the library's own cache."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path, PurePath
from typing import Any

from engine.config.schema_data import DataConfig
from engine.data.corpus.units import option_of, optional
from engine.errors import DataError, nearest

_DICT, _INFO, _STATE = "dataset_dict.json", "dataset_info.json", "state.json"
_DEFAULT_SPLIT = "train"


def saved_shards(cfg: DataConfig, source: str) -> list[tuple[str, str]] | None:
    """(name, path) of the shards of FOLDER or FOLDER#split, written by `save_to_disk`; None: it is no such folder.

    Needs no library. Raises DataError: 404 a file of the folder cannot be read, 445 there is no such split.
    """
    place, _, split = (source, "", "") if os.path.exists(source) else source.partition("#")
    folder = Path(place)
    if os.path.isfile(folder / _DICT):
        splits = _read(cfg, source, folder / _DICT, "splits")
        wanted = split or _DEFAULT_SPLIT
        if wanted not in splits:
            raise _no_split(cfg, source, wanted, [str(name) for name in splits])
        folder = folder / wanted
    elif not (os.path.isfile(folder / _STATE) and os.path.isfile(folder / _INFO)):
        return None
    elif split:
        raise _no_split(cfg, source, split, [])
    names = [entry["filename"] for entry in _read(cfg, source, folder / _STATE, "_data_files")]
    missing = [name for name in names if not os.path.isfile(folder / name)]
    if missing:
        raise _unreadable(cfg, source, folder / _STATE, f"names {missing[0]}, which is not there")
    return [(name, str(folder / name)) for name in names]


def hub_shards(cfg: DataConfig, source: str, name: str) -> list[tuple[str, str]]:
    """(name, path) of the shards of NAME[:CONFIG][#split], which `datasets` downloads once into its cache.

    The name holds the cache's hash of the content, so it changes with the data. Raises DataError: 442 `datasets` is
    not installed, 443 it cannot load NAME.
    """
    place, _, split = name.partition("#")
    path, _, config = place.partition(":")
    datasets = optional("datasets", cfg, source)
    try:
        return _load(datasets.load_dataset, path, config or None, split or _DEFAULT_SPLIT)
    except Exception as error:  # the library raises its own and those of its many dependencies
        reason = str(error).strip().split("\n")[0]
        rule = f"`datasets` cannot load it ({type(error).__name__}: {reason})"
        way_out = (
            "Give hf:NAME, hf:NAME:CONFIG or hf:NAME#SPLIT of a dataset without a script; without network, save it "
            "with save_to_disk elsewhere and give the folder"
        )
        raise DataError.of(443, option_of(cfg, source), source, rule, way_out) from error


@functools.cache
def _load(load_dataset: Any, path: str, config: str | None, split: str) -> list[tuple[str, str]]:
    files = [entry["filename"] for entry in load_dataset(path, config, split=split).cache_files]
    return [("/".join(PurePath(file).parts[-3:]), file) for file in files]


def _read(cfg: DataConfig, source: str, path: Path, key: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(cfg, source, path, f"cannot be read ({error!r})") from error


def _unreadable(cfg: DataConfig, source: str, path: Path, what: str) -> Exception:
    way_out = "Save the dataset again with `datasets`' save_to_disk"
    return DataError.of(404, option_of(cfg, source), source, f"{path} {what}", way_out)


def _no_split(cfg: DataConfig, source: str, split: str, splits: list[str]) -> Exception:
    known = f"it has {', '.join(splits)}" if splits else "it is one split"
    rule = f"the saved dataset has no split {split!r}, {known}"
    way_out = f"{nearest(split, splits)}; give FOLDER#SPLIT" if splits else "Give the folder alone"
    return DataError.of(445, option_of(cfg, source), source, rule, way_out)
