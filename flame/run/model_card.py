"""``README.md`` of an exported model: what it is, how to load it, and how it was trained."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedTokenizerFast

from flame.checkpoints.step_folder import step_of
from flame.data.bos import before_prompt
from flame.data.locate import local_path
from flame.data.text import PYTHON_DOCS
from flame.models import SoftpickTransformerConfig, normalizer_of
from flame.run.fingerprint import BATCH_KEY, RUN_FILE
from flame.run.metrics_file import METRICS_FILE, read_metrics
from flame.run.record import RECORD_FOLDER

_BODY = """---
{header}
---

# {title}

A language model of {parameters:,} parameters with **{normalizer}** attention (`attn_impl` {attn_impl}), trained with flame on torchtitan.
It is a base model: it continues text.

```python
import flame.models  # teaches transformers the model; without it transformers does not know {model_type}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

`flame` is the trainer's package: `pip install -e .` in its checkout. `python -m flame.generate --model {folder} --prompt "The "` lets the model write.

| | |
|---|---|
{table}
"""


def model_card(
    config: SoftpickTransformerConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    bos: str,
    parameters: int,
    checkpoint: Path,
    folder: Path,
    run: Path | None,
) -> str:
    """The text of the card, with facts from the files of the run.

    Args:
        config: Configuration of the model.
        tokenizer: Tokenizer of the run.
        bos: Mode of `flame.data.bos` that the model was trained in.
        parameters: Number of the model's weights.
        checkpoint: Folder ``step-N`` that is exported.
        folder: Folder of the exported model.
        run: Folder of the run; None where it is not known.
    """
    normalizer = normalizer_of(config.attn_impl)
    begins = " ".join(tokenizer.convert_ids_to_tokens(before_prompt(tokenizer, bos))) or "no token"
    facts = {
        "attention normalizer": normalizer,
        "layers, heads, width": f"{config.num_hidden_layers}, {config.num_attention_heads}, {config.hidden_size}",
        "vocabulary": f"{config.vocab_size:,}",
        "a text begins with": f"{begins} (`--training.bos {bos}`), which the tokenizer adds",
    }
    datasets: list[str] = []
    if run is not None:
        more, datasets = _of_run(run, step_of(checkpoint))
        facts |= more
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=sorted({"softpick", "flame", normalizer, config.model_type}),
        datasets=datasets or None,
    )
    return _BODY.format(
        header=header.to_yaml(),
        title=run.resolve().name if run is not None else folder.resolve().name,
        parameters=parameters,
        normalizer=normalizer,
        attn_impl=config.attn_impl,
        model_type=config.model_type,
        folder=folder,
        table="\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
    )


def _of_run(run: Path, step: int) -> tuple[dict[str, Any], list[str]]:
    """Facts about the training, and the datasets that are on the hub."""
    made = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    seq_len, batch = made["--training.seq_len"], made[BATCH_KEY]
    facts = {
        "training": f"step {step:,}, {step * seq_len * batch:,} tokens",
        "sequence length": f"{seq_len:,} tokens",
        "data": made["--training.dataset"],
        "tokenizer": made["--model.tokenizer_path"],
    }
    metrics = [x for x in read_metrics(run / METRICS_FILE) if x["step"] <= step]
    for key, name in (("loss", "training loss"), ("validation_loss", "validation loss")):
        if newest := [x for x in metrics if key in x]:
            facts[name] = f"{newest[-1][key]:.4f} nats per token at step {newest[-1]['step']:,}"
    records = sorted((run / RECORD_FOLDER).glob("*.json"))
    if records:
        record = json.loads(records[-1].read_text(encoding="utf-8"))
        git = record["git"]
        changed = " with changes" if git.get("patch") else ""
        facts["command"] = f"`{record['command']}`"
        facts["commit"] = f"{git['commit']}{changed}" if git["commit"] else git["reason"]
        facts["device"] = record["device"]
        names = ("torch", "transformers", "triton")
        versions = record["versions"]
        facts["versions"] = ", ".join(f"{x} {versions[x]}" for x in names if versions[x])
    return facts, [name for name in made["--training.dataset"].split(",") if _is_on_hub(name)]


def _is_on_hub(dataset: str) -> bool:
    try:
        return dataset != PYTHON_DOCS and local_path("", dataset, "") is None
    except ValueError:
        # a path that is gone
        return False


def _cell(value: object) -> str:
    """The value as text on one line, escaped for a table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
