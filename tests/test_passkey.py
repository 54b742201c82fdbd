"""Passkey retrieval: by a stand-in that copies, by one that cannot, and by a real model's cache."""

import re
from types import SimpleNamespace

import pytest
import torch
from small_model import write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flame.analysis import passkey
from flame.analysis.passkey import passkey_accuracy, passkey_loss
from flame.base.errors import UsageError
from flame.data.tokenizer import load_tokenizer
from flame.models import SoftpickTransformerForCausalLM, read_config

DEPTHS = (0, 0.25, 0.5, 1)


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer("byte")


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE in which numbers take one to three tokens, with a bos of its own in front of a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ["There is an important info. The grass is green. What is the pass key?"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(words + [f" {i}" for i in range(10_000, 100_000, 37)], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


class Copying:
    """Predicts what followed the longest end of the text where that stood before; nothing if it is short."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, shortest=6, sees=lambda row: row):
        self.tokenizer, self.shortest, self.sees = tokenizer, shortest, sees
        self.prompts = []

    def next_of(self, row):
        row = self.sees(row)
        best, where = self.shortest, None
        for i in range(1, len(row)):
            size = 0
            while size < i and row[i - 1 - size] == row[-1 - size]:
                size += 1
            if size >= best:
                best, where = size, i
        return None if where is None else row[where]

    def __call__(self, ids, logits_to_keep):
        logits = torch.zeros(len(ids), logits_to_keep, len(self.tokenizer))
        for b, row in enumerate(ids.tolist()):
            for i in range(logits_to_keep):
                token = self.next_of(row[: len(row) - logits_to_keep + 1 + i])
                if token is not None:
                    logits[b, i, token] = 30
        return SimpleNamespace(logits=logits)

    def generate(self, ids, attention_mask, max_new_tokens, do_sample, use_cache, pad_token_id):
        assert attention_mask.all()
        assert not do_sample
        assert use_cache
        self.prompts += ids.tolist()
        for _ in range(max_new_tokens):
            tokens = [self.next_of(row) for row in ids.tolist()]
            tokens = [pad_token_id if token is None else token for token in tokens]
            ids = torch.cat([ids, torch.tensor(tokens)[:, None]], dim=1)
        return ids


def ask(function, model, tokenizer, length, depths=DEPTHS, samples=3, seed=0):
    return function(model, tokenizer, length, depths=depths, samples=samples, seed=seed)


@pytest.mark.parametrize(("name", "lengths"), [("byte", (244, 400)), ("bpe", (140, 200))])
def test_copying_finds_every_key_in_prompts_of_the_exact_length(name, lengths, request):
    tokenizer = request.getfixturevalue(name)
    keys = {}
    for length in lengths:
        model = Copying(tokenizer, 6 if name == "byte" else 2)
        assert ask(passkey_accuracy, model, tokenizer, length) == dict.fromkeys(DEPTHS, 1.0)
        assert [len(prompt) for prompt in model.prompts] == [length] * len(DEPTHS) * 3
        texts = [tokenizer.decode(prompt) for prompt in model.prompts]
        shape = r"<.?bos.?>There is an important .* The pass key is (\d{5})\. Remember it\. \1 is the pass key\..* The pass key is"
        keys[length] = [re.fullmatch(shape, text)[1] for text in texts]
        # pieces put together are the text's own tokens, but for the one sentence that is cut
        start = tokenizer(texts[0].removeprefix(tokenizer.bos_token)).input_ids[:20]
        assert model.prompts[0][:20] == start
    # the same at every depth and length
    (first, second) = keys.values()
    assert first == second == first[:3] * len(DEPTHS)
    assert len(set(first)) == 3


def test_the_key_stands_where_depth_says(byte):
    model = Copying(byte)
    depths = (0, 0.3, 0.6, 1)
    ask(passkey_accuracy, model, byte, 500, depths=depths, samples=1)
    texts = [byte.decode(prompt) for prompt in model.prompts]
    places = [
        text.index(" The pass key is") - text.index("there.") - len("there.") for text in texts
    ]
    # all that is no filler is as long at every depth
    filler = places[-1]
    assert places[0] == 0
    assert texts[-1].endswith("is the pass key. What is the pass key? The pass key is")
    for depth, place in zip(depths, places, strict=True):
        # the longest sentence has 23 bytes
        assert abs(place - depth * filler) <= 12
        assert texts[depths.index(depth)][: texts[0].index("there.") + 6 + place].endswith(".")


def test_without_sight_of_the_needle_no_key_is_found(byte):
    # 60 tokens: the question, and of the needle the end at most
    model = Copying(byte, sees=lambda row: row[-60:])
    assert ask(passkey_accuracy, model, byte, 400, depths=(0, 0.5)) == {0: 0.0, 0.5: 0.0}


def test_a_number_that_goes_on_is_not_the_key(byte):
    class Verbose(Copying):
        def generate(self, ids, **options):
            found = super().generate(ids, **options)
            found[:, -1] = ord("7")
            return found

    assert ask(passkey_accuracy, Verbose(byte), byte, 300) == dict.fromkeys(DEPTHS, 0.0)


def test_another_seed_draws_other_keys(byte):
    prompts = []
    for seed in (0, 0, 1):
        model = Copying(byte)
        ask(passkey_accuracy, model, byte, 300, seed=seed)
        prompts.append(model.prompts)
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_loss_tells_a_key_that_is_read_from_one_that_is_not(byte, bpe):
    losses = ask(passkey_loss, Copying(byte), byte, 300)
    for depth in DEPTHS:
        found = losses[depth]
        assert found["with_key"] == pytest.approx(0, abs=1e-6)
        # uniform over the vocabulary, for five digits of a byte each
        assert found["without_key"] == pytest.approx(5 * torch.tensor(259.0).log().item(), rel=1e-6)
        # sure of the other key's digits
        assert found["other_key"] > 30
    # answers of different numbers of tokens in a batch
    sizes = {len(bpe(f" {key}", add_special_tokens=False).input_ids) for key in (10_037, 98_765)}
    assert len(sizes) == 2
    assert ask(passkey_loss, Copying(bpe, 2), bpe, 140, samples=8)[0]["with_key"] < 1e-5


def test_a_real_model_with_and_without_its_cache(byte, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = SoftpickTransformerForCausalLM(read_config(write_model(tmp_path))).eval()
    # of a model that knows nothing: no key, and its own losses
    assert ask(passkey_accuracy, model, byte, 270, depths=(0.5,)) == {0.5: 0.0}
    losses = ask(passkey_loss, model, byte, 270, depths=(0.5,))
    prompts = Copying(byte)
    ask(passkey_accuracy, prompts, byte, 270, depths=(0.5,))
    expected = 0.0
    for prompt in prompts.prompts:
        key = re.search(r"key is (\d{5})", byte.decode(prompt))[1]
        ids = torch.tensor([prompt + byte(f" {key}", add_special_tokens=False).input_ids])
        with torch.no_grad():
            scores = model(ids).logits[0, -6:-1].log_softmax(-1)
        expected -= scores.gather(1, ids[0, -5:, None]).sum().item() / 3
    assert losses[0.5]["with_key"] == pytest.approx(expected, rel=1e-5)
    # one prompt at a time
    monkeypatch.setattr(passkey, "_BATCH_TOKENS", 1)
    single = ask(passkey_loss, model, byte, 270, depths=(0.5,))
    assert single[0.5] == pytest.approx(losses[0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"length": 100}, "length must be at least 244 tokens of this tokenizer.*, got 100"),
        ({"depths": ()}, "depths must name at least one depth"),
        ({"depths": (0.5, 1.5)}, "depths must lie between 0 and 1, got 1.5"),
        ({"depths": (float("nan"),)}, "depths must lie between 0 and 1, got nan"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("function", [passkey_accuracy, passkey_loss])
def test_says_what_cannot_be_asked(byte, function, words, message):
    with pytest.raises(UsageError, match=message):
        ask(function, Copying(byte), byte, **{"length": 300} | words)
