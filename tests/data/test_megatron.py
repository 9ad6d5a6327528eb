"""Indexed files are those of megatron-core: it reads ours and we read its, to the byte.

Importing megatron.core takes some five seconds of processor time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.storage.indexed import IndexedFile, merge
from tests.unit.data.indexed_samples import SHAPES, VOCABULARIES, contents, three, write


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_megatron_core_reads_our_files(megatron: Any, tmp_path: Path, shape: str, vocabulary: str) -> None:
    write(tmp_path / "a", SHAPES[shape], VOCABULARIES[vocabulary])
    theirs = megatron.IndexedDataset(str(tmp_path / "a"))
    bounds = theirs.document_indices.tolist()
    found = [theirs[i].tolist() for i in range(len(theirs))]
    assert [found[a:b] for a, b in zip(bounds, bounds[1:], strict=False)] == SHAPES[shape]
    assert theirs.sequence_lengths.tolist() == [len(part) for document in SHAPES[shape] for part in document]
    assert theirs.index.dtype.__name__ == vocabulary


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_we_read_and_write_the_bytes_of_megatron_core(
    megatron: Any, tmp_path: Path, shape: str, vocabulary: str
) -> None:
    vocab_size = VOCABULARIES[vocabulary]
    dtype = megatron.DType.optimal_dtype(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for document in SHAPES[shape]:
        flat = [token for part in document for token in part]
        builder.add_document(np.array(flat, dtype), [len(part) for part in document])
    builder.finalize(str(tmp_path / "a.idx"))
    file = IndexedFile.open(tmp_path / "a")
    assert contents(file) == SHAPES[shape] and file.contiguous and file.digest is None
    file.verify(vocab_size=vocab_size, foreign=True)
    write(tmp_path / "b", SHAPES[shape], vocab_size)
    assert three(tmp_path / "b")[:2] == [(tmp_path / f"a.{end}").read_bytes() for end in ("bin", "idx")]
    merge([tmp_path / "a"], tmp_path / "c", vocab_size)
    assert three(tmp_path / "c") == three(tmp_path / "b")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_every_integer_dtype_of_megatron_core_is_read(megatron: Any, tmp_path: Path, code: int) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=megatron.DType.dtype_from_code(code))
    builder.add_document(np.array([1, 2, 100]), [2, 1])
    builder.finalize(str(tmp_path / "a.idx"))
    assert contents(IndexedFile.open(tmp_path / "a")) == [[[1, 2], [100]]]
