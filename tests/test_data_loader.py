"""flame.data: the token stream and the loaders over it."""

import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from word_tokenizer import word_tokenizer

from flame.data import mixing
from flame.data import tokens as tokens_module
from flame.data.batches import IGNORE_INDEX
from flame.data.loader import TokenLoader, validation_batches
from flame.data.source import TokenSource
from flame.data.text import load_documents
from flame.data.tokenizer import load_tokenizer
from flame.data.tokens import split_tokens, tokenize

BYTE = load_tokenizer("byte")
EOS = 257
# no deadline: the first example pays for imports
quick = settings(max_examples=100, deadline=None)


class TestTokenize:
    @quick
    @given(st.lists(st.text(max_size=40)))
    @example(["", "<|eos|>", ""])
    def test_is_the_bytes_with_eos_behind_each_document(self, documents):
        expected = [i for document in documents for i in (*document.encode(), EOS)]
        tokens = tokenize(iter(documents), BYTE)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == expected

    def test_pieces_and_batches_do_not_show(self, monkeypatch):
        documents = load_documents("python-docs")[:6] + ["x" * 500, "", "\n" * 500]
        whole = tokenize(documents, BYTE)
        monkeypatch.setattr(tokens_module, "_PIECE", 100)
        monkeypatch.setattr(tokens_module, "_BATCH", 250)
        pieces = list(tokens_module._pieces(documents))
        assert max(len(text) for text, _ in pieces) == 100
        assert "".join(text for text, _ in pieces) == "".join(documents)
        assert len(list(tokens_module._batches(pieces))) > 10
        np.testing.assert_array_equal(tokenize(documents, BYTE), whole)

    @pytest.mark.parametrize(("num_words", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
    def test_dtype_holds_every_id(self, num_words, dtype):
        # the eos token takes the next id, 65,535 or 65,536
        tokens = tokenize([f"w{num_words - 1}"], word_tokenizer(num_words, eos_token="</s>"))
        assert tokens.dtype == dtype
        assert tokens.tolist() == [num_words - 1, num_words]

    def test_any_tokenizer_reads_special_tokens_as_text_and_is_left_alone(self):
        tokenizer = word_tokenizer(4, eos_token="</s>", pad_token="<pad>")
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=5, pad_token="<pad>")
        assert tokenize(["w1 </s> w2 w3", "w1"], tokenizer).tolist() == [1, 0, 2, 3, 4, 1, 4]
        assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
        assert tokenizer.backend_tokenizer.padding["length"] == 8
        assert tokenizer("</s>", truncation=False)["input_ids"] == [4]


class TestSplitTokens:
    @quick
    @given(
        num_tokens=st.integers(0, 400),
        seq_len=st.integers(1, 50),
        share=st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True)),
    )
    def test_parts_are_whole_and_do_not_overlap(self, num_tokens, seq_len, share):
        tokens = np.arange(num_tokens, dtype=np.uint16)
        try:
            train, validation = split_tokens(tokens, seq_len, share)
        except ValueError:
            # too short: the held-out part is at most the share plus a sequence and a label
            assert num_tokens < share * num_tokens + 2 * seq_len + 2
            return
        assert np.concatenate([train, validation]).tolist() == tokens.tolist()
        assert train.base is not None
        assert len(train) >= seq_len + 1
        if share == 0:
            assert not len(validation)
        else:
            count, rest = divmod(len(validation) - 1, seq_len)
            assert rest == 0
            assert count >= 1
            assert abs(count - share * num_tokens / seq_len) <= 1

    def test_example(self):
        train, validation = split_tokens(np.arange(1000), 10, 0.1)
        assert (len(train), len(validation)) == (899, 101)

    def test_too_short(self):
        message = r"^--training\.seq_len 10: the data has {} tokens, .* takes 11 .*; use a shorter"
        split_tokens(np.arange(11), 10, 0.0)
        with pytest.raises(ValueError, match=message.format(10)):
            split_tokens(np.arange(10), 10, 0.0)
        split_tokens(np.arange(22), 10, 0.01)
        with pytest.raises(ValueError, match=message.format(21)):
            split_tokens(np.arange(21), 10, 0.01)

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
    def test_bad_share(self, share):
        with pytest.raises(ValueError, match=r"^--validation\.share"):
            split_tokens(np.arange(100), 10, share)


