"""All that touches torchtitan 0.2.2; no other room imports it.

Importing this room patches torchtitan (`patches`), which must not have been imported before. It may import `models`,
`config`, `machine`, `base` and the operators.
"""

from flame.titan import patches  # noqa: F401
