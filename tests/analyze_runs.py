"""`flame.analyze` called as a program, and exported models for it."""

import sys

import pytest
import torch

from flame import analyze
from flame.data.tokenizer import load_tokenizer
from flame.models import SoftpickTransformerForCausalLM

LENGTHS = [16, 48]


def export(folder, config, seed):
    torch.manual_seed(seed)
    model = SoftpickTransformerForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(40)
    model.save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    return model


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["flame.analyze", *map(str, words)])
    # models of seconds, and naive operators
    monkeypatch.setattr(analyze.torch.cuda, "is_available", lambda: False)
    analyze.main()


def refused(monkeypatch, capfd, *words):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    assert end.value.code == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("flame: error: ")]
    assert len(lines) == 1, lines
    return lines[0]
