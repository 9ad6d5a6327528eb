"""Which way messages between pipeline stages go."""

from __future__ import annotations

from engine.config.derived import sequence_multiple
from engine.config.enums import Transport
from engine.config.schema import Config
from engine.dist.context import ParallelContext
from engine.dist.init import DTYPES
from engine.parallel.symmetric import require_mapped
from engine.runtime.channels import Channels
from engine.runtime.executor import Messages
from engine.runtime.mailboxes import Mailboxes, SymmetricBoxes
from engine.topology.program import Program


def open_messages(cfg: Config, ctx: ParallelContext, program: Program) -> Messages:
    """What `parallel.pipeline_transport` means for the messages of `program`. Collective.

    Raises:
        LaunchError: see `require_mapped`.
    """
    if cfg.parallel.pipeline_transport is not Transport.copy_engine:
        return Channels(ctx, program)
    require_mapped(ctx.pp, ctx.device, "parallel.pipeline_transport", "copy_engine", "nccl")
    mailboxes = Mailboxes(program, ctx.pp.rank, ctx.device)
    positions = cfg.data.seq_len // sequence_multiple(cfg.parallel)
    elements = cfg.train.micro_batch * positions * cfg.model.hidden_size
    dtype = DTYPES[cfg.precision.dtype]
    timeout_s = cfg.train.timeout_s
    return mailboxes.open(SymmetricBoxes(ctx.pp, mailboxes.count, elements, dtype, ctx.device, timeout_s))