def source_of(tokens, name="test"):
    """A source of one document."""
    return TokenSource(name, tokens, np.array([len(tokens)]), "")


def make_loader(
    tokens, *, seq_len=4, batch_size=2, dp_rank=0, dp_world_size=1, seed=0, num_workers=0
):
    return TokenLoader(
        [source_of(tokens)],
        shares=[1],
        num_workers=num_workers,
        seq_len=seq_len,
        batch_size=batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        seed=seed,
    )


def visited(batch, seq_len=4):
    """The sequences of a batch; the streams here count up, so the first token says which."""
    inputs, labels = batch
    torch.testing.assert_close(labels, inputs["input"] + 1, rtol=0, atol=0)
    return (inputs["input"][:, 0] // seq_len).tolist()


def global_order(loaders, num_batches):
    """What the ranks together visit, in the order of the ranks within each step."""
    steps = zip(*(islice(loader, num_batches) for loader in loaders), strict=True)
    return [sequence for step in steps for batch in step for sequence in visited(batch)]


def ranks(tokens, world_size, batch_size, state=None):
    loaders = [
        make_loader(tokens, batch_size=batch_size, dp_rank=rank, dp_world_size=world_size)
        for rank in range(world_size)
    ]
    for loader in loaders if state else []:
        loader.load_state_dict(state)
    return loaders


class TestTokenLoader:
    # 10 sequences of 4 and three tokens that are not used
    TOKENS = np.arange(10 * 4 + 1 + 3, dtype=np.uint16)

    def test_batch(self):
        inputs, labels = next(iter(make_loader(self.TOKENS, batch_size=3)))
        assert list(inputs) == ["input"]
        for tensor in (inputs["input"], labels):
            assert tensor.shape == (3, 4)
            assert tensor.dtype == torch.int64
            assert tensor.is_contiguous()
        torch.testing.assert_close(
            inputs["input"] % 4, torch.arange(4).expand(3, 4), rtol=0, atol=0
        )
        torch.testing.assert_close(labels, inputs["input"] + 1, rtol=0, atol=0)

    def test_epochs_are_fresh_permutations_that_may_end_inside_a_batch(self):
        order = global_order([make_loader(self.TOKENS, batch_size=7)], 10)
        epochs = [order[i : i + 10] for i in range(0, 70, 10)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(10))
        assert len({tuple(epoch) for epoch in epochs}) == 7
        assert global_order([make_loader(self.TOKENS, batch_size=7)], 10) == order
        assert global_order([make_loader(self.TOKENS, batch_size=7, seed=1)], 10) != order

    def test_batch_larger_than_several_epochs(self):
        order = global_order([make_loader(self.TOKENS, batch_size=35)], 2)
        assert order == global_order([make_loader(self.TOKENS, batch_size=5)], 14)

    def test_order_is_the_same_for_every_version(self):
        # written down: a change here breaks the exact resume of every older checkpoint
        assert mixing.permutation(10, 0, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
        assert mixing.permutation(10, 42, 3).tolist() == [0, 8, 6, 5, 1, 3, 7, 4, 2, 9]

    # an example makes up to eleven loaders
    @settings(quick, max_examples=30)
    @given(
        num_sequences=st.integers(1, 23),
        world_size=st.integers(1, 5),
        batch_size=st.integers(1, 6),
        num_batches=st.integers(0, 8),
        new_world_size=st.integers(1, 5),
        new_batch_size=st.integers(1, 6),
    )
    def test_order_and_resume_do_not_depend_on_the_ranks(
        self, num_sequences, world_size, batch_size, num_batches, new_world_size, new_batch_size
    ):
        tokens = np.arange(num_sequences * 4 + 1, dtype=np.uint16)
        before = ranks(tokens, world_size, batch_size)
        order = global_order(before, num_batches)
        states = [loader.state_dict() for loader in before]
        assert all(state == states[0] for state in states)
        after = ranks(tokens, new_world_size, new_batch_size, states[0])
        order += global_order(after, 5)
        assert order == global_order([make_loader(tokens, batch_size=1)], len(order))

    def test_resume_is_bitwise_and_counts_only_what_was_handed_out(self):
        loader = make_loader(self.TOKENS, batch_size=3)
        state = loader.state_dict()
        for batch in islice(loader, 9):
            resumed = make_loader(self.TOKENS, batch_size=3)
            resumed.load_state_dict(state)
            torch.testing.assert_close(next(iter(resumed)), batch, rtol=0, atol=0)
            state = loader.state_dict()

    def test_state_passes_through_a_distributed_checkpoint(self, tmp_path):
        loader = make_loader(self.TOKENS)
        list(islice(loader, 7))
        dcp.save({"dataloader": loader}, checkpoint_id=tmp_path, no_dist=True)
        fresh = make_loader(self.TOKENS)
        dcp.load({"dataloader": fresh}, checkpoint_id=tmp_path, no_dist=True)
        assert fresh.state_dict() == loader.state_dict()
        torch.testing.assert_close(next(iter(fresh)), next(iter(loader)), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seq_len": 5}, r"^--training\.seq_len: .*has seq_len 4, this run's has 5"),
            ({"seed": 1}, r"^--training\.seed: .*has seed 0, this run's has 1"),
            (
                {"tokens": TOKENS[:-4]},
                r"^--training\.dataset: .*has num_sequences 10, this run's has 9",
            ),
            ({"tokens": TOKENS[1:]}, r"^--training\.dataset: .*has checksum"),
        ],
        ids=["seq_len", "seed", "fewer", "shifted"],
    )
    def test_resume_onto_something_else(self, change, message):
        state = make_loader(self.TOKENS).state_dict()
        other = make_loader(**{"tokens": self.TOKENS, **change})
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)

    def test_memory_map_is_not_copied(self, tmp_path):
        size = 8 << 20
        np.memmap(tmp_path / "tokens", np.uint16, "w+", shape=size)[:] = np.arange(
            size, dtype=np.uint16
        )
        mapped = np.memmap(tmp_path / "tokens", np.uint16, "r")
        tracemalloc.start()
        try:
            train, validation = split_tokens(mapped, 1024, 0.5)
            loader = make_loader(train, seq_len=1024)
            inputs, _ = next(iter(loader))
            next(
                validation_batches(
                    [source_of(validation)], seq_len=1024, batch_size=2, dp_rank=0, dp_world_size=1
                )
            )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < size / 8
        np.testing.assert_array_equal(inputs["input"].diff() % (1 << 16), 1)

    @pytest.mark.parametrize(
        ("change", "flag"),
        [
            ({"seq_len": 44}, "seq_len"),
            ({"seq_len": 0}, "seq_len"),
            ({"batch_size": 0}, "batch_size"),
            ({"seed": -1}, "seed"),
        ],
    )
    def test_bad_argument(self, change, flag):
        with pytest.raises(ValueError, match=rf"^--training\.{flag} -?\d+: "):
            make_loader(self.TOKENS, **change)


