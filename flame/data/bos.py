"""How documents and sequences begin (``--training.bos``), in training and in the tokenizer that is exported.

- ``tokenizer``: a document is what the tokenizer makes of it, its own special tokens included.
- ``sequence``: every sequence starts with bos; with ``--training.varlen`` every document in it does too.
- ``none``: no token is added before a text.

In every mode a document ends in one eos.
"""

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.processors import PostProcessor
from transformers import PreTrainedTokenizerFast

MODES = ("tokenizer", "sequence", "none")
BEFORE_THE_FLAG = "none"
"""Mode of runs, token files and exports that do not record one."""

_FLAG = "--training.bos"
_CONFIG = "tokenizer_config.json"


def affixes(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer itself adds before and after a text.

    Raises:
        ValueError: The post-processor does something else, such as repeating the text.
    """
    # a tokenizer of a single word, so that every text has tokens
    probe = _probe(tokenizer.backend_tokenizer.post_processor)
    encoding = probe.encode("x")
    texts = [i for i, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
    if len(texts) != 1:
        raise ValueError(
            f"{_FLAG} tokenizer: the post-processor of --model.tokenizer_path must hold a text once, got "
            f"{len(texts)} times; use {_FLAG} sequence or none, or another tokenizer"
        )
    return encoding.ids[: texts[0]], encoding.ids[texts[0] + 1 :]


def around_document(tokenizer: PreTrainedTokenizerFast, mode: str) -> tuple[list[int], list[int]]:
    """Ids before and after the text of a document; the last one is eos.

    Raises:
        ValueError: The tokenizer itself puts an eos elsewhere after the text than at the end.
    """
    eos: int = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]  # transformers types the ids of all special tokens alike; this one is an int
    if mode != "tokenizer":
        return [], [eos]
    before, after = affixes(tokenizer)
    if after[-1:] != [eos]:
        after = [*after, eos]
    if after.count(eos) > 1:
        raise ValueError(
            f"{_FLAG} tokenizer: the post-processor of --model.tokenizer_path adds "
            f"{' '.join(tokenizer.convert_ids_to_tokens(affixes(tokenizer)[1]))!r} after a text, but only its last token may "
            f"be eos; use {_FLAG} sequence or none, or another tokenizer"
        )
    return before, after


def sequence_bos(tokenizer: PreTrainedTokenizerFast, mode: str) -> int | None:
    """The token that every sequence starts with, if the mode puts one there.

    Raises:
        ValueError: The mode needs a bos, and the tokenizer has none.
    """
    if mode != "sequence":
        return None
    if tokenizer.bos_token_id is None:
        raise ValueError(
            f"{_FLAG} sequence: the tokenizer of --model.tokenizer_path has no bos token; use {_FLAG} tokenizer or "
            f"none, or set bos_token in its {_CONFIG}"
        )
    return tokenizer.bos_token_id  # pyright: ignore[reportReturnType]  # transformers types the ids of all special tokens alike; this one is an int


def before_prompt(tokenizer: PreTrainedTokenizerFast, mode: str) -> list[int]:
    """Ids that a text begins with at inference, where training used ``mode``."""
    if mode == "tokenizer":
        return affixes(tokenizer)[0]
    return [token for token in [sequence_bos(tokenizer, mode)] if token is not None]


def describe(tokenizer: PreTrainedTokenizerFast, mode: str, *, varlen: bool) -> str:
    """Which token begins documents or sequences, for the log."""
    tokens = " ".join(tokenizer.convert_ids_to_tokens(before_prompt(tokenizer, mode)))
    what = "every document" if mode == "tokenizer" else "every sequence"
    what += " and document" if mode == "sequence" and varlen else ""
    begins = f"{what} begins with {tokens}" if tokens else "nothing is added before a document"
    return f"{begins} ({_FLAG} {mode})"


def for_inference(tokenizer: PreTrainedTokenizerFast, mode: str) -> PreTrainedTokenizerFast:
    """A copy of the tokenizer that begins a text as training did, and adds nothing after it."""
    before = before_prompt(tokenizer, mode)
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    if affixes(tokenizer) != (before, []):
        backend.post_processor = _post_processor(
            before,
            tokenizer.convert_ids_to_tokens(before),  # pyright: ignore[reportArgumentType]  # given a list of ids, it returns a list of str
            backend.post_processor,
        )
    return tokenizer


def save_for_inference(tokenizer: PreTrainedTokenizerFast, mode: str, folder: Path) -> None:
    """Writes the tokenizer of `for_inference`, which every version of transformers then reads as it is."""
    tokenizer = for_inference(tokenizer, mode)
    tokenizer.save_pretrained(folder)
    file = folder / _CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    # other classes rebuild parts of a tokenizer, which differ by version, instead of reading tokenizer.json
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers reads the post-processor instead; for programs that read the file
    config["add_bos_token"] = before_prompt(tokenizer, "tokenizer")[:1] == [tokenizer.bos_token_id]
    config["add_eos_token"] = False
    # these describe the machine that wrote the file
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _post_processor(
    ids: list[int], tokens: list[str], replaced: PostProcessor | None
) -> PostProcessor:
    """A post-processor that adds ``tokens`` before a text, and keeps the parts of ``replaced`` that add no tokens."""
    special = {
        token: {"id": token, "ids": [number], "tokens": [token]}
        for number, token in zip(ids, tokens, strict=True)
    }

    def piece(sequence: str, type_id: int) -> list[dict[str, Any]]:
        own = [{"SpecialToken": {"id": token, "type_id": type_id}} for token in tokens]
        return [*own, {"Sequence": {"id": sequence, "type_id": type_id}}]

    template = {
        "type": "TemplateProcessing",
        "single": piece("A", 0),
        "pair": [*piece("A", 0), *piece("B", 1)],
        "special_tokens": special,
    }
    old = json.loads(_probe(replaced).to_str())["post_processor"] or {}
    kept = [p for p in old.get("processors", [old]) if p.get("type") == "ByteLevel"]
    processor = {"type": "Sequence", "processors": [*kept, template]} if kept else template
    # built as JSON, since a template string cannot name every token
    spec = json.loads(_probe(None).to_str()) | {"post_processor": processor}
    return Tokenizer.from_str(json.dumps(spec)).post_processor


def _probe(post_processor: PostProcessor | None) -> Tokenizer:
    probe = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    if post_processor is not None:
        probe.post_processor = post_processor
    return probe
