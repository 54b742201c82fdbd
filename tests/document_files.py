"""Documents in files of every kind, for the tests of reading them."""

import bz2
import gzip
import lzma

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq


def go_offline(monkeypatch):
    """Makes the hub as unreachable as without a network, without the retries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def compressed(ending, content):
    if ending == ".zst":
        return bytes(pa.compress(content.encode(), "zstd", asbytes=True))
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(content.encode())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table) and path.suffix == ".arrow":
        with pa.ipc.new_stream(path, content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    elif isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_bytes(content.encode())
    return str(path)


def save_to_disk(folder, texts, num_shards=1):
    dataset = datasets.Dataset.from_dict({"text": texts})
    dataset.save_to_disk(folder, num_shards=num_shards)
    return str(folder)
