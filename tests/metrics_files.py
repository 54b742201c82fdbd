"""Reads what runs leave behind, and the flags of a small run."""

import json

from small_model import write_model, write_text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 12


def small_flags(folder):
    """Flags of a run of 2 layers of width 32 on 29 KB of text."""
    return {
        "model.config": str(write_model(folder)),
        "model.tokenizer_path": "byte",
        "training.dataset": str(write_text(folder)),
        "training.steps": STEPS,
        "training.batch_size": 4,
        "training.seq_len": 32,
        "validation.freq": 100,
        "metrics.log_freq": 1,
        "sample.max_new_tokens": 0,
        "lr_scheduler.warmup_steps": 2,
    }


def records(folder, name="metrics.jsonl"):
    def refuse(text):
        raise ValueError(f"{text} is not JSON")

    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def curve(folder, key, name="metrics.jsonl"):
    return {record["step"]: record[key] for record in records(folder, name) if key in record}


def drawn(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def summary(folder, step):
    return json.loads((folder / "spikes" / f"step-{step}" / "summary.json").read_text())
