"""How documents and sequences begin, in every way of reading them, and in the tokenizer that is exported."""

import json
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import write_model
from test_varlen import model_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from flame.analysis.flags import check, parser
from flame.base.log import logger
from flame.config.parse import parse_args
from flame.config.sections import DataSource, JobConfig, Training, Validation
from flame.data import TokenSource, load_tokenizer, open_data, prepare
from flame.data.batches import to_batch
from flame.data.bos import MODES, affixes, for_inference, save_for_inference
from flame.data.loader import _rows
from flame.data.prepared import read_prepared, tokenizer_fingerprint
from flame.data.tokenizer import TOKENIZER_KEY, tokenizer_sha256
from flame.data.tokens import Encoder
from flame.generate import encode, load, write
from flame.models import SoftpickTransformerForCausalLM, read_config
from flame.run.finish import _offer_comparison, twin_of
from flame.run.identity import claim_run_folder, fingerprint, require_same_run, set_bos
from flame.sweeps.check import _require_one_bos

BYTE = load_tokenizer("byte")
BOS, EOS = BYTE.bos_token_id, BYTE.eos_token_id
T = 16
DOCUMENTS = [f"{i}:" + "abcdefghij" * (i % 4) + "." * (i % 7) for i in range(60)]


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

    @pytest.mark.parametrize("varlen", [False, True])
    @pytest.mark.parametrize("mode", MODES)
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


class TestExport:
    @pytest.mark.parametrize(
        "template",
        [
            None,
            "<s> $A",
            "<s> $A </s>",
            "[CLS] $A [SEP]",
            processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
            processors.Sequence(
                [
                    processors.ByteLevel(),
                    processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)]),
                ]
            ),
        ],
    )
    @pytest.mark.parametrize("mode", MODES)
    def test_begins_a_text_as_training_did_and_does_not_end_it(self, tmp_path, mode, template):
        tokenizer = words(template)
        before = {"tokenizer": affixes(tokenizer)[0], "sequence": [0], "none": []}[mode]
        save_for_inference(tokenizer, mode, tmp_path)
        for loaded in (
            AutoTokenizer.from_pretrained(tmp_path),
            PreTrainedTokenizerFast.from_pretrained(tmp_path),
            for_inference(tokenizer, mode),
        ):
            assert loaded("a b").input_ids == loaded.encode("a b") == [*before, 4, 5]
            assert loaded("").input_ids == before
            assert loaded(["a", "b"]).input_ids == [[*before, 4], [*before, 5]]
            assert loaded("a", add_special_tokens=False).input_ids == [4]
            # nothing else has changed, and saving it again changes nothing
            ours, theirs = tokenizer_fingerprint(loaded), tokenizer_fingerprint(tokenizer)
            del ours["tokenizer_sha256"], theirs["tokenizer_sha256"]
            assert ours == theirs
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert config["add_bos_token"] == (before == [0])
        assert config["add_eos_token"] is False
        backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert backend.encode("a b").ids == [*before, 4, 5]

    def test_prompts_do_not_end_in_eos_whatever_the_folder_says(self):
        assert encode(words("<s> $A </s>"), "a b") == [0, 4, 5]
        assert encode(words("<s> $A </s>"), "") == [0]
        assert encode(words(), "") == [1]

    def test_generates_from_every_token_in_flame_and_in_pipelines(self, tmp_path):
        torch.manual_seed(0)
        model = SoftpickTransformerForCausalLM(read_config(write_model(tmp_path)))
        # every token is nearly as likely as any other
        model.lm_head.weight.data *= 0.01
        model.generation_config.update(do_sample=True, top_k=0, top_p=1.0)
        model.generation_config.eos_token_id = None
        model.save_pretrained(tmp_path / "hf")
        save_for_inference(BYTE, "tokenizer", tmp_path / "hf")
        own, tokenizer = load(str(tmp_path / "hf"), "cpu")
        options = {"max_new_tokens": 150, "temperature": 1.0}
        assert len(set(write(own, tokenizer, "x", **options).tolist())) > 60
        greedy = write(own, tokenizer, "x", max_new_tokens=9, temperature=0).tolist()
        assert greedy[:2] == [BOS, ord("x")]
        for limit in ({"top_k": 1}, {"top_p": 1e-6}):
            found = write(own, tokenizer, "x", max_new_tokens=9, temperature=1.0, **limit)
            assert found.tolist() == greedy
        # as transformers itself opens it
        theirs = pipeline("text-generation", str(tmp_path / "hf"))
        [found] = theirs("x", max_new_tokens=150, return_tensors=True)
        assert found["generated_token_ids"][:2] == [BOS, ord("x")]
        assert len(set(found["generated_token_ids"])) > 60


def old_run(folder, bos=None):
    """A run folder of before --training.bos, or of a mode; and the identity of the run that continues it."""
    config = JobConfig()
    config.job.dump_folder = str(folder)
    if bos is not None:
        config.training.bos = bos
    shape = read_config(config.model.config)
    options = {"model": shape, "global_batch_size": 16}
    run = fingerprint(config, data={TOKENIZER_KEY: tokenizer_sha256(BYTE), "tokens": 1}, **options)
    if bos is None:
        del run["--training.bos"], run[TOKENIZER_KEY]
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    # a folder without a checkpoint is nobody's
    (folder / "checkpoint" / "step-5").mkdir(parents=True)
    (folder / "checkpoint" / "step-5" / ".metadata").touch()
    config = JobConfig()
    config.job.dump_folder = str(folder)
    return config, options


