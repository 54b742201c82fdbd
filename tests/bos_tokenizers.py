"""Configurations and tokenizers for the tests of how documents begin."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flame.config.sections import JobConfig, Training, Validation
from flame.data.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")
BOS, EOS = BYTE.bos_token_id, BYTE.eos_token_id


def config_of(path, share=0.05, sequences=0, **training):
    training = Training(dataset=str(path), **training)
    return JobConfig(training=training, validation=Validation(share=share, sequences=sequences))


def words(template=None, bos="<s>", pre_tokenizer=None):
    """Whole words and a template around a text, with the special tokens of several families."""
    names = ["<s>", "</s>", "[CLS]", "[SEP]", "a", "b", "c"]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="c"))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    special = [(name, vocab[name]) for name in names[:4]]
    if isinstance(template, str):
        template = processors.TemplateProcessing(single=template, special_tokens=special)
    if template is not None:
        backend.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>")
