"""rectify: decoding-time detoxification of language models by dead-end analysis."""

from typing import TYPE_CHECKING

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
from rectify.lazy import lazy_attributes
from rectify.version import __version__

if TYPE_CHECKING:
    from rectify.detector_value import DetectorValue
    from rectify.hub import checkpoint_folder, load_language_model
    from rectify.processor import RectificationProcessor, Statistics
    from rectify.q_network import DeadEndQNetwork, QConfig, token_risks
    from rectify.rule import Advantage, Cap, Mask, Rule, Tilt, make_rule
else:
    # torch and transformers are imported with the first of these, and not before
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "Advantage": "rectify.rule",
            "Cap": "rectify.rule",
            "DeadEndQNetwork": "rectify.q_network",
            "DetectorValue": "rectify.detector_value",
            "Mask": "rectify.rule",
            "QConfig": "rectify.q_network",
            "RectificationProcessor": "rectify.processor",
            "Rule": "rectify.rule",
            "Statistics": "rectify.processor",
            "Tilt": "rectify.rule",
            "checkpoint_folder": "rectify.hub",
            "load_language_model": "rectify.hub",
            "make_rule": "rectify.rule",
            "token_risks": "rectify.q_network",
        },
    )

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
