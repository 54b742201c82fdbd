"""Operators of one normaliser from the operator of all of them."""

import inspect
from collections.abc import Callable
from typing import Any


def bind_normalizer(operator: Callable[..., Any], normalizer: str) -> Callable[..., Any]:
    """``operator`` with ``normalizer=normalizer``, as a function of the operator's module.

    Args:
        operator: A function that takes ``normalizer`` by keyword and has ``normalized_attn`` in its name.
        normalizer: A key of `naive.NORMALIZERS`.

    Returns:
        A function with the operator's other arguments, under its name with ``normalizer`` for ``normalized``. The
        operator's module binds that name to the function, so that the function can be pickled.
    """

    def named(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs, normalizer=normalizer)

    name = operator.__name__.replace("normalized", normalizer)
    named.__name__ = named.__qualname__ = name
    # a code object of each function: tracebacks name it, and torch.compile counts recompilations by it
    named.__code__ = named.__code__.replace(co_name=name, co_qualname=name)
    named.__module__ = operator.__module__
    named.__doc__ = f'`{operator.__name__}` with ``normalizer="{normalizer}"``.'
    signature = inspect.signature(operator)
    parameters = [p for p in signature.parameters.values() if p.name != "normalizer"]
    named.__signature__ = signature.replace(parameters=parameters)
    named.__annotations__ = {
        name: kind for name, kind in operator.__annotations__.items() if name != "normalizer"
    }
    return named
