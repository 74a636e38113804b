"""Toxicity scores of texts: local scorers, a Perspective-compatible client and server, and a cache."""

from rectify.scoring.load import load_scorer
from rectify.scoring.scores import ATTRIBUTES, Reason, Scorer, Scores, UnknownAttributeError

__all__ = ["ATTRIBUTES", "Reason", "Scorer", "Scores", "UnknownAttributeError", "load_scorer"]
