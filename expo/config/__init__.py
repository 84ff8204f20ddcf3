"""The configuration of a training run and of an evaluation: typed, frozen sections, read from YAML and flags.

Defaults are those of the paper (EXPO, arXiv 2605.09923 and 2605.11403, section 4.1). Where the paper defers to the
DAPO-17K recipe (arXiv 2503.14476, section 4.1, and its published run script), the field says so. The embedded
demonstration overrides them in `recipes/ledger.yaml`. `--help-all` prints the text under each field.
"""

from expo.config.algorithm import CurriculumSection, KLSection, ObjectiveSection, RewardSection
from expo.config.engine import EngineConfig
from expo.config.evaluation import EVALUATION_FIELDS, EvalConfig, evaluation_values
from expo.config.general import DataSection, DeadlineSection, ModelSection, RunSection
from expo.config.load import DEFAULT_RECIPE, RECIPES, load_config, parse_command_line
from expo.config.policy import OptimizerSection, PolicySection
from expo.config.run import RunConfig
from expo.config.sampling import EvaluationSection, RolloutSection, VllmSection
from expo.config.section import changed_settings

__all__ = [
    "DEFAULT_RECIPE",
    "EVALUATION_FIELDS",
    "RECIPES",
    "CurriculumSection",
    "DataSection",
    "DeadlineSection",
    "EngineConfig",
    "EvalConfig",
    "EvaluationSection",
    "KLSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PolicySection",
    "RewardSection",
    "RolloutSection",
    "RunConfig",
    "RunSection",
    "VllmSection",
    "changed_settings",
    "evaluation_values",
    "load_config",
    "parse_command_line",
]
