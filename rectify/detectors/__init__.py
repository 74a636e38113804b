"""Detectors of toxic text: from text to the probability that it is toxic."""

from rectify.detectors.classifier import DetectorConfig, ToxicityClassifier

__all__ = ["DetectorConfig", "ToxicityClassifier"]
