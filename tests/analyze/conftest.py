"""Models, and the report on them, for the tests of `flame.analyze`."""

import json
import sys
import types

import pytest
from analyze_runs import LENGTHS, export, run
from small_model import write_model, write_text

from flame.models import read_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two seeds of softmax and of softpick, with the curves of their runs, and text."""
    root = tmp_path_factory.mktemp("models")
    write_text(root)
    for normalizer in ("softmax", "softpick"):
        config = read_config(write_model(root, normalizer=normalizer))
        for seed in (0, 1):
            run = root / f"{normalizer}-{seed}"
            export(run / "hf", config, seed)
            with open(run / "metrics.jsonl", "w") as file:
                for step in (10, 20):
                    numbers = {"step": step, "time": 1.0, "loss": 5.0 + seed - step / 10}
                    file.write(json.dumps(numbers | {"attention/zeros": 0.25}) + "\n")
    return root


@pytest.fixture(scope="module")
def report(models):
    """The report of all four models, with stand-ins for what quantises and what asks for passkeys."""

    def quantize_weights(model, bits, group_size=64):
        model.lm_head.weight.data *= bits

    def passkey_accuracy(model, tokenizer, length, *, depths, samples, seed):
        return {depth: depth / 2 for depth in depths}

    def passkey_loss(model, tokenizer, length, *, depths, samples, seed):
        return {d: {"with_key": 1.0, "other_key": 2.0, "without_key": 3.0} for d in depths}

    quantized = types.ModuleType("flame.analysis.quantized")
    quantized.quantize_weights = quantize_weights
    passkey = types.ModuleType("flame.analysis.passkey")
    passkey.passkey_accuracy, passkey.passkey_loss = passkey_accuracy, passkey_loss
    names = ["softmax-0", "softmax-1", "softpick-0", "softpick-1"]
    out = models / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flame.analysis.quantized", quantized)
        patch.setitem(sys.modules, "flame.analysis.passkey", passkey)
        run(
            patch,
            *["--model", *(models / name / "hf" for name in names)],
            *["--label", "softmax", "softmax", "softpick", "softpick"],
            *["--run", *(models / name for name in names)],
            *["--data", models / "text.txt", "--out", out, "--samples", 3],
            *["--lengths", *LENGTHS, "--bits", 2, 8, "--passkey_lengths", 40],
            *["--passkey_depths", 0, 1, "--first_token", "bos", "--interventions"],
        )
    return out
