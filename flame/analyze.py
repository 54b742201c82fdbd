"""``python -m flame.analyze``: measures what attention does in trained models, and writes the comparison as a report.

``--out`` gets ``records.jsonl`` (one number per line), ``report.md`` (tables) and ``report.html`` (tables and charts, one
page that needs nothing else). Several models with one ``--label`` are seeds of one arm. What each number is:
docs/softpick/ANALYSIS.md.
"""

from flame.base.log import announce_imports
from flame.base.stop_signals import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()
    announce_imports()

import argparse
import shlex
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import flame.models  # noqa: F401  # teaches transformers the model
from flame.analysis.curves import Curves, read_curves, record_curves
from flame.analysis.flags import (
    check,
    find_models,
    has_other_flags,
    head_of,
    labels_of,
    parser,
    require_out,
)
from flame.analysis.heads import Thresholds
from flame.analysis.interventions import NUM_RUNS, frequent_token, intervene
from flame.analysis.lengths import default_lengths
from flame.analysis.measure import loss_of, measure, perplexity, record_maps
from flame.analysis.models import ModelSource
from flame.analysis.records import (
    RECORDS_FILE,
    Recorder,
    Results,
    read_records,
    write_records,
)
from flame.analysis.report import html, markdown
from flame.analysis.samples import Samples, read_samples
from flame.base.command_line import make_folder
from flame.base.errors import UsageError, exit_on_usage_error
from flame.base.log import init_logger, logger

MAP_CELLS = 48
"""Largest number of rows of an attention map in the report."""


def _choose_heads(recorder: Recorder, length: int) -> dict[tuple[int, int], str]:
    """The head with the most weight on key 0, and the one with the largest entropy, of a measured model."""

    def best(metric: str) -> tuple[int, int] | None:
        found = {
            (r["layer"], r["head"]): r["value"]
            for r in recorder.records
            if r["metric"] == metric and r["length"] == length and r["head"] is not None
        }
        # drop NaN, the value of a head without any weight
        found = {key: value for key, value in found.items() if value == value}
        return max(found, key=found.get) if found else None

    chosen = {}
    for metric, text in (
        ("entropy", f"largest entropy in {recorder.label}"),
        ("first_weight", f"largest mean weight on key 0 in {recorder.label}"),
    ):
        if (head := best(metric)) is not None:
            chosen[head] = f"{chosen[head]}, and {text}" if head in chosen else text
    return dict(reversed(chosen.items()))


def _measure_all(
    args: argparse.Namespace,
    models: list[ModelSource],
    labels: list[str],
    samples: Samples,
    curves: list[Curves],
) -> list[dict[str, Any]]:
    """The records of every model, one model in memory at a time."""
    lengths = sorted(args.lengths)
    thresholds = Thresholds(sink_eps=tuple(args.sink_eps), small_eps=tuple(args.sparsity_eps))
    heads = {head_of(text): "chosen by --heatmap_heads" for text in args.heatmap_heads}
    replacement = None
    if args.interventions:
        # one token for all models, also where they differ in what is special
        special = {i for source in models for i in source.tokenizer.all_special_ids}
        replacement = frequent_token(samples.tokens, special)
    # how often each sample is read at each length
    num_runs = 1 + NUM_RUNS * args.interventions
    total = len(models) * args.samples * (num_runs * len(lengths) + len(args.bits))
    records: list[dict[str, Any]] = []
    with tqdm(total=total, unit="sequence", disable=None) as bar:
        for number, (source, label) in enumerate(zip(models, labels, strict=True)):
            recorder = Recorder(str(args.model[number]), label)
            bar.set_description(label)
            with tqdm.external_write_mode():
                logger.info(f"measuring model {number + 1} of {len(models)}, {label}")
            model = source.load()
            try:
                # first, since it fails if a package is missing or a length too short
                _measure_robustness(args, source, model, samples, recorder, bar.update)
                options = {
                    "thresholds": thresholds,
                    "token_text": source.tokenizer.convert_ids_to_tokens,
                    "tick": bar.update,
                }
                for length in lengths:
                    tokens = samples.tokens[:, : length + 1]
                    try:
                        measure(model, tokens, recorder, **options)
                    except UsageError as error:
                        raise UsageError(f"--model {source.path}: {error}") from None
                    if replacement is not None:
                        intervene(
                            model,
                            tokens,
                            recorder,
                            replacement=replacement,
                            token_text=options["token_text"],
                            tick=bar.update,
                        )
                if label not in labels[:number]:
                    heads = heads or _choose_heads(recorder, lengths[-1])
                    layers, width = model.config.num_hidden_layers, model.config.num_attention_heads
                    existing = [(i, j) for i, j in heads if i < layers and j < width]
                    sequence = samples.tokens[0, : lengths[0]]
                    record_maps(model, sequence, existing, recorder, cells=MAP_CELLS, why=heads)
            except NotImplementedError as error:
                raise UsageError(f"--model {source.path}: {error}") from None
            parameters = sum(p.numel() for p in model.parameters())
            recorder.add("model", parameters, **source.fields(), **source.trained())
            if curves:
                record_curves(curves[number], recorder)
            loss = next(r for r in recorder.records if r["metric"] == "loss")["value"]
            with tqdm.external_write_mode():
                logger.info(f"{label}  {source.path}  loss {loss:.4f} at {lengths[0]} tokens")
            records += recorder.records
            # free the memory before the next model is loaded
            del model
    return records


