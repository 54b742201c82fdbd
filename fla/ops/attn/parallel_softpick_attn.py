"""Makes the name ``fla.ops.attn.parallel_softpick_attn`` the function itself.

``fla/ops/attn/__init__.py`` belongs to upstream flash-linear-attention, so nothing of ours can be
re-exported there. This module replaces itself in ``sys.modules`` by the function, which then answers
to all three spellings: ``from fla.ops.attn import parallel_softpick_attn``,
``import fla.ops.attn.parallel_softpick_attn`` and
``from fla.ops.attn.parallel_softpick_attn import parallel_softpick_attn``.
"""

import sys

from fla.ops.attn.softpick import parallel_softpick_attn

# read by the third spelling, which looks the name up on what stands in sys.modules
parallel_softpick_attn.parallel_softpick_attn = parallel_softpick_attn  # pyright: ignore[reportFunctionMemberAccess]  # functions take attributes
sys.modules[__name__] = parallel_softpick_attn  # pyright: ignore[reportArgumentType]  # import takes any object
