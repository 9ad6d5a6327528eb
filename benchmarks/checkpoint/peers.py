"""What else saves the same state: DeepSpeed's own checkpoints, and torch's distributed ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from engine.protocols import Engine


def sync() -> None:
    """Wait until all ranks are here and what was written is on disk, as DeepSpeed and torch leave it to the system."""
    dist.barrier()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


def deepspeed_save(engine: Any, folder: Path) -> dict[str, float]:
    """Seconds that a step waits for DeepSpeed, and until all is on disk."""
    started = time.perf_counter()
    # The converter asks for these, and an engine without them is no reason for it to fail.
    engine._ds.save_checkpoint(str(folder), tag="global_step1", client_state={"iteration": 1})
    dist.barrier()
    stall = time.perf_counter() - started
    sync()
    return {"stall": stall, "total": time.perf_counter() - started}


def deepspeed_load(engine: Any, folder: Path) -> float:
    """Seconds until weights and optimizer are back."""
    dist.barrier()
    started = time.perf_counter()
    engine._ds.load_checkpoint(str(folder), tag="global_step1")
    dist.barrier()
    return time.perf_counter() - started


def universal_conversion(folder: Path, out: Path, workers: int) -> float:
    """Seconds of DeepSpeed's offline conversion, which makes a checkpoint loadable in another layout."""
    package = find_spec("deepspeed")
    assert package is not None and package.submodule_search_locations
    script = Path(package.submodule_search_locations[0]) / "checkpoint" / "ds_to_universal.py"
    words = [sys.executable, str(script), "--input_folder", str(folder / "global_step1"), "--output_folder", str(out)]
    words += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers), "--inject_missing_state"]
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"the conversion ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return took


def distributed_state(engine: Engine) -> dict[str, Any]:
    """The state for torch.distributed.checkpoint: this rank's stretch of each flat tensor, as a sharded one."""
    mesh = init_device_mesh(engine.ctx.device.type, (dist.get_world_size(),))
    found: dict[str, Any] = {}
    for slot in engine.state().slots:
        found.setdefault(slot.kind, []).append(slot.values)
    state = {}
    for kind, values in found.items():
        # DeepSpeed keeps one flat tensor per kind; its pieces are neighbours in memory.
        for storage in {value.untyped_storage().data_ptr(): value for value in values}.values():
            flat = torch.tensor([], dtype=torch.float32, device=storage.device).set_(storage.untyped_storage())
            sizes = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
            dist.all_gather_object(sizes, flat.numel())
            if len(set(sizes)) > 1:
                raise SystemExit("unequal shards: take a layout in which all ranks hold as much")
            state[f"{kind}.{len(state)}"] = DTensor.from_local(flat, mesh, [Shard(0)], run_check=False)
    return state


def dcp_save(engine: Engine, folder: Path, *, asynchronous: bool) -> dict[str, float]:
    """Seconds that a step waits for torch's distributed checkpoint, and until all is on disk."""
    state, group = distributed_state(engine), dist.new_group(backend="gloo")
    dist.barrier()
    started = time.perf_counter()
    if asynchronous:
        # Its background work needs a group of the CPU's.
        future = dcp.async_save(state, checkpoint_id=str(folder), process_group=group)
        stall = time.perf_counter() - started
        future.result()
    else:
        dcp.save(state, checkpoint_id=str(folder))
        stall = time.perf_counter() - started
    sync()
    return {"stall": stall, "total": time.perf_counter() - started}


def dcp_load(engine: Engine, folder: Path) -> float:
    """Seconds until the flat tensors are back; the weights in the dtype of the run are not made."""
    state = distributed_state(engine)
    dist.barrier()
    started = time.perf_counter()
    dcp.load(state, checkpoint_id=str(folder))
    dist.barrier()
    return time.perf_counter() - started
