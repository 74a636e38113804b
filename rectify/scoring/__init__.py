"""Toxicity scores of texts: local scorers, a Perspective-compatible client and server, and a cache."""

from rectify.errors import UnknownAttributeError
from rectify.scoring.load import load_scorer
from rectify.scoring.scores import ATTRIBUTES, Reason, Scorer, Scores

__all__ = ["ATTRIBUTES", "Reason", "Scorer", "Scores", "UnknownAttributeError", "load_scorer"]
