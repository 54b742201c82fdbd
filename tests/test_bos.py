"""How documents and sequences begin, in every way of reading them, and what is refused."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from bos_tokenizers import BOS, BYTE, EOS, config_of, words
from hypothesis import given, settings
from hypothesis import strategies as st
from test_varlen import model_of
from tokenizers import pre_tokenizers, processors

from flame.config.sections import DataSource, Training
from flame.data import prepare
from flame.data.batches import to_batch
from flame.data.bos import MODES
from flame.data.loader import _rows
from flame.data.prepared import read_prepared
from flame.data.run_data import open_data
from flame.data.source import TokenSource
from flame.data.tokens import Encoder

T = 16
DOCUMENTS = [f"{i}:" + "abcdefghij" * (i % 4) + "." * (i % 7) for i in range(60)]


class TestDocuments:
    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (None, [[4, 5, 1], [1]]),
            ("<s> $A", [[0, 4, 5, 1], [0, 1]]),
            # not a second eos
            ("<s> $A </s>", [[0, 4, 5, 1], [0, 1]]),
            # eos ends it, behind what the tokenizer adds
            ("[CLS] $A [SEP]", [[2, 4, 5, 3, 1], [2, 3, 1]]),
            (processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)), [[2, 4, 5, 3, 1], [2, 3, 1]]),
            # OPT begins with what others end with
            ("</s> $A", [[1, 4, 5, 1], [1, 1]]),
        ],
    )
    def test_are_what_the_tokenizer_makes_of_them_and_end_in_one_eos(self, template, expected):
        tokens, lengths = Encoder(words(template), "tokenizer")(["a b", ""])
        parts = np.split(tokens, np.cumsum(lengths)[:-1])
        assert [part.tolist() for part in parts] == expected
        for mode in ("sequence", "none"):
            assert Encoder(words(template), mode)(["a b", ""])[0].tolist() == [4, 5, 1, 1]

    def test_of_several_pieces_begin_and_end_once(self, monkeypatch):
        monkeypatch.setattr("flame.data.tokens._PIECE", 4)
        tokens, lengths = Encoder(words("<s> $A </s>"), "tokenizer")(["a b\n" * 5, "a"])
        assert tokens.tolist() == [0, *[4, 5] * 5, 1, 0, 4, 1]
        assert lengths.tolist() == [12, 3]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("<s> $A </s> [SEP]", "'</s> [SEP]' after a text, but only its last token may"),
            ("<s> $A </s> </s>", "'</s> </s>' after a text"),
            ("<s> $A $A", "must hold a text once, got 2 times"),
        ],
    )
    def test_without_a_sensible_end_are_refused(self, template, message):
        with pytest.raises(ValueError, match="--training.bos tokenizer: the post-processor") as e:
            Encoder(words(template), "tokenizer")
        assert message in str(e.value)
        Encoder(words(template), "none")


def expected_sequences(documents, mode, varlen):
    """Rows ``[T + 1]`` by the definition, slowly: of one epoch, in the order of the stream."""
    bos = [BOS] if mode == "tokenizer" or (mode == "sequence" and varlen) else []
    stream = [(i, j == 0) for x in documents for j, i in enumerate([*bos, *x.encode(), EOS])]
    rows, place, step = [], 0, T - (mode == "sequence")
    while True:
        ids = [i for i, _ in stream[place : place + T + 1]]
        if mode == "sequence" and not (varlen and stream[place][1]):
            ids = [BOS, *ids[:T]]
        if len(ids) < T + 1:
            return rows
        rows.append(ids)
        place += step
        if place >= len(stream):
            return rows


def source_of(documents, mode, varlen):
    tokens, lengths = Encoder(BYTE, mode)(documents)
    bos = BOS if mode == "sequence" else None
    has_document_bos = mode == "sequence" and varlen
    ends = np.cumsum(lengths)
    return TokenSource("x", tokens, ends, "", bos=bos, has_document_bos=has_document_bos)


class TestSequences:
    @settings(max_examples=60, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
        share=st.sampled_from([0.0, 0.3]),
        mode=st.sampled_from(MODES),
        varlen=st.booleans(),
    )
    def test_are_those_of_the_definition(self, lengths, share, mode, varlen):
        documents = ["xyz"[i % 3] * n for i, n in enumerate(lengths)]
        source = source_of(documents, mode, varlen)
        if len(source.tokens) < 4 * T:
            return
        train, held_out = source.split(T, share)
        if not share:
            rows = [train.read(i, T)[0].tolist() for i in range(train.num_sequences(T))]
            assert rows == expected_sequences(documents, mode, varlen)
        assert held_out.num_sequences(T) >= (share > 0)
        for part in (train, held_out):
            for i in range(part.num_sequences(T)):
                row, ends = part.read(i, T)
                assert len(row) == T + 1
                if mode == "sequence":
                    assert row[0] == BOS
                inner = [end for end in ends.tolist() if end < T]
                assert inner == [i + 1 for i in range(T - 1) if row[i] == EOS]
                if mode == "sequence" and varlen:
                    assert all(row[end] == BOS for end in inner)

    @pytest.mark.parametrize(
        ("mode", "varlen"),
        [
            pytest.param(
                mode, varlen, marks=() if varlen == (mode == "sequence") else pytest.mark.slow
            )
            for mode in MODES
            for varlen in (False, True)
        ],
    )
    def test_are_alike_from_text_token_files_and_streams(self, tmp_path, mode, varlen):
        file = tmp_path / "text.jsonl"
        file.write_text("".join(json.dumps({"text": x}) + "\n" for x in DOCUMENTS))
        source = DataSource(str(file), None, "train", None, None, 1)
        prepare.prepare(source, BYTE, "byte", tmp_path / "tokens", num_proc=1, bos=mode)

        def data_of(path, sequences=0, **more):
            training = {"seq_len": T, "batch_size": 2, "bos": mode, "varlen": varlen} | more
            return open_data(config_of(path, share=0, sequences=sequences, **training), BYTE)

        def batches(data, ranks, steps, state=None, **workers):
            loaders = [data.loader(dp_rank=r, dp_world_size=ranks) for r in range(ranks)]
            for loader in loaders if state else []:
                loader.load_state_dict(state)
            found = [
                [*row.tolist(), label[-1].item()]
                for step in zip(*(islice(loader, steps) for loader in loaders), strict=True)
                for inputs, labels in step
                for row, label in zip(inputs["input"], labels, strict=True)
            ]
            for loader in loaders:
                loader.close()
            return found, loaders[0].state_dict()

        expected = expected_sequences(DOCUMENTS, mode, varlen)
        text, tokens = data_of(file), data_of(tmp_path / "tokens")
        count = len(expected) // 2
        order, _ = batches(text, 1, count)
        assert all(row in expected for row in order)
        assert len({tuple(row) for row in order}) == len({tuple(row) for row in expected}) or (
            len(expected) % 2
        )
        assert batches(tokens, 1, count)[0] == order
        streamed, _ = batches(data_of(file, streaming=True), 1, count)
        assert streamed == expected[: 2 * count]
        # any number of ranks and workers, from any place on
        for streaming, whole in ((False, order), (True, streamed)):
            first, state = batches(data_of(file, streaming=streaming), 1, 3)
            data = data_of(file, streaming=streaming, num_workers=1)
            rest, _ = batches(data, 2, 2, state)
            assert [*first, *rest] == whole[:14]
        # the held-out documents of a stream begin alike
        data = data_of(file, sequences=3, streaming=True)
        held_out = next(data.validation(dp_rank=0, dp_world_size=1, batch_size=3))
        assert held_out[0]["input"].tolist() == [row[:-1] for row in expected[:3]]

    @pytest.mark.parametrize("mode", MODES)
    def test_packed_is_separate(self, mode):
        model = model_of("naive_softpick_attn", "cpu", layers=1)
        source = source_of(DOCUMENTS, mode, varlen=True)
        inputs, labels = to_batch(_rows([(source, 0), (source, 2)], T), T)
        ids, bounds = inputs["input"].flatten(), inputs["cu_seqlens"].tolist()
        assert len(bounds) > 3
        pieces = [ids[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        if mode == "sequence":
            assert all(piece[0] == BOS for piece in pieces)
        with torch.no_grad():
            packed = model(inputs.pop("input"), **inputs)
            separate = torch.cat([model(piece[None]) for piece in pieces], 1)
        torch.testing.assert_close(packed.view_as(separate), separate, rtol=2e-4, atol=2e-4)
        assert (labels[:, :-1] == ids.view(2, T)[:, 1:]).all()


class TestRefused:
    def test_sequence_without_bos(self, tmp_path):
        (tmp_path / "a.txt").write_text("a b " * 50)
        config = config_of(tmp_path, bos="sequence", seq_len=8)
        message = (
            "--training.bos sequence: the tokenizer of --model.tokenizer_path has no bos token"
        )
        with pytest.raises(ValueError, match=message):
            open_data(config, words(bos=None))

    def test_sequences_of_one_token(self):
        with pytest.raises(ValueError, match="--training.seq_len must be at least 2 with"):
            Training(seq_len=1, bos="sequence")

    def test_token_files_of_another_mode(self, tmp_path):
        (tmp_path / "a.txt").write_text("some text " * 50)
        source = DataSource(str(tmp_path / "a.txt"), None, "train", None, None, 1)
        prepare.prepare(source, BYTE, "byte", tmp_path / "new", num_proc=1, bos="tokenizer")
        prepare.prepare(source, BYTE, "byte", tmp_path / "old", num_proc=1, bos="none")
        index = tmp_path / "old" / "flame-tokens.json"
        content = json.loads(index.read_text())
        assert content.pop("bos") == "none"
        for key in ("text_sha256", "tokenizer_sha256"):
            del content["tokenizer"][key]
        # as before the flag
        index.write_text(json.dumps(content))

        def read(name, mode):
            return open_data(config_of(tmp_path / name, bos=mode, seq_len=16), BYTE)

        read("new", "tokenizer")
        read("old", "none")
        for name, mode, made_for in (
            ("new", "none", "tokenizer"),
            ("new", "sequence", "tokenizer"),
            ("old", "tokenizer", "none"),
        ):
            message = f"--training.bos {mode}: --training.dataset .*{name}' was written with --training.bos {made_for}"
            with pytest.raises(ValueError, match=message):
                read(name, mode)

    def test_a_tokenizer_that_differs_in_anything(self, tmp_path):
        (tmp_path / "a.txt").write_text("a b c " * 50)
        source = DataSource(str(tmp_path / "a.txt"), None, "train", None, None, 1)
        prepare.prepare(source, words("<s> $A"), "x", tmp_path / "tokens", num_proc=1)
        others = (
            words("<s> $A", pre_tokenizer=pre_tokenizers.Whitespace()),
            words("<s> $A </s>"),
            words("<s> $A", bos="[CLS]"),
        )
        for other in others:
            assert other.get_vocab() == words().get_vocab()
            with pytest.raises(ValueError, match="whose t[a-z]*_sha256 is"):
                read_prepared("tokens", tmp_path / "tokens", other, "tokenizer")
        # the sequences of flame.analyze have their own beginning
        read_prepared("tokens", tmp_path / "tokens", words("<s> $A </s>"))
