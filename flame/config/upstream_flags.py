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
    "training.mixed_precision_reduce": "leave it out; gradients are summed over processes in float32",
    "experimental.context_parallel_rotate_method": "leave it out; keys and values are gathered (allgather)",
    "experimental.pipeline_parallel_degree": "leave it out; shard with "
    "--training.data_parallel_shard_degree or --training.tensor_parallel_degree instead",
    "experimental.enable_async_tensor_parallel": "leave it out; --training.tensor_parallel_degree works "
    "without it",
    "experimental.enable_compiled_autograd": "leave it out; --training.compile compiles forward and "
    "backward of each layer without it",
}
"""Flag -> what its user should do."""

ONLY_VALUES: dict[str, str | bool] = {
    "training.mixed_precision_reduce": "float32",
    "experimental.context_parallel_rotate_method": "allgather",
    "experimental.pipeline_parallel_degree": "1",
    "experimental.enable_async_tensor_parallel": False,
    "experimental.enable_compiled_autograd": False,
}
"""Refused flag -> the one value that says what is done anyway.

Commands, recipes and folders of version 0.1.0 give these flags with that value, and are read as before."""

REFUSED_SECTIONS: dict[str, str] = {
    "activation_offload": "use --activation_checkpoint.mode",
    "float8": "leave it out; training is in bfloat16 or float32",
    "fault_tolerance": "leave it out; a run that was stopped continues by the same command",
}
"""Section -> what the user of any of its flags should do."""


def refuse(argv: list[str]) -> list[str]:
    """``argv`` without the flags of `ONLY_VALUES` that are given their value.

    Raises:
        UsageError: An argument is one of the flags above.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            kept.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        flag = name.replace("-", "_")
        section, _, option = flag.partition(".")
        # the negative form of a switch
        positive = f"{section}.{option.removeprefix('no_')}"
        advice = REFUSED.get(flag) or REFUSED.get(positive) or REFUSED_SECTIONS.get(section)
        if advice is None:
            kept.append(word)
            continue
        only = ONLY_VALUES.get(positive)
        if only is False and flag != positive and not equals:
            continue
        if isinstance(only, str) and flag == positive:
            value = value if equals else next(words, "")
            if value == only:
                continue
        raise UsageError(f"--{flag} is not supported: {advice}")
    return kept
