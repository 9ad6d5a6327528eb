"""Split linear layers: every overlap has the values and gradients of layers that are not cut, also when compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.config.enums import TpOverlap
from engine.config.load import load
from engine.dist import collectives
from engine.dist.context import AxisGroup, ParallelContext
from engine.errors import LaunchError
from engine.model.build import build_layers
from engine.parallel import overlap, split_linear, symmetric
from engine.parallel.overlap_choice import choose_overlap
from engine.parallel.sequence import whole
from engine.parallel.split_linear import column_linear, row_linear
from engine.topology.grid import Grid
from engine.train.kernels import choose_kernels
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

LENGTH, HIDDEN, INNER = 16, 8, 12


def axis_of(how: TpOverlap) -> AxisGroup:
    rank, world = dist.get_rank(), dist.get_world_size()
    return AxisGroup(rank=rank, size=world, ranks=tuple(range(world)), group=dist.group.WORLD, overlap=how)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to("cuda" if torch.cuda.is_initialized() else "cpu", dtype)


class OverGloo:
    """What `engine.parallel.symmetric` promises, without GPUs."""

    @staticmethod
    def start_all_gather(rows: Tensor, group: str) -> Callable[[], Tensor]:
        return lambda: collectives.all_gather(rows, collectives.resolve(group), 0)

    @staticmethod
    def start_reduce_scatter(rows: Tensor, group: str) -> Callable[[], Tensor]:
        return lambda: collectives.reduce_scatter(rows, collectives.resolve(group), 0)

    @staticmethod
    def gather_and_consume(
        rows: Tensor, consume: Callable[[Tensor, int], None], gathered: Tensor, group: str, keep: bool
    ) -> None:
        everyone = collectives.all_gather(rows, collectives.resolve(group), 0)
        for rank, part in enumerate(everyone.chunk(dist.get_world_size())):
            consume(part, rank)
        if keep:
            gathered.copy_(everyone)

    @staticmethod
    def produce_and_exchange(produce: Callable[[int, Tensor], None], received: Tensor, group: str) -> None:
        made = torch.empty_like(received)
        for rank, part in enumerate(made.chunk(dist.get_world_size())):
            produce(rank, part)
        dist.all_to_all_single(received, made)


def mlp(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, gain: Tensor, axis: AxisGroup, sequence: bool) -> Tensor:
    """A gain that all ranks hold, a column-parallel layer with bias and a row-parallel one."""
    x = x * whole(gain, axis, sequence=sequence)
    inner = torch.tanh(column_linear(x, up, bias, axis, sequence=sequence))
    return row_linear(inner.cumsum(1), down, axis, sequence=sequence) + x


def unordered(
    x: Tensor, up: Tensor, bias: Tensor, down: Tensor, gain: Tensor, axis: AxisGroup, sequence: bool
) -> Tensor:
    """The same with nothing between the layers that looks at more than one position."""
    x = x * whole(gain, axis, sequence=sequence)
    inner = torch.tanh(column_linear(x, up, bias, axis, sequence=sequence, ordered=False))
    return row_linear(inner, down, axis, sequence=sequence, ordered=False) + x


def arguments(axis: AxisGroup, batch: int, sequence: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """This rank's x, weights and gain, all with gradients, and the weights of the outputs."""

    def mine(x: Tensor, dim: int) -> Tensor:
        return x.chunk(axis.size, dim)[axis.rank].clone()

    x, weight = (draw(seed, batch, LENGTH, HIDDEN, dtype=dtype) for seed in (1, 2))
    up, bias, down = (
        draw(3, INNER, HIDDEN, dtype=dtype),
        draw(4, INNER, dtype=dtype),
        draw(5, HIDDEN, INNER, dtype=dtype),
    )
    tensors = [mine(x, 1) if sequence else x, mine(up, 0), mine(bias, 0), mine(down, 1), draw(6, HIDDEN, dtype=dtype)]
    return [t.requires_grad_() for t in tensors], mine(weight, 1) if sequence else weight


