"""muP's learning rates (arXiv 2203.03466): the rate tuned at the base width serves all widths.

Table 8 gives SGD and Adam. The other rules follow from the same demand, that one step changes a hidden matrix W of
width n so that the change of W x stays of order one, which is: the change of W has entries of order 1/n when it is
aligned with x, as gradients are (arXiv 2310.17813 states it as a spectral norm of order one). All hidden sizes are
taken to grow with `hidden_size`. Initial weights, logits and attention are in `engine.config.derived`.
"""

from __future__ import annotations

from engine.config.enums import OptimizerName
from engine.parallel.logical import Role

# Power of m, the width over the base width, for matrices between hidden layers and for all other parameters.
_POWERS: dict[OptimizerName, tuple[float, float]] = {
    OptimizerName.sgd: (0.0, 1.0),
    # Entries of the update have a size of their own, whatever the gradient's.
    OptimizerName.adamw: (-1.0, 0.0),
    OptimizerName.lion: (-1.0, 0.0),
    OptimizerName.adafactor: (-1.0, 0.0),
    # The update has a share of the weights' norm, whose entries are of order 1/sqrt(n).
    OptimizerName.lamb: (-0.5, 0.0),
    # All singular values are 0.2 sqrt(n).
    OptimizerName.muon: (-0.5, 0.0),
}


def lr_scale(name: OptimizerName, role: Role, width_ratio: float) -> float:
    """Factor of the learning rate of a parameter of `role` in a model `width_ratio` times as wide as the base."""
    matrix, other = _POWERS[name]
    return float(width_ratio ** (matrix if role == "matrix" else other))
