"""The norm of gradients, clipping by it and scaling: one launch for all tensors of a dtype, however many there are.

Tensors are cut into chunks, and a table on the device gives each program the address of its chunk and the elements in
it. Chunks are the same wherever the kernels run and partial sums are added in a fixed order, so that a sum is always
the same.
"""

# Arguments of kernels have types that no annotation says.
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_kernels.interpreter import require_gpu
from engine_kernels.reference.grad_norm import check_clip, check_factor, check_tensors

_CHUNK = 32768
"""Elements of a program, whose squares are added in fp32."""
_BLOCK = 4096
"""Elements of a program that are loaded at once; 16 for each thread."""
_NUM_WARPS = 8
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _chunk(table, chunks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Start of the program's chunk, its elements, and how many of these stand in whole blocks that start at multiples
    of 16 bytes.
    """
    program = tl.program_id(0)
    address = tl.load(table + program)
    count = tl.load(table + chunks + program).to(tl.int32)
    whole = tl.where(address % 16 == 0, count // BLOCK * BLOCK, 0)
    return address.to(tl.pointer_type(DTYPE)), count, whole


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["partials"])
def _squared_norm_kernel(table, chunks, partials, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    start, count, whole = _chunk(table, chunks, DTYPE, BLOCK)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, whole, BLOCK):
        x = tl.load(tl.multiple_of(start + first, 16) + lanes).to(tl.float32)
        total = tl.fma(x, x, total)
    for first in range(whole, count, BLOCK):
        x = tl.load(start + first + lanes, mask=first + lanes < count, other=0.0).to(tl.float32)
        total = tl.fma(x, x, total)
    tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["factor"])
def _scale_kernel(table, chunks, factor, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        start, count, whole = _chunk(table, chunks, DTYPE, BLOCK)
        lanes = tl.arange(0, BLOCK)
        for first in range(0, whole, BLOCK):
            here = tl.multiple_of(start + first, 16) + lanes
            tl.store(here, (tl.load(here).to(tl.float32) * by).to(DTYPE))
        for first in range(whole, count, BLOCK):
            here = start + first + lanes
            inside = first + lanes < count
            tl.store(here, (tl.load(here, mask=inside).to(tl.float32) * by).to(DTYPE), mask=inside)


@triton.jit
def _clip_factor_kernel(norm, out, max_norm):
    x = tl.load(norm).to(tl.float64)
    factor = tl.minimum(max_norm / (x + 1e-6), 1.0)
    tl.store(out, tl.where(x < float("inf"), factor, float("nan")).to(tl.float32))


def _launches(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, Tensor]]:
    """The table of each dtype that occurs, int64 (2, chunks): addresses, and elements."""
    return [
        (dtype, _table([tensor for tensor in tensors if tensor.dtype == dtype and tensor.numel()]))
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors if tensor.numel())
    ]


def _table(tensors: Sequence[Tensor]) -> Tensor:
    cpu = torch.device("cpu")
    sizes = torch.tensor([tensor.numel() for tensor in tensors], device=cpu)
    starts = torch.tensor([tensor.data_ptr() for tensor in tensors], device=cpu)
    counts = (sizes + _CHUNK - 1) // _CHUNK
    owners = torch.repeat_interleave(counts)
    firsts = (torch.arange(len(owners), device=cpu) - (counts.cumsum(0) - counts)[owners]) * _CHUNK
    addresses = starts[owners] + firsts * tensors[0].element_size()
    table = torch.stack((addresses, (sizes[owners] - firsts).clamp(max=_CHUNK)))
    if tensors[0].device.type == "cuda":
        # Pageable memory would make the host wait for the device.
        table = table.pin_memory()
    return table.to(tensors[0].device, non_blocking=True)


def _check(tensors: Sequence[Tensor]) -> None:
    check_tensors(tensors)
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensors[{i}] in {tensor.dtype} must be in {', '.join(map(str, _DTYPES))}")
    if tensors:
        require_gpu("tensors[0]", tensors[0])


@torch.library.custom_op("octant::squared_norm", mutates_args=())
def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    dense = [tensor.contiguous() for tensor in tensors]
    launches = _launches(dense)
    partials = torch.empty(sum(table.shape[1] for _, table in launches), dtype=torch.float32, device=dense[0].device)
    done = 0
    with torch.cuda.device_of(partials):
        for dtype, table in launches:
            chunks = table.shape[1]
            _squared_norm_kernel[(chunks,)](
                table, chunks, partials[done:], DTYPE=_DTYPES[dtype], BLOCK=_BLOCK, num_warps=_NUM_WARPS
            )
            done += chunks
    return partials.sum(dtype=torch.float64)


@_squared_norm.register_fake
def _(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


@torch.library.custom_op("octant::scale_", mutates_args=("tensors",))
def _scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    dense = [tensor.contiguous() for tensor in tensors]
    with torch.cuda.device_of(factor):
        for dtype, table in _launches(dense):
            chunks = table.shape[1]
            _scale_kernel[(chunks,)](table, chunks, factor, DTYPE=_DTYPES[dtype], BLOCK=_BLOCK, num_warps=_NUM_WARPS)
    for tensor, scaled in zip(tensors, dense, strict=True):
        if scaled is not tensor:
            tensor.copy_(scaled)


@_scale.register_fake
def _(tensors: Sequence[Tensor], factor: Tensor) -> None:
    return None


@torch.library.custom_op("octant::clip_factor", mutates_args=())
def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    out = torch.empty((), dtype=torch.float32, device=norm.device)
    with torch.cuda.device_of(norm):
        _clip_factor_kernel[(1,)](norm, out, max_norm, num_warps=1)
    return out


@_clip_factor.register_fake
def _(norm: Tensor, max_norm: float) -> Tensor:
    return norm.new_empty((), dtype=torch.float32)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements of all tensors, with one launch for each dtype among them and one more.

    Squares of 32768 elements are added in fp32, in the fixed order of a tree, and these sums in fp64: elements beyond
    1.8e19 count as infinite. Nobody waits for the device. A captured graph goes on reading the memory that the tensors
    had.

    Args:
        tensors: fp32, bf16 or fp16, any shapes, on one device; copied where they are not contiguous.

    Returns:
        fp64 scalar on their device; NaN and infinity where the tensors hold them. Without tensors a 0 on the default
        device.

    Raises:
        ValueError: other dtypes; several devices; no CUDA device.
    """
    _check(tensors)
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return _squared_norm(list(tensors))


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply the tensors by `factor` in place, in fp32, and round each product once: one launch for each dtype.

    Where the device finds that `factor` is 1, it reads nothing else.

    Args:
        tensors: fp32, bf16 or fp16, any shapes, on one device, no memory in two of them; those that are not contiguous
            are copied, and copied back.
        factor: one number beside them, fp32 or fp64; NaN makes every element NaN.

    Raises:
        ValueError: other dtypes; several devices; no CUDA device; `factor` is not one number.
    """
    _check(tensors)
    check_factor(tensors, factor)
    if factor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"factor in {factor.dtype} must be in torch.float32 or torch.float64")
    if tensors:
        _scale(list(tensors), factor)


@torch.no_grad()
def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients with this norm are multiplied by so that their norm is at most `max_norm`, in one launch.

    min(1, max_norm / (norm + 1e-6)) as in torch.nn.utils.clip_grad_norm_ (arXiv 1211.5063, algorithm 1); NaN where the
    norm is not finite, so that a step that is given it is dropped on the device.

    Args:
        norm: one floating number on a CUDA device.
        max_norm: positive.

    Returns:
        fp32 scalar beside `norm`; nobody waits for it.

    Raises:
        ValueError: `norm` is not one floating number or on no CUDA device; `max_norm` is not positive.
    """
    check_clip(norm, max_norm)
    require_gpu("norm", norm)
    return _clip_factor(norm, max_norm)
