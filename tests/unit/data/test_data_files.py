"""Files that are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.data.storage import files


def test_json_is_read_back_and_replaces_what_was_there(tmp_path: Path) -> None:
    for content in ({"a": [1, "ä"]}, {"b": None}):
        files.write_json(tmp_path / "x.json", content)
        assert files.read_json(tmp_path / "x.json") == content
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_what_is_no_json_object_is_a_value_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError):
        files.read_json(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.data.storage.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(tmp_path / "x.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert files.read_json(tmp_path / "x.json") == {"a": 1}


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = files.os.fsync, files.os.replace
    monkeypatch.setattr("engine.data.storage.files.os.fsync", lambda handle: (done.append("sync"), fsync(handle)))
    monkeypatch.setattr("engine.data.storage.files.os.replace", lambda a, b: (done.append("rename"), rename(a, b)))
    (tmp_path / "a.tmp").write_text("new")
    files.replace(tmp_path / "a.tmp", tmp_path / "a")
    assert done == ["sync", "rename", "sync"] and (tmp_path / "a").read_text() == "new"
