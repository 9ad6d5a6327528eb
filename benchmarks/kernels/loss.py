"""Suite `loss`: the last linear layer and the cross-entropy together. Shapes: T tokens, D hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.contest import BOTH, Bench, Case, Entrant, clean, contest, judge_by
from benchmarks.kernels.timing import reason

IGNORE = -100
OCTANT, PLAIN, COMPILED, LIGER = "octant triton", "torch", "torch.compile", "liger"
MEMORY = "extra memory"
_LIMIT = 0.05
"""Gradients that are summed over pieces of the tokens in bf16 are that far from fp32."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (T,D), weight (V,D), labels (T,) -> mean over the labels that are not `IGNORE`."""


def run(bench: Bench) -> None:
    """8192 tokens, hidden 4096, the vocabulary of Llama 3."""
    tokens, hidden, vocabulary = (24, 16, 48) if bench.quick else (8192, 4096, 128256)
    generator = torch.Generator(bench.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=bench.device, dtype=torch.bfloat16)
    x_TD, weight_VD = draw(tokens, hidden), draw(vocabulary, hidden) * hidden**-0.5
    labels_T = torch.randint(vocabulary, (tokens,), generator=generator, device=bench.device)
    labels_T[:: 16 if tokens > 16 else 4] = IGNORE
    leaves = [x_TD.requires_grad_(), weight_VD.requires_grad_()]
    losses: dict[str, Callable[[], Loss]] = {
        OCTANT: partial(_octant, vocabulary, (labels_T != IGNORE).sum().float()),
        PLAIN: lambda: plain,
        COMPILED: partial(_compiled, bench.device),
        LIGER: _liger,
    }
    calls: dict[str, Callable[[], Sequence[Tensor]]] = {}

    def maker(name: str) -> Entrant:
        calls[name] = partial(_both, losses[name](), leaves, labels_T)
        return Entrant({BOTH: calls[name]}, calls[name]())

    facts = {"suite": "loss", "tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    wanted = _exact(x_TD, weight_VD, labels_T)
    name = f"linear cross-entropy T{tokens} D{hidden} V{vocabulary}"
    case = Case(name, {BOTH: 6.0 * tokens * hidden * vocabulary}, "tflops", facts, judge_by(wanted, _LIMIT))
    del wanted
    times = contest(bench, case, {system: partial(maker, system) for system in losses}, 1)
    if bench.device.type == "cuda":
        for system in times:
            _write_memory(bench, case, system, calls[system])


def plain(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """All logits at once, the softmax in fp32."""
    return F.cross_entropy(F.linear(x_TD, weight_VD).float(), labels_T, ignore_index=IGNORE)


def _compiled(device: torch.device) -> Loss:
    return torch.compile(plain, backend="inductor" if device.type == "cuda" else "aot_eager")


def _liger() -> Loss:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
    return lambda x_TD, weight_VD, labels_T: module(weight_VD, x_TD, labels_T)


def _octant(vocabulary: int, divisor: Tensor) -> Loss:
    from engine_kernels.triton.linear_cross_entropy import linear_cross_entropy

    return partial(linear_cross_entropy, divisor=divisor, vocab_size=vocabulary)


def _both(loss: Loss, leaves: Sequence[Tensor], labels_T: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients by x and weight."""
    x_TD, weight_VD = leaves
    value = loss(x_TD, weight_VD, labels_T)
    return (value.detach(), *torch.autograd.grad(value, leaves))


def _exact(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().float().requires_grad_() for x in (x_TD, weight_VD)]
    return _both(plain, leaves, labels_T)


def _write_memory(bench: Bench, case: Case, system: str, call: Callable[[], Sequence[Tensor]]) -> None:
    """Peak of what is allocated in one call beyond inputs and results, GiB."""
    clean(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    try:
        results = call()
    except Exception as error:
        bench.sheet.unavailable(case.name, f"{system}, memory", reason(error), **case.facts)
        return
    torch.cuda.synchronize(bench.device)
    kept = sum(x.nbytes for x in results)
    gib = (torch.cuda.max_memory_allocated(bench.device) - before - kept) / 2**30
    bench.sheet.add(case.name, system, MEMORY, "GiB", [gib], **case.facts)
    print(f"  {system}: {gib:.3f} GiB beyond inputs and gradients", flush=True)
