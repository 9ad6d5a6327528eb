"""Damaged indexed files: whatever happened to them is found and the file named, with sums and without."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from engine.data.storage.indexed import IndexedFile, IndexedWriter, merge
from engine.errors import DataError

ENDS = (".bin", ".idx", ".sums.json")
PAGE = 4096


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora of equal sizes, `a` and `b`."""
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        with IndexedWriter(folder / name, 60_000) as writer:
            for i in range(700):
                writer.add_document([rng.integers(1, 60_000, 11), rng.integers(1, 60_000, 1 + i % 30)])
    return folder


def damage(content: bytes, other: bytes, rng: random.Random) -> bytes | None:
    """One random corruption that changes the bytes; None: the file is gone."""
    place = rng.randrange(len(content) if rng.random() < 0.7 else 40)
    changed = bytearray(content)
    kind = rng.choice(["bit", "byte", "truncate", "append", "swap", "zero", "missing", "insert", "delete"])
    if kind == "missing":
        return None
    if kind == "bit":
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        changed[place] ^= rng.randrange(1, 256)
    elif kind == "truncate":
        del changed[place:]
    elif kind == "append":
        changed += rng.choice([b"\0", b"\n", rng.randbytes(rng.randrange(1, 9000)), bytes(rng.randrange(1, 9000))])
    elif kind == "swap":
        changed[:] = other
    elif kind == "zero":
        start = place - place % PAGE
        changed[start : start + PAGE] = bytes(len(changed[start : start + PAGE]))
    elif kind == "insert":
        changed.insert(place, rng.randrange(256))
    else:
        del changed[place]
    return bytes(changed) if changed != content else damage(content, other, rng)


def test_the_undamaged_corpora_pass(corpora: Path) -> None:
    for name in "ab":
        IndexedFile.open(corpora / name).verify(vocab_size=60_000)
    assert (corpora / "a.bin").stat().st_size == (corpora / "b.bin").stat().st_size
    assert IndexedFile.open(corpora / "a").digest != IndexedFile.open(corpora / "b").digest


@pytest.mark.parametrize("end", ENDS)
def test_every_random_corruption_is_found_and_its_file_named(corpora: Path, tmp_path: Path, end: str) -> None:
    for name in ENDS:
        shutil.copy(corpora / f"a{name}", tmp_path)
    target = tmp_path / f"a{end}"
    content, other = target.read_bytes(), (corpora / f"b{end}").read_bytes()
    passed, codes = [], set()
    for seed in range(80):
        changed = damage(content, other, random.Random(seed))
        target.unlink(missing_ok=True)
        if changed is not None:
            target.write_bytes(changed)
        try:
            IndexedFile.open(tmp_path / "a", "data.cache_dir").verify()
            passed.append(seed)
        except DataError as error:
            (violation,) = error.violations
            codes.add(violation.code)
            assert str(target) in violation.rule, (seed, str(error))
            assert violation.way_out == f"Delete the folder {tmp_path}; the next run builds it again"
    assert passed == []
    assert codes == {".bin": {430, 437}, ".idx": {430, 437}, ".sums.json": {436, 437}}[end]


def test_each_byte_of_the_sums_counts(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 300) as writer:
        writer.add_document([[1, 2, 3]])
    target = tmp_path / "a.sums.json"
    content = target.read_bytes()
    for place in range(len(content)):
        for byte in {content[place] ^ 32, ord(" ")} - {content[place]}:
            target.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            with pytest.raises(DataError, match="OCT436"):
                IndexedFile.open(tmp_path / "a")


def test_own_files_without_sums_are_refused_and_foreign_ones_are_not(corpora: Path, tmp_path: Path) -> None:
    for end in ENDS[:2]:
        shutil.copy(corpora / f"a{end}", tmp_path)
    file = IndexedFile.open(tmp_path / "a")
    assert file.digest is None
    file.verify(foreign=True)
    file.verify(vocab_size=60_000, foreign=True)
    with pytest.raises(DataError, match=r"OCT436.*a\.sums\.json is missing, so damage cannot be found"):
        file.verify()


