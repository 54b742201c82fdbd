"""The random state of a run: Python's, numpy's and torch's generators, of every rank."""

import pickle
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful


def seed_host(seed: int) -> None:
    """Seeds Python's and numpy's generators; torchtitan seeds torch's alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


class RandomState(Stateful):
    """The generators' states as part of a checkpoint.

    All ranks' states are one entry, so that any number of ranks can read it: rank ``r`` continues with the
    state that rank ``r`` had; a rank that did not exist is seeded by ``seed`` and ``r``. The GPU's generator
    is seeded so too where the checkpoint was written by another type of device.

    Args:
        group: Gloo group of all ranks, which must save and load together.
        device: Device of this rank.
        seed: Seed of the run.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, seed: int) -> None:
        self.group, self.device, self.seed = group, device, seed

    def state_dict(self) -> dict[str, Any]:
        own = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "device_type": self.device.type,
        }
        if self.device.type != "cpu":
            own["device"] = torch.get_device_module(self.device).get_rng_state(self.device)
        states: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(states, own, group=self.group)
        # bytes, since the entries of a checkpoint that are tensors must keep their shape
        return {"states": pickle.dumps(states)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = pickle.loads(state_dict["states"])
        rank = dist.get_rank(self.group)
        own = states[rank] if rank < len(states) else None
        if own is None or own["device_type"] != self.device.type:
            derived = np.random.SeedSequence([self.seed, rank]).generate_state(1, np.uint64)[0]
            seed_host(int(derived))
            torch.manual_seed(int(derived))
        if own is not None:
            random.setstate(own["python"])
            np.random.set_state(own["numpy"])
            torch.set_rng_state(own["torch"])
            if self.device.type != "cpu" and own["device_type"] == self.device.type:
                torch.get_device_module(self.device).set_rng_state(own["device"], self.device)
