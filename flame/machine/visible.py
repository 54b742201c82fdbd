"""Which GPUs a run sees, and whether the variables that select GPUs mean what they seem to mean."""

from collections.abc import Mapping

from flame.base.errors import UsageError
from flame.base.log import logger
from flame.machine import kfd, list_gpus

ROCR = "ROCR_VISIBLE_DEVICES"
HIP = "HIP_VISIBLE_DEVICES"
CUDA = "CUDA_VISIBLE_DEVICES"
# values that hide all GPUs from a run that is meant for the CPU; NoDevFiles is Slurm's
_HIDING = ("", "-1", "NoDevFiles")


def selecting_variable(env: Mapping[str, str], *, is_rocm: bool) -> str:
    """The variable whose list of GPUs takes effect, or would if it were set.

    HIP reads CUDA's variable if its own is unset.
    """
    return HIP if is_rocm and (HIP in env or CUDA not in env) else CUDA


def _set_variables(env: Mapping[str, str], *, is_rocm: bool) -> dict[str, str]:
    names = (ROCR, HIP, CUDA) if is_rocm else (CUDA,)
    return {name: env[name] for name in names if name in env}


def describe_variables(env: Mapping[str, str], *, is_rocm: bool) -> str:
    """The variables that select GPUs, with their values, for errors."""
    masks = _set_variables(env, is_rocm=is_rocm)
    given = ", ".join(f"{name}={value}" for name, value in masks.items())
    return given or f"no {selecting_variable(env, is_rocm=is_rocm)}"


def visible_gpus(env: Mapping[str, str], *, is_rocm: bool) -> list[str]:
    """PCI addresses of the GPUs that a process of this environment sees, in its order; empty for a run on the CPU.

    Partitions of a GPU have the same address.

    Raises:
        UsageError: The variables name GPUs that are not seen, or no GPU is seen though none was hidden on purpose.
    """
    found = list_gpus.addresses(env)
    if not found:
        _require_cpu_run(env, is_rocm=is_rocm)
        return []
    masks = _set_variables(env, is_rocm=is_rocm)
    last = selecting_variable(env, is_rocm=is_rocm)
    if masks.get(last) == "":
        # HIP before the fix of its issue 3001
        raise UsageError(
            f"{last} must not be empty: this version of HIP then shows all GPUs; set {last}=-1 to train on the CPU, "
            "or unset it"
        )
    last = last if last in masks else ROCR
    if last in masks:
        named = [name for name in masks[last].split(",") if name]
        if len(named) != len(found):
            raise UsageError(
                f"{last} names {len(named)} GPUs, of which torch sees {len(found)} "
                f"({describe_variables(env, is_rocm=is_rocm)}{_counting(masks)}): name GPUs of this machine, each "
                "once and without spaces"
            )
    return found


def _counting(masks: Mapping[str, str]) -> str:
    return f"; HIP counts from 0 what {ROCR} leaves" if ROCR in masks and len(masks) > 1 else ""


def _require_cpu_run(env: Mapping[str, str], *, is_rocm: bool) -> None:
    """Raises UsageError unless the GPUs are hidden on purpose, or the machine has none."""
    masks = _set_variables(env, is_rocm=is_rocm)
    given = describe_variables(env, is_rocm=is_rocm)
    variable = selecting_variable(env, is_rocm=is_rocm)
    if masks.get(variable) in _HIDING or masks.get(ROCR) in _HIDING:
        return
    on_cpu = f"set {variable}=-1 to train on the CPU"
    listed = kfd.num_gpus()
    if listed and is_rocm:
        problem = kfd.access_problem()
        if problem or not masks:
            raise UsageError(
                f"torch sees no GPU with {given}, but the kernel lists {listed} AMD GPUs: "
                f"{problem or '`rocminfo` may say why'}; or {on_cpu}"
            )
    if masks:
        raise UsageError(
            f"torch sees no GPU with {given}{_counting(masks)}: name GPUs of this machine, or {on_cpu}"
        )
    if listed:
        logger.warning(
            f"the kernel lists {listed} AMD GPUs, which this build of torch cannot use: install its ROCm build; "
            "training on the CPU"
        )
