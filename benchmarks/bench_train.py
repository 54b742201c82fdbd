"""Times the trainer: python benchmarks/bench_train.py [--models 1B 340M] [--seq_len 4096] [--steps 40]

Each row is a run of `flame.train` in a process of its own, compiled, in bfloat16, without checkpoints, on the
text that ships with Python: tokens per second as the run itself logs them, median after the first quarter of the
steps, MFU, memory reserved, and the seconds from the start of the process to the first step, compilation
included (the second run of a shape finds what the first compiled). The arm "softmax, SDPA" is the same model
with torch's scaled_dot_product_attention, which chooses among its kernels, in place of the kernels of this
repository; "softmax, FA2" and "softmax, cuDNN" name the kernel.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parent.parent
# tokens in a micro-batch
TOKENS = {"1B": 2**14, "340M": 2**16}
ARMS = {
    "softpick": "softpick",
    "softmax, same kernel": "softmax",
    "softmax, SDPA": "softmax",
    "softmax, FA2": "softmax",
    "softmax, cuDNN": "softmax",
}
# arm with torch's attention -> its kernel, None for torch's choice
BACKENDS = {
    "softmax, SDPA": None,
    "softmax, FA2": SDPBackend.FLASH_ATTENTION,
    "softmax, cuDNN": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(kw_only=True, slots=True)
class Result:
    tokens_per_s: float
    mfu: float | None
    memory_gib: float
    seconds_to_first_step: float


def sdpa(backend: SDPBackend | None):
    """torch's attention as attn_impl calls an operator; windows, sinks and packed sequences do not occur in these runs."""

    def attention(q, k, v, scale=None, cu_seqlens=None, *, window_size=None, sink_bias=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            o = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return o.transpose(1, 2)

    return attention


def child(arm: str, flags: list[str]) -> None:
    """One run, in the process that the parent started for it."""
    from flame.models import attention

    if arm in BACKENDS:
        attention.OPERATORS["parallel_softmax_attn"] = sdpa(BACKENDS[arm])
        attention.register_operators()
    from flame import train

    torch.set_float32_matmul_precision("high")
    sys.argv = ["flame.train", *flags]
    train.main()


def run(model: str, arm: str, seq_len: int, steps: int, loss: str, extra: list[str]) -> Result:
    """Runs one arm.

    Raises:
        RuntimeError: The run failed; the message is the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((ROOT / f"configs/{ARMS[arm]}_transformer_{model}.json").read_text())
        config["max_position_embeddings"] = max(config["max_position_embeddings"], seq_len)
        model_path = Path(folder) / "model.json"
        model_path.write_text(json.dumps(config))
        flags = {
            "job.dump_folder": f"{folder}/run",
            "model.config": str(model_path),
            "training.batch_size": str(TOKENS[model] // seq_len),
            "training.seq_len": str(seq_len),
            "training.steps": str(steps),
            "training.loss": loss,
            "optimizer.lr": "2e-4",
            "validation.share": "0",
            "sample.max_new_tokens": "0",
            "metrics.log_freq": "4",
        }
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        words += ["--training.compile", "--checkpoint.no_enable_checkpoint", *extra]
        start = time.time()
        process = subprocess.run(
            [sys.executable, __file__, "--child", arm, *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            raise RuntimeError("\n".join(process.stdout.splitlines()[-20:]))
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "tokens_per_s" in record]
    steady = [record for record in records if record["step"] > steps // 4]
    return Result(
        tokens_per_s=median(record["tokens_per_s"] for record in steady),
        mfu=median(record["mfu"] for record in steady) if "mfu" in steady[0] else None,
        memory_gib=max(record["memory_GiB"] for record in records),
        seconds_to_first_step=records[0]["time"] - start,
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Further flags go to every run."
    )
    parser.add_argument("--models", nargs="+", default=list(TOKENS), choices=TOKENS)
    arms = [arm for arm in ARMS if arm not in ("softmax, FA2", "softmax, cuDNN")]
    parser.add_argument("--arms", nargs="+", default=arms, choices=ARMS)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--loss", nargs="+", default=["cross_entropy"], help="--training.loss")
    args, extra = parser.parse_known_args()
    if args.steps < 8:
        parser.error(
            f"--steps must be at least 8, so that the first ones can be left out, got {args.steps}"
        )
    for model in args.models:
        if args.seq_len < 1 or TOKENS[model] % args.seq_len:
            parser.error(
                f"--seq_len must divide the {TOKENS[model]} tokens of a {model} step, got {args.seq_len}"
            )
    if not torch.cuda.is_available():
        sys.exit("bench_train.py needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    failed = False
    for model in args.models:
        print(
            f"\n{model}, {TOKENS[model] // args.seq_len} x {args.seq_len} tokens per step {' '.join(extra)}"
        )
        print(f"{'':24} {'loss':26} {'tokens/s':>9} {'MFU':>6} {'GiB':>6} {'first step, s':>14}")
        for loss in args.loss:
            for arm in args.arms:
                try:
                    r = run(model, arm, args.seq_len, args.steps, loss, extra)
                except RuntimeError as error:
                    failed = True
                    print(f"{arm:24} {loss:26} failed:\n{error}", flush=True)
                    continue
                mfu = f"{r.mfu:6.1%}" if r.mfu else "     -"
                print(
                    f"{arm:24} {loss:26} {r.tokens_per_s:9,.0f} {mfu} {r.memory_gib:6.2f} "
                    f"{r.seconds_to_first_step:14.1f}",
                    flush=True,
                )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
