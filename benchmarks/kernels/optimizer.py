"""Suite `optimizer`: a step of AdamW over one flat tensor; norm, scaling and sums of the gradients of many.

A step reads parameters and both moments in fp32 and the gradient in bf16, and writes the first three and a copy of the
parameters in bf16: 28 bytes an element, counted for all systems, whatever else they move.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contest import Bench, Case, Entrant, Judge, clean, contest, judge_by
from benchmarks.kernels.copying import COPY, MOST_BYTES, copy_case, copy_entrant, write_of_copy
from engine_kernels import plain
from engine_kernels.ops import AccumulateFn

OCTANT, TORCH = "octant triton", "torch fused + copies"
FOREACH = "torch foreach"
TORCH_SUMS = "torch add_"
STEP = "step"
STEP_BYTES = 28
_HELD_BYTES = 14 + 18 + 6 + 2
"""An element's bytes while both systems are there: Octant's, torch's with a gradient in fp32, the inputs, and spare."""
_OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_JUDGED = 2**20
"""Elements at both ends that are compared."""
_FACTOR = 0.999
"""So near to one that bf16 rounds it away and values stay what they are, sample after sample."""


def run(bench: Bench) -> None:
    """The step, then the gradients."""
    count = 5000 if bench.quick else 1_400_000_000
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info(bench.device)[0] - 2 * MOST_BYTES
        while count * _HELD_BYTES > free:
            count //= 2
    _step(bench, count)
    if not bench.budget.over():
        _gradients(bench)
    if not bench.budget.over():
        _sums(bench)


def _ends(x: Tensor) -> Tensor:
    return torch.cat([x[:_JUDGED], x[-_JUDGED:]]).float()


def _step(bench: Bench, count: int) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    parameter = torch.randn(count, generator=generator, device=bench.device)
    gradient = torch.randn(count, generator=generator, device=bench.device, dtype=torch.bfloat16)
    wanted = _exact_step(_ends(parameter), _ends(gradient))
    facts = {"suite": "optimizer", "elements": count, "bytes_per_element": STEP_BYTES}
    case = Case(f"adamw n{count:.2g}", {STEP: float(STEP_BYTES * count)}, "gb_per_s", facts, _step_judge(wanted))
    makers: dict[str, Callable[[], Entrant]] = {
        COPY: partial(copy_entrant, bench.device, case.work),
        OCTANT: partial(_octant_step, parameter, gradient),
        TORCH: partial(_torch_step, parameter, gradient),
    }
    times = contest(bench, case, makers, 2, {COPY: copy_case(case)})
    write_of_copy(bench, case, times)
    del parameter, gradient, makers
    clean(bench.device)


def _exact_step(parameter: Tensor, gradient: Tensor) -> list[Tensor]:
    """Change of the parameters, first and second moment after a first step, in fp64 (arXiv 1711.05101, algorithm 2)."""
    p, g, (first, second) = parameter.double(), gradient.double(), _OPTIONS["betas"]
    mean, square = (1 - first) * g, (1 - second) * g.square()
    root = (square / (1 - second)).sqrt() + _OPTIONS["eps"]
    change = -_OPTIONS["lr"] * (_OPTIONS["weight_decay"] * p + mean / (1 - first) / root)
    return [change, mean, square, p + change]


def _step_judge(wanted: list[Tensor]) -> Judge:
    """Changes are differences of fp32 parameters; the copy in bf16 is judged apart."""
    exact, rounded = judge_by(wanted[:3], 1e-3), judge_by(wanted[3:], 4e-3)
    return lambda found: exact(found[:3]) | {"error_copy": rounded(found[3:])["error"]}


def _octant_step(parameter: Tensor, gradient: Tensor) -> Entrant:
    from engine_kernels.triton.adamw import adamw_step

    p, mean, square = parameter.clone(), torch.zeros_like(parameter), torch.zeros_like(parameter)
    copy = torch.empty_like(gradient)

    def call() -> None:
        adamw_step(p, gradient, mean, square, **_OPTIONS, step=1, copy_out=copy)

    before = _ends(p)
    call()
    return Entrant({STEP: call}, [_ends(p) - before, _ends(mean), _ends(square), _ends(copy)])


def _torch_step(parameter: Tensor, gradient: Tensor) -> Entrant:
    p = parameter.clone()
    p.grad, copy = torch.empty_like(p), torch.empty_like(gradient)
    wide = p.grad
    optimizer = torch.optim.AdamW([p], **_OPTIONS, fused=True)

    def call() -> None:
        wide.copy_(gradient)
        optimizer.step()
        copy.copy_(p)

    before = _ends(p)
    call()
    state = optimizer.state[p]
    found = [_ends(p) - before, _ends(state["exp_avg"]), _ends(state["exp_avg_sq"]), _ends(copy)]
    return Entrant({STEP: call}, found)


