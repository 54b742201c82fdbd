"""Generate, and count the share of the cached values that were read.

    python examples/share_of_values.py                                             # a tiny model, not trained
    python examples/share_of_values.py --model exp/softpick_transformer_tiny/hf    # what train.sh exported

Softpick gives most keys weight zero, and decoding does not read the values of those keys. With a reference, on a CPU,
the share is that of the keys with weight: what the kernels read.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flame.models  # teaches transformers the model
from flame.data.tokenizer import load_tokenizer
from flame.models.key_ranges import count_reads

ROOT = Path(__file__).parent.parent


def load(folder: str | None):
    """The model and its tokenizer; without a folder a tiny model with random weights."""
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model, AutoTokenizer.from_pretrained(folder)
    config = flame.models.read_config(ROOT / "configs" / "softpick_transformer_tiny.json")
    return AutoModelForCausalLM.from_config(config), load_tokenizer("byte")


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate, and count what is read of V.")
    parser.add_argument("--model", help="folder of an exported model (default: a tiny one)")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--max_new_tokens", type=int, default=50)
    parser.add_argument("--device", default="cpu", help="cuda for a model with a Triton attn_impl")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load(args.model)
    model.to(args.device).eval()
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    with count_reads() as reads:
        ids = model.generate(
            **inputs.to(args.device),
            max_new_tokens=args.max_new_tokens,
            do_sample=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    print(tokenizer.decode(ids[0], skip_special_tokens=True))
    print(f"{reads.share():.1%} of the values read, mean over layers and steps")


if __name__ == "__main__":
    main()
