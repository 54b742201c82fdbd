"""The evaluation harness through an exported model, on tasks that need no network."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import write_model

from flame import lm_eval
from flame.data.tokenizer import load_tokenizer
from flame.models import SoftpickTransformerForCausalLM, read_config

ROOT = Path(__file__).parent.parent

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXT = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """Of the tokens ``continuation`` behind ``context``, without the harness."""
    ids = torch.tensor([context + continuation])
    scores = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return scores.gather(1, ids[0, len(context) :, None]).sum().item()


@pytest.mark.slow
def test_the_harness_scores_an_exported_model_as_the_model_does(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    torch.manual_seed(0)
    # as a GPU trains it; the harness passes attn_implementation on
    config = read_config(write_model(tmp_path, attn_impl="parallel_softpick_attn"))
    model = SoftpickTransformerForCausalLM(config).eval()
    # steps of the size of a trained model's, or all choices are alike
    model.lm_head.weight.data *= 20
    tokenizer = load_tokenizer("byte")
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")

    choices = [" one", " two", " forty-two"]
    questions = [{"question": f"{i} plus {i} is", "choices": choices} for i in range(7)]
    texts = [{"text": f"{i} times {i} is {i * i}. " * (i + 1)} for i in range(3)]
    model.set_attn_implementation("naive_softpick")
    best = [
        max(
            range(3),
            key=lambda c: log_likelihood(
                model, tokenizer(q["question"]).input_ids, [*choices[c].encode()]
            ),
        )
        for q in questions
    ]
    # all right but the last two
    for i, question in enumerate(questions):
        question["answer"] = best[i] if i < 5 else (best[i] + 1) % 3
    write_lines(tmp_path / "questions.jsonl", questions)
    write_lines(tmp_path / "text.jsonl", texts)
    (tmp_path / "tasks").mkdir()
    for name, task in (("choice", CHOICE), ("text", TEXT)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(folder=tmp_path))

    done = subprocess.run(
        f"""{sys.executable} -m flame.lm_eval run --model hf --device cpu --batch_size 4
        --model_args pretrained={tmp_path}/hf,backend=causal,attn_implementation=naive_softpick
        --tasks local_choice,local_text --include_path {tmp_path}/tasks --output_path {tmp_path}/results.json""".split(),
        env=os.environ
        | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "|local_choice|" in done.stdout
    (file,) = tmp_path.glob("results*.json")
    results = json.loads(file.read_text())["results"]
    assert results["local_choice"]["acc,none"] == pytest.approx(5 / 7)
    # bos comes before a text, once, and is no part of it
    rows = [[*record["text"].encode()] for record in texts]
    nats = -sum(log_likelihood(model, [tokenizer.bos_token_id], row) for row in rows)
    expected = nats / math.log(2) / sum(map(len, rows))
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)


def test_says_which_extra_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as end:
        lm_eval.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flame: error: flame.lm_eval needs the package lm_eval (")
    assert line.endswith("): pip install -e '.[eval]'")


@pytest.mark.parametrize("folder", [".", "missing"])
def test_a_folder_without_a_model_is_one_line(tmp_path, monkeypatch, capsys, folder):
    path = tmp_path / folder
    argv = ["lm_eval", "run", "--model_args", f"dtype=float32,pretrained={path},backend=causal"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        lm_eval.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"flame: error: --model_args pretrained={path} must be a folder with")


def test_names_of_the_hub_are_left_to_the_harness():
    lm_eval.require_model(["--model_args", "pretrained=gpt2", "pretrained=org/name,dtype=float32"])


def test_a_file_that_holds_its_configuration_needs_no_other(tmp_path):
    lm_eval.require_model(["--model_args", f"pretrained={tmp_path},gguf_file=model.gguf"])
