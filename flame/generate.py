"""``python -m flame.generate``: generates text with an exported model and prints it token by token.

With ``--interactive`` every line is a separate prompt, which the model continues; a base model does not answer
questions. After each text it prints the speed, and the share of the cached values with any weight, which is the share
that the decoding kernels read.
"""

from flame.base.stop_signals import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()

import argparse
import io
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.utils import logging as transformers_logging

import flame.models  # teaches transformers the model
from flame.base.command_line import Parser
from flame.base.errors import UsageError, exit_on_usage_error, require_unicode
from flame.base.paths import text_argument
from flame.models.key_ranges import count_reads
from flame.models.loading import READING_ERRORS, unreadable
from flame.run.generate import encode, load, write


def _stream(
    model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, args: argparse.Namespace
) -> None:
    """Prints a text while it is generated, then tokens, speed and share of the values read."""
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
    """Reads the flags and prints the continuation."""
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
                raise UsageError(
                    f"--{flag} has no effect with --temperature 0; leave one of them out"
                )
        for flag, value, is_valid, expected in (
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
            if not is_valid:
                raise UsageError(f"--{flag} must be {expected}, got {value}")
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
            # so that a line that is not valid UTF-8 is read, and refused by name
            sys.stdin.reconfigure(errors="surrogateescape")
        for line in sys.stdin:
            with exit_on_usage_error():
                require_unicode("--interactive: a line", line)
                _stream(model, tokenizer, line.rstrip("\n"), args)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        sys.exit(130)


if __name__ == "__main__":
    raise_at_interrupt()
    main()
