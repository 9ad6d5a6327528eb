from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from engine.parallel.logical import LogicalTensor, logical_of, make_parameter, name_parameters, replicated_parameter


def numbered(*shape: int) -> torch.Tensor:
    """A tensor in which every element is different, and none is zero."""
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32).view(*shape)


LOGICAL = {
    "rows": LogicalTensor((12, 5), dim=0),
    "columns": LogicalTensor((5, 12), dim=1),
    "vector": LogicalTensor((12,), dim=0),
    "fused equal": LogicalTensor((24, 3), dim=0, segments=(12, 12)),
    "fused unequal": LogicalTensor((32, 3), dim=0, segments=(24, 4, 4)),
    "fused vector": LogicalTensor((32,), dim=0, segments=(24, 4, 4)),
    "fused columns": LogicalTensor((3, 16), dim=1, segments=(4, 8, 4)),
    "padded": LogicalTensor((9, 3), dim=0, padded=16),
    "padded past a whole rank": LogicalTensor((3, 2), dim=0, padded=16),
    "padding of none": LogicalTensor((16, 3), dim=0, padded=16),
    "replicated": LogicalTensor((7, 3)),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("logical", LOGICAL.values(), ids=LOGICAL.keys())
def test_slices_of_all_ranks_assemble_to_the_whole(logical: LogicalTensor, size: int) -> None:
    full = numbered(*logical.shape)
    slices = [logical.local_slice(full, rank, size) for rank in range(size)]
    assert len({part.shape for part in slices}) == 1
    torch.testing.assert_close(logical.assemble(slices), full, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("logical", LOGICAL.values(), ids=LOGICAL.keys())
def test_each_element_is_on_one_rank_or_replicated_on_all(logical: LogicalTensor, size: int) -> None:
    full = numbered(*logical.shape)
    held = torch.cat([logical.local_slice(full, rank, size).flatten() for rank in range(size)])
    copies = size if logical.dim is None else 1
    assert sorted(held[held != 0].tolist()) == sorted(full.flatten().tolist() * copies)


def test_a_fused_weight_gives_each_rank_its_part_of_each_segment() -> None:
    query, key, value = torch.full((4,), 1.0), torch.full((2,), 2.0), torch.full((2,), 3.0)
    query[2:] = 10.0
    logical = LogicalTensor((8,), dim=0, segments=(4, 2, 2))
    first, second = (logical.local_slice(torch.cat([query, key, value]), rank, 2).tolist() for rank in (0, 1))
    assert first == [1, 1, 2, 3]
    assert second == [10, 10, 2, 3]


def test_padding_is_zero_and_lies_at_the_end() -> None:
    logical = LogicalTensor((5,), dim=0, padded=8)
    slices = [logical.local_slice(numbered(5), rank, 4).tolist() for rank in range(4)]
    assert slices == [[1, 2], [3, 4], [5, 0], [0, 0]]


def test_what_padding_rows_hold_does_not_come_back() -> None:
    logical = LogicalTensor((5,), dim=0, padded=8)
    slices = [logical.local_slice(numbered(5), rank, 2) for rank in range(2)]
    slices[1][1:] = float("nan")
    assert logical.assemble(slices).tolist() == [1, 2, 3, 4, 5]


def test_a_draw_is_a_function_of_seed_and_name_alone() -> None:
    first = LogicalTensor((64, 8), init_std=0.5, name="block.0.weight")
    second = LogicalTensor((64, 8), init_std=0.5, name="block.1.weight")
    forth = first.draw(1), second.draw(1)
    torch.manual_seed(99)
    back = second.draw(1), first.draw(1)
    assert torch.equal(forth[0], back[1])
    assert torch.equal(forth[1], back[0])
    assert not torch.equal(forth[0], forth[1]), "names differ"
    assert not torch.equal(forth[0], first.draw(2)), "seeds differ"


def test_a_draw_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    LogicalTensor((8,), init_std=1.0, name="x").draw(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_has_the_asked_standard_deviation_whatever_the_cut() -> None:
    plain = LogicalTensor((400, 250), init_std=0.02, name="w")
    value = plain.draw(5)
    assert value.dtype is torch.float32
    # Standard error of a standard deviation over n = 1e5 draws is std / sqrt(2 n) = 0.22 %; of the mean, std / sqrt(n).
    assert float(value.std()) == pytest.approx(0.02, rel=0.01)
    assert abs(float(value.mean())) < 4 * 0.02 / 100_000**0.5
    assert torch.equal(LogicalTensor((400, 250), dim=0, padded=512, init_std=0.02, name="w").draw(5), value)


def test_a_large_draw_is_made_by_threads_and_does_not_depend_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.parallel.logical._PIECE", 1000)
    large = LogicalTensor((70, 50), init_std=1.0, name="w")
    values = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        values.append(large.draw(5))
    assert torch.equal(*values)
    pieces = values[0].view(-1).split(1000)
    assert [len(piece) for piece in pieces] == [1000, 1000, 1000, 500]
    for first, second in itertools.combinations(pieces, 2):
        # Of independent pieces, the correlation has a standard error of 1 / sqrt(n).
        assert abs(float((first[: len(second)] * second).mean())) < 4 / len(second) ** 0.5
    small = LogicalTensor((20, 50), init_std=1.0, name="w")
    assert torch.equal(small.draw(5).view(-1), pieces[0]), "one piece has the tensor's own seed"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constants_are_not_drawn(value: float) -> None:
    assert torch.equal(LogicalTensor((3, 2), init_value=value, name="b").draw(1), torch.full((3, 2), value))


def test_parameters_get_their_path_below_the_prefix_and_keep_the_rest() -> None:
    inner = nn.Module()
    inner.weight = make_parameter((2, 3), LogicalTensor((4, 3), dim=0, init_std=0.1))
    inner.bias = replicated_parameter((3,), init_value=1.0)
    outer = nn.Module()
    outer.inner = inner
    found = {logical_of(p).name: logical_of(p) for p in name_parameters("block.3", outer)}
    assert set(found) == {"block.3.inner.weight", "block.3.inner.bias"}
    assert found["block.3.inner.weight"] == LogicalTensor(
        (4, 3), dim=0, init_std=0.1, name="block.3.inner.weight", decay=True
    )
    bias = found["block.3.inner.bias"]
    assert (bias.dim, bias.init_value, bias.decay) == (None, 1.0, False)
