"""Sources mixed in shares, rows with the bounds of their documents, and the flags of sources."""

import numpy as np
import pytest
from data_sources import BYTE
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.config.parse import parse_args
from flame.data.batches import IGNORE_INDEX, Rows, to_batch
from flame.data.mixing import Mixture
from flame.data.run_data import open_data


class TestPackedRows:
    def test_example(self):
        tokens = np.arange(14, dtype=np.uint16).reshape(2, 7)
        # the first row: documents of 2 and 4 tokens, the second: one that goes on, and an empty one
        rows = Rows(tokens, [np.array([2, 6]), np.array([3, 4, 7])])
        inputs, labels = to_batch(rows, 3)
        assert inputs["cu_seqlens"].tolist() == [0, 2, 5, 6, 9, 10, 12]
        assert inputs["positions"].tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 0, 1]]
        assert labels.tolist() == tokens[:, 1:].tolist()
        assert list(to_batch(rows, None)[0]) == ["input"]

    def test_inputs_and_labels_are_apart(self):
        inputs, labels = to_batch(Rows(np.zeros((1, 5), np.uint16), [np.empty(0, int)]), None)
        labels[:] = IGNORE_INDEX
        assert not inputs["input"].any()


class TestMixture:
    @settings(max_examples=50, deadline=None)
    @given(
        shares=st.lists(st.integers(1, 30), min_size=2, max_size=4),
        seed=st.integers(0, 2**40),
        start=st.integers(0, 200),
    )
    def test_each_sequence_of_a_source_once_and_shares_exact(self, shares, seed, start):
        mixture, size = Mixture(shares, seed), sum(shares)
        seen = [mixture.locate(place) for place in range(start, start + 2 * size)]
        assert seen == [
            Mixture(shares, seed).locate(place) for place in range(start, start + 2 * size)
        ]
        for source, share in enumerate(shares):
            numbers = [number for own, number in seen if own == source]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert abs(len(numbers) - 2 * share) <= share
        whole = [source for source, _ in (mixture.locate(place) for place in range(size))]
        assert [whole.count(source) for source in range(len(shares))] == list(shares)

    def test_blocks_and_seeds_differ(self):
        orders = {
            tuple(Mixture([50, 50], seed).locate(place)[0] for place in range(block, block + 100))
            for seed in (0, 1)
            for block in (0, 100)
        }
        assert len(orders) == 4

    def test_order_is_the_same_for_every_version(self):
        # written down: a change here breaks the exact resume of every older checkpoint
        order = [Mixture([3, 2], 42).locate(place) for place in range(10)]
        assert order == [
            (0, 0),
            (1, 0),
            (0, 1),
            (1, 1),
            (0, 2),
            (0, 3),
            (0, 4),
            (0, 5),
            (1, 2),
            (1, 3),
        ]


class TestFlags:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("--training.dataset a,b", "data_probs must be 2 numbers"),
            ("--training.dataset a,b --training.data_probs 0.7,0.2", "sum to 1, got '0.7,0.2'"),
            ("--training.dataset a,b --training.data_probs 1,0", "positive"),
            ("--training.dataset a,b --training.data_probs 0.55555,0.44445", "multiple of 0.0001"),
            ("--training.dataset a,b --training.data_probs 1", "data_probs must be 2 numbers"),
            ("--training.dataset a,b --training.data_probs x,y", "data_probs must be 2 numbers"),
            (
                "--training.dataset a,b --training.data_probs 0.5,0.5 --training.data_dir x",
                "data_dir must be 2 values",
            ),
            ("--training.streaming", "--validation.share must be 0 with --training.streaming"),
            ("--validation.sequences 3", "--validation.sequences must be 0 without"),
            ("--training.context_len 8", "context_len must be .* goes with --training.varlen"),
            (
                "--training.varlen --training.context_len 129",
                "between 1 and --training.seq_len 128",
            ),
            ("--training.prefetch_factor 2", "goes with --training.num_workers"),
            ("--training.num_workers -1", "num_workers must be at least 0"),
        ],
    )
    def test_a_mistake_is_named(self, argv, message):
        with pytest.raises(ValueError, match=message):
            parse_args(argv.split())

    def test_values_go_to_their_sources(self):
        flags = "--training.dataset a,b,c --training.data_probs 0.2,0.5,0.3"
        names = "--training.dataset_name x,,z --training.dataset_split ,test,"
        sources = parse_args(
            f"{flags} {names} --training.data_files ,f,".split()
        ).training.sources()
        assert [(s.dataset, s.name, s.split, s.data_files, s.share) for s in sources] == [
            ("a", "x", "train", None, 2000),
            ("b", None, "test", "f", 5000),
            ("c", "z", "train", None, 3000),
        ]
        # one source alone keeps its commas
        [source] = parse_args(
            ["--training.dataset", "a", "--training.data_files", "f,g"]
        ).training.sources()
        assert source.data_files == "f,g"

    def test_empty_source_is_named(self):
        flags = ["--training.dataset", "python-docs,", "--training.data_probs", "0.5,0.5"]
        with pytest.raises(ValueError, match=r"^--training\.dataset '': empty"):
            open_data(parse_args(flags), BYTE)
