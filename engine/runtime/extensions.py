"""DeepSpeed's C++ extensions for steps in host memory and on NVMe: where they are kept, and what building them needs.

`python -m engine.runtime.extensions` builds the one that AdamW offload needs, as `make setup` does. DeepSpeed itself is
imported only to build.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch

from engine.config.derived import offloads
from engine.config.enums import Offload, OffloadStrategy, OptimizerName
from engine.config.schema import Config
from engine.errors import ConfigError, Violation

VARIABLE = "TORCH_EXTENSIONS_DIR"
"""Where torch builds and looks for extensions."""

_ADAM = "cpu_adam"


def export() -> None:
    """Let torch find the extensions that `make setup` built into this environment, and its own ninja before others.

    Another version of ninja would not know the commands that it was built with, and build it again: for most of a
    minute, beside processes that load it. A folder that the user has named stays.
    """
    if sys.prefix != sys.base_prefix:
        os.environ.setdefault(VARIABLE, str(Path(sys.prefix) / "torch_extensions" / f"torch-{torch.__version__}"))
    scripts = sysconfig.get_path("scripts")
    own = shutil.which("ninja", path=scripts)
    if own is not None and own != shutil.which("ninja"):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])


def require(cfg: Config) -> None:
    """Refuse offload that cannot run here, before any rank has built a model.

    Raises:
        ConfigError: 701 DeepSpeed's step in host memory is neither built nor can it be; 702 NVMe without libaio; 349 a
            strategy that overlaps with a GPU, without one.
    """
    export()
    found = []
    strategy = cfg.zero.offload_strategy
    overlaps = strategy in (OffloadStrategy.zenflow, OffloadStrategy.superoffload)
    if overlaps and not torch.cuda.is_available():
        found.append(
            Violation(
                code=349,
                option="zero.offload_strategy",
                value=strategy,
                rule="it overlaps the host's step with a GPU's work, and no CUDA device is visible",
                way_out="Start where a GPU is, or use zero.offload_strategy=plain",
            )
        )
    steps_there = offloads(cfg) and cfg.optim.name is OptimizerName.adamw
    if steps_there and not usable(_ADAM):
        found.append(
            Violation(
                code=701,
                option="zero.offload_optimizer",
                value=cfg.zero.offload_optimizer,
                rule=f"adamw steps in host memory with DeepSpeed's {_ADAM} extension, which is not built in "
                f"{os.environ.get(VARIABLE, 'the cache of torch')}, and {_missing()} to build it is not here",
                way_out="Install g++ and ninja and run 'make setup', or use zero.offload_optimizer=none or optim=sgd",
            )
        )
    for option in ("offload_optimizer", "offload_params"):
        if getattr(cfg.zero, option) is Offload.nvme and not usable("async_io"):
            found.append(
                Violation(
                    code=702,
                    option=f"zero.{option}",
                    value=Offload.nvme,
                    rule="DeepSpeed reads and writes NVMe with its async_io extension, which needs g++, ninja and the "
                    "library libaio with its headers, and not all of them are here",
                    way_out=f"Install libaio-dev (libaio-devel on RPM systems), or use zero.{option}=cpu",
                )
            )
    if found:
        raise ConfigError(found)


def usable(name: str) -> bool:
    """Whether extension `name` is built, or can be when it is first asked for."""
    folder = os.environ.get(VARIABLE)
    if folder is not None and (Path(folder) / name / f"{name}.so").is_file():
        return True
    return not _missing() and (name != "async_io" or _has_libaio())


def _missing() -> str:
    """The first tool that a build needs and this machine lacks, or nothing."""
    for tool in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(tool) is None:
            return tool
    return ""


def _has_libaio() -> bool:
    folders = ["/usr/include", "/usr/local/include", *os.environ.get("CPATH", "").split(os.pathsep)]
    return ctypes.util.find_library("aio") is not None and any(Path(f, "libaio.h").is_file() for f in folders if f)


def main() -> int:
    """Build DeepSpeed's CPU Adam if it is not built. 0 also when it cannot be: all but offload works without it."""
    export()
    if not usable(_ADAM):
        print(f"extensions: no {_missing()} here, so zero.offload_optimizer needs optim=sgd or optim=lion")
        return 0
    start = time.perf_counter()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load(verbose=False)
    print(f"extensions: {_ADAM} is ready after {time.perf_counter() - start:.0f} s, in {os.environ.get(VARIABLE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
