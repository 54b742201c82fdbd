"""Several sources of text, and what the ranks of a run read of them."""

import json
import random
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from flame.config.parse import parse_args
from flame.data.run_data import open_data
from flame.data.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")
EOS = BYTE.eos_token_id
T = 32


def write_sources(folder):
    """Writes a folder of three formats and two other sources; every document names its file and its number."""
    draw = random.Random(0)

    def document(name, i):
        return f"{name}{i}:" + "".join(draw.choices("0123456789 ", k=draw.randint(0, 150)))

    for name in ("a", "c"):
        lines = (json.dumps({"text": document(name, i)}) + "\n" for i in range(60))
        (folder / "many").mkdir(exist_ok=True)
        (folder / "many" / f"{name}.jsonl").write_text("".join(lines))
    table = pa.table({"text": [document("b", i) for i in range(60)]})
    pq.write_table(table, folder / "many" / "b.parquet", row_group_size=7)
    (folder / "few").mkdir()
    for i in range(3):
        (folder / "few" / f"{i}.txt").write_text(f"few{i}:" + "y" * (100 + 70 * i))
    return folder


MAP = ("--validation.share", "0")
STREAM = ("--training.streaming", "--validation.share", "0")


def data_of(text, *flags, mixed=True):
    dataset = f"{text / 'many'},{text / 'few'}" if mixed else str(text / "many")
    probs = ["--training.data_probs", "0.7,0.3"] if mixed else []
    # the modes of --training.bos are those of test_bos.py
    size = ["--training.seq_len", str(T), "--training.batch_size", "3", "--training.bos", "none"]
    config = parse_args(["--training.dataset", dataset, *probs, *size, *flags])
    return open_data(config, BYTE)


def rows_of(loaders, steps, state=None):
    """What the ranks together train on, in the order of the ranks within each step ``[rows, T + 1]``."""
    for loader in loaders if state else []:
        loader.load_state_dict(state)
    batches = zip(*(islice(loader, steps) for loader in loaders), strict=True)
    return [
        [*row, label[-1]]
        for step in batches
        for inputs, labels in step
        for row, label in zip(inputs["input"].tolist(), labels.tolist(), strict=True)
    ]


def loaders_of(data, world_size):
    return [data.loader(dp_rank=rank, dp_world_size=world_size) for rank in range(world_size)]
