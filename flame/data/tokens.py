"""Encodes documents into one token stream, and splits the stream into training and validation parts."""

import copy
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerFast

from flame.data.bos import around_document
from flame.data.tokenizer import tokenizer_sha256

# The backend needs about 130 bytes of memory per token while it works, so it never sees more than
# _BATCH characters (plus one piece) at a time, however long the documents are. Pieces of a batch are
# encoded in parallel.
_PIECE = 1 << 18
_BATCH = 1 << 21


class Encoder:
    """Documents to token ids, each document ended by one eos.

    Text that spells a special token is encoded as plain text, whatever the tokenizer's setting. A document
    longer than 262,144 characters is encoded in pieces cut at line ends. This changes nothing for a byte tokenizer, and
    for others at most tokens at the cuts. Tokens around a document are added once.

    Args:
        tokenizer: A fast tokenizer with an eos token. Not changed.
        bos: A mode of `flame.data.bos`. ``sequence`` adds nothing here; bos is added when sequences are cut.

    Raises:
        ValueError: The tokenizer adds tokens in a way that the mode does not support.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, bos: str) -> None:
        self._tokenizer = tokenizer
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.encode_special_tokens = True
        # a tokenizer.json may turn both on
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos = bos
        self._before, self._after = around_document(tokenizer, bos)
        # the largest id and not the count: vocabularies may have gaps
        largest = max(tokenizer.get_vocab().values())
        # uint16 where every id of the vocabulary fits, else uint32
        self.dtype = np.dtype("<u2" if largest <= np.iinfo(np.uint16).max else "<u4")

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever the tokens of a text could change."""
        return f"{tokenizer_sha256(self._tokenizer)} {self.bos}"

    def __call__(self, documents: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids ``[num_tokens]`` and the tokens of each document, all included, ``[num_documents]``."""
        chunks, lengths, length, is_open = [np.empty(0, self.dtype)], [], 0, False
        for batch in _batches(_pieces(documents)):
            # the fast variant computes no offsets, and takes a sixth of the time on long documents
            encodings = self._backend.encode_batch_fast(
                [text for text, _ in batch], add_special_tokens=False
            )
            pieces = []
            for encoding, (_, ends) in zip(encodings, batch, strict=True):
                # before the first piece of a document
                before = [] if is_open else self._before
                pieces.append([*before, *encoding.ids, *(self._after if ends else [])])
                length += len(pieces[-1])
                is_open = not ends
                if ends:
                    lengths.append(length)
                    length = 0
            chunks.append(np.fromiter(chain.from_iterable(pieces), self.dtype))
        return np.concatenate(chunks), np.asarray(lengths, np.int64)


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, bos: str = "none"
) -> np.ndarray:
    """One stream of all documents, ``[num_tokens]``, as `Encoder` makes it."""
    return Encoder(tokenizer, bos)(documents)[0]


def split_tokens(
    tokens: np.ndarray, seq_len: int, validation_share: float, *, stride: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the end of the stream for validation.

    Args:
        tokens: The stream ``[num_tokens]``.
        seq_len: Sequence length in tokens.
        stride: Tokens from the start of a sequence to that of the next, by default ``seq_len``; ``n``
            sequences take ``n * stride + 1`` tokens, as labels are shifted by one.
        validation_share: Share of the stream to hold out, in [0, 1): rounded to whole sequences, at
            least one where it is above 0.

    Returns:
        The training and the validation stream, views that do not overlap; the second is empty for a
        share of 0.

    Raises:
        ValueError: The share is out of range, or no training sequence is left.
    """
    if not 0 <= validation_share < 1:
        raise ValueError(
            f"--validation.share {validation_share}: expected at least 0 and less than 1"
        )
    if seq_len < 1:
        raise ValueError(f"--training.seq_len {seq_len}: expected at least 1")
    stride = seq_len if stride is None else stride
    held_out = 0
    if validation_share > 0:
        held_out = max(1, round(validation_share * len(tokens) / stride)) * stride + 1
    cut = len(tokens) - held_out
    if cut < stride + 1:
        raise ValueError(
            f"--training.seq_len {seq_len}: the data has {len(tokens)} tokens, but one training "
            f"sequence takes {stride + 1} and the validation share of {validation_share} takes "
            f"{held_out}; use a shorter sequence or more text"
        )
    return tokens[:cut], tokens[cut:]


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of documents of at most _PIECE characters, and whether each is the last of its document."""
    for document in documents:
        start = 0
        while len(document) - start > _PIECE:
            # after the last line end of the piece; without one rfind returns -1, so this is 0
            stop = document.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
            yield document[start:stop], False
            start = stop
        yield document[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in groups of about _BATCH characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        # plus one, so that many empty documents also end a batch
        size += len(piece[0]) + 1
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
