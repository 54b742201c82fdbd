"""Fine-tune a model of transformers with softpick attention, documents packed without padding.

    python examples/finetune_packed.py                                     # a tiny model that is made up, on a CPU
    python examples/finetune_packed.py --model FOLDER --attn softpick      # yours, with the kernels, on a GPU

`DataCollatorWithFlattening` lays the documents of a batch end to end, and the operator sees their bounds: no token sees
another document. A model that was trained with softmax computes another function under softpick until it is trained
further: docs/softpick/CONVERT.md. Needs accelerate, as every Trainer of transformers does.
"""

import argparse
import tempfile

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

import flame.models  # noqa: F401, makes softpick an attn_implementation
from flame.data.tokenizer import load_tokenizer

DOCUMENTS = [f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}.\n" for i in range(400)]


def tiny_model(attn: str, vocab_size: int):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune with softpick attention, packed.")
    parser.add_argument("--model", help="folder or hub name (default: a tiny Llama, made up)")
    parser.add_argument(
        "--attn",
        choices=("softpick", "naive_softpick"),
        default="naive_softpick",
        help="the kernels, on a GPU, or the reference (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", help="folder of the result (default: it is not kept)")
    args = parser.parse_args()

    if args.model is None:
        tokenizer = load_tokenizer("byte")
        model = tiny_model(args.attn, len(tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation=args.attn)

    ids = [tokenizer(text).input_ids for text in DOCUMENTS]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=args.out or scratch,
                use_cpu=args.attn == "naive_softpick",
                max_steps=args.steps,
                per_device_train_batch_size=8,
                learning_rate=3e-3 if args.model is None else 1e-5,
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                seed=0,
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        )
        trainer.train()
        if args.out:
            # config.json names the operator: whoever loads the folder imports flame.models first
            trainer.save_model()
            tokenizer.save_pretrained(args.out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")


if __name__ == "__main__":
    main()
