"""``python -m flame.analyze``: measures what attention does in trained models, and writes the comparison as a report.

``--out`` gets ``records.jsonl`` (one number a line), ``report.md`` (tables) and ``report.html`` (tables and charts, one
page that needs nothing else). Several models with one ``--label`` are seeds of one arm. What each number is:
docs/softpick/ANALYSIS.md.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import flame.models  # noqa: F401  # teaches transformers the model
from flame.analysis import html, tables
from flame.analysis.curves import find_curves, record_curves
from flame.analysis.heads import Thresholds
from flame.analysis.measure import loss_of, measure, perplexity, record_maps
from flame.analysis.models import OWN, Model, find_model
from flame.analysis.records import (
    RECORDS_FILE,
    Recorder,
    Results,
    read_records,
    write_records,
)
from flame.analysis.samples import FIRST_TOKENS, Samples, read_samples
from flame.cli import Parser
from flame.data.prepared import tokenizer_identity
from flame.errors import UsageError, exit_on_usage_error
from flame.log import init_logger, logger
from flame.models.attention import IMPLEMENTATIONS

MAP_CELLS = 48
"""Largest number of rows of an attention map in the report."""
BITS = (2, 3, 4, 8)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flame.analyze",
        description="Measures attention in trained models and writes a report that compares them.",
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="folder of the report; an earlier report is replaced",
    )
    add(
        "--report_only",
        action="store_true",
        help="measure nothing: draw the report of the records that are in --out again",
    )
    add(
        "--model",
        type=Path,
        nargs="+",
        default=[],
        help="Hugging Face folders such as <dump_folder>/hf, or checkpoints <dump_folder>/checkpoint/step-N",
    )
    add(
        "--label",
        nargs="+",
        help="name of each model's arm; the same name: seeds (default: by folder)",
    )
    add(
        "--data",
        help="held-out text: a file, a folder, or a folder of flame.data.prepare; sequences are taken from its end",
    )
    add(
        "--held_out",
        action="store_true",
        help="all of --data is held out: take sequences evenly spaced through it, not from its end",
    )
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[128, 512],
        help="tokens in a sequence, with the same beginnings for every length (default: 128 512)",
    )
    add("--samples", type=int, default=32, help="sequences (default: %(default)s)")
    add(
        "--first_token",
        choices=FIRST_TOKENS,
        default="text",
        help="token 0 of every sequence: as the text has it, or this one put before (default: %(default)s)",
    )
    add(
        "--sink_eps",
        type=float,
        nargs="+",
        default=[0.2, 0.3],
        help="mean weights on the first key above which a head is a sink (default: 0.2 0.3)",
    )
    add(
        "--sparsity_eps",
        type=float,
        nargs="+",
        default=[1e-5],
        help="weights up to these are counted beside the exact zeros (default: 1e-5)",
    )
    add(
        "--heatmap_heads",
        nargs="+",
        default=[],
        metavar="LAYER.HEAD",
        help="heads whose attention is drawn (default: the first model's largest weight on key 0, and most entropic)",
    )
    add(
        "--run",
        type=Path,
        nargs="+",
        help="dump folder of each model's run, for its training curves",
    )
    add(
        "--bits",
        type=int,
        nargs="+",
        default=[],
        choices=BITS,
        help="also the perplexity at the longest length with weights quantised to so many bits",
    )
    add(
        "--passkey_lengths",
        type=int,
        nargs="+",
        default=[],
        help="also retrieve passkeys in texts so long",
    )
    add(
        "--passkey_depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="where the key stands, from 0 (the start) to 1 (default: 0 0.25 0.5 0.75 1)",
    )
    add("--passkey_samples", type=int, default=20, help="keys at a depth (default: %(default)s)")
    add(
        "--attn_implementation",
        nargs="+",
        default=[OWN],
        metavar="NAME",
        help="operator, such as softpick, of models of transformers that name none: one for all models or one each "
        f"(default: {OWN}, that is softmax)",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    if not args.model:
        raise UsageError("--model is needed, or --report_only")
    if args.data is None:
        raise UsageError("--data is needed: held-out text")
    for flag, values, is_right, right in (
        ("lengths", args.lengths, lambda x: x >= 2, "at least 2"),
        ("samples", [args.samples], lambda x: x >= 1, "at least 1"),
        ("sink_eps", args.sink_eps, lambda x: 0 < x < 1, "above 0 and below 1"),
        ("sparsity_eps", args.sparsity_eps, lambda x: 0 < x < 1, "above 0 and below 1"),
        ("passkey_lengths", args.passkey_lengths, lambda x: x >= 1, "at least 1"),
        ("passkey_depths", args.passkey_depths, lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("passkey_samples", [args.passkey_samples], lambda x: x >= 1, "at least 1"),
    ):
        for value in values:
            if not is_right(value):
                raise UsageError(f"--{flag} must be {right}, got {value:g}")
        if len(set(values)) < len(values):
            raise UsageError(f"--{flag} names {max(values, key=values.count):g} twice")
    for flag, values in (("label", args.label), ("run", args.run)):
        if values is not None and len(values) != len(args.model):
            raise UsageError(
                f"--{flag} must have one value for each of the {len(args.model)} of --model, got {len(values)}"
            )
    if len(args.attn_implementation) not in (1, len(args.model)):
        raise UsageError(
            f"--attn_implementation must have one value, or one for each of the {len(args.model)} of --model, got "
            f"{len(args.attn_implementation)}"
        )
    for name in args.attn_implementation:
        if name != OWN and name not in IMPLEMENTATIONS:
            raise UsageError(
                f"--attn_implementation must be {OWN} or one of {', '.join(IMPLEMENTATIONS)}; got {name}"
            )
    if len({path.resolve() for path in args.model}) < len(args.model):
        raise UsageError("--model names a folder twice; it would count as two seeds")


def _require_out(out: Path) -> None:
    """Raises UsageError where the report would go into somebody else's folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORDS_FILE).is_file():
        raise UsageError(
            f"--out {out} holds files and no {RECORDS_FILE}; name a new folder or one of an earlier report"
        )


