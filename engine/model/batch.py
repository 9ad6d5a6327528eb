"""What a model eats: one micro-batch as the data gives it. Shapes: B rows, S positions of the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.parallel.cross_entropy import IGNORE
from engine_kernels.ops import Documents

__all__ = ["IGNORE", "Batch", "Documents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of one replica; the same on all its ranks."""

    tokens_BS: Tensor
    """int64."""
    labels_BS: Tensor
    """int64, `IGNORE` where there is no target."""
    samples_B: Tensor
    """Global sample numbers, int64: no two rows of a run share one. Dropout masks are functions of them."""
    lengths_B: Tensor | None = None
    """Positions before the padding at the end, int64. None: no row is padded, or what comes before does not see it."""
    token_types_BS: Tensor | None = None
    """Segment of each token, int64; None: all 0."""
    sentence_B: Tensor | None = None
    """Class of each row for the sentence head, int64."""
    documents: Documents | None = None
    """Pieces of documents that see only themselves; labels are `IGNORE` where the next token is of another one. None:
    a token sees all of its row that comes before it."""

    @property
    def length(self) -> int:
        """S."""
        return self.tokens_BS.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`; copies from pinned memory do not wait."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        return Batch(
            tokens_BS=self.tokens_BS.to(device, non_blocking=True),
            labels_BS=self.labels_BS.to(device, non_blocking=True),
            samples_B=self.samples_B.to(device, non_blocking=True),
            lengths_B=move(self.lengths_B),
            token_types_BS=move(self.token_types_BS),
            sentence_B=move(self.sentence_B),
            documents=None if self.documents is None else self.documents.to(device),
        )