class TestValidationBatches:
    @quick
    @given(
        num_sequences=st.integers(0, 30),
        rest=st.integers(0, 3),
        world_size=st.integers(1, 5),
        batch_size=st.integers(1, 6),
    )
    def test_every_sequence_once_and_as_many_batches_on_each_rank(
        self, num_sequences, rest, world_size, batch_size
    ):
        tokens = np.arange(num_sequences * 4 + 1 + rest, dtype=np.uint16)
        per_rank = [
            list(
                validation_batches(
                    [source_of(tokens)],
                    seq_len=4,
                    batch_size=batch_size,
                    dp_rank=rank,
                    dp_world_size=world_size,
                )
            )
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in per_rank} == {
            -(-num_sequences // (batch_size * world_size))
        }
        seen = []
        for step in zip(*per_rank, strict=True):
            for inputs, labels in step:
                assert inputs["input"].shape == labels.shape == (batch_size, 4)
                assert inputs["input"].dtype == labels.dtype == torch.int64
                real = (labels != IGNORE_INDEX).all(dim=1)
                assert (labels[~real] == IGNORE_INDEX).all()
                assert (inputs["input"][~real] == 0).all()
                seen += visited(({"input": inputs["input"][real]}, labels[real]))
        assert seen == list(range(num_sequences))

    def test_nothing_held_out(self):
        _, validation = split_tokens(np.arange(100), 10, 0.0)
        assert not list(
            validation_batches(
                [source_of(validation)], seq_len=10, batch_size=1, dp_rank=0, dp_world_size=1
            )
        )


def test_ignore_index_is_the_one_torch_uses():
    loss = torch.nn.functional.cross_entropy(
        torch.zeros(1, 3), torch.tensor([IGNORE_INDEX]), reduction="sum"
    )
    assert loss.item() == 0