def _labels(args: argparse.Namespace) -> list[str]:
    if args.label is not None:
        return args.label
    labels = []
    for path in (path.resolve() for path in args.model):
        if path.name == "hf":
            labels.append(path.parent.name)
        elif path.parent.name == "checkpoint":
            labels.append(f"{path.parent.parent.name}/{path.name}")
        else:
            labels.append(path.name)
    if len(set(labels)) < len(labels):
        raise UsageError(
            f"--label is needed: by their folders several models are called {max(labels, key=labels.count)!r}; seeds of "
            "an arm share a label"
        )
    return labels


def _find_models(args: argparse.Namespace, labels: list[str], device: str) -> list[Model]:
    """Everything about the models that can be known, and be wrong, before the first is loaded."""
    names = args.attn_implementation
    names = names * len(args.model) if len(names) == 1 else names
    models = [find_model(p, n, device) for p, n in zip(args.model, names, strict=True)]
    first = models[0]
    arms: dict[str, Model] = {}
    for model, label in zip(models, labels, strict=True):
        if tokenizer_identity(model.tokenizer) != tokenizer_identity(first.tokenizer):
            raise UsageError(
                f"--model {model.path} has another tokenizer than {first.path}: they would be measured on other tokens, and "
                "their losses do not compare"
            )
        arm = arms.setdefault(label, model)
        if arm.fields() != model.fields():
            raise UsageError(
                f"--label {label}: {model.path} ({model.fields()}) is no seed of the arm of {arm.path} ({arm.fields()})"
            )
        most = getattr(model.config, "max_position_embeddings", None)
        longest = max([*args.lengths, *args.passkey_lengths])
        if most is not None and longest > most:
            flag = "lengths" if longest in args.lengths else "passkey_lengths"
            raise UsageError(
                f"--{flag} {longest}: --model {model.path} takes {most} tokens at most"
            )
        for text in args.heatmap_heads:
            layer, head = _head(text)
            layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
            if layer >= layers or head >= heads:
                raise UsageError(
                    f"--heatmap_heads {text}: --model {model.path} has layers 0 to {layers - 1} and heads 0 to {heads - 1}"
                )
    return models


def _head(text: str) -> tuple[int, int]:
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise UsageError(f"--heatmap_heads must be layer.head, such as 3.5, got {text}")
    return int(layer), int(head)


def _choose_heads(recorder: Recorder, length: int) -> dict[tuple[int, int], str]:
    """The head with the most weight on key 0, and the one with the largest entropy, of a measured model."""

    def best(metric: str) -> tuple[int, int] | None:
        found = {
            (r["layer"], r["head"]): r["value"]
            for r in recorder.records
            if r["metric"] == metric and r["length"] == length and r["head"] is not None
        }
        # NaN, of a head without any weight, is unlike itself
        found = {place: value for place, value in found.items() if value == value}
        return max(found, key=found.get) if found else None

    chosen = {}
    for metric, text in (
        ("entropy", f"largest entropy in {recorder.label}"),
        ("first_weight", f"largest mean weight on key 0 in {recorder.label}"),
    ):
        if (place := best(metric)) is not None:
            chosen[place] = f"{chosen[place]}, and {text}" if place in chosen else text
    return dict(reversed(chosen.items()))


