"""``python -m flame.generate``: lets an exported model write."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import flame.models  # teaches transformers the model
from flame.errors import UsageError, exit_on_usage_error


def generate(
    folder: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The prompt and its continuation by the exported model in ``folder``.

    Args:
        folder: Folder that `flame.convert.dcp_to_hf` wrote.
        temperature: 0 takes the likeliest token each time.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    if ids.shape[1] == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]], device=device)
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    with torch.no_grad():
        ids = model.generate(ids, max_new_tokens=max_new_tokens, **sampling)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flame.generate", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of an exported model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    with exit_on_usage_error():
        try:
            config = flame.models.read_config(args.model)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from None
        if not Path(args.model).is_dir():
            raise UsageError(f"--model must be the folder of an exported model, got {args.model}")
        if args.temperature < 0 or args.max_new_tokens < 1:
            raise UsageError(
                "--temperature must be at least 0 and --max_new_tokens at least 1, "
                f"got {args.temperature} and {args.max_new_tokens}"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        flame.models.require_device(config.attn_impl, device)
        try:
            text = generate(
                args.model,
                args.prompt,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=args.seed,
                device=device,
            )
        except OSError as error:
            raise UsageError(f"--model {args.model}: {' '.join(str(error).split())}") from None
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
