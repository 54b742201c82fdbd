"""Selects the held-out sequences: the same for all models, and for every length with the same beginnings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from flame.base.errors import UsageError
from flame.data.bos import before_prompt
from flame.data.folder import has_splits
from flame.data.locate import local_path
from flame.data.prepared import is_prepared, read_index, read_prepared
from flame.data.text import PYTHON_DOCS, load_documents
from flame.data.tokens import Encoder

FIRST_TOKENS = ("training", "text", "bos", "eos")
_BATCH = 16


@dataclass(frozen=True)
class Samples:
    """Token sequences, and the part of the data that they come from."""

    tokens: torch.Tensor
    """Ids ``[N, length + 1]``, the first of them the one that ``--first_token`` asks for."""
    share_from_end: float
    """Share of the data, counted from its end, that contains the sequences."""
    num_documents: int
    """Number of documents that they come from."""
    begins: str
    """First token of each sequence, for the log."""


def read_samples(
    data: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    number: int,
    length: int,
    first_token: str,
    is_held_out: bool,
) -> Samples:
    """Takes sequences of ``length`` inputs and a last label, each within one document and without padding.

    Args:
        data: A text file, a folder of text, a folder of `flame.data.prepare`, or another value of --training.dataset.
        tokenizer: The models' tokenizer.
        number: Sequences to take.
        length: Inputs of a sequence, in tokens.
        first_token: ``training``: the tokens that ``tokenizer`` puts before a text, as in training, then a sequence
            shorter by their number. ``text``: a sequence without them. ``bos``, ``eos``: this token, then a sequence
            shorter by one.
        is_held_out: All of the data is held out: take sequences evenly spaced through it. Otherwise the last
            ones, since training holds out the end.

    Raises:
        UsageError: There is no such data, or not enough of it.
    """
    prefix = before_prompt(tokenizer, "tokenizer") if first_token == "training" else []
    if first_token not in ("training", "text"):
        token = getattr(tokenizer, f"{first_token}_token_id")
        if token is None:
            raise UsageError(f"--first_token {first_token}: the tokenizer has no such token")
        prefix = [token]
    try:
        count, document, size = _open(data, tokenizer, is_held_out)
    except ValueError as error:
        raise UsageError(str(error).replace("--training.dataset", "--data")) from None
    # tokens of text in a sequence; the last label may be the first input of the next sequence
    need = length + 1 - len(prefix)
    # (document, first token): the last `number`, or all if the data is held out
    positions: list[tuple[int, int]] = []
    longest = 0
    for i in reversed(range(count)):
        tokens = len(document(i))
        longest = max(longest, tokens)
        starts = range(0, tokens - need + 1, length)
        positions += [(i, start) for start in reversed(starts)]
        if len(positions) >= number and not is_held_out:
            break
    if len(positions) < number:
        raise UsageError(
            f"--samples {number}: --data {data} has {len(positions)} sequences of {length} tokens that lie within one "
            f"document (its longest has {longest}); give shorter --lengths, fewer --samples or more text"
        )
    chosen = (
        [positions[n * len(positions) // number] for n in range(number)]
        if is_held_out
        else positions
    )
    chosen = chosen[:number]
    rows = [[*prefix, *document(i)[start : start + need].tolist()] for i, start in chosen]
    first = min(chosen)
    before = sum(size(i) for i in range(first[0])) + size(first[0]) * first[1] / len(
        document(first[0])
    )
    total = sum(size(i) for i in range(count))
    begins = " ".join(tokenizer.convert_ids_to_tokens(prefix)) or "a token of the text"
    if first_token == "training":
        begins += ", as in training"
    return Samples(torch.tensor(rows), 1 - before / total, len({i for i, _ in chosen}), begins)


def _open(
    data: str, tokenizer: PreTrainedTokenizerFast, is_held_out: bool
) -> tuple[int, Callable[[int], np.ndarray], Callable[[int], int]]:
    """Number of documents, the tokens of one, and its size in tokens or, of text, in characters."""
    if data != PYTHON_DOCS:
        path = local_path("--data", data, "a text file, or a folder of text or of token files")
        if path is not None and is_prepared(Path(path)):
            source = read_prepared(data, path, tokenizer, None)
            starts = np.concatenate([[0], source.ends[:-1]])
            # what comes before the text of a document is put before every sequence instead
            starts += len(read_index(path).get("before_document", []))

            def tokens_of(i: int) -> np.ndarray:
                return source.tokens[starts[i] : source.ends[i]]

            return len(starts), tokens_of, lambda i: int(source.ends[i] - starts[i])
        if is_held_out and path is not None and path.is_dir() and has_splits(data, path):
            # training reads the split train, whose end it holds out
            raise ValueError(
                f"--data {data!r}: has splits, and training reads the split train; name the files or the "
                "folder of a split that is held out"
            )
    documents = load_documents(data)
    return (
        len(documents),
        _Encoded(documents, Encoder(tokenizer, "none")),
        lambda i: len(documents[i]),
    )


class _Encoded:
    """Tokens of documents, encoded on demand, a few at a time."""

    def __init__(self, documents: Sequence[str], encoder: Encoder) -> None:
        self.documents, self.encoder = documents, encoder
        self.known: dict[int, np.ndarray] = {}

    def __call__(self, i: int) -> np.ndarray:
        if i not in self.known:
            first = i // _BATCH * _BATCH
            texts = [self.documents[n] for n in range(first, min(first + _BATCH, self._count()))]
            tokens, lengths = self.encoder(texts)
            parts = np.split(tokens, np.cumsum(lengths)[:-1])
            self.known |= dict(enumerate(parts, start=first))
        return self.known[i]

    def _count(self) -> int:
        return len(self.documents)
