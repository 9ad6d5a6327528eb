"""Short samples put together in rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """First item of each row, then the number of items: int64 (rows + 1,). Each of `sizes` is at most `capacity`.

    Items stay in order, and a row takes as many as fit (next fit): it wastes less than the first item of the next row.
    """
    until = np.concatenate([[0], np.cumsum(sizes)])
    following = (np.searchsorted(until, until[:-1] + capacity, side="right") - 1).tolist()
    firsts, item = [], 0
    while item < len(following):
        firsts.append(item)
        item = following[item]
    return np.array([*firsts, len(following)], dtype=np.int64)
