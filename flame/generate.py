"""``python -m flame.generate``: lets an exported model write."""

import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import flame.models  # teaches transformers the model
from flame.cli import Parser
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

    Raises:
        UsageError: The model has weights that are not finite.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    for name, x in model.named_parameters():
        if not x.isfinite().all():
            raise UsageError(f"the model in {folder} cannot write: {name} is not finite")
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
    parser = Parser(
        prog="python -m flame.generate", description="Lets an exported model continue a text."
    )
    parser.add_argument("--model", required=True, help="folder of an exported model")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--max_new_tokens", type=int, default=200, help="tokens to write (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="of sampling; 0: the likeliest token each time (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    transformers_logging.disable_progress_bar()
    with exit_on_usage_error():
        args = parser.parse_args()
        if not (Path(args.model) / "config.json").is_file():
            raise UsageError(f"--model must be the folder of an exported model, got {args.model}")
        try:
            config = flame.models.read_config(args.model)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from None
        for flag, value, is_right, right in (
            ("max_new_tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                args.temperature,
                args.temperature == 0 or 0.01 <= args.temperature <= 100,
                "0, or between 0.01 and 100",
            ),
            ("seed", args.seed, 0 <= args.seed < 2**63, "at least 0 and below 2^63"),
        ):
            if not is_right:
                raise UsageError(f"--{flag} must be {right}, got {value}")
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
        except UsageError:
            raise
        # files that are missing or damaged, in the words of transformers, tokenizers and safetensors
        except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
            raise UsageError(
                f"--model {args.model} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from None
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
