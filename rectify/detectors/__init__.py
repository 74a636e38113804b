"""Detectors of toxic text: from text to the probability that it is toxic."""

from typing import TYPE_CHECKING

from rectify.lazy import lazy_attributes

if TYPE_CHECKING:
    from rectify.detectors.adapter_blend import AdapterBlend
    from rectify.detectors.classifier import ToxicityClassifier
    from rectify.detectors.config import DetectorConfig
    from rectify.detectors.gated import GatedDetector, load_detector
else:
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "AdapterBlend": "rectify.detectors.adapter_blend",
            "DetectorConfig": "rectify.detectors.config",
            "GatedDetector": "rectify.detectors.gated",
            "ToxicityClassifier": "rectify.detectors.classifier",
            "load_detector": "rectify.detectors.gated",
        },
    )

__all__ = ["AdapterBlend", "DetectorConfig", "GatedDetector", "ToxicityClassifier", "load_detector"]
