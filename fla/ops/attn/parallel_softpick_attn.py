"""Makes the name ``fla.ops.attn.parallel_softpick_attn`` the function itself.

``fla/ops/attn/__init__.py`` belongs to upstream flash-linear-attention, so nothing of ours can be
re-exported there. This module replaces itself in ``sys.modules`` by the function, so that all three spellings
import it: ``from fla.ops.attn import parallel_softpick_attn``,
``import fla.ops.attn.parallel_softpick_attn`` and
``from fla.ops.attn.parallel_softpick_attn import parallel_softpick_attn``.
"""

import sys

from fla.ops.attn.softpick import parallel_softpick_attn

# the third spelling looks this attribute up on the entry of sys.modules
parallel_softpick_attn.parallel_softpick_attn = parallel_softpick_attn  # pyright: ignore[reportFunctionMemberAccess]  # Python functions accept new attributes
sys.modules[__name__] = parallel_softpick_attn  # pyright: ignore[reportArgumentType]  # import accepts any object as a module
