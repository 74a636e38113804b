"""Training whose parameters are sharded over processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moderation_records import write_backbone
from sharded_training import PAIRS, batch_of, losses, make

from rectify.detectors.moderation import QAModeration
from rectify.training.detector import _Training

SCRIPT = Path(__file__).with_name("sharded_training.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    backbone = write_backbone(folder / "backbone")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, str(SCRIPT), backbone, str(folder)], env=environment, check=True, timeout=120)
    return folder


@pytest.mark.parametrize(
    ("lora_r", "of_losses", "of_probabilities"),
    [(0, 1e-5, 1e-4), (4, 0.03, 0.25)],
    ids=["whole", "adapter in bfloat16"],
)
def test_two_processes_hold_half_and_learn_what_one_learns(place, lora_r, of_losses, of_probabilities):
    report = json.loads((place / f"report-{lora_r}.json").read_text())
    assert report["not_sharded"] == []
    assert report["held"] == pytest.approx(report["all"] / 2, rel=0.02)
    moderation = make(str(place / "backbone"), lora_r)
    alone = losses(_Training(moderation.train(), None), batch_of(moderation, range(4)))
    assert report["losses"] == pytest.approx(alone.tolist(), abs=of_losses)
    assert alone[-1] < alone[0]
    loaded = QAModeration.from_pretrained(place / f"saved-{lora_r}")
    assert loaded.label_probabilities(PAIRS) == pytest.approx(
        moderation.eval().label_probabilities(PAIRS), abs=of_probabilities
    )
    assert not any(isinstance(each, torch.distributed.tensor.DTensor) for each in loaded.parameters())
