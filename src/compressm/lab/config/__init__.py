"""The configuration of a training run: what may stand in a YAML file, and how it is read."""

from compressm.lab.config.data import DataConfig
from compressm.lab.config.model import Layer, ModelConfig
from compressm.lab.config.reading import OWN, builtin_configs, load_config, parse_config, present_form, read_yaml
from compressm.lab.config.schema import (
    CompressionConfig,
    Config,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)

__all__ = [
    "OWN",
    "CompressionConfig",
    "Config",
    "DataConfig",
    "Layer",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
    "builtin_configs",
    "load_config",
    "parse_config",
    "present_form",
    "read_yaml",
]
