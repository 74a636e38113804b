"""A moderation trained by two gloo processes that hold half of each parameter; run by `test_sharded_training.py`.

accelerate shards on accelerators alone: on CPUs it takes DistributedDataParallel, silently. So the layers are sharded
here as its FSDP 2 does it, with `fully_shard`, and everything else is the project's own.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rectify.detectors.moderation import QAModeration
from rectify.training.detector import _Training, collate, whole_weights

PAIRS = [("How about it?", "No."), ("Who?", "Nobody at all."), ("Why?", "It is so."), ("Where is it?", "There.")]


def make(backbone, lora_r):
    torch.manual_seed(0)
    return QAModeration.from_backbone(backbone, max_length=40, lora_r=lora_r)


def losses(training, batch, steps=3):
    """The losses of some steps of AdamW."""
    optimizer = torch.optim.AdamW([each for each in training.parameters() if each.requires_grad], lr=0.01)
    found = []
    for _ in range(steps):
        loss = training(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def batch_of(moderation, rows):
    labels = [[float((row + place) % 3 == 0) for place in range(14)] for row in rows]
    ids = moderation.encode([PAIRS[row] for row in rows])
    return collate([{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)])


def sharded(rank, backbone, folder, lora_r):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / f"store-{lora_r}"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    moderation = make(backbone, lora_r)
    training = _Training(moderation, None)
    training.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    training.train()
    mesh = dist.init_device_mesh("cpu", (2,))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if lora_r else MixedPrecisionPolicy()
    for layer in moderation.inner.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=bf16)
    fully_shard(training, mesh=mesh, mp_policy=bf16)
    kinds = {name: type(each).__name__ for name, each in training.named_parameters()}
    held = sum(each.to_local().numel() for each in training.parameters() if isinstance(each, DTensor))
    found = losses(training, batch_of(moderation, (2 * rank, 2 * rank + 1)))
    dist.all_reduce(found)
    weights = whole_weights(moderation.model)
    if rank == 0:
        moderation.save_pretrained(folder / f"saved-{lora_r}", weights)
        report = {
            "not_sharded": [name for name, kind in kinds.items() if kind != "DTensor"],
            "held": held,
            "all": sum(each.numel() for each in training.parameters()),
            "losses": (found / 2).tolist(),
        }
        (folder / f"report-{lora_r}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def main(backbone, folder):
    # forked before anything is computed, so that torch is imported once
    runs = [
        processes.start_processes(sharded, (backbone, Path(folder), lora_r), nprocs=2, join=False, start_method="fork")
        for lora_r in (0, 4)
    ]
    for run in runs:
        while not run.join():
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
