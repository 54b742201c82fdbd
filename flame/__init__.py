"""flame: a trainer on torchtitan for language models that differ in the attention normaliser."""