def _measure_robustness(
    args: argparse.Namespace,
    source: ModelSource,
    model: PreTrainedModel,
    samples: Samples,
    recorder: Recorder,
    tick: Callable[[], Any],
) -> None:
    if args.passkey_lengths:
        from flame.analysis.passkey import passkey_accuracy, passkey_loss

        options = {
            "depths": args.passkey_depths,
            "samples": args.passkey_samples,
            "seed": 0,
        }
        for length in sorted(args.passkey_lengths):
            with tqdm.external_write_mode():
                logger.info(f"passkeys in {length} tokens")
            try:
                shares = passkey_accuracy(model, source.tokenizer, length, **options)
            except UsageError as error:
                raise UsageError(f"--passkey_lengths {length}: {error}") from None
            for depth, share in shares.items():
                recorder.add("passkey", share, length=length, depth=depth)
            losses = passkey_loss(model, source.tokenizer, length, **options)
            for depth, by_text in losses.items():
                for planted, loss in by_text.items():
                    keys = {"depth": depth, "planted": planted}
                    recorder.add("passkey_loss", loss, length=length, **keys)
    if args.bits:
        from flame.analysis.quantized import quantize_weights

        longest = max(args.lengths)
        for bits in sorted(args.bits):
            with tqdm.external_write_mode():
                logger.info(f"weights of {bits} bits")
            quantized = source.load()
            try:
                quantize_weights(quantized, bits)
            except UsageError as error:
                raise UsageError(f"--bits {bits}: --model {source.path}: {error}") from None
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
        begins=samples.begins,
        sink_eps=args.sink_eps,
        sparsity_eps=args.sparsity_eps,
    )
    return recorder.records[0]


def _analyze(args: argparse.Namespace) -> None:
    check(args)
    require_out(args.out)
    logger.info("reading the models' configurations and the text of --data")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = labels_of(args)
    models = find_models(args, labels, device)
    if not args.lengths:
        trained = [model.trained()["training_length"] for model in models]
        args.lengths = default_lengths(trained, [model.max_length for model in models])
        logger.info(f"--lengths {' '.join(map(str, args.lengths))}")
    curves = [read_curves(run) for run in args.run or []]
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
                f"--model {model.path} must have a row of its vocabulary, {model.config.vocab_size}, for each token of its tokenizer"
            )
    logger.info(
        f"{args.samples} sequences from the last {samples.share_from_end:.2%} of {args.data}, "
        f"{samples.num_documents} documents; each begins with {samples.begins}"
    )
    make_folder("--out", args.out)
    records = _measure_all(args, models, labels, samples, curves)
    try:
        write_records(args.out / RECORDS_FILE, [_setup(args, samples, device), *records])
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error}") from None


def _render(out: Path) -> None:
    results = Results(read_records(out / RECORDS_FILE))
    texts = {"report.md": markdown.report(results), "report.html": html.page(results)}
    for name, text in texts.items():
        try:
            (out / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written: {error}") from None
        logger.info(f"written to {out / name}")


def _render_again(out: Path) -> None:
    try:
        _render(out)
    except UsageError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # a missing key, or a value of another type, raises where it is drawn
        raise UsageError(
            f"--report_only: {out / RECORDS_FILE} is damaged or of another version, measure again: {error!r}"
        ) from error


def main() -> None:
    """Measures the models, or reads their records, and writes the report."""
    transformers_logging.disable_progress_bar()
    init_logger()
    with exit_on_usage_error():
        args = parser().parse_args()
        try:
            if args.report_only:
                if has_other_flags(args):
                    raise UsageError("--report_only takes --out and no other flag")
                _render_again(args.out)
            else:
                _analyze(args)
                _render(args.out)
        except KeyboardInterrupt:
            logger.info("SIGINT: nothing was written to --out; the same command starts again")
            sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    raise_at_interrupt()
    main()
