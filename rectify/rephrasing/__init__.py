"""Fills the masks of a text with other words."""
