"""Tokens per second that the data path of one training process delivers: python benchmarks/bench_data.py

The text is the sources of Python's standard library as JSON lines, the tokenizer a byte-level BPE trained
on them. It is read (a) from the token files of flame.data.prepare, in the global order of training, and
(b) as a stream, tokenized while it is read. What comes out are the batches that the trainer gets.
"""

import argparse
import json
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flame.base.log import init_logger
from flame.config.parse import parse_args
from flame.config.sections import DataSource
from flame.data.prepare import prepare
from flame.data.run_data import open_data
from flame.data.tokenizer import load_tokenizer


def write_text(folder: Path) -> Path:
    """The standard library's sources as JSON lines, one file per line, in 8 files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    out = folder / "text"
    out.mkdir()
    for i in range(8):
        with (out / f"{i}.jsonl").open("w", encoding="utf-8") as lines:
            for file in files[i::8]:
                text = file.read_bytes().decode("utf-8", errors="replace")
                lines.write(json.dumps({"text": text}) + "\n")
    return out


def train_tokenizer(text: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the first file's text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (text / "0.jsonl").read_text(encoding="utf-8").splitlines()
    backend.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


def tokens_per_second(tokenizer, flags, seconds: float) -> tuple[list[float], float]:
    """Tokens per second of wall time, for each of five stretches of `seconds`, and tokens per second of CPU time.

    A first stretch, not counted, starts the workers and fills the queues. The CPU time is that of all processes; other
    work of the machine changes it less than the wall time.
    """
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value) if word]
    data = open_data(parse_args(words), tokenizer)
    before = sum(os.times()[:4])
    loader = data.loader(dp_rank=0, dp_world_size=1)
    batches, rates, total = iter(loader), [], 0
    for _ in range(6):
        start, count = time.perf_counter(), 0
        while (now := time.perf_counter()) - start < seconds:
            count += next(batches)[1].numel()
        rates.append(count / (now - start))
        total += count
    # the time of workers is known when they have ended
    loader.close()
    return rates[1:], total / (sum(os.times()[:4]) - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tokenizer", help="folder or name; default: a BPE of 32,000 trained here")
    args = parser.parse_args()
    init_logger()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = write_text(folder)
        path = args.tokenizer or "trained here"
        tokenizer = (
            load_tokenizer(path) if args.tokenizer else train_tokenizer(text, vocab_size=32_000)
        )
        packages = ("numpy", "torch", "tokenizers", "transformers", "datasets")
        print(
            f"Python {platform.python_version()}, "
            + ", ".join(f"{package} {version(package)}" for package in packages)
            + f"; {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; "
            f"tokenizer {path}, {len(tokenizer)} ids; batches of {args.batch_size} x {args.seq_len}"
        )
        num_proc = max(1, *args.num_workers)
        source = DataSource(str(text), None, "train", None, None, 1)
        prepare(source, tokenizer, path, folder / "tokens", num_proc=num_proc)
        print("| source | varlen | workers | tokens/s, median | lowest | highest | tokens/CPU s |")
        print("|---|---|---|---|---|---|---|")
        size = {
            "training.seq_len": str(args.seq_len),
            "training.batch_size": str(args.batch_size),
            "validation.share": "0",
        }
        streaming = {"training.dataset": str(text), "training.streaming": ""}
        for kind, flags in (
            ("token files", {"training.dataset": str(folder / "tokens")}),
            ("stream", streaming),
        ):
            for varlen in (False, True):
                for num_workers in args.num_workers:
                    more = {"training.varlen": ""} if varlen else {}
                    more["training.num_workers"] = str(num_workers)
                    rates, per_cpu = tokens_per_second(tokenizer, size | flags | more, args.seconds)
                    print(
                        f"| {kind} | {'yes' if varlen else 'no'} | {num_workers} "
                        f"| {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} "
                        f"| {per_cpu:,.0f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