def _shapes(hidden: int, layers: int) -> list[tuple[int, ...]]:
    """Parameters of layers of a GPT, 12 each."""
    wide: list[tuple[int, ...]] = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
    return [*wide, *((shape[0],) for shape in wide), *[(hidden,)] * 4] * layers


def _gradients(bench: Bench) -> None:
    """300 gradients in bf16, as of a GPT of 1.3 B parameters."""
    hidden, layers = (16, 2) if bench.quick else (2048, 25)
    generator = torch.Generator(bench.device).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=bench.device, dtype=torch.bfloat16)
    tensors = [draw(shape) for shape in _shapes(hidden, layers)]
    count = sum(x.numel() for x in tensors)
    squares = torch.stack([x.float().square().sum().double() for x in tensors])
    facts = {"suite": "optimizer", "tensors": len(tensors), "elements": count}
    work = {"norm": 2.0 * count, "scale": 4.0 * count}
    judge = judge_by([squares.sum().sqrt(), tensors[0].float() * _FACTOR], 1e-2)
    case = Case(f"gradients {len(tensors)} tensors n{count:.2g}", work, "gb_per_s", facts, judge)
    makers: dict[str, Callable[[], Entrant]] = {
        COPY: partial(copy_entrant, bench.device, case.work),
        OCTANT: partial(_octant_gradients, tensors),
        FOREACH: partial(_torch_gradients, tensors),
    }
    times = contest(bench, case, makers, 1, {COPY: copy_case(case)})
    write_of_copy(bench, case, times)


def _sums(bench: Bench) -> None:
    """As many gradients in bf16, the first of a step copied into sums in fp32, others added to them."""
    hidden, layers = (16, 2) if bench.quick else (2048, 25)
    generator = torch.Generator(bench.device).manual_seed(2)
    shapes = _shapes(hidden, layers)
    gradients = [torch.randn(x, generator=generator, device=bench.device, dtype=torch.bfloat16) for x in shapes]
    count = sum(x.numel() for x in gradients)
    facts = {"suite": "optimizer", "tensors": len(gradients), "elements": count}
    work = {"first": 6.0 * count, "add": 10.0 * count}
    judge = judge_by([gradients[0].float() * 2, gradients[-1].float() * 2], 1e-6)
    case = Case(f"sums {len(gradients)} tensors n{count:.2g}", work, "gb_per_s", facts, judge)
    makers: dict[str, Callable[[], Entrant]] = {
        COPY: partial(copy_entrant, bench.device, case.work),
        OCTANT: partial(_octant_sums, gradients),
        TORCH_SUMS: partial(_summed, plain.accumulate, gradients),
    }
    times = contest(bench, case, makers, 1, {COPY: copy_case(case)})
    write_of_copy(bench, case, times)


def _octant_sums(gradients: list[Tensor]) -> Entrant:
    from engine_kernels.triton.accumulate import accumulate

    return _summed(accumulate, gradients)


def _summed(accumulate: AccumulateFn, gradients: list[Tensor]) -> Entrant:
    totals = [torch.empty_like(x, dtype=torch.float32) for x in gradients]

    def call(first: bool) -> None:
        for total, x in zip(totals, gradients, strict=True):
            accumulate(total, x, first=first)

    call(True)
    call(False)
    found = [totals[0].clone(), totals[-1].clone()]
    return Entrant({"first": partial(call, True), "add": partial(call, False)}, found)


def _octant_gradients(tensors: list[Tensor]) -> Entrant:
    from engine_kernels.triton.grad_norm import scale_, squared_norm

    own, factor = [x.clone() for x in tensors], torch.tensor(_FACTOR, device=tensors[0].device)
    return _measured(lambda: squared_norm(own).sqrt(), lambda: scale_(own, factor), own)


def _torch_gradients(tensors: list[Tensor]) -> Entrant:
    own, factor = [x.clone() for x in tensors], torch.tensor(_FACTOR, device=tensors[0].device)
    return _measured(
        lambda: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(own))),
        lambda: torch._foreach_mul_(own, factor),
        own,
    )


def _measured(norm: Callable[[], Tensor], scale: Callable[[], Any], own: list[Tensor]) -> Entrant:
    found = norm()
    scale()
    return Entrant({"norm": norm, "scale": scale}, [found, own[0]])
