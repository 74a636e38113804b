"""On a GPU the processor does what it does on a CPU."""

from copy import deepcopy

import pytest
import torch

from rectify import RectificationProcessor, Tilt


@pytest.mark.gpu
def test_rectified_scores_are_those_of_the_cpu(model, q_network):
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = []
    for device in ("cpu", "cuda"):
        own, network = deepcopy(model).to(device), deepcopy(q_network).to(device)
        processor = RectificationProcessor(network, Tilt(beta=4), model=own, do_sample=False)
        out = own.generate(
            prompts.to(device),
            logits_processor=[processor],
            **processor.generate_kwargs(),
            min_new_tokens=8,
            max_new_tokens=8,
            output_scores=True,
            return_dict_in_generate=True,
        )
        found.append((out.sequences.cpu(), torch.stack(out.scores).cpu()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-3, rtol=1e-3)
