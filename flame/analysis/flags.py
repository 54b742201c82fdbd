"""The flags of `flame.analyze`, and the checks that need no loaded model."""

import argparse
from pathlib import Path

from flame.analysis.models import OWN, ModelSource, find_model
from flame.analysis.quantized import BITS
from flame.analysis.records import RECORDS_FILE
from flame.analysis.samples import FIRST_TOKENS
from flame.base.command_line import Parser
from flame.base.errors import UsageError
from flame.base.paths import path_argument, text_argument
from flame.data.bos import before_prompt
from flame.data.prepared import tokenizer_fingerprint
from flame.models.attention import IMPLEMENTATIONS


def parser() -> Parser:
    """The parser of the command line."""
    flags = Parser(
        prog="python -m flame.analyze",
        description="Measures attention in trained models and writes a report that compares them.",
    )
    add = flags.add_argument
    add(
        "--out",
        type=path_argument,
        required=True,
        help="folder of the report; an earlier report is replaced",
    )
    add(
        "--report_only",
        action="store_true",
        help="measure nothing: draw the report again from the records in --out",
    )
    add(
        "--model",
        type=path_argument,
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
        type=text_argument,
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
        default=[],
        help="tokens in a sequence, with the same beginnings for every length (default: the length of training and the "
        "powers of 4 below it, from 16 on; 128 512 if no run.json says how long that is)",
    )
    add("--samples", type=int, default=32, help="sequences (default: %(default)s)")
    add(
        "--first_token",
        choices=FIRST_TOKENS,
        default="training",
        help="token 0 of every sequence: what the model's tokenizer puts before a text, which is what training began "
        "with; a token of the text; or this one (default: %(default)s)",
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
        help="weights up to these are counted in addition to the exact zeros (default: 1e-5)",
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
        type=path_argument,
        nargs="+",
        help="dump folder of each model's run, for its training curves",
    )
    add(
        "--bits",
        type=int,
        nargs="+",
        default=[],
        choices=BITS,
        help="also the perplexity at the longest length with weights quantised to this many bits",
    )
    add(
        "--passkey_lengths",
        type=int,
        nargs="+",
        default=[],
        help="also retrieve passkeys in texts of these lengths, in tokens",
    )
    add(
        "--passkey_depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="position of the key, from 0 (the start) to 1 (default: 0 0.25 0.5 0.75 1)",
    )
    add("--passkey_samples", type=int, default=20, help="keys at a depth (default: %(default)s)")
    add(
        "--interventions",
        action="store_true",
        help="also the loss without the first token, without its largest channel, and without the weight of sink heads on it",
    )
    add(
        "--attn_implementation",
        nargs="+",
        default=[OWN],
        metavar="NAME",
        help="operator, such as softpick, of models of transformers that name none: one for all models or one each "
        f"(default: {OWN}, that is softmax)",
    )
    return flags


def has_other_flags(args: argparse.Namespace) -> bool:
    """Whether any flag other than --report_only and --out is given."""
    bare = parser().parse_args(["--report_only", "--out", str(args.out)])
    return bare != args


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for a wrong value, or for two that exclude each other."""
    if not args.model:
        raise UsageError("--model is needed, or --report_only")
    if args.data is None:
        raise UsageError("--data is needed: held-out text")
    for flag, values, is_valid, expected in (
        ("lengths", args.lengths, lambda x: x >= 2, "at least 2"),
        ("samples", [args.samples], lambda x: x >= 1, "at least 1"),
        ("sink_eps", args.sink_eps, lambda x: 0 < x < 1, "above 0 and below 1"),
        ("sparsity_eps", args.sparsity_eps, lambda x: 0 < x < 1, "above 0 and below 1"),
        ("passkey_lengths", args.passkey_lengths, lambda x: x >= 1, "at least 1"),
        ("passkey_depths", args.passkey_depths, lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("passkey_samples", [args.passkey_samples], lambda x: x >= 1, "at least 1"),
    ):
        for value in values:
            if not is_valid(value):
                raise UsageError(f"--{flag} must be {expected}, got {value:g}")
        if len(set(values)) < len(values):
            raise UsageError(f"--{flag} names {max(values, key=values.count):g} twice")
    for flag, values in (("label", args.label), ("run", args.run)):
        if values is not None and len(values) != len(args.model):
            raise UsageError(
                f"--{flag} must have one value for each of the {len(args.model)} of --model, got {len(values)}"
            )
    for label in args.label or []:
        if not label.strip():
            raise UsageError(f"--label must name an arm, got {label!r}")
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


def require_out(out: Path) -> None:
    """Raises UsageError if ``out`` holds files that are not a report."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORDS_FILE).is_file():
        raise UsageError(
            f"--out {out} holds files and no {RECORDS_FILE}; name a new folder or one of an earlier report"
        )


