"""``python -m flame.data.prepare``: text to a folder of token files that training maps into memory."""

from flame.base.stop_signals import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.base.command_line import Parser
from flame.base.errors import UsageError, exit_on_training_error, exit_on_usage_error
from flame.base.files import apply_umask
from flame.base.log import init_logger, logger
from flame.base.paths import path_argument, split_list, text_argument
from flame.config.sections import DEFAULT_BOS, SHARE_UNITS, DataSource
from flame.data.bos import MODES, around_document, sequence_bos
from flame.data.prepared import (
    ENDS,
    ENDS_DTYPE,
    FORMAT,
    INDEX,
    TOKENS,
    sample_crc32,
    tokenizer_fingerprint,
    verify,
)
from flame.data.shards import Shards, open_shards
from flame.data.tokenizer import load_tokenizer
from flame.data.tokens import Encoder
from flame.data.workers import Workers

# characters that a process gets at a time; at least one document
_CHUNK = 1 << 20
_SECONDS_BETWEEN_LINES = 10


class _Stopped(Exception):  # noqa: N818  # no error: the user asked
    """SIGTERM or SIGHUP as an exception, so that unfinished files are removed as after Ctrl-C."""


def prepare(
    source: DataSource,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_path: str,
    out: Path,
    *,
    num_proc: int,
    bos: str = DEFAULT_BOS,
) -> None:
    """Writes the token files of a source; the same bytes whatever ``num_proc``.

    They are written next to ``out`` and moved there when all is on the disk, so ``out`` is either complete or absent.
    Memory holds a few pieces of 1 MiB of text for each process, and the content of one text file, JSON array or
    parquet row group.

    Args:
        source: What to read.
        tokenizer: Tokenizes it.
        tokenizer_path: Name of the tokenizer in the index.
        out: Folder to create, which must not exist.
        num_proc: Processes that tokenize; the calling one reads and writes.
        bos: A mode of `flame.data.bos`, that of the runs that will use the files.

    Raises:
        UsageError: ``out`` exists or cannot be written.
        ValueError: A file is empty or damaged, by name.
    """
    out = out.absolute()
    if os.path.lexists(out):
        raise UsageError(f"--out {out} exists; name a folder that does not, or delete it")
    # refuses a tokenizer without bos
    sequence_bos(tokenizer, bos)
    encoder = Encoder(tokenizer, bos)
    shards = open_shards(source, streaming=False)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"--out {out} must be writable: {error.strerror}") from None
    workers = Workers(encoder, num_proc, prefetch_factor=2)
    try:
        index = _write(shards, workers, encoder.dtype, folder)
        index |= {
            "bos": bos,
            "before_document": around_document(tokenizer, bos)[0],
            "tokenizer": {"path": tokenizer_path, **tokenizer_fingerprint(tokenizer)},
            "source": {
                flag: value
                for flag, value in (
                    ("training.dataset", source.dataset),
                    ("training.dataset_name", source.name),
                    ("training.dataset_split", source.split),
                    ("training.data_dir", source.data_dir),
                    ("training.data_files", source.data_files),
                )
                if value is not None
            },
            "versions": {name: version(name) for name in ("tokenizers", "transformers")},
        }
        with (folder / INDEX).open("w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, ensure_ascii=False) + "\n")
            _flush(file)
        # mkdtemp gives access to the owner only
        apply_umask(folder)
        folder.rename(out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error}") from None
    finally:
        workers.close()
        # it no longer exists if it was moved
        shutil.rmtree(folder, ignore_errors=True)


def _write(shards: Shards, workers: Workers, dtype: np.dtype, folder: Path) -> dict[str, object]:
    """Writes both files, in the order of the documents; returns their entries of the index."""
    tokens_sha256, ends_sha256 = hashlib.sha256(), hashlib.sha256()
    num_tokens = num_documents = num_characters = 0
    start = last_line = time.monotonic()
    with (folder / TOKENS).open("wb") as tokens_file, (folder / ENDS).open("wb") as ends_file:
        chunks = _chunks(shards)
        pending: deque = deque()
        while True:
            while len(pending) < workers.num_ahead and (chunk := next(chunks, None)) is not None:
                shard, texts = chunk
                pending.append((shard, sum(map(len, texts)), workers.submit(texts)))
            if not pending:
                break
            shard, size, future = pending.popleft()
            tokens, lengths = workers.result(future)
            ends = (num_tokens + np.cumsum(lengths)).astype(ENDS_DTYPE)
            for file, digest, array in (
                (tokens_file, tokens_sha256, tokens),
                (ends_file, ends_sha256, ends),
            ):
                file.write(array.data)
                digest.update(array.data)
            num_tokens += len(tokens)
            num_documents += len(lengths)
            num_characters += size
            now = time.monotonic()
            if now - last_line > _SECONDS_BETWEEN_LINES:
                last_line = now
                logger.info(
                    f"file or shard {shard + 1} of {shards.count}: {num_documents:,} documents, "
                    f"{num_characters:,} characters, {num_tokens:,} tokens, "
                    f"{num_tokens / (now - start):,.0f} tokens/s"
                )
        for file in (tokens_file, ends_file):
            _flush(file)
    seconds = time.monotonic() - start
    logger.info(
        f"{num_documents:,} documents, {num_characters:,} characters, {num_tokens:,} tokens in "
        f"{seconds:.1f} s, {num_tokens / seconds:,.0f} tokens/s"
    )
    return {
        "format": FORMAT,
        "dtype": dtype.str,
        "num_tokens": num_tokens,
        "num_documents": num_documents,
        "tokens_sha256": tokens_sha256.hexdigest(),
        "ends_sha256": ends_sha256.hexdigest(),
        "sample_crc32": sample_crc32(np.memmap(folder / TOKENS, dtype, "r")),
    }


def _chunks(shards: Shards) -> Iterator[tuple[int, list[str]]]:
    """Documents in groups of about _CHUNK characters, with the shard of the last."""
    texts: list[str] = []
    size = 0
    for shard in range(shards.count):
        for text in shards.read(shard, 0):
            texts.append(text)
            size += len(text) + 1
            if size >= _CHUNK:
                yield shard, texts
                texts, size = [], 0
    if texts:
        yield shard, texts  # pyright: ignore[reportPossiblyUnboundVariable]  # if there are texts, the loop has bound shard


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped(number)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the data flags of training, for one source; `one_source` reads them."""
    for flag, dest, default, text in (
        ("dataset", "dataset", None, "file, folder, Hugging Face name or python-docs"),
        (
            "dataset_name",
            "name",
            None,
            "configuration of a Hugging Face dataset or of a folder's card",
        ),
        ("dataset_split", "split", "train", "split of a Hugging Face dataset or of a folder"),
        ("data_dir", "data_dir", None, "folder within a Hugging Face dataset"),
        ("data_files", "data_files", None, "files of it, or a glob pattern in a folder"),
    ):
        text += "" if default is None else " (default: %(default)s)"
        parser.add_argument(f"--training.{flag}", dest=dest, default=default, help=text)


def one_source(args: argparse.Namespace) -> DataSource:
    """The source that the flags of `add_source_flags` name.

    Raises:
        UsageError: They name several.
    """
    if len(split_list(args.dataset)) > 1:
        raise UsageError(
            f"--training.dataset must be one source, got {args.dataset!r}; prepare a folder for each"
        )
    return DataSource(
        args.dataset, args.name, args.split, args.data_dir, args.data_files, SHARE_UNITS
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flame.data.prepare",
        description="Writes text as a folder of token files that training maps into memory.",
        epilog="The data flags mean what they mean in training (bash train.sh -h), for one source.",
    )
    parser.add_argument("--out", type=path_argument, help="folder to write, which must not exist")
    parser.add_argument("--verify", type=path_argument, help="check a finished folder instead")
    parser.add_argument(
        "--model.tokenizer_path",
        dest="tokenizer_path",
        type=text_argument,
        default="byte",
        help='folder, hub name or "byte" (default: %(default)s)',
    )
    parser.add_argument(
        "--training.bos",
        "--bos",
        dest="bos",
        choices=MODES,
        default=DEFAULT_BOS,
        help="how documents begin, as the runs to come have it (default: %(default)s)",
    )
    add_source_flags(parser)
    parser.add_argument(
        "--num_proc", type=int, default=1, help="processes that tokenize (default: %(default)s)"
    )
    return parser


def main() -> None:
    """Writes token files, or verifies them."""
    init_logger()
    with exit_on_usage_error(), exit_on_training_error():
        args = _parser().parse_args()
        if args.verify is not None:
            if len(sys.argv) > 3 or (len(sys.argv) > 2 and "=" in sys.argv[1]):
                raise UsageError("--verify takes a folder and no other flag")
            try:
                index = verify(args.verify)
            except ValueError as error:
                raise UsageError(str(error)) from None
            logger.info(f"{args.verify}: all {index['num_tokens']:,} tokens match their checksum")
            return
        if args.out is None or args.dataset is None:
            raise UsageError("--out and --training.dataset are needed, or --verify")
        if args.out.name in ("", ".."):
            raise UsageError(f"--out must be the name of a new folder, got {str(args.out)!r}")
        if args.num_proc < 1:
            raise UsageError(f"--num_proc must be at least 1, got {args.num_proc}")
        source = one_source(args)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _stop)
        try:
            tokenizer = load_tokenizer(args.tokenizer_path)
            prepare(
                source,
                tokenizer,
                args.tokenizer_path,
                args.out,
                num_proc=args.num_proc,
                bos=args.bos,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        except (KeyboardInterrupt, _Stopped) as stopped:
            logger.info(f"stopped; nothing was written to {args.out}")
            sys.exit(128 + (stopped.args[0] if stopped.args else signal.SIGINT))
    mode = "" if args.bos == DEFAULT_BOS else f" --training.bos {args.bos}"
    logger.info(
        f"train with --training.dataset {args.out} --model.tokenizer_path {args.tokenizer_path}{mode}"
    )


if __name__ == "__main__":
    raise_at_interrupt()
    main()
