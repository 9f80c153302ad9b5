"""Experiment files: the schema with every key, its default and its checks, and the reading of YAML with overrides.

Everything here is a frozen value that knows nothing of how it is used, and imports no torch, so that it runs on a login
node. Other rooms take the section that they need rather than the whole experiment.
"""

from pipeline.config.data import CacheConfig, CropConfig, DataConfig, LocalCropConfig
from pipeline.config.engine import EngineConfig, KernelsConfig
from pipeline.config.model import DepthSpan, ModelConfig, Span
from pipeline.config.reading import dump_config, load_config, parse_config
from pipeline.config.schema import (
    CheckpointConfig,
    EvalConfig,
    ExperimentConfig,
    HeadsConfig,
    LossConfig,
    MetricsConfig,
    OptimConfig,
    RunConfig,
    SamplingConfig,
)

__all__ = [
    "CacheConfig",
    "CheckpointConfig",
    "CropConfig",
    "DataConfig",
    "DepthSpan",
    "EngineConfig",
    "EvalConfig",
    "ExperimentConfig",
    "HeadsConfig",
    "KernelsConfig",
    "LocalCropConfig",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "SamplingConfig",
    "Span",
    "dump_config",
    "load_config",
    "parse_config",
]
