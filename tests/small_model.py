"""The model and the text of tests that train: seconds on a CPU."""

import json
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def write_model(folder, *, normalizer="softpick", **keys):
    """A JSON configuration of 2 layers of width 32 in ``folder``; ``keys`` replace others of the tiny model's."""
    raw = json.loads((ROOT / "configs" / f"{normalizer}_transformer_tiny.json").read_text())
    raw |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | keys
    file = folder / f"{normalizer}_small.json"
    file.write_text(json.dumps(raw))
    return file


def write_text(folder):
    """29 KB of arithmetic."""
    lines = (f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}.\n" for i in range(600))
    file = folder / "text.txt"
    file.write_text("".join(lines))
    return file


def checkpoint_activations(model):
    """Recomputes the layers of a model of transformers in backward."""
    # its name before transformers 5.24
    older = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})


def padded(rows, side):
    """Token ids ``[B, T]`` of rows of several lengths, padded with 0 on one side, and their attention mask."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[i, part], mask[i, part] = row, 1
    return ids, mask
