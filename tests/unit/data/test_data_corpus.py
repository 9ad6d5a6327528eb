"""Which files a source means, how they are cut into units, how documents are split, and what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.enums import SampleKind
from engine.config.schema_data import DataConfig
from engine.data.corpus import documents as corpus
from engine.data.corpus.documents import (
    Document,
    Problem,
    fingerprint,
    no_documents,
    read_unit,
    split_of,
    split_position,
    units,
)
from engine.errors import DataError


def cfg_of(source: str, **changes: Any) -> DataConfig:
    return DataConfig(**{"source": source, "seq_len": 8, "vocab_size": 300, **changes})


def write(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def read(cfg: DataConfig, source: str | None = None) -> list[Document]:
    source = source or cfg.source
    return [document for unit in units(cfg, source) for document in read_unit(unit, cfg, [])]


def names(source: str, **changes: Any) -> list[str]:
    return [unit.name for unit in units(cfg_of(source, **changes), source)]


def refusal(source: str, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        units(cfg_of(source, **changes), source)
    return str(caught.value)


def test_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    source = write(tmp_path, {"b.txt": b"b", "a/z.py": b"z", "a.md": b"a", "a/y/x.rst": "é".encode()})
    assert [(d.name, d.parts, d.label) for d in read(cfg_of(source))] == [
        ("a.md", ("a",), None),
        ("a/y/x.rst", ("é",), None),
        ("a/z.py", ("z",), None),
        ("b.txt", ("b",), None),
    ]


def test_folder_leaves_out_other_suffixes_and_hidden_folders(tmp_path: Path) -> None:
    others = {name: b"text" for name in ("image.png", "Makefile", ".git/a.txt", "__pycache__/a.py")}
    assert names(write(tmp_path, {"keep.txt": b"text", **others})) == ["keep.txt"]


def test_include_and_exclude_choose_by_path_and_add_suffixes(tmp_path: Path) -> None:
    files = ["a.md", "a.txt", "docs/b.md", "docs/old/c.md", "run.log", "bare"]
    source = write(tmp_path, dict.fromkeys(files, b"text"))
    assert names(source, include="*.md") == ["a.md", "docs/b.md", "docs/old/c.md"]
    assert names(source, include="docs/*, *.txt", exclude="*/old/*") == ["a.txt", "docs/b.md"]
    assert names(source, include="*.log") == ["run.log"]
    assert [Path(n).name for n in names(f"{source}/*", exclude="*.md")] == ["a.txt", "bare", "run.log"]
    message = refusal(source, include="*.tex")
    assert "[OCT402]" in message and "none of its 4 files is left by data.include=*.tex" in message
    message = refusal(source, exclude="*")
    assert "none of its 4 files is left by data.include=* and data.exclude=*" in message
    assert "a pattern of paths inside the source" in message


def test_glob_takes_what_it_matches_whatever_the_suffix(tmp_path: Path) -> None:
    write(tmp_path, {"a/one.log": b"1", "b/c/two.log": b"2", "b/[3].txt": b"3"})
    assert [Path(n).name for n in names(f"{tmp_path}/**/*.log")] == ["one.log", "two.log"]
    assert [d.parts for d in read(cfg_of(f"{tmp_path}/b/[3].txt"))] == [("3",)]


def test_python_source_is_the_standard_library_without_installed_packages() -> None:
    found = names("python")
    assert {"json/decoder.py", "os.py"} <= set(found)
    assert found == sorted(found)
    assert not [n for n in found if "site-packages" in n or "__pycache__" in n or not n.endswith(".py")]


def test_python_source_of_one_installed_package_and_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"pkg_a/__init__.py": b"", "pkg_a/sub/b.py": b"b", "pkg_a/data.txt": b"c", "single.py": b"d"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert names("python:pkg_a") == ["pkg_a/sub/b.py"]
    assert names("python:single") == ["single.py"]
    paths = {"stdlib": write(tmp_path / "s", {"x.py": b"x"}), "purelib": str(tmp_path / "p"), "platlib": ""}
    write(tmp_path / "p", {"numpie/y.py": b"y"})
    monkeypatch.setattr("sysconfig.get_paths", lambda: {**paths, "platlib": paths["purelib"]})
    assert names("python:all") == ["purelib/numpie/y.py", "stdlib/x.py"]
    message = refusal("python:numpi")
    assert "[OCT444] data.source=python:numpi" in message and "no package of .py files called 'numpi'" in message
    assert "Nearest: numpie" in message


def test_max_bytes_cuts_the_last_document_between_characters(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": b"1234", "b.txt": "xéé".encode(), "c.txt": b"never"})
    cfg = cfg_of(source, max_bytes=8)
    assert [d.parts for d in read(cfg)] == [("1234",), ("xé",)]
    assert [(unit.size, unit.limit) for unit in units(cfg, source)] == [(4, None), (5, 4)]
    assert len(units(cfg_of(source, max_bytes=9), source)) == 2


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_jsonl_is_cut_into_units_at_line_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    rows = [json.dumps({"text": f"row {i} " + "é" * (i % 7)}, ensure_ascii=False) for i in range(200)]
    source = str(tmp_path / "a.jsonl")
    Path(source).write_bytes(ending.join(rows).encode())
    cfg = cfg_of(source)
    whole = read(cfg)
    assert [d.parts[0] for d in whole] == [json.loads(row)["text"] for row in rows]
    for size in (1, 30, 500, 4000):
        monkeypatch.setattr(corpus, "UNIT_BYTES", size)
        found = units(cfg, source)
        assert len(found) > 1 and read(cfg) == whole
        assert [unit.start + unit.size for unit in found[:-1]] == [unit.start for unit in found[1:]]


def test_max_bytes_leaves_out_records_past_it_whole_however_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tmp_path / "a.jsonl")
    lines = [json.dumps({"text": "x" * i}) + "\n" for i in range(1, 40)]
    Path(source).write_text("".join(lines))
    for size in (1 << 20, 100):
        monkeypatch.setattr(corpus, "UNIT_BYTES", size)
        for limit, count in ((500, 19), (sum(map(len, lines[:5])), 5), (sum(map(len, lines[:5])) - 1, 4)):
            cfg = cfg_of(source, max_bytes=limit)
            expected = max(n for n in range(40) if sum(map(len, lines[:n])) <= limit)
            assert [len(d.parts[0]) for d in read(cfg)] == list(range(1, expected + 1)), (size, limit, count)


def test_split_depends_on_content_only_and_keeps_the_shares() -> None:
    cfg = cfg_of("x", valid_fraction=0.2, test_fraction=0.1)
    texts = [f"document {i}" for i in range(4000)]
    found = {text: split_of(split_position(Document("name", (text,))), cfg) for text in texts}
    assert found == {text: split_of(split_position(Document(text, (text,), 1)), cfg) for text in reversed(texts)}
    shares = {name: list(found.values()).count(name) / len(texts) for name in ("train", "valid", "test")}
    assert abs(shares["valid"] - 0.2) < 0.03 and abs(shares["test"] - 0.1) < 0.03 and abs(shares["train"] - 0.7) < 0.03
    more = cfg_of("x", valid_fraction=0.3)
    assert all(split_of(split_position(Document("n", (t,))), more) == "valid" for t in texts if found[t] == "valid")
    none = cfg_of("x", valid_fraction=0.0)
    assert {split_of(split_position(Document("n", (t,))), none) for t in texts} == {"train"}
    assert all(0 <= split_position(Document("n", (t, "completion"))) < 1 for t in texts)
    assert split_position(Document("n", ("a", "bc"))) != split_position(Document("n", ("ab", "c")))


def test_fingerprint_follows_names_sizes_times_and_options(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.txt": b"one", "b.txt": b"two"})

    def now(**changes: Any) -> str:
        return fingerprint(cfg_of(source, **changes), source)

    seen = [now(), now(max_bytes=5), now(text_field="body"), now(kind=SampleKind.completion, include="*.txt")]
    assert now() == seen[0] == now(seq_len=99, seed=3, bad_files="stop")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.append(now())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.append(now())
    (tmp_path / "c.txt").write_bytes(b"longer")
    seen.append(now())
    assert len(set(seen)) == len(seen)
    assert fingerprint(cfg_of("python"), "python") == fingerprint(cfg_of("python"), "python")


def test_missing_folder_and_glob_without_match_are_refused(tmp_path: Path) -> None:
    for source in (f"{tmp_path}/nowhere", f"{tmp_path}/*.txt"):
        message = refusal(source)
        assert f"[OCT401] data.source={source}" in message
        assert "no folder has this path and no file matches it as a glob" in message
        assert "data.source=python" in message
    assert "[OCT401] data.blend=" in refusal(f"{tmp_path}/x", blend={f"{tmp_path}/x": 1.0})


def test_folder_without_files_of_the_kind_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.bin": b"text"})
    message = refusal(source)
    assert f"[OCT402] data.source={source}" in message
    assert "the folder holds 0 files" in message and ".txt" in message
    assert "a glob that names the files" in message
    write(tmp_path, {"a.txt": b"text"})
    assert "suffixes of data.kind=rows (.jsonl, .csv, .parquet, ...)" in refusal(source, kind=SampleKind.rows)


def test_refusal_of_a_source_without_documents_tells_the_first_problems(tmp_path: Path) -> None:
    source = write(tmp_path, {f"{i}.txt": b"\xff" for i in range(5)})
    cfg, problems = cfg_of(source, max_bytes=4), list[Problem]()
    found = units(cfg, source)
    assert [document for unit in found for document in read_unit(unit, cfg, problems)] == []
    message = str(no_documents(cfg, source, len(found), problems))
    assert f"[OCT403] data.source={source}" in message
    assert "no document of data.kind=text is in it within data.max_bytes=4 (units of files: 4, " in message
    assert "problems: 4" in message and "0.txt: is not UTF-8" in message and "3.txt" not in message
    assert "Give text files in UTF-8, or records with text, or a larger data.max_bytes" in message


def test_missing_package_is_refused_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"a.parquet": b"PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = refusal(source)
    assert "[OCT442]" in message and "read with the package pyarrow" in message and "pip install pyarrow" in message
