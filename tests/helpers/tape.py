"""What a CUDA graph does, on a CPU: operations with the tensors and numbers that they were recorded with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.runtime.graphs import Repeater, Work

_aten = torch.ops.aten
READS = (_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.unique_consecutive, _aten.equal)
"""Operations whose result the host waits for."""


class _Recording(TorchDispatchMode):
    """Lists operations. Those that write in place write nothing yet; what others give is of the right shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        assert func.overloadpacket not in READS, f"{func} makes the host wait"
        kwargs = kwargs or {}
        if not func._schema.is_mutable:
            result = func(*args, **kwargs)
        else:
            written = [argument.name for argument in func._schema.arguments if _is_written(argument)]
            named = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
            returned = [named[name] for name in written][: len(func._schema.returns)]
            result = returned[0] if len(returned) == 1 else tuple(returned) or None
        self.calls.append((func, args, kwargs, result))
        return result


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class Tape(Repeater):
    """A recorder for `GraphedPasses`: Python runs once, and only tensors that stay where they are tell passes apart."""

    def record(self, work: Work) -> Work:
        """See `Recorder`."""
        recording = _Recording()
        with recording:
            work()
        return lambda: _replay(recording.calls)


@torch.no_grad()
def _replay(calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
    for func, args, kwargs, result in calls:
        again = func(*args, **kwargs)
        for was, now in zip(tree_leaves(result), tree_leaves(again), strict=True):
            if isinstance(was, Tensor) and was.data_ptr() != now.data_ptr():
                was.copy_(now)
