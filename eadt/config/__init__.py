"""The configuration of a run: one YAML file, checked as a whole before anything is started.

Imports pydantic and yaml only. ``load_config`` reads a file; ``check_paths`` looks at the local paths
it names; ``inactive_settings`` says which settings do nothing yet.
"""

from eadt.config.checks import check_paths, inactive_settings, require_paths
from eadt.config.control import (
    MPS_PRESETS,
    ElasticConfig,
    MpsConfig,
    PolicyConfig,
    ScheduleEntry,
    SupervisorConfig,
)
from eadt.config.loading import ConfigProblem, InvalidConfigError, config_from_dict, load_config, problem_at
from eadt.config.outside import (
    CheckpointConfig,
    PowerConfig,
    PowerEstimateConfig,
    ReportConfig,
    ResourcesConfig,
    RunSection,
    SimulatedPowerConfig,
    StorageConfig,
)
from eadt.config.reference import json_schema, reference_markdown
from eadt.config.root import RunConfig
from eadt.config.training import (
    BYTE_TOKENIZER,
    PYTHON_STDLIB,
    AdaptiveTrainingConfig,
    DeepSpeedConfig,
    Precision,
    TrainingConfig,
)

__all__ = [
    "BYTE_TOKENIZER",
    "MPS_PRESETS",
    "PYTHON_STDLIB",
    "AdaptiveTrainingConfig",
    "CheckpointConfig",
    "ConfigProblem",
    "DeepSpeedConfig",
    "ElasticConfig",
    "InvalidConfigError",
    "MpsConfig",
    "PolicyConfig",
    "PowerConfig",
    "PowerEstimateConfig",
    "Precision",
    "ReportConfig",
    "ResourcesConfig",
    "RunConfig",
    "RunSection",
    "ScheduleEntry",
    "SimulatedPowerConfig",
    "StorageConfig",
    "SupervisorConfig",
    "TrainingConfig",
    "check_paths",
    "config_from_dict",
    "inactive_settings",
    "json_schema",
    "load_config",
    "problem_at",
    "reference_markdown",
    "require_paths",
]
