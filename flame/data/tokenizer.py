"""Tokenizers: the built-in ``byte``, a local folder, or a Hugging Face name."""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flame.data.locate import first_line, local_path

BYTE = "byte"

TOKENIZER_KEY = "the sha256 of the tokenizer (--model.tokenizer_path)"
"""Key of `tokenizer_sha256` in the fingerprint of a run."""

_FLAG = "--model.tokenizer_path"
_EXPECTED = f"{BYTE!r}, a folder written by save_pretrained, or a Hugging Face tokenizer name"


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """Loads a fast tokenizer that has an end-of-sequence token.

    Args:
        name_or_path: ``"byte"`` for :func:`byte_tokenizer`, a local folder, or a hub name. A local
            folder called ``byte`` is ``"./byte"``.

    Raises:
        ValueError: The value names no tokenizer, the hub cannot be reached, or the tokenizer is not
            a fast one or has no eos token.
    """
    if name_or_path == BYTE:
        return byte_tokenizer()
    path = local_path(_FLAG, name_or_path, _EXPECTED)
    if path is not None and not path.is_dir():
        raise ValueError(f"{_FLAG} {name_or_path!r}: is a file; give the folder that holds it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path or name_or_path))
    # the Rust library raises plain Exception on a corrupt tokenizer.json, so no narrower class will do
    except Exception as error:
        where = (
            "no usable tokenizer in this folder" if path else "no local folder, and the hub failed"
        )
        raise ValueError(
            f"{_FLAG} {name_or_path!r}: {where} ({first_line(error)}); expected {_EXPECTED}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{_FLAG} {name_or_path!r}: {type(tokenizer).__name__} is not a fast tokenizer; "
            "give one that has a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{_FLAG} {name_or_path!r}: the tokenizer has no eos token to end a document with; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The built-in byte tokenizer: ids 0 to 255 are the UTF-8 bytes, then bos 256, eos 257, pad 258.

    It decodes every string exactly, and puts bos before a text as a Llama tokenizer does. Text that spells a special
    token, such as ``<|eos|>``, stays bytes (``split_special_tokens``, which ``save_pretrained`` keeps);
    pass ``split_special_tokens=False`` in a call to have it read as the token. A str that is not valid
    Unicode (a lone surrogate) is a TypeError.
    """
    # byte-level libraries write byte b as one printable character; no merges keeps bytes apart
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = bos_template("<|bos|>", len(vocab))
    # tokens missing from the vocabulary get the next free id in the order bos, eos, pad
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        split_special_tokens=True,
    )


def tokenizer_sha256(
    tokenizer: PreTrainedTokenizerFast, *, with_post_processor: bool = True
) -> str:
    """SHA-256 of the whole tokenizer.json (vocabulary, merges, normalizer, pre-tokenizer, post-processor, added
    tokens), and of the names of bos and eos.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # training neither truncates nor pads
    for key in ("truncation", "padding"):
        content.pop(key, None)
    if not with_post_processor:
        # it adds tokens around a text
        content.pop("post_processor", None)
    # new versions of the library add fields that are null
    special = [tokenizer.bos_token, tokenizer.eos_token]
    text = json.dumps([_without_null(content), special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(x) for key, x in value.items() if x is not None}
    return [_without_null(x) for x in value] if isinstance(value, list) else value


def bos_template(token: str, number: int) -> processors.TemplateProcessing:
    """Puts bos before a text, and before the second of a pair."""
    return processors.TemplateProcessing(
        single=[token, "$A"],
        pair=[token, "$A", f"{token}:1", "$B:1"],
        special_tokens=[(token, number)],
    )
