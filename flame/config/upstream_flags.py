"""Flags of upstream flame that this trainer does not have, each with what to use instead.

A command written for upstream ends with this advice instead of "unrecognized option".
"""

from flame.base.errors import UsageError

REFUSED: dict[str, str] = {
    "job.use_for_integration_test": "leave it out; the tests have runs of their own",
    "model.name": "leave it out; --model.config names the model",
    "model.norm_type": "leave it out; the model has RMSNorm, with rms_norm_eps in --model.config",
    "model.converters": "leave it out; nothing is converted, float8 included",
    "model.print_after_conversion": "leave it out; nothing is converted",
    "optimizer.early_step_in_backward": "leave it out; it steps before the gradient norm is known, which "
    "--training.max_norm and --training.skip_nan_inf need",
    "optimizer.fused": "use --optimizer.implementation fused",
    "optimizer.scheduler": "use --lr_scheduler.decay_type, with --lr_scheduler.decay_ratio for wsd",
    "optimizer.min_lr_ratio": "use --lr_scheduler.lr_min",
    "training.warmup_steps": "use --lr_scheduler.warmup_steps",
    "training.enable_l2wrap": "leave it out; the loss is cross-entropy alone",
    "training.l2wrap_factor": "leave it out; the loss is cross-entropy alone",
    "metrics.rank_0_only": "leave it out, it is the default; --metrics.save_for_all_ranks is the opposite",
}
"""Flag -> what its user should do."""

REFUSED_SECTIONS: dict[str, str] = {
    "activation_offload": "use --activation_checkpoint.mode",
    "float8": "leave it out; training is in bfloat16 or float32",
    "fault_tolerance": "leave it out; a run that was stopped continues by the same command",
}
"""Section -> what the user of any of its flags should do."""


def refuse(argv: list[str]) -> None:
    """Raises UsageError if an argument is one of the flags above."""
    for word in argv:
        if not word.startswith("--"):
            continue
        flag = word.removeprefix("--").split("=")[0].replace("-", "_")
        section, _, option = flag.partition(".")
        # the negative form of a switch
        positive = f"{section}.{option.removeprefix('no_')}"
        advice = REFUSED.get(flag) or REFUSED.get(positive) or REFUSED_SECTIONS.get(section)
        if advice is not None:
            raise UsageError(f"--{flag} is not supported: {advice}")
