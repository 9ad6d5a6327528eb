"""What each format's reader makes of good and of bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from engine.config.enums import BadFiles, SampleKind
from engine.config.schema_data import DataConfig
from engine.data.corpus import documents as corpus
from engine.data.corpus.documents import Document, Problem, read_unit, units
from engine.errors import DataError

TEXT, COMPLETION, ROWS = SampleKind.text, SampleKind.completion, SampleKind.rows


def read(path: Path | str, **changes: Any) -> tuple[list[Document], list[str]]:
    """Documents and problems of a source."""
    cfg = DataConfig(**{"source": str(path), "seq_len": 8, "vocab_size": 300, **changes})
    problems: list[Problem] = []
    found = [d for unit in units(cfg, cfg.source) for d in read_unit(unit, cfg, problems)]
    return found, [str(problem).removeprefix(f"{path}") for problem in problems]


def texts(path: Path | str, **changes: Any) -> list[Any]:
    found, problems = read(path, **changes)
    assert problems == []
    return [d.parts[0] if len(d.parts) == 1 else d.parts for d in found]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_byte_order_mark_is_dropped_and_crlf_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(path) == ["one\r\ntwo\r\n"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}\r\n')
    assert texts(path) == ["a\r\nb", "c"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"ab\xffcd", "is not UTF-8: byte 0xff at offset 2 (invalid start byte)"),
        (b"abc\xc3", "is not UTF-8: byte 0xc3 at offset 3 (unexpected end of data)"),
    ],
)
def test_bad_text_files_are_skipped_or_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"good")
    found, problems = read(tmp_path)
    assert [d.parts for d in found] == [("good",)] and problems == [f"/a.txt: {reason}"]
    with pytest.raises(DataError) as caught:
        read(tmp_path, bad_files=BadFiles.stop)
    message = str(caught.value)
    assert f"[OCT440] data.bad_files=stop: {tmp_path}/a.txt: {reason}" in message
    assert "leave it out with data.exclude, or use data.bad_files=skip" in message


def test_unreadable_and_vanished_files_are_problems(tmp_path: Path) -> None:
    cfg = DataConfig(source=str(tmp_path), seq_len=8, vocab_size=300)
    (tmp_path / "a.txt").write_text("text")
    (unit,) = units(cfg, cfg.source)
    (tmp_path / "a.txt").unlink()
    problems: list[Problem] = []
    assert list(read_unit(unit, cfg, problems)) == []
    assert [p.reason for p in problems] == ["cannot be read (No such file or directory)"]


def test_bad_lines_are_named_by_number_and_the_others_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "one"}',
        b'{"text": "two"',
        b"[1]",
        b"",
        b'{"body": 1, "id": 2}',
        b'{"text": 3}',
        b'{"text": ""}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": null}',
        b"1" * 5000,
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    expected = [
        ":2: is not a JSON object (Expecting ',' delimiter at column 15)",
        ":3: is a list, not an object",
        ":5: has no field 'text'; its fields: body, id",
        ":6: field 'text' is a number, not a text",
        ":7: field 'text' is empty",
        f":8: is not UTF-8: byte 0xff at offset {sum(len(x) + 1 for x in lines[:7]) + 10} (invalid start byte)",
        ":9: field 'text' has half of a surrogate pair at character 0",
        ":10: field 'text' is null, not a text",
        ":11: is not a JSON object that can be read (Exceeds the limit",
        ":12: is not a JSON object that can be read (",
    ]
    for size in (1 << 20, 1):
        monkeypatch.setattr(corpus, "UNIT_BYTES", size)
        found, problems = read(path)
        assert [d.parts for d in found] == [("one",), ("last",)]
        assert [p[: len(e)] for p, e in zip(problems, expected, strict=True)] == expected


def test_many_problems_are_counted_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_PROBLEMS", 3)
    _, problems = read(jsonl(tmp_path / "a.jsonl", *["{"] * 10, {"text": "x"}))
    assert len(problems) == 4 and problems[2].startswith(":3: ") and problems[3] == ": 7 more problems"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_read_the_same_and_truncated_ones_are_problems(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"row {i}"} for i in range(5000)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / f"a.jsonl{suffix}"

    def packed(part: bytes) -> bytes:
        if suffix == ".gz":
            return gzip.compress(part)
        return zstandard.compress(part) if suffix else part

    # Two members, in the middle of a line, and gzip's padding.
    path.write_bytes(packed(content[:1001]) + packed(content[1001:]) + b"\0" * 9 * (suffix == ".gz"))
    assert texts(path) == [row["text"] for row in rows]
    if not suffix:
        return
    whole = packed(content)
    path.write_bytes(whole[: len(whole) // 2])
    found, problems = read(path)
    assert 0 <= len(found) < 5000 and [d.parts[0] for d in found] == [row["text"] for row in rows[: len(found)]]
    cut_line = [p for p in problems if "truncated" not in p]
    assert f": is truncated: its {len(whole) // 2} bytes end in the middle of the compressed stream" in problems
    assert cut_line == []
    path.write_bytes(b"no stream at all")
    assert "cannot be decompressed" in read(path)[1][0]
    path.write_bytes(whole)
    some = texts(path, max_bytes=len(whole) * 2 // 3)
    assert some == [row["text"] for row in rows[: len(some)]] and len(some) < 5000


def test_json_files_are_records_where_the_first_line_is_one(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.json", {"text": "one"}, {"text": "two"})
    (tmp_path / "b.json").write_text('{\n "text": "config"\n}\n')
    (tmp_path / "c.json").write_text('{"other": 1}')
    assert texts(tmp_path) == ["one", "two", '{\n "text": "config"\n}\n', '{"other": 1}']


def test_dotted_names_reach_into_objects_and_plain_ones_come_first(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"meta": {"text": "deep"}}, {"meta.text": "flat", "meta": {"text": "deep"}})
    assert texts(path, text_field="meta.text") == ["deep", "flat"]
    _, problems = read(jsonl(tmp_path / "b.jsonl", {"meta": "x"}), text_field="meta.text")
    assert problems == [":1: has no field 'meta.text'; its fields: meta"]


def test_completion_has_two_parts_and_only_the_prompt_may_be_empty(tmp_path: Path) -> None:
    rows = [{"q": "2+2", "a": "4"}, {"q": "", "a": "x"}, {"q": "y", "a": ""}]
    found, problems = read(jsonl(tmp_path / "a.jsonl", *rows), kind=COMPLETION, prompt_field="q", completion_field="a")
    assert [d.parts for d in found] == [("2+2", "4"), ("", "x")] and problems == [":3: field 'a' is empty"]
    (tmp_path / "b.txt").write_text("plain")
    _, problems = read(tmp_path / "b.txt", kind=COMPLETION)
    assert problems == [": holds no records: data.kind=completion reads .jsonl, .csv, .tsv and .parquet files"]


def test_labels_are_integers_or_floats_and_one_of_them_in_the_whole_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["1", "0.5", '"a"', "true", "NaN", "null", "-2", "1e400", "9007199254740993"]
    rows = [f'{{"text": "t{i}", "label": {label}}}' for i, label in enumerate(labels)]
    expected = [
        ":2: label 'label' is a float (0.5), the first label of the corpus is an integer",
        ":3: label 'label' is a text ('a'), neither an integer nor a float",
        ":4: label 'label' is true or false, neither an integer nor a float",
        ":5: label 'label' is nan, not a number that can be learned",
        ":6: label 'label' is null, neither an integer nor a float",
        ":8: label 'label' is inf, not a number that can be learned",
        ":9: label 'label' is 9007199254740993, not a number that can be learned",
    ]
    for size in (1 << 20, 1):
        monkeypatch.setattr(corpus, "UNIT_BYTES", size)
        found, problems = read(jsonl(tmp_path / "a.jsonl", *rows), kind=ROWS)
        assert [(d.parts, d.label) for d in found] == [(("t0",), 1), (("t6",), -2)]
        assert all(isinstance(d.label, int) for d in found)
        assert problems == expected
    found, problems = read(jsonl(tmp_path / "a.jsonl", *rows[1:]), kind=ROWS)
    assert [d.label for d in found] == [0.5] and "an integer (-2)" in problems[4]


def test_tables_have_a_header_and_rows_of_its_width(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'label,text,b\r\n1,"x, ""y""\nz",q\r\n0,w,v\r\n2,short\r\n3,l,o,ng\r\nno,t,u\r\n')
    found, problems = read(tmp_path / "a.csv", kind=ROWS, pair_field="b")
    assert [(d.parts, d.label) for d in found] == [(('x, "y"\nz', "q"), 1), (("w", "v"), 0)]
    assert problems == [
        ":5: has 2 columns, the header has 3",
        ":6: has 4 columns, the header has 3",
        ":7: label 'label' is a text ('no'), neither an integer nor a float",
    ]
    (tmp_path / "b.tsv").write_text('label\tcontent\n0.5\ta "quote\n1.0\tb\n')
    found, problems = read(tmp_path / "b.tsv", kind=ROWS, text_field="content")
    assert [(d.parts[0], d.label) for d in found] == [('a "quote', 0.5), ("b", 1.0)] and problems == []
    found, problems = read(tmp_path / "b.tsv", kind=ROWS)
    assert found == [] and problems[0] == ":2: has no field 'text'; its fields: label, content"
    assert len(read(tmp_path / "b.tsv", kind=ROWS, text_field="content", max_bytes=30)[0]) == 1


def parquet(path: Path, rows: int, per_group: int) -> Path:
    columns = {"text": [f"row {i}" for i in range(rows)], "meta": [{"score": i / 2} for i in range(rows)]}
    columns["label"] = list(range(rows))
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=per_group)
    return path


def test_parquet_row_groups_are_units_and_columns_may_be_nested(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", 25, 10)
    cfg = DataConfig(source=str(path), seq_len=8, vocab_size=300)
    assert [(unit.part, unit.start) for unit in units(cfg, cfg.source)] == [(0, 0), (1, 10), (2, 20)]
    assert texts(path) == [f"row {i}" for i in range(25)]
    found, _ = read(path, kind=ROWS, label_field="meta.score")
    assert [d.label for d in found] == [i / 2 for i in range(25)]
    sizes = [unit.size for unit in units(cfg, cfg.source)]
    assert len(texts(path, max_bytes=sizes[0] + sizes[1] // 2 + 1)) == 15


def test_bad_parquet_is_reported(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "a.parquet", 25, 10)
    _, problems = read(whole, text_field="body")
    assert problems[0] == ": has no column 'body'; its columns: label, meta.score, text"
    path = tmp_path / "b.parquet"
    path.write_bytes(whole.read_bytes()[:-20])
    assert read(path)[1][0].startswith(": cannot be read (")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, ""]}), path)
    found, problems = read(path)
    assert [d.parts for d in found] == [("a",)]
    assert problems == [", row 2: field 'text' is null, not a text", ", row 3: field 'text' is empty"]
