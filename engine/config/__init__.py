"""Typed configuration: `schema` and `enums` (what can be asked), `load` (argv to dataclasses), `rules` (what fits).

Importing this package does not import Hydra; only `engine.config.load` does.
"""

from engine.config.enums import (
    Activation,
    Attention,
    Balance,
    Device,
    DType,
    Kernel,
    Norm,
    OptimizerName,
    Positions,
    ScheduleName,
    Switch,
    WandbMode,
)
from engine.config.schema import (
    Config,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    RunConfig,
    RuntimeConfig,
    ZeroConfig,
)
from engine.config.schema_checkpoint import CheckpointConfig
from engine.config.schema_data import DataConfig
from engine.config.schema_kernels import KernelsConfig
from engine.config.schema_training import PrecisionConfig, TrainingConfig

__all__ = [
    "Activation",
    "Attention",
    "Balance",
    "CheckpointConfig",
    "Config",
    "DType",
    "DataConfig",
    "Device",
    "Kernel",
    "KernelsConfig",
    "LoggingConfig",
    "ModelConfig",
    "Norm",
    "OptimConfig",
    "OptimizerName",
    "ParallelConfig",
    "Positions",
    "PrecisionConfig",
    "ProfileConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleName",
    "Switch",
    "TrainingConfig",
    "WandbMode",
    "ZeroConfig",
]
