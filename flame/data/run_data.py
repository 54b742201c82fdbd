"""The data of a run, opened from its flags: what to train on, what to hold out, and its fingerprint."""

from collections.abc import Iterator
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from flame.config.sections import DEFAULT_BOS, DataSource, JobConfig
from flame.data.batches import Batch
from flame.data.bos import describe, sequence_bos
from flame.data.loader import TokenLoader, validation_batches
from flame.data.locate import local_path
from flame.data.prepared import is_prepared, read_prepared
from flame.data.shards import open_shards
from flame.data.source import TokenSource
from flame.data.stream import StreamLoader, hold_out
from flame.data.text import PYTHON_DOCS, load_documents, refuse_hub_options
from flame.data.tokenizer import TOKENIZER_KEY, tokenizer_sha256
from flame.data.tokens import Encoder


class RunData(Protocol):
    """What the trainer asks of the data."""

    fingerprint: dict[str, Any]
    """Values that must not change on resume. No data is read for them."""
    summary: str
    """Sizes of the data, for the log."""
    begins: str
    """Which token begins documents and sequences, for the log."""

    def loader(self, *, dp_rank: int, dp_world_size: int) -> TokenLoader | StreamLoader:
        """Endless training batches of one data-parallel rank."""
        ...

    def validation(
        self, *, dp_rank: int, dp_world_size: int, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """The held-out sequences once, see `validation_batches`; in training's batches by default."""
        ...


class _RunDataBase:
    """Flags and held-out sequences, common to data in memory and streamed data."""

    def __init__(self, config: JobConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        t = config.training
        mode = t.bos or DEFAULT_BOS
        self._encoder = Encoder(tokenizer, mode)
        self._sequences = {
            "bos": sequence_bos(tokenizer, mode),
            "has_document_bos": mode == "sequence" and t.varlen,
        }
        self.begins = describe(tokenizer, mode, varlen=t.varlen)
        self._tokenizer_fingerprint = {TOKENIZER_KEY: tokenizer_sha256(tokenizer)}
        self._shares = [source.share for source in t.sources()]
        self._seed = t.seed
        self._workers = {
            "num_workers": t.num_workers,
            "prefetch_factor": t.prefetch_factor or 2,
        }
        self._shape = {
            "seq_len": t.seq_len,
            "batch_size": t.batch_size,
            "context_len": (t.context_len or t.seq_len) if t.varlen else None,
        }
        self._held_out: list[TokenSource] = []

    def validation(
        self, *, dp_rank: int, dp_world_size: int, batch_size: int | None = None
    ) -> Iterator[Batch]:
        shape = self._shape | ({} if batch_size is None else {"batch_size": batch_size})
        return validation_batches(
            self._held_out, **shape, dp_rank=dp_rank, dp_world_size=dp_world_size
        )


class _MapData(_RunDataBase):
    def __init__(self, config: JobConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(config, tokenizer)
        sources = [
            _read_source(source, tokenizer, self._encoder, self._sequences)
            for source in config.training.sources()
        ]
        parts = [s.split(config.training.seq_len, config.validation.share) for s in sources]
        self._train = [train for train, _ in parts]
        self._held_out = [held_out for _, held_out in parts]
        self.fingerprint = self._tokenizer_fingerprint | {
            what + _source_suffix(sources, source): value
            for source in sources
            for what, value in (
                ("the number of tokens", len(source.tokens)),
                ("the checksum of the tokens", source.checksum),
            )
        }
        self.summary = (
            f"{sum(len(s.tokens) for s in self._train):,} to train on, "
            f"{sum(len(s.tokens) for s in self._held_out):,} held out"
        )

    def loader(self, *, dp_rank: int, dp_world_size: int) -> TokenLoader:
        return TokenLoader(
            self._train,
            shares=self._shares,
            seed=self._seed,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            **self._shape,
            **self._workers,
        )


class _StreamData(_RunDataBase):
    def __init__(self, config: JobConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(config, tokenizer)
        sources = [open_shards(source, streaming=True) for source in config.training.sources()]
        self._train = []
        for shards in sources:
            held_out, begin = hold_out(
                shards,
                self._encoder,
                config.validation.sequences,
                config.training.seq_len,
                **self._sequences,  # pyright: ignore[reportArgumentType]  # the dict holds bos and has_document_bos, each of the right type
            )
            self._held_out.append(held_out)
            self._train.append((shards, begin))
        # local files are left to the loader's state, which knows which of them may change
        self.fingerprint = self._tokenizer_fingerprint | {
            f"the files{_source_suffix(sources, shards)}": shards.fingerprint
            for shards in sources
            if shards.files is None
        }
        self.summary = (
            f"a stream of {sum(shards.count for shards in sources):,} files or shards to train on, "
            f"{sum(len(s.tokens) for s in self._held_out):,} held out"
        )

    def loader(self, *, dp_rank: int, dp_world_size: int) -> StreamLoader:
        return StreamLoader(
            self._train,
            held_out=[held_out.checksum for held_out in self._held_out],
            shares=self._shares,
            encoder=self._encoder,
            seed=self._seed,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            **self._sequences,  # pyright: ignore[reportArgumentType]  # the dict holds bos and has_document_bos, each of the right type
            **self._shape,
            **self._workers,
        )


def open_data(config: JobConfig, tokenizer: PreTrainedTokenizerFast) -> RunData:
    """Reads, maps or opens everything under ``--training.dataset``.

    Raises:
        ValueError: There is no such data, it is damaged, empty or too short, or an option does not apply;
            one line that names flag or file.
    """
    kind = _StreamData if config.training.streaming else _MapData
    return kind(config, tokenizer)


def _source_suffix(sources: list[Any], source: Any) -> str:
    """Suffix of a fingerprint's key: the number of the source, if there are several, and the flag."""
    number = f" of source {sources.index(source) + 1}" if len(sources) > 1 else ""
    return f"{number} (--training.dataset)"


def _read_source(
    source: DataSource,
    tokenizer: PreTrainedTokenizerFast,
    encoder: Encoder,
    sequences: dict[str, Any],
) -> TokenSource:
    options = {"name": source.name, "split": source.split}
    options |= {"data_dir": source.data_dir, "data_files": source.data_files}
    if source.dataset != PYTHON_DOCS:
        path = local_path("--training.dataset", source.dataset, "a file, a folder or a name")
        if path is not None and is_prepared(path):
            refuse_hub_options(source.dataset, **options)
            return read_prepared(source.dataset, path, tokenizer, encoder.bos, **sequences)
    return TokenSource.of_documents(
        source.dataset, load_documents(source.dataset, **options), encoder, **sequences
    )