def labels_of(args: argparse.Namespace) -> list[str]:
    """The arm of each model: --label, or the name of its folder.

    Raises:
        UsageError: There is no --label, and two folders have the same name.
    """
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
            f"--label is needed, since several folders of --model give the label {max(labels, key=labels.count)!r}; "
            "give all seeds of an arm the same label"
        )
    return labels


def find_models(args: argparse.Namespace, labels: list[str], device: str) -> list[ModelSource]:
    """Finds the models, and checks tokenizers, arms and the given lengths before the first is loaded.

    Raises:
        UsageError: A model cannot be found, or does not fit the other models or the flags.
    """
    names = args.attn_implementation
    names = names * len(args.model) if len(names) == 1 else names
    runs = args.run or [None] * len(args.model)
    models = [find_model(p, n, device, r) for p, n, r in zip(args.model, names, runs, strict=True)]
    first = models[0]
    arms: dict[str, ModelSource] = {}
    for model, label in zip(models, labels, strict=True):
        if _text_fingerprint(model) != _text_fingerprint(first):
            raise UsageError(
                f"--model {model.path} has another tokenizer than {first.path}: losses compare only if all models are "
                "measured on the same tokens"
            )
        own, others = (before_prompt(x.tokenizer, "tokenizer") for x in (model, first))
        if args.first_token == "training" and own != others:
            raise UsageError(
                f"--model {model.path} begins a text with {_words(model, own)}, but {first.path} with "
                f"{_words(first, others)}: measure them apart, or give --first_token"
            )
        arm = arms.setdefault(label, model)
        if arm.fields() != model.fields():
            raise UsageError(
                f"--label {label}: {model.path} ({model.fields()}) must be another seed of the arm of {arm.path} "
                f"({arm.fields()}); give it another label"
            )
        most = model.max_length
        longest = max([*args.lengths, *args.passkey_lengths], default=0)
        if most is not None and longest > most:
            flag = "lengths" if longest in args.lengths else "passkey_lengths"
            raise UsageError(
                f"--{flag} {longest}: --model {model.path} takes {most} tokens at most"
            )
        for text in args.heatmap_heads:
            layer, head = head_of(text)
            layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
            if layer >= layers or head >= heads:
                raise UsageError(
                    f"--heatmap_heads {text}: --model {model.path} has layers 0 to {layers - 1} and heads 0 to {heads - 1}"
                )
    return models


def _text_fingerprint(model: ModelSource) -> dict[str, object]:
    """Values that are equal if two models see the same tokens in a text, apart from tokens before it."""
    fingerprint = tokenizer_fingerprint(model.tokenizer)
    del fingerprint["tokenizer_sha256"]
    return fingerprint


def _words(model: ModelSource, ids: list[int]) -> str:
    return " ".join(model.tokenizer.convert_ids_to_tokens(ids)) or "no token of its own"


def head_of(text: str) -> tuple[int, int]:
    """Layer and head of a value of --heatmap_heads, such as ``3.5``.

    Raises:
        UsageError: The value is not two numbers joined by a dot.
    """
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdecimal() and head.isdecimal()):
        raise UsageError(f"--heatmap_heads must be layer.head, such as 3.5, got {text}")
    return int(layer), int(head)
