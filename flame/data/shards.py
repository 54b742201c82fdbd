"""Documents of a source one by one, from any document on; streaming and `flame.data.prepare` read them."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from flame.config.sections import DataSource
from flame.data.files import TEXT, read_file
from flame.data.locate import first_line, local_path
from flame.data.prepared import is_prepared
from flame.data.text import PYTHON_DOCS, load_documents, load_from_hub, local_files

_FLAG = "--training.dataset"


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """A source in parts, in a fixed order; a part can be read from any of its documents on."""

    name: str
    """What messages call the source."""
    count: int
    """Number of parts."""
    read: Callable[[int, int], Iterator[str]]
    """``read(part, start)``: documents of a part from number ``start`` on. Raises ValueError, which names the part, if
    it is empty or damaged."""
    fingerprint: str
    """Changes when parts are added, removed, renamed or resized."""
    files: tuple[tuple[str, int], ...] | None = None
    """Name and size of the file of each part; None where parts are not local files."""

    def part(self, shard: int) -> str:
        """What messages call a part."""
        return self.files[shard][0] if self.files else f"shard {shard}"


def open_shards(source: DataSource, *, streaming: bool) -> Shards:
    """The parts of a source: its files, or what a hub dataset is split into.

    Args:
        source: What to read.
        streaming: Read a hub dataset from the network, without a local copy.

    Raises:
        ValueError: As `load_documents`, as far as it is known without reading; or a prepared folder,
            which holds no text.
    """
    options = {"name": source.name, "split": source.split}
    options |= {"data_dir": source.data_dir, "data_files": source.data_files}
    if source.dataset == PYTHON_DOCS:
        return _in_memory(PYTHON_DOCS, load_documents(PYTHON_DOCS, **options))
    if source.dataset.strip():
        path = local_path(_FLAG, source.dataset, "a file or folder of text")
        if path is not None and is_prepared(path):
            raise ValueError(
                f"{_FLAG} {source.dataset!r}: holds tokens, not text, so it cannot be streamed or prepared "
                "again; leave out --training.streaming, and it is read a piece at a time"
            )
    files = local_files(source.dataset, **options)
    if files is None:
        if not streaming:
            return _in_memory(source.dataset, load_documents(source.dataset, **options))
        return _of_hub(source)
    sizes = [file.stat().st_size for file in files]
    if 0 in sizes:
        raise ValueError(
            f"{_FLAG} {str(files[sizes.index(0)])!r}: holds no text; remove it or give a file with text"
        )
    listing = [(file.name, size) for file, size in zip(files, sizes, strict=True)]
    return Shards(
        source.dataset,
        len(files),
        lambda shard, start: read_file(files[shard], start),
        f"crc32 {zlib.crc32(repr(listing).encode()):08x}",
        tuple(listing),
    )


class _Documents(Protocol):
    """A list of texts, or a column of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


def _in_memory(name: str, documents: _Documents) -> Shards:
    return Shards(
        name,
        1,
        lambda shard, start: (documents[i] for i in range(start, len(documents))),
        f"{len(documents)} documents",
    )


def _of_hub(source: DataSource) -> Shards:
    stream = load_from_hub(
        source.dataset,
        source.name,
        source.split,
        source.data_dir,
        source.data_files,
        streaming=True,
    )
    count = stream.num_shards

    def read(shard: int, start: int) -> Iterator[str]:
        where = f"{_FLAG} {source.dataset!r}: shard {shard} of {count}"
        row = start
        records = iter(islice(stream.shard(count, shard), start, None))
        while True:
            try:
                record = next(records, None)
            # readers of all formats and networks raise whatever they like
            except Exception as error:
                raise ValueError(
                    f"{where}, row {row}, cannot be read ({first_line(error)}); fetch it again, or start "
                    "a new run that leaves it out with --training.data_files"
                ) from error
            if record is None:
                break
            text = record.get(TEXT)
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}, row {row}, has {type(text).__name__} in column {TEXT!r}, among "
                    f"{sorted(record)}; each must be a string"
                )
            row += 1
            yield text
        if row == 0:
            raise ValueError(f"{where} holds no text; leave it out with --training.data_files")

    return Shards(source.dataset, count, read, f"{count} shards")
