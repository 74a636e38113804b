"""Losses and trainers."""

# before transformers' Trainer, which imports peft, and bitsandbytes with it
from rectify import quiet_peft as _quiet_peft  # noqa: F401
