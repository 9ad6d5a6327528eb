"""Implementations of attention: Octant's from the registry, and those of others that it does not have.

All calls take (B,S,N,H), (B,S,K,H), (B,S,K,H) and return (B,S,N,H), but for a system that lays its inputs out itself.
Shapes: B batch, S sequence, N query heads, K key/value heads, H head dim, T = B * S.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.contest import Unavailable
from engine_kernels import ops
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
    """What the registry is asked: the fields that it knows of these, the others as they are by default."""
    known: dict[str, Any] = {
        "device": device,
        "dtype": torch.bfloat16,
        "head_dim": case.head_dim,
        "documents": bool(case.pieces),
        "length": case.length,
        "groups": case.heads // case.kv_heads,
        "causal": case.causal,
    }
    names = {entry.name for entry in fields(Situation)}
    return Situation(**{name: value for name, value in known.items() if name in names})


def systems(
    case: AttentionCase, device: torch.device, tutorial: str | None = None, documents: Documents | None = None
) -> dict[str, Build]:
    """Every system, the registry's first and in its order."""
    found: dict[str, Build] = {
        impl.name: partial(_registered, impl, case, device, documents)
        for impl in implementations("attention")
        if impl.name != ORACLE
    }
    others: dict[str, Build] = {
        "flash_attn_4": partial(_flash_attn_4, case, documents),
        "flash_attn": partial(_flash_attn, case, documents),
        "flex": partial(_flex, case, device, documents),
    }
    if documents is None:
        # Inside documents torch has one kernel only, which `sdpa` calls.
        others = {
            "sdpa_cudnn": partial(_sdpa, case, device, SDPBackend.CUDNN_ATTENTION),
            "sdpa_flash": partial(_sdpa, case, device, SDPBackend.FLASH_ATTENTION),
            **others,
            TUTORIAL: partial(_tutorial, case, tutorial),
        }
    return found | {name: build for name, build in others.items() if name not in found}


def _registered(impl: Impl, case: AttentionCase, device: torch.device, documents: Documents | None) -> System:
    why = impl.supports(situation(case, device))
    if why is not None:
        raise Unavailable(why)
    options: dict[str, Any] = {} if documents is None else {"documents": documents}
    return System(partial(impl.fn, causal=case.causal, **options))


def _sdpa(case: AttentionCase, device: torch.device, backend: SDPBackend) -> System:
    if device.type != "cuda":
        raise Unavailable("needs a CUDA device")

    def call(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return ops.sdpa_attention(*qkv, causal=case.causal)

    return System(call)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(case: AttentionCase, device: torch.device, documents: Documents | None) -> System:
    if device.type != "cuda":
        raise Unavailable("needs a CUDA device")
    from torch.nn.attention.flex_attention import create_block_mask

    number_BS = None if documents is None else documents.numbers(case.batch, case.length)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = query >= key if case.causal else query == query
        return before if number_BS is None else before & (number_BS[b, query] == number_BS[b, key])

    mask = None
    if case.causal or number_BS is not None:
        rows = None if number_BS is None else case.batch
        mask = create_block_mask(seen, rows, None, case.length, case.length, device=device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)
        return out.transpose(1, 2)

    return System(call)


def _packed(varlen: Callable[..., Any], case: AttentionCase, documents: Documents) -> System:
    """A call over (T,N,H) with cumulative lengths as one over rows."""
    sizes: dict[str, Any] = {"cu_seqlens_q": documents.starts, "cu_seqlens_k": documents.starts}
    sizes |= {"max_seqlen_q": documents.longest, "max_seqlen_k": documents.longest}

    def call(*qkv: Tensor) -> Tensor:
        return _first(varlen(*(x.flatten(0, 1) for x in qkv), **sizes, causal=case.causal)).view_as(qkv[0])

    return System(call)


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _flash_attn_4(case: AttentionCase, documents: Documents | None) -> System:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    if documents is not None:
        return _packed(flash_attn_varlen_func, case, documents)
    return System(lambda *qkv: _first(flash_attn_func(*qkv, causal=case.causal)))


def _flash_attn(case: AttentionCase, documents: Documents | None) -> System:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if documents is not None:
        return _packed(flash_attn_varlen_func, case, documents)
    return System(partial(flash_attn_func, causal=case.causal))


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