def _measure_all(
    args: argparse.Namespace, models: list[Model], labels: list[str], samples: Samples
) -> list[dict[str, Any]]:
    """The records of every model, one model in memory at a time."""
    lengths = sorted(args.lengths)
    thresholds = Thresholds(sink_eps=tuple(args.sink_eps), small_eps=tuple(args.sparsity_eps))
    heads = {_head(text): "chosen by --heatmap_heads" for text in args.heatmap_heads}
    total = len(models) * args.samples * (len(lengths) + len(args.bits))
    records: list[dict[str, Any]] = []
    with tqdm(total=total, unit="sequence", disable=None) as bar:
        for number, (source, label) in enumerate(zip(models, labels, strict=True)):
            recorder = Recorder(str(args.model[number]), label)
            bar.set_description(label)
            model = source.load()
            try:
                for length in lengths:
                    tokens = samples.tokens[:, : length + 1]
                    measure(model, tokens, recorder, thresholds=thresholds, tick=bar.update)
                if label not in labels[:number]:
                    heads = heads or _choose_heads(recorder, lengths[-1])
                    layers, width = model.config.num_hidden_layers, model.config.num_attention_heads
                    own = [place for place in heads if place[0] < layers and place[1] < width]
                    sequence = samples.tokens[0, : lengths[0]]
                    record_maps(model, sequence, own, recorder, cells=MAP_CELLS, why=heads)
            except NotImplementedError as error:
                raise UsageError(f"--model {source.path}: {error}") from None
            parameters = sum(p.numel() for p in model.parameters())
            recorder.add("model", parameters, **source.fields())
            _measure_robustness(args, source, model, samples, recorder, bar.update)
            if args.run is not None:
                record_curves(find_curves(args.run[number]), recorder)
            loss = next(r for r in recorder.records if r["metric"] == "loss")["value"]
            with tqdm.external_write_mode():
                logger.info(f"{label}  {source.path}  loss {loss:.4f} at {lengths[0]} tokens")
            records += recorder.records
            # before the next one is loaded
            del model
    return records


def _measure_robustness(
    args: argparse.Namespace,
    source: Model,
    model: torch.nn.Module,
    samples: Samples,
    recorder: Recorder,
    tick: Callable[[], Any],
) -> None:
    if args.passkey_lengths:
        from flame.analysis.passkey import passkey_accuracy

        for length in sorted(args.passkey_lengths):
            shares = passkey_accuracy(
                model,
                source.tokenizer,
                length,
                depths=args.passkey_depths,
                samples=args.passkey_samples,
                seed=0,
            )
            for depth, share in shares.items():
                recorder.add("passkey", share, length=length, depth=depth)
    if args.bits:
        from flame.analysis.quantized import quantize_weights

        longest = max(args.lengths)
        for bits in sorted(args.bits):
            quantized = source.load()
            quantize_weights(quantized, bits)
            loss = loss_of(quantized, samples.tokens[:, : longest + 1], tick=tick)
            recorder.add("perplexity", perplexity(loss), length=longest, bits=bits)


def _setup(args: argparse.Namespace, samples: Samples, device: str) -> dict[str, Any]:
    recorder = Recorder("", "")
    recorder.add(
        "setup",
        "",
        command=shlex.join(["python", "-m", "flame.analyze", *sys.argv[1:]]),
        date=datetime.now().astimezone().isoformat(timespec="minutes"),
        device=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        torch=torch.__version__,
        data=args.data,
        samples=args.samples,
        documents=samples.num_documents,
        share_from_end=samples.share_from_end,
        held_out=args.held_out,
        first_token=args.first_token,
        sink_eps=args.sink_eps,
        sparsity_eps=args.sparsity_eps,
    )
    return recorder.records[0]


def _analyze(args: argparse.Namespace) -> None:
    _check(args)
    _require_out(args.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = _labels(args)
    models = _find_models(args, labels, device)
    for run in args.run or []:
        find_curves(run)
    samples = read_samples(
        args.data,
        models[0].tokenizer,
        number=args.samples,
        length=max(args.lengths),
        first_token=args.first_token,
        is_held_out=args.held_out,
    )
    for model in models:
        if samples.tokens.max() >= model.config.vocab_size:
            raise UsageError(
                f"--model {model.path} has {model.config.vocab_size} tokens, and its tokenizer more"
            )
    logger.info(
        f"{args.samples} sequences from the last {samples.share_from_end:.2%} of {args.data}, "
        f"{samples.num_documents} documents"
    )
    records = _measure_all(args, models, labels, samples)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write_records(args.out / RECORDS_FILE, [_setup(args, samples, device), *records])
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error}") from None


def _render(out: Path) -> None:
    results = Results(read_records(out / RECORDS_FILE))
    for name, text in (("report.md", tables.report(results)), ("report.html", html.page(results))):
        (out / name).write_text(text, encoding="utf-8")
        logger.info(f"written to {out / name}")


def main() -> None:
    transformers_logging.disable_progress_bar()
    init_logger()
    with exit_on_usage_error():
        args = _parser().parse_args()
        if args.report_only:
            if len(sys.argv) > 4:
                raise UsageError("--report_only takes --out and no other flag")
        else:
            _analyze(args)
        _render(args.out)


if __name__ == "__main__":
    main()