def expected(run: Callable[..., Tensor], batch: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    alone = AxisGroup(rank=0, size=1, ranks=(0,), group=None)
    inputs, weight = arguments(alone, batch, False, dtype)
    out = run(*inputs, alone, False)
    return out.detach(), torch.autograd.grad((out * weight).sum(), inputs)


def compare(
    how: TpOverlap,
    batch: int,
    sequence: bool,
    run: Callable[..., Tensor],
    dtype: torch.dtype,
    compiler: Callable[..., Any] = lambda run: run,
) -> None:
    axis, tolerance = axis_of(how), {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    inputs, weight = arguments(axis, batch, sequence, dtype)
    out = compiler(run)(*inputs, axis, sequence)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    whole_out, whole_grads = expected(run, batch, dtype)
    cuts = (1 if sequence else None, 0, 0, 1, None)
    for name, got, want, dim in zip(
        ("out", "x", "up", "bias", "down", "gain"),
        (out.detach(), *found),
        (whole_out, *whole_grads),
        (cuts[0], *cuts),
        strict=True,
    ):
        want = want if dim is None else want.chunk(axis.size, dim)[axis.rank]
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}, {how} {batch} {sequence}: {m}"
        )


def every_overlap() -> None:
    with patch.object(overlap, "symmetric", OverGloo), patch.object(overlap, "HALF_ROWS", 4):
        for how in (TpOverlap.none, TpOverlap.chunked, TpOverlap.symmetric):
            for sequence in (True, False):
                for dtype in (torch.float64, torch.float32):
                    for batch, run in product((1, 3), (mlp, unordered)):
                        compare(how, batch, sequence, run, dtype)


@pytest.mark.parametrize("world", [2, 4])
def test_every_overlap_has_the_gradients_of_whole_layers(world: int) -> None:
    run_ranks(every_overlap, world, timeout_s=120)