def foreign(
    folder: Path,
    *,
    header: tuple[bytes, int, int] = (b"MMIDIDX\0\0", 1, 8),
    lengths: tuple[int, ...] = (2, 3, 1),
    pointers: tuple[int, ...] = (0, 4, 10),
    documents: tuple[int, ...] = (0, 2, 3),
    counts: tuple[int, int] | None = None,
    tail: bytes = b"",
    tokens: bytes = struct.pack("<6H", 1, 2, 3, 4, 5, 6),
) -> Path:
    """A file as Megatron would write it, but for what is given."""
    magic, version, code = header
    n, d = counts or (len(lengths), len(documents))
    head = struct.pack("<9sQBQQ", magic, version, code, n, d)
    arrays = np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    (folder / "x.idx").write_bytes(head + arrays + np.array(documents, "<i8").tobytes() + tail)
    (folder / "x.bin").write_bytes(tokens)
    return folder / "x"


def refused(prefix: Path, code: int, end: str) -> str:
    with pytest.raises(DataError) as caught:
        IndexedFile.open(prefix).verify(foreign=True)
    message = str(caught.value)
    assert f"[OCT{code}] data.source={prefix}: {prefix}{end} " in message
    return message


def test_the_sound_foreign_file_passes_also_with_modes(tmp_path: Path) -> None:
    for tail in (b"", bytes(3)):
        file = IndexedFile.open(foreign(tmp_path, tail=tail))
        assert file.document(0).tolist() == [1, 2, 3, 4, 5] and file.contiguous


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ((b"MMIDIDX\0\1", 1, 8), "is not an index of Megatron"),
        ((b"TNTIDX\0\0\0", 1, 8), "is not an index of Megatron"),
        ((b"MMIDIDX\0\0", 2, 8), "has version 2 and dtype code 8; legal are version 1"),
        ((b"MMIDIDX\0\0", 1, 6), "dtype code 6; legal are version 1 and the integers [1, 2, 3, 4, 5, 8]"),
        ((b"MMIDIDX\0\0", 1, 0), "dtype code 0; legal"),
    ],
)
def test_other_headers_are_refused(tmp_path: Path, header: tuple[bytes, int, int], expected: str) -> None:
    message = refused(foreign(tmp_path, header=header), 431, ".idx")
    assert expected in message
    assert (
        f"Make {tmp_path / 'x'} again, or copy its .bin and .idx (and .sums.json, if it has one) here again" in message
    )


@pytest.mark.parametrize("size", [0, 8, 33])
def test_an_index_shorter_than_its_header_is_refused(tmp_path: Path, size: int) -> None:
    prefix = foreign(tmp_path)
    (tmp_path / "x.idx").write_bytes((tmp_path / "x.idx").read_bytes()[:size])
    assert "is not an index of Megatron" in refused(prefix, 431, ".idx")


@pytest.mark.parametrize("counts", [(4, 3), (3, 2), (2**64 - 1, 2**64 - 1), (2**61, 3), (0, 3)])
def test_counts_that_do_not_make_the_size_are_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    message = refused(foreign(tmp_path, counts=counts), 432, ".idx")
    assert f"has 94 bytes, but {counts[0]} sequences and {counts[1]} document boundaries make " in message


STRUCTURE = [
    ({"lengths": (2, -3, 1)}, "sequence 1 has a negative length"),
    ({"lengths": (2, 3, 2)}, "sequence 2 ends past the 12 bytes of .bin"),
    ({"lengths": (2**31 - 1, 3, 1)}, "sequence 0 ends past the 12 bytes of .bin"),
    ({"pointers": (0, 4, 11)}, "sequence 2 starts at no token's address"),
    ({"pointers": (0, -4, 10)}, "sequence 1 starts at no token's address"),
    ({"pointers": (0, 2**63 - 2, 10)}, "sequence 1 ends past the 12 bytes of .bin"),
    ({"pointers": (4, 0, 10)}, "sequence 1 lies before the one ahead of it"),
    ({"documents": (1, 2, 3)}, "says that its documents are sequences 1 to 3; it has 3, so legal is 0 to 3"),
    ({"documents": (0, 2, 2)}, "documents are sequences 0 to 2"),
    ({"documents": (0, 2, 1, 3)}, "document 1 ends before it starts"),
    ({"documents": (0, 4, 3)}, "document 1 ends before it starts"),
    ({"documents": (0, -1, 3)}, "document 0 ends before it starts"),
    ({"documents": ()}, "has no document boundary"),
    ({"tail": b"\0\1\0"}, "sequences whose mode is not 0"),
]


@pytest.mark.parametrize(("change", "expected"), STRUCTURE, ids=[f"{i}" for i in range(len(STRUCTURE))])
def test_impossible_structures_are_refused(tmp_path: Path, change: dict[str, tuple[int, ...]], expected: str) -> None:
    assert expected in refused(foreign(tmp_path, **change), 433, ".idx")  # type: ignore[arg-type]


