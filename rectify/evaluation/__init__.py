"""Measurements of rectified generation."""
