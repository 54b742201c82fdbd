"""Keywords that transformers passes from a model's call to its attention, and that have no effect there.

A keyword that is neither used nor listed here is refused. transformers renames and adds keywords every few releases
(the cache was ``past_key_values`` until 5.23 and is ``cache`` from 5.24 on); silently dropping one would compute
something else.
"""

from collections.abc import Iterable

HARMLESS = {
    "use_cache": "whether the model makes a cache; a layer is given the cache itself",
    "num_items_in_batch": "scales the loss",
    "output_hidden_states": "collected around the layers",
    "output_router_logits": "collected around the layers",
    "max_length_q": "the operators take lengths from cu_seq_lens_q",
    "max_length_k": "the operators take lengths from cu_seq_lens_k",
    "deterministic": "the backward pass always is",
}
"""Keyword -> why it may be ignored."""


def refuse_unknown(name: str, keywords: Iterable[str]) -> None:
    """Raises TypeError, naming ``name`` and the keyword, unless all ``keywords`` are `HARMLESS`."""
    for keyword in keywords:
        if keyword not in HARMLESS:
            raise TypeError(
                f"{name} does not know the keyword {keyword!r}; ignoring it could compute something else"
            )
