"""rectify: decoding-time detoxification of language models by dead-end analysis."""

from rectify.detector_value import DetectorValue
from rectify.errors import (
    CheckpointError,
    InvalidArgumentError,
    MissingExtraError,
    OutputError,
    PromptError,
    RectifyError,
    ScorerError,
    TrajectoryError,
    VocabularyMismatchError,
)
from rectify.hub import checkpoint_folder, load_language_model
from rectify.processor import RectificationProcessor, Statistics
from rectify.q_network import DeadEndQNetwork, QConfig, token_risks
from rectify.rule import Advantage, Cap, Mask, Rule, Tilt, make_rule
from rectify.version import __version__

__all__ = [
    "Advantage",
    "Cap",
    "CheckpointError",
    "DeadEndQNetwork",
    "DetectorValue",
    "InvalidArgumentError",
    "Mask",
    "MissingExtraError",
    "OutputError",
    "PromptError",
    "QConfig",
    "RectificationProcessor",
    "RectifyError",
    "Rule",
    "ScorerError",
    "Statistics",
    "Tilt",
    "TrajectoryError",
    "VocabularyMismatchError",
    "__version__",
    "checkpoint_folder",
    "load_language_model",
    "make_rule",
    "token_risks",
]
