"""Implementations of attention: all of the registry, and the kernel of Triton's tutorial.

All calls take (B,S,N,H), (B,S,K,H), (B,S,K,H) and return (B,S,N,H), but for a system that lays its inputs out itself.
Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim, T = B * S.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contest import Unavailable
from engine_kernels import ops  # noqa: F401  (registers the implementations)
from engine_kernels.documents import Documents
from engine_kernels.registry import Impl, Situation, implementations

__all__ = ["TUTORIAL", "AttentionCase", "Build", "System", "situation", "systems"]

TUTORIAL = "triton tutorial"
ORACLE = "reference"
"""Holds all scores, and is no contestant."""
_TUTORIAL_BLOCKS = (128, (64, 128), 3)
"""Rows, columns and stages of the tutorial's configurations that are tried: all 36 would take minutes to compile."""


@dataclass(frozen=True)
class AttentionCase:
    """Shapes of one case; `pieces`: lengths of the documents that the rows are packed with."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    pieces: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        kind = "documents" if self.pieces else "attention"
        mask = "causal" if self.causal else "full"
        shape = f"H{self.head_dim} S{self.length} B{self.batch} N{self.heads} K{self.kv_heads}"
        return f"{kind} {mask} {shape}"


@dataclass(frozen=True)
class System:
    """One implementation. `lay_out` swaps sequence and heads, both ways, where a system wants heads first."""

    call: Callable[..., Any]
    lay_out: Callable[[Tensor], Tensor] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


Build = Callable[[], System]
"""Imports, which may fail, happen here."""


def situation(case: AttentionCase, device: torch.device) -> Situation:
    """What the registry is asked."""
    return Situation(
        device,
        torch.bfloat16,
        head_dim=case.head_dim,
        length=case.length,
        groups=case.heads // case.kv_heads,
        causal=case.causal,
        documents=bool(case.pieces),
    )


def systems(
    case: AttentionCase, device: torch.device, tutorial: str | None = None, documents: Documents | None = None
) -> dict[str, Build]:
    """Every system, in the registry's order."""
    found: dict[str, Build] = {
        impl.name: partial(_registered, impl, case, device, documents)
        for impl in implementations("attention")
        if impl.name != ORACLE
    }
    if documents is None:
        found[TUTORIAL] = partial(_tutorial, case, tutorial)
    return found


def _registered(impl: Impl, case: AttentionCase, device: torch.device, documents: Documents | None) -> System:
    why = impl.supports(situation(case, device))
    if why is not None:
        raise Unavailable(why)
    options: dict[str, Any] = {} if documents is None else {"documents": documents}
    return System(partial(impl.fn, causal=case.causal, **options))


def _tutorial(case: AttentionCase, file: str | None) -> System:
    if file is None:
        raise Unavailable("no file was given (--tutorial)")
    if not Path(file).is_file():
        raise Unavailable(f"--tutorial {file} is not there")
    if case.heads != case.kv_heads:
        raise Unavailable("has no grouped heads")
    module, tried = _tutorial_module(file)
    scale = case.head_dim**-0.5
    # It rounds to fp16 inside, whatever its inputs; its last argument, warp specialisation, is for other architectures.
    return System(
        lambda q, k, v: module.attention(q, k, v, case.causal, scale, False),
        lambda x: x.transpose(1, 2).half().contiguous(),
        {"configurations": tried, "dtype": "float16"},
    )


@cache
def _tutorial_module(file: str) -> tuple[ModuleType, int]:
    """Triton's fused attention tutorial, with fewer configurations to try, and how many these are."""
    spec = importlib.util.spec_from_file_location("triton_attention_tutorial", file)
    if spec is None or spec.loader is None:
        raise Unavailable(f"--tutorial {file} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuned, (rows, columns, stages) = module._attn_fwd, _TUTORIAL_BLOCKS
    fewer = [
        config
        for config in tuned.configs
        if config.kwargs["BLOCK_M"] == rows and config.kwargs["BLOCK_N"] in columns and config.num_stages == stages
    ]
    tuned.configs = fewer or tuned.configs
    return module, len(tuned.configs)
