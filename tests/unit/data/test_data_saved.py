"""Datasets of Hugging Face: folders of `save_to_disk`, and names that the library loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from engine.config.enums import SampleKind
from engine.config.schema_data import DataConfig
from engine.data.corpus.documents import fingerprint, read_unit, units
from engine.errors import DataError

ROWS = {"text": [f"row {i}" for i in range(30)], "label": [i % 2 for i in range(30)]}


def cfg_of(source: Path | str, **changes: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "seq_len": 8, "vocab_size": 300, **changes})


def texts(source: Path | str, **changes: Any) -> list[str]:
    cfg = cfg_of(source, **changes)
    return [d.parts[0] for unit in units(cfg, cfg.source) for d in read_unit(unit, cfg, [])]


def refusal(source: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        texts(source)
    return str(caught.value)


def test_saved_dataset_is_read_shard_by_shard(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(tmp_path / "one") == ROWS["text"]
    cfg = cfg_of(tmp_path / "one", kind=SampleKind.rows)
    found = units(cfg, cfg.source)
    assert len(found) == 3
    assert [d.label for unit in found for d in read_unit(unit, cfg, [])] == ROWS["label"]
    half = texts(tmp_path / "one", max_bytes=found[0].size + found[1].size // 2 + 1)
    assert half == ROWS["text"][:15]
    message = refusal(f"{tmp_path}/one#test")
    assert "[OCT445]" in message and "it is one split" in message and "Give the folder alone" in message


def test_split_of_a_saved_dict_is_train_or_the_named_one(tmp_path: Path) -> None:
    both = {"train": datasets.Dataset.from_dict(ROWS), "test": datasets.Dataset.from_dict({"text": ["held out"]})}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "two") == ROWS["text"]
    assert texts(f"{tmp_path}/two#test") == ["held out"]
    message = refusal(f"{tmp_path}/two#tset")
    assert "[OCT445] data.source=" in message
    assert "no split 'tset', it has train, test" in message and "Nearest: test" in message


def test_damaged_saved_datasets_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    datasets.Dataset.from_dict(ROWS).save_to_disk(folder)
    cfg, problems = cfg_of(folder, text_field="body"), list[Any]()
    (unit,) = units(cfg, cfg.source)
    assert list(read_unit(unit, cfg, problems)) == []
    assert problems[0].reason == "has no column 'body'; its columns: label, text"
    Path(unit.path).write_bytes(Path(unit.path).read_bytes()[:300])
    cfg, problems = cfg_of(folder), []
    assert list(read_unit(units(cfg, cfg.source)[0], cfg, problems)) == []
    assert problems[0].reason.startswith("cannot be read (")
    Path(unit.path).unlink()
    message = refusal(folder)
    assert "[OCT404]" in message and "which is not there" in message and "save_to_disk" in message


def test_named_dataset_is_read_from_the_cache_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    load, asked = datasets.load_dataset, []

    def local(path: str, config: str | None, split: str) -> Any:
        asked.append((path, config, split))
        return load("json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert texts("hf:org/name:config#validation") == ["one", "two"]
    assert texts("hf:org/name") == ["one", "two"]
    assert asked == [("org/name", "config", "validation"), ("org/name", None, "train")]
    assert len(fingerprint(cfg_of("hf:org/name"), "hf:org/name")) == 32


def test_named_dataset_that_cannot_be_loaded_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(path: str, config: str | None, split: str) -> Any:
        raise ConnectionError("Couldn't reach 'org/absent' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refusal("hf:org/absent")
    assert "[OCT443] data.source=hf:org/absent" in message
    assert "`datasets` cannot load it (ConnectionError: Couldn't reach 'org/absent' on the Hub)" in message
    assert "save_to_disk" in message
