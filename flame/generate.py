"""``python -m flame.generate``: lets an exported model write, token by token as they come.

With ``--interactive`` every line is a prompt of its own, which the model continues; a base model answers nothing. At
the end of each text stand the speed and the share of the cached values that had any weight, which is what the
decoding kernels read of them.
"""

import argparse
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

import flame.models  # teaches transformers the model
from flame.cli import Parser
from flame.data.bos import before_prompt
from flame.errors import UsageError, exit_on_usage_error, require_unicode
from flame.models.key_ranges import count_reads
from flame.models.loading import READING_ERRORS, load_model, unreadable
from flame.paths import text_argument


def load(folder: str, device: str) -> tuple[PreTrainedModel, Tokenizer]:
    """The exported model in ``folder``, ready to generate, and its tokenizer.

    Raises:
        UsageError: The model has weights that are not finite, or not all of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder).to(device).eval()
    # what the folder says of sampling is not asked for
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{name: getattr(model.generation_config, name) for name in ids}
    )
    return model, tokenizer


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt: what training put before a text, and the text; one id at least.

    A tokenizer that also ends a text would have the model write another one.
    """
    text = tokenizer(prompt, add_special_tokens=False).input_ids
    return [*before_prompt(tokenizer, "tokenizer"), *text] or [tokenizer.eos_token_id]


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    streamer: BaseStreamer | None = None,
) -> torch.Tensor:
    """Token ids ``[T]`` of the prompt and its continuation.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_k: Sample from so many of the likeliest tokens. Default: from all.
        top_p: Sample from the likeliest tokens that together have this probability. Default: from all.
        streamer: Given the ids as they come.
    """
    ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        # transformers would sample from 50 tokens where top_k is None
        limits = {"top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
        sampling = {"do_sample": True, "temperature": temperature, **limits}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **sampling,
    )[0]


def generate(
    folder: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The prompt and its continuation by the exported model in ``folder``, as `write` makes it."""
    model, tokenizer = load(folder, device)
    torch.manual_seed(seed)
    ids = write(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    return tokenizer.decode(ids, skip_special_tokens=True)


def _stream(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace
) -> None:
    """Prints a text as it is written, then how that went."""
    start = time.perf_counter()
    with count_reads() as reads:
        ids = write(
            model,
            tokenizer,
            prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    seconds = time.perf_counter() - start
    count = len(ids) - len(encode(tokenizer, prompt))
    share = f", {reads.share():.1%} of the values read" if reads.steps else ""
    sys.stderr.write(f"[{count} tokens, {count / seconds:.1f} tokens/s{share}]\n")


def main() -> None:
    parser = Parser(
        prog="python -m flame.generate", description="Lets an exported model continue a text."
    )
    parser.add_argument(
        "--model", type=text_argument, required=True, help="folder of an exported model"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument(
        "--interactive", action="store_true", help="continue each line of the input, up to its end"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=200, help="tokens to write (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="of sampling; 0: the likeliest token each time (default: %(default)s)",
    )
    parser.add_argument(
        "--top_k", type=int, help="sample from so many of the likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        help="sample from the likeliest tokens of so much probability together (default: all)",
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
        for flag in ("top_k", "top_p"):
            if getattr(args, flag) is not None and not args.temperature:
                raise UsageError(f"--{flag} is of sampling: leave it out with --temperature 0")
        for flag, value, is_right, right in (
            ("max_new_tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                args.temperature,
                args.temperature == 0 or 0.01 <= args.temperature <= 100,
                "0, or between 0.01 and 100",
            ),
            ("top_k", args.top_k, args.top_k is None or args.top_k >= 1, "at least 1"),
            (
                "top_p",
                args.top_p,
                args.top_p is None or 0 < args.top_p <= 1,
                "above 0 and at most 1",
            ),
            ("seed", args.seed, 0 <= args.seed < 2**63, "at least 0 and below 2^63"),
        ):
            if not is_right:
                raise UsageError(f"--{flag} must be {right}, got {value}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        flame.models.require_device(config.attn_impl, device)
        try:
            model, tokenizer = load(args.model, device)
        except UsageError:
            raise
        except READING_ERRORS as error:
            raise unreadable(args.model, error) from None
    torch.manual_seed(args.seed)
    try:
        if not args.interactive:
            _stream(model, tokenizer, args.prompt, args)
            return
        sys.stderr.write("a line to continue, Ctrl-D to end\n")
        if isinstance(sys.stdin, io.TextIOWrapper):
            # so that a line that is no UTF-8 arrives, and is refused by name
            sys.stdin.reconfigure(errors="surrogateescape")
        for line in sys.stdin:
            with exit_on_usage_error():
                require_unicode("--interactive: a line", line)
                _stream(model, tokenizer, line.rstrip("\n"), args)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