class TestRunFolder:
    def test_of_before_the_flag_continues_as_it_was(self, tmp_path):
        config, options = old_run(tmp_path)
        for _ in range(2):
            # the second time run.json names the mode
            config.training.bos = None
            set_bos(config)
            assert config.training.bos == "none"
            data = {TOKENIZER_KEY: "any", "tokens": 1}
            claim_run_folder(config, fingerprint(config, data=data, **options)).close()
        assert json.loads((tmp_path / "run.json").read_text())["--training.bos"] == "none"
        # from now on the tokenizer is known
        with pytest.raises(ValueError, match="the sha256 of the tokenizer .* was 'any', is now"):
            require_same_run(
                tmp_path,
                fingerprint(config, data={TOKENIZER_KEY: "other", "tokens": 1}, **options),
            )

    @pytest.mark.parametrize("mode", ["tokenizer", "sequence"])
    def test_of_before_the_flag_refuses_another_mode(self, tmp_path, mode):
        config, options = old_run(tmp_path)
        config.training.bos = mode
        set_bos(config)
        with pytest.raises(ValueError, match=f"--training.bos was 'none', is now '{mode}'"):
            require_same_run(tmp_path, fingerprint(config, data={"tokens": 1}, **options))

    def test_new_or_of_a_mode(self, tmp_path):
        config, _ = old_run(tmp_path / "run", "sequence")
        set_bos(config)
        assert config.training.bos == "sequence"
        # of a run that saved nothing nothing is left to continue
        (tmp_path / "run" / "checkpoint" / "step-5" / ".metadata").unlink()
        config.training.bos = None
        set_bos(config)
        assert config.training.bos == "tokenizer"
        config = JobConfig()
        config.job.dump_folder = str(tmp_path / "new")
        set_bos(config)
        assert config.training.bos == "tokenizer"

    def test_stream_checkpoints_of_before_the_flag_continue(self, tmp_path):
        (tmp_path / "a.txt").write_text("some text " * 100)

        def loader(mode, tokenizer=BYTE):
            options = {"share": 0, "bos": mode, "seq_len": 16, "streaming": True}
            data = open_data(config_of(tmp_path / "a.txt", **options), tokenizer)
            return data.loader(dp_rank=0, dp_world_size=1)

        stream = loader("none")
        state = stream.state_dict()
        loader("none").load_state_dict(state)
        for other in (loader("tokenizer"), loader("none", words())):
            with pytest.raises(ValueError, match="^--model.tokenizer_path, --training.bos: "):
                other.load_state_dict(state)
        places = json.dumps([[0, 0, 0, 0]])
        earlier = state | {"checksum": stream._earlier_checksum, "places": places}
        loader("none").load_state_dict(earlier)
        with pytest.raises(ValueError, match="has checksum"):
            loader("tokenizer").load_state_dict(earlier)

    def test_a_sweep_of_before_the_flag_gets_no_runs_of_another_mode(self, tmp_path):
        old, _ = old_run(tmp_path / "old")
        new = JobConfig()
        new.job.dump_folder = str(tmp_path / "new")
        for config in (old, new):
            set_bos(config)
        sweep = SimpleNamespace(file="sweep.toml")
        _require_one_bos(sweep, [old, old])
        with pytest.raises(ValueError, match="sweep.toml: training.bos .*old has none, .*new has"):
            _require_one_bos(sweep, [old, new])


class TestTwin:
    """The last line of a run: the command of its twin, or the comparison of the two."""

    def last_line(self, caplog, *argv):
        config = parse_args(list(argv))
        asked = config.flags()
        caplog.clear()
        with caplog.at_level("INFO"):
            _offer_comparison(config, asked, twin_of(asked))
        return caplog.messages[-1].split(maxsplit=2)[2].removeprefix("twin").strip()

    def test_readme_twins_end_in_the_comparison(self, tmp_path, monkeypatch, caplog):
        (tmp_path / "configs").symlink_to(Path(__file__).parent.parent / "configs")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(logger, "propagate", True)
        softmax = ("--model.config", "configs/softmax_transformer_tiny.json")
        line = self.last_line(caplog)
        assert line == "bash train.sh --model.config configs/softmax_transformer_tiny.json"
        for name in ("softpick_transformer_tiny", "softmax_transformer_tiny", "mine", "mine-twin"):
            (tmp_path / "exp" / name / "hf").mkdir(parents=True)
            (tmp_path / "exp" / name / "hf" / "config.json").touch()
        for argv in ((), softmax):
            line = self.last_line(caplog, *argv)
            assert line == (
                "python -m flame.analyze --model exp/softpick_transformer_tiny/hf exp/softmax_transformer_tiny/hf "
                "--label softpick softmax --run exp/softpick_transformer_tiny exp/softmax_transformer_tiny "
                "--data python-docs --lengths 128 --out exp/report"
            )
            check(parser().parse_args(line.split()[3:]))
        lines = {
            self.last_line(caplog, *argv, "--job.dump_folder", f"exp/{name}")
            for argv, name in (((), "mine"), (softmax, "mine-twin"))
        }
        assert len(lines) == 1
        assert "--model exp/mine/hf exp/mine-twin/hf" in lines.pop()
        shutil.rmtree(tmp_path / "exp" / "mine")
        line = self.last_line(caplog, *softmax, "--job.dump_folder", "exp/mine-twin")
        assert line.startswith("bash train.sh --job.dump_folder exp/mine --model.config")
