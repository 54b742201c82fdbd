"""The random state of a run: the generators of Python, numpy and torch on every rank."""

import pickle
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.stateful import Stateful


def seed_host(seed: int) -> None:
    """Seeds the generators of Python and numpy; torchtitan seeds those of torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


class RandomState(Stateful):
    """The generators' states as part of a checkpoint.

    One entry holds the states of all ranks, so any number of ranks can read it. Rank ``r`` continues with the state
    of rank ``r``; a rank that did not exist is seeded from ``seed`` and ``r``. So is the generator of the GPU if the
    checkpoint was written on another type of device.

    Args:
        group: Gloo group of all ranks, which must save and load together.
        device: Device of this rank.
        seed: Seed of the run.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, seed: int) -> None:
        self.group, self.device, self.seed = group, device, seed

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks, pickled; all ranks must call it."""
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
        # as bytes, since a tensor in a checkpoint must keep its shape
        return {"states": pickle.dumps(states)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the generators of this rank to its saved state, or seeds them."""
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
