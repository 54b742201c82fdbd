"""``python -m flame.data.train_tokenizer``: a byte-level BPE tokenizer from text."""

from flame.base.stop_signals import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flame.base.command_line import Parser, make_folder
from flame.base.errors import UsageError, exit_on_usage_error
from flame.base.log import init_logger, logger
from flame.base.paths import path_argument
from flame.data.prepare import add_source_flags, one_source
from flame.data.shards import Shards, open_shards
from flame.data.tokenizer import bos_template

# ids 0 to 2, named as in flame.data.tokenizer.byte_tokenizer
_SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
_SMALLEST = 256 + len(_SPECIAL)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; the same for the same documents, however many threads count them.

    It gives back every string exactly. Text that spells a special token stays text, and no special token is
    added by itself, as with the built-in ``byte``. Words are split as GPT-2 does.

    Args:
        documents: Text to learn the merges from.
        vocab_size: Tokens, of which 256 are the bytes and 3 are bos 0, eos 1 and pad 2.

    Raises:
        ValueError: ``vocab_size`` is below 259, or the text has too few pairs for it.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(
            f"--vocab_size {vocab_size}: expected at least {_SMALLEST}: 256 bytes, bos, eos and pad"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"--vocab_size {vocab_size}: the text gives {backend.get_vocab_size()} tokens only; "
            "ask for fewer, or use more text"
        )
    bos, eos, pad = _SPECIAL
    backend.post_processor = bos_template(bos, backend.token_to_id(bos))  # pyright: ignore[reportArgumentType]  # the tokenizer was trained with this token, so it has an id
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        split_special_tokens=True,
    )


def save(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the folder, which must not exist; it is there complete or not at all.

    Raises:
        UsageError: It exists or cannot be written.
    """
    out = out.absolute()
    if os.path.lexists(out):
        raise UsageError(f"--out {out} exists; name a folder that does not, or delete it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.unfinished-", dir=out.parent) as near:
            # a folder in it, since that one is for its owner alone
            tokenizer.save_pretrained(Path(near) / "tokenizer")
            shutil.move(Path(near) / "tokenizer", out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from None


def _documents(shards: Shards) -> Iterator[str]:
    for shard in range(shards.count):
        yield from shards.read(shard, 0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flame.data.train_tokenizer",
        description="Trains a byte-level BPE tokenizer and writes it as a folder for --model.tokenizer_path.",
        epilog="The data flags mean what they mean in training (bash train.sh -h), for one source.",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, help="folder to write, which must not exist"
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        required=True,
        help="tokens, 256 bytes, bos, eos and pad among them",
    )
    add_source_flags(parser)
    return parser


def main() -> None:
    """Trains the tokenizer and writes its folder."""
    init_logger()
    with exit_on_usage_error():
        args = _parser().parse_args()
        if args.dataset is None:
            raise UsageError("--training.dataset is needed: the text to learn from")
        if os.path.lexists(args.out):
            # before the work that it would throw away
            raise UsageError(f"--out {args.out} exists; name a folder that does not, or delete it")
        try:
            shards = open_shards(one_source(args), streaming=False)
            make_folder(f"--out {args.out}: the folder", args.out.absolute().parent)
            tokenizer = train_tokenizer(_documents(shards), args.vocab_size)
        except ValueError as error:
            raise UsageError(str(error)) from None
        save(tokenizer, args.out)
    logger.info(
        f"{args.out}: {len(tokenizer):,} tokens; use it with --model.tokenizer_path {args.out}"
    )


if __name__ == "__main__":
    raise_at_interrupt()
    main()
