"""The folder of token files that `flame.data.prepare` writes: its format, reading and checking it.

``tokens.bin`` holds the ids, little-endian uint16 or uint32, nothing else; ``ends.bin``, int64, one past
the last token of each document; ``flame-tokens.json``, written last, says what they are.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.data.bos import BEFORE_THE_FLAG
from flame.data.locate import first_line
from flame.data.source import TokenSource, sample_crc32
from flame.data.tokenizer import tokenizer_sha256

INDEX, TOKENS, ENDS = "flame-tokens.json", "tokens.bin", "ends.bin"
FORMAT = 1
ENDS_DTYPE = np.dtype("<i8")

_FLAG = "--training.dataset"
_FIELDS = {
    "format": int,
    "dtype": str,
    "num_tokens": int,
    "num_documents": int,
    "tokens_sha256": str,
    "ends_sha256": str,
    "sample_crc32": int,
    "tokenizer": dict,
}


def is_prepared(path: Path) -> bool:
    """Whether a path is a folder of token files, finished or damaged."""
    return (path / INDEX).is_file()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What must be equal for two tokenizers to make the same ids of a text."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "eos_token_id": tokenizer.eos_token_id,
        "text_sha256": tokenizer_sha256(tokenizer, with_post_processor=False),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared folder, with the sizes of its files checked.

    Raises:
        ValueError: The index or a file is damaged, missing, or of another size.
    """
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _fail(file, f"cannot be read ({first_line(error)})")
    if not isinstance(index, dict) or any(
        not isinstance(index.get(field), kind) for field, kind in _FIELDS.items()
    ):
        _fail(file, f"lacks one of {', '.join(_FIELDS)}")
    if index["format"] != FORMAT or index["dtype"] not in ("<u2", "<u4"):
        _fail(file, f"has format {index['format']} and dtype {index['dtype']!r}, not {FORMAT}")
    for name, count, dtype in (
        (TOKENS, index["num_tokens"], np.dtype(index["dtype"])),
        (ENDS, index["num_documents"], ENDS_DTYPE),
    ):
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            _fail(folder / name, error.strerror)
        if size != count * dtype.itemsize or not count:
            _fail(folder / name, f"has {size} bytes, its index says {count * dtype.itemsize}")
    return index


def read_prepared(
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    mode: str | None = None,
    **sequences: Any,
) -> TokenSource:
    """Maps the token files of a folder into memory; a page is read when it is used.

    A sample of the tokens is compared with its checksum; `verify` compares all of them.

    Args:
        name: The value of --training.dataset, for messages.
        folder: Folder that `flame.data.prepare` wrote.
        tokenizer: Tokenizer of the run, which must be the one that made the tokens.
        mode: The mode of `flame.data.bos` that the tokens must have been made for; None: any, and the tokenizer may
            add other tokens around a document.
        sequences: How sequences begin, fields of `TokenSource`.

    Raises:
        ValueError: A file is damaged, or the tokens are another tokenizer's or another mode's.
    """
    index = read_index(folder)
    made_for = index.get("bos", BEFORE_THE_FLAG)
    if mode not in (None, made_for):
        raise ValueError(
            f"--training.bos {mode}: {_FLAG} {name!r} was written with --training.bos {made_for}; give that, or "
            "prepare the data again"
        )
    theirs, own = index["tokenizer"], tokenizer_fingerprint(tokenizer)
    if mode is None:
        del own["tokenizer_sha256"]
    for field, value in own.items():
        # earlier files lack these
        is_later = field in ("text_sha256", "tokenizer_sha256")
        if theirs.get(field, value if is_later else None) != value:
            raise ValueError(
                f"{_FLAG} {name!r}: was written with --model.tokenizer_path {theirs.get('path')!r}, whose "
                f"{field} is {theirs.get(field)!r}, but this run's has {value!r}; give that tokenizer, or "
                "prepare the data again"
            )
    tokens = np.memmap(folder / TOKENS, index["dtype"], "r")
    ends = np.memmap(folder / ENDS, ENDS_DTYPE, "r")
    if sample_crc32(tokens) != index["sample_crc32"] or ends[-1] != len(tokens):
        _fail(folder / TOKENS, "does not match its checksum")
    # plain views: a memmap's own slices are slow
    checksum = f"sha256 {index['tokens_sha256']}"
    return TokenSource(name, np.asarray(tokens), np.asarray(ends), checksum, **sequences)


def verify(folder: Path) -> dict[str, Any]:
    """Reads every file of a prepared folder and compares it with its checksum; returns the index.

    Raises:
        ValueError: A file is damaged, missing, or not what its index says.
    """
    if not is_prepared(folder):
        _fail(folder, f"holds no {INDEX}")
    index = read_index(folder)
    for name, field in ((TOKENS, "tokens_sha256"), (ENDS, "ends_sha256")):
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index[field]:
                _fail(folder / name, "does not match its checksum")
    return index


def _fail(file: Path, problem: object) -> NoReturn:
    raise ValueError(f"{_FLAG} {str(file)!r}: {problem}; prepare the data again, or copy it again")
