"""Which documents a source has, how they are split, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.data.corpus import (
    Document,
    corpus_bytes,
    corpus_fingerprint,
    documents,
    is_validation,
    source_files,
    split_position,
)
from engine.errors import DataError


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def names(source: str, max_bytes: int | None = None) -> list[str]:
    return [document.name for document in documents(source, max_bytes)]


def test_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    source = write(tmp_path, {"b.txt": b"b", "a/z.py": b"z", "a.md": b"a", "a/y/x.rst": "é".encode()})
    assert [(d.name, d.text) for d in documents(source, None)] == [
        ("a.md", "a"),
        ("a/y/x.rst", "é"),
        ("a/z.py", "z"),
        ("b.txt", "b"),
    ]


def test_folder_leaves_out_other_suffixes_hidden_folders_invalid_utf8_and_empty_files(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        {
            "keep.txt": b"text",
            "image.png": b"text",
            ".git/a.txt": b"text",
            "__pycache__/a.py": b"text",
            "latin.txt": b"\xff\xfe",
            "empty.txt": b"",
        },
    )
    assert names(source) == ["keep.txt"]


def test_glob_takes_what_it_matches_whatever_the_suffix(tmp_path: Path) -> None:
    write(tmp_path, {"a/one.log": b"1", "b/c/two.log": b"2", "b/three.txt": b"3"})
    assert [Path(n).name for n in names(f"{tmp_path}/**/*.log")] == ["one.log", "two.log"]
    assert [d.text for d in documents(f"{tmp_path}/b/three.txt", None)] == ["3"]


def test_python_source_is_the_standard_library_without_installed_packages() -> None:
    files = [file.name for file in source_files("python")]
    assert {"json/decoder.py", "os.py"} <= set(files)
    assert files == sorted(files)
    assert not [n for n in files if "site-packages" in n or "__pycache__" in n or not n.endswith(".py")]


def test_max_bytes_cuts_the_last_document_between_characters(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": b"1234", "b.txt": "xéé".encode(), "c.txt": b"never"})
    assert [d.text for d in documents(source, 8)] == ["1234", "xé"]
    assert corpus_bytes(source, 8) == 8
    assert corpus_bytes(source, None) == 14


def test_split_depends_on_content_only_and_keeps_the_share() -> None:
    texts = [f"document {i}" for i in range(4000)]
    held_out = {t for t in texts if is_validation(Document("name", t), 0.2)}
    assert held_out == {t for t in reversed(texts) if is_validation(Document(t, t), 0.2)}
    assert 0.17 < len(held_out) / len(texts) < 0.23
    assert all(is_validation(Document("n", t), 0.3) for t in held_out)
    assert not any(is_validation(Document("n", t), 0.0) for t in texts)
    assert all(0 <= split_position(Document("n", t)) < 1 for t in texts)


def test_fingerprint_follows_names_sizes_times_and_max_bytes(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": b"one", "b.txt": b"two"})
    seen = [corpus_fingerprint(source, None)]
    assert corpus_fingerprint(source, None) == seen[0]
    seen.append(corpus_fingerprint(source, 5))
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.append(corpus_fingerprint(source, None))
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.append(corpus_fingerprint(source, None))
    (tmp_path / "c.txt").write_bytes(b"longer")
    seen.append(corpus_fingerprint(source, None))
    assert len(set(seen)) == len(seen)
    assert corpus_fingerprint("python", None) == corpus_fingerprint("python", None)


def test_missing_folder_and_glob_without_match_are_refused(tmp_path: Path) -> None:
    for source in (f"{tmp_path}/nowhere", f"{tmp_path}/*.txt"):
        with pytest.raises(DataError) as caught:
            list(documents(source, None))
        message = str(caught.value)
        assert f"[OCT401] data.source={source}" in message
        assert "no folder has this path and no file matches it as a glob" in message
        assert "data.source=python" in message


def test_folder_without_text_files_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.bin": b"text"})
    with pytest.raises(DataError) as caught:
        list(documents(source, None))
    message = str(caught.value)
    assert f"[OCT402] data.source={source}" in message
    assert "the folder holds 0 files" in message
    assert "a glob that names the files" in message


def test_corpus_without_text_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": b"", "b.txt": b"\xff"})
    with pytest.raises(DataError) as caught:
        list(documents(source, None))
    message = str(caught.value)
    assert f"[OCT403] data.source={source}" in message
    assert "its 2 files hold 0 bytes of UTF-8 text within data.max_bytes=None" in message
    assert "Give a source with text" in message


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"a.txt": b"text"})

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError) as caught:
        list(documents(source, None))
    message = str(caught.value)
    assert f"[OCT404] data.source={source}" in message
    assert f"{tmp_path}/a.txt cannot be read (Permission denied)" in message
    assert "a glob that leaves it out" in message
