"""Detectors of toxic text: from text to the probability that it is toxic."""

from rectify.detectors.adapter_blend import AdapterBlend
from rectify.detectors.classifier import ToxicityClassifier
from rectify.detectors.config import DetectorConfig
from rectify.detectors.gated import GatedDetector, load_detector

__all__ = ["AdapterBlend", "DetectorConfig", "GatedDetector", "ToxicityClassifier", "load_detector"]