def test_structure_is_checked_beyond_the_first_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.storage.layout._SLICE", 2)
    IndexedFile.open(foreign(tmp_path))
    cases = [
        ({"pointers": (0, 4, 2), "lengths": (2, 3, 0)}, "sequence 2 lies before"),
        ({"lengths": (2, 3, -1)}, "sequence 2 has a negative"),
        ({"documents": (0, 3, 3, 1, 3)}, "document 2 ends before it starts"),
    ]
    for change, expected in cases:
        assert expected in refused(foreign(tmp_path, **change), 433, ".idx")  # type: ignore[arg-type]
    assert not IndexedFile.open(foreign(tmp_path, pointers=(0, 4, 8))).contiguous


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (bytes(13), "has 13 bytes, no multiple of the 2 that a token has"),
        (bytes(14), "has 14 bytes, but the sequences of x.idx end at byte 12"),
    ],
)
def test_another_size_of_the_tokens_is_refused(tmp_path: Path, tokens: bytes, expected: str) -> None:
    assert expected in refused(foreign(tmp_path, tokens=tokens), 435, ".bin")


def test_a_file_of_no_documents_is_refused_but_can_be_merged(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "none", 300):
        pass
    with IndexedWriter(tmp_path / "one", 300) as writer:
        writer.add_document([[1]])
    with pytest.raises(DataError, match=r"OCT434.*none\.idx holds no documents\. Give a corpus that has at least one"):
        IndexedFile.open(tmp_path / "none")
    merge([tmp_path / "none", tmp_path / "one", tmp_path / "none"], tmp_path / "all", 300)
    assert (tmp_path / "all.idx").read_bytes() == (tmp_path / "one.idx").read_bytes()


@pytest.mark.parametrize(("code", "width", "ids", "shown"), [(8, 2, [1, 300, 299], 300), (4, 4, [5, -7, 8], -7)])
def test_ids_outside_the_vocabulary_are_refused(
    tmp_path: Path, code: int, width: int, ids: list[int], shown: int
) -> None:
    tokens = np.array(ids, {2: "<u2", 4: "<i4"}[width]).tobytes()
    head = (b"MMIDIDX\0\0", 1, code)
    prefix = foreign(tmp_path, header=head, lengths=(3,), pointers=(0,), documents=(0, 1), tokens=tokens)
    file = IndexedFile.open(prefix)
    with pytest.raises(DataError) as caught:
        file.verify(vocab_size=300, foreign=True)
    message = str(caught.value)
    assert f"[OCT438] data.source={prefix}: {prefix}.bin has token id {shown} in bytes 0 to {len(tokens)}" in message
    assert "legal are 0 to 299, as the vocabulary has 300 entries" in message
    assert "Set data.tokenizer to the one that made this file" in message


@pytest.mark.parametrize("end", ENDS[:2])
def test_missing_and_unreadable_files_are_refused(tmp_path: Path, end: str) -> None:
    prefix = foreign(tmp_path)
    (tmp_path / f"x{end}").unlink()
    assert "cannot be read (No such file or directory)" in refused(prefix, 430, end)
    (tmp_path / f"x{end}").mkdir()
    assert "cannot be read (Is a directory)" in refused(prefix, 430, end)


def test_a_file_that_shrinks_while_it_is_used_is_refused(tmp_path: Path) -> None:
    file = IndexedFile.open(foreign(tmp_path))
    (tmp_path / "x.bin").write_bytes(bytes(4))
    with pytest.raises(DataError, match=r"OCT430.*x\.bin cannot be read \(.*ends at byte 4\)"):
        file.verify(vocab_size=300, foreign=True)


def test_random_damage_to_a_foreign_index_never_crashes_and_never_reads_outside(tmp_path: Path) -> None:
    """Without sums not all damage can be seen; what passes must be usable."""
    prefix = foreign(tmp_path)
    content = (tmp_path / "x.idx").read_bytes()
    for seed in range(300):
        changed = damage(content, content[::-1], random.Random(seed)) or b""
        (tmp_path / "x.idx").write_bytes(changed)
        try:
            file = IndexedFile.open(prefix)
            file.verify(vocab_size=300, foreign=True)
        except DataError as error:
            assert str(prefix) in str(error)
            continue
        assert [len(file.sequence(i)) for i in range(file.num_sequences)] == file.lengths.tolist()
        assert sum(len(file.document(i)) for i in range(file.num_documents)) == int(file.lengths.sum())
