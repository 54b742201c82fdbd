"""A small Hugging Face tokenizer for the tests of flame.data."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(num_words, **special):
    """A tokenizer that is unlike the byte one: whole words, unknown ones included."""
    vocab = {f"w{i}": i for i in range(num_words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