def copied() -> None:
    """Gathered sequences are put in order on a layer's cut side alone, and not at all where nobody looks at order."""
    copy = collectives.packed
    shapes: list[tuple[tuple[int, ...], bool]] = []

    def count(x: Tensor) -> Tensor:
        shapes.append((tuple(x.shape), x.is_contiguous()))
        return copy(x)

    with patch.object(split_linear, "packed", count), patch.object(collectives, "packed", count):
        for how, ordered in product((TpOverlap.none, TpOverlap.chunked), (False, True)):
            axis = axis_of(how)
            inputs, weight = arguments(axis, 3, True, torch.float32)
            x, up, bias, down, _ = inputs
            shapes.clear()
            inner = column_linear(x, up, bias, axis, sequence=True, ordered=ordered)
            out = row_linear(inner, down, axis, sequence=True, ordered=ordered)
            torch.autograd.grad((out * weight).sum(), inputs[:4])
            moved = [shape for shape, contiguous in shapes if not contiguous]
            assert [shape[-1] for shape in moved] == ([INNER // axis.size] * 5 if ordered else []), moved


def test_only_the_cut_side_of_a_layer_is_put_in_order() -> None:
    run_ranks(copied, 2)


def frozen() -> None:
    """Inputs and weights that want no gradient cost no product, and the others get theirs."""
    for how in (TpOverlap.none, TpOverlap.chunked):
        axis = axis_of(how)
        for sequence in (True, False):
            for run, wanted in product((mlp, unordered), ((0,), (1, 2), (3,))):
                inputs, weight = arguments(axis, 2, sequence, torch.float64)
                every = torch.autograd.grad((run(*inputs, axis, sequence) * weight).sum(), inputs)
                few = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
                asked = [t for t in few if t.requires_grad]
                found = torch.autograd.grad((run(*few, axis, sequence) * weight).sum(), asked)
                for index, got in zip(wanted, found, strict=True):
                    assert torch.equal(got, every[index])


def test_frozen_weights_leave_the_other_gradients_as_they_are() -> None:
    run_ranks(frozen, 2)


def gathers_are_exact() -> None:
    """What arrives is what was sent, whatever the overlap; a sum of small integers is exact too."""
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.bfloat16)
    group = axis_of(TpOverlap.none).name
    plain = overlap.start_gather(x, group, "none")()
    assert torch.equal(overlap.start_gather(x, group, "chunked")(), plain)
    eye = torch.eye(8, dtype=torch.bfloat16)
    for how in ("none", "chunked"):
        y, kept = overlap.gather_product(x, eye, None, group, how, keep=True)
        assert torch.equal(y, plain)
        assert kept is not None
        assert torch.equal(kept, plain)
    counted = torch.arange(96).view(24, 4).bfloat16() + dist.get_rank()
    parts = [overlap.start_reduce_scatter(counted, group, how)() for how in ("none", "chunked")]
    parts += [overlap.product_scatter(counted, eye[:4, :4], group, how) for how in ("none", "chunked")]
    assert all(torch.equal(part, parts[0]) for part in parts)


def test_gathered_parts_are_equal_to_the_bit() -> None:
    run_ranks(gathers_are_exact, 2)


def compiled(backend: str) -> None:
    """torch 2.11 compiled collectives that work in place to gradients of zero, and broke the graph at each."""
    for how in (TpOverlap.none, TpOverlap.chunked):
        for sequence in (True, False):
            for run in (mlp, unordered):
                torch._dynamo.reset()
                compare(how, 2, sequence, run, torch.float32, partial(torch.compile, backend=backend, fullgraph=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_has_the_gradients_of_whole_layers(backend: str) -> None:
    run_ranks(compiled, 2, (backend,), timeout_s=240)


def block() -> None:
    """A transformer block is one graph, and has the gradients that it has without a compiler."""
    words = ["model=llama_tiny", "data=random", "data.seq_len=16", "train.device=cpu", "kernels.attention=reference"]
    for sequence in ("true", "false"):
        cfg = load([*words, "parallel.tp=2", f"parallel.sequence={sequence}", "parallel.tp_overlap=chunked"])
        ctx = ParallelContext.create(Grid(tp=2), torch.device("cpu"))
        kernels = choose_kernels(cfg, ctx.device).kernels
        module = next(layer for layer in build_layers(cfg, ctx, kernels) if layer.repeats).factory()
        for number, parameter in enumerate(module.parameters()):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(10 * ctx.tp.rank + number))
        length = 8 if sequence == "true" else 16
        x = draw(1, 2, length, cfg.model.hidden_size, dtype=torch.float32).requires_grad_()
        wanted = [x, *module.parameters()]
        torch._dynamo.reset()
        graph = torch.compile(module, fullgraph=True, backend="aot_eager")
        found, expected = (torch.autograd.grad(run(x).square().sum(), wanted) for run in (graph, module))
        for got, want in zip(found, expected, strict=True):
            assert want.abs().max() > 0
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_block_is_one_graph() -> None:
    run_ranks(block, 2, timeout_s=180)


def choices() -> None:
    cpu, axis = torch.device("cpu"), axis_of(TpOverlap.none)
    for device in (cpu, torch.device("cuda", 0)):
        assert choose_overlap(TpOverlap.auto, axis, device) is TpOverlap.none, "gloo sends nothing from a GPU"
    with patch.object(dist, "get_backend", return_value="nccl"):
        assert choose_overlap(TpOverlap.auto, axis, torch.device("cuda", 0)) is TpOverlap.chunked
    assert choose_overlap(TpOverlap.chunked, axis, cpu) is TpOverlap.chunked
    assert choose_overlap(TpOverlap.symmetric, axis, torch.device("cuda", 0)) is TpOverlap.symmetric
    with pytest.raises(LaunchError, match=r"\[OCT515\].*this run is on CPUs\. Use parallel\.tp_overlap=auto"):
        choose_overlap(TpOverlap.symmetric, axis, cpu)
    host = f"host{dist.get_rank()}"
    with (
        patch("socket.gethostname", return_value=host),
        pytest.raises(LaunchError, match=r"these 2 ranks are on host0, host1\. Use parallel\.tp_overlap=chunked"),
    ):
        choose_overlap(TpOverlap.symmetric, axis, torch.device("cuda", 0))


def test_symmetric_memory_is_refused_where_there_is_none() -> None:
    run_ranks(choices, 2)


def test_the_functions_of_torch_that_symmetric_calls_are_there() -> None:
    library = symmetric.library()
    for name in ("_pipelined_all_gather_and_consume", "_pipelined_produce_and_all2all"):
        assert callable(getattr(library, name))
    for name in ("_low_contention_all_gather", "_low_contention_reduce_scatter"):
        assert callable(getattr(torch.ops.symm_mem, name))
