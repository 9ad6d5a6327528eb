"""Documents that share rows and do not see each other, by cumulative lengths. Shapes: B rows, S positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """The pieces that the flattened (B * S) positions of a micro-batch are cut into.

    A document never reaches over the border of a row: what goes on in the next row is another piece, and so is the
    padding at the end of a row.
    """

    starts: Tensor
    """int32 (n + 1,), cumulative lengths: 0 first, B * S last, every row border among them, strictly rising."""
    longest: int
    """At least the most positions of a piece."""
    host: Tensor | None = None
    """`starts` in the host's memory where `starts` is not: reading lengths need not wait for the device."""

    def to(self, device: torch.device) -> Documents:
        """The same on `device`; copies from pinned memory do not wait."""
        moved = self.starts.to(device, non_blocking=True)
        return Documents(moved, self.longest, self.starts if self.starts.device.type == "cpu" else self.host)

    def numbers(self, rows: int, length: int) -> Tensor:
        """Number of the piece that each position is in, int64 (B, S)."""
        flat = torch.arange(rows * length, device=self.starts.device)
        return (torch.searchsorted(self.starts.long(), flat, right=True) - 1).view(rows, length)

    def positions(self, rows: int, length: int) -> Tensor:
        """Position of each token in its piece, int64 (B, S)."""
        flat = torch.arange(rows * length, device=self.starts.device).view(rows, length)
        return flat - self.starts.long()[self.numbers(rows, length)]


def piece_starts(lengths_B: Tensor, length: int) -> Tensor:
    """Cumulative lengths, int32 (2B + 1,), of rows of `length` positions cut into what is real and what is padding."""
    first_B = torch.arange(len(lengths_B), device=lengths_B.device, dtype=torch.int32) * length
    ends_B2 = torch.stack([first_B + lengths_B.int(), first_B + length], 1)
    return torch.cat([ends_B2.new_zeros(1), ends_B2.flatten()])
