"""The options of `search`: how `python -m engine.train -m` goes through values. A single run does not read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config.enums import Direction, SearchMethod


@dataclass(slots=True, kw_only=True)
class SearchConfig:
    """Several runs from one command."""

    method: SearchMethod = SearchMethod.grid
    study: str | None = None
    """Folder of the search inside run.dir. None: run.name and the method."""
    jobs: int = 1
    """Runs at once. Visible GPUs are shared out evenly among them."""
    metric: str = "val_loss"
    """Key of metrics.jsonl; its last value is a run's result."""
    direction: Direction = Direction.minimize
    space: dict[str, str] = field(default_factory=dict)
    """Option -> values, beside those on the command line: `log(1e-5,1e-2)`, `interval(0,0.2)`, `choice(1,2)`, `1,2`."""
    trials: int = 24
    """coarse_to_fine: runs in all. Those that are neither fine nor final are coarse."""
    coarse_steps: float = 0.25
    """Length of a coarse run over train.steps."""
    fine_trials: int = 7
    """Runs around the best of the coarse ones."""
    fine_steps: float = 0.5
    """Length of a fine run over train.steps."""
    final_seeds: int = 3
    """Whole runs of the best values, each with its own train.seed."""
    prune: bool = True
    """End coarse and fine runs whose metric is worse than the median of the others at the same step."""
    prune_checks: int = 4
    """Validations in a coarse or fine run, for pruning; they replace train.eval_every there."""
    seed: int = 0
    """Seed of the sampler."""
