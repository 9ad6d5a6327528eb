"""Loading: find the checkpoint, check all of it, then let each rank read its rectangles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from engine.checkpoint.manifest import MANIFEST, is_complete
from engine.checkpoint.reader import Reader, damaged
from engine.checkpoint.retention import CHECKPOINTS, complete_steps
from engine.checkpoint.shard_file import placed
from engine.errors import CheckpointError, Violation
from engine.protocols import Engine

LOAD = "checkpoint.load"
Shape = tuple[int, ...]


def candidates(path: Path, option: str = LOAD) -> list[Path]:
    """The checkpoints that `path` means, the one to try first in front.

    Args:
        path: of a checkpoint, a folder of checkpoints, or a run.

    Raises:
        CheckpointError: 631 there is none.
    """
    if is_complete(path) or (path / MANIFEST).is_file():
        return [path]
    for folder in (path / CHECKPOINTS, path):
        found = complete_steps(folder)
        if found:
            return found
    rule = "it holds no finished checkpoint"
    way_out = "Name the folder of a run that had checkpoint.every > 0, or one of its checkpoints/step-... folders"
    raise CheckpointError.of(631, option, path, rule, way_out)


def open_first(paths: Sequence[Path], say: Callable[[str], None], option: str = LOAD) -> Reader:
    """The first of the checkpoints that is whole, as far as its manifest and its sizes tell.

    Raises:
        CheckpointError: that of the last one, when none is.
    """
    for number, path in enumerate(paths):
        try:
            return Reader(path, option)
        except CheckpointError as error:
            if number + 1 == len(paths):
                raise
            say(f"{error}\ngoing on with the one before, {paths[number + 1]}")
    raise AssertionError("no paths")


def open_verified(paths: Sequence[Path], say: Callable[[str], None], option: str = LOAD) -> Reader:
    """The first of the checkpoints of which every byte is as it was written, for all ranks the same. Collective.

    Each rank reads a part. What one of them cannot open, on a host with an older view of the disk say, none takes.

    Raises:
        CheckpointError: 631 to 634 about the last one, when none is.
    """
    for number, path in enumerate(paths):
        reader, found, error = None, [""], None
        try:
            reader = Reader(path, option)
            found = [reader.seal]
        except CheckpointError as refusal:
            error, found = refusal, [f"rank {dist.get_rank()}: {refusal.violations[0].rule}"]
        seen = sorted(set(_everyone(found)))
        if reader is not None and seen == [reader.seal]:
            bad = _everyone(reader.damages(dist.get_rank(), dist.get_world_size()))
        else:
            bad = [line for line in seen if reader is None or line != reader.seal] or ["hosts see different manifests"]
        if reader is not None and not bad:
            return reader
        error = error or damaged(path, bad, option)
        if number + 1 == len(paths):
            raise error
        say(f"{error}\ngoing on with the one before, {paths[number + 1]}")
    raise AssertionError("no paths")


def _everyone(mine: list[str]) -> list[str]:
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return [line for part in found for line in part]


def require_same_optimizer(reader: Reader, kinds: Collection[str], option: str = LOAD) -> None:
    """Refuse a checkpoint of another optimizer. `kinds`: of this run's state. Raises CheckpointError 637."""
    found = reader.manifest.shapes.keys()
    if found != set(kinds):
        optimizer = reader.manifest.facts.get("config", {}).get("optim", {}).get("name")
        raise CheckpointError.of(
            637,
            option,
            reader.folder,
            f"it holds {', '.join(sorted(found))} (optim.name={optimizer}); this run has {', '.join(sorted(kinds))}",
            f"Use the optimizer options of the run that wrote it (optim.name={optimizer}), or "
            "checkpoint.initial_weights for its weights alone",
        )


def require_same_tensors(reader: Reader, kind: str, wanted: Mapping[str, Shape], option: str = LOAD) -> None:
    """Refuse a checkpoint of another model.

    Args:
        wanted: shape of every logical tensor of the model that has this `kind` of state.

    Raises:
        CheckpointError: 638 tensors missing or extra, 639 another shape; both name them.
    """
    there, found = reader.manifest.shapes.get(kind, {}), []
    missing, extra = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
    if missing or extra:
        lists = f"{len(missing)} tensors missing {missing[:3]}, {len(extra)} not in this model {extra[:3]}"
        found.append(_other_model(638, reader, f"it belongs to another model ({kind}): {lists}", option))
    for name in sorted(wanted.keys() & there.keys()):
        if tuple(wanted[name]) != there[name]:
            rule = f"{name} ({kind}) has shape {list(there[name])} there and {list(wanted[name])} in this model"
            found.append(_other_model(639, reader, rule, option))
    if found:
        raise CheckpointError(found[:8])


def _other_model(code: int, reader: Reader, rule: str, option: str) -> Violation:
    model = reader.manifest.facts.get("config", {}).get("model", {}).get("name", "?")
    way_out = f"Use the model options of the run that wrote it (model.name={model}; its manifest has them all)"
    return Violation(code=code, option=option, value=reader.folder, rule=rule, way_out=way_out)


def load(engine: Engine, reader: Reader, option: str = LOAD) -> int:
    """Fill the engine from `reader`, whose bytes were checked; returns the number of tensors. Collective.

    Raises:
        CheckpointError: see `require_same_optimizer` and `require_same_tensors`; nothing was changed then.
    """
    state = engine.state()
    mine: dict[str, dict[str, Shape]] = {}
    for slot in state.slots:
        mine.setdefault(slot.kind, {})[slot.piece.logical.name] = slot.piece.logical.shape
    parts: list[dict[str, dict[str, Shape]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    kinds = sorted({kind for part in parts for kind in part})
    wanted = {kind: {name: shape for part in parts for name, shape in part.get(kind, {}).items()} for kind in kinds}
    require_same_optimizer(reader, kinds, option)
    for kind in kinds:
        require_same_tensors(reader, kind, wanted[kind], option)
    for slot in state.slots:
        # Padding, which no rectangle covers, is zero in weights and moments alike.
        slot.values.zero_()
        for rectangle, values in placed(slot, engine.ctx):
            reader.read(slot.kind, slot.piece.logical.name, rectangle, values)
    numbers = reader.manifest.facts["numbers"]
    engine.adopt_state({name: numbers.get(name, value) for name, value in state.numbers.items()})
    return sum(len(named) for named in wanted.values())
