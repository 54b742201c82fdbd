"""How documents begin in the tokenizer that is exported, in a run that continues, and in the twin of a run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bos_tokenizers import BOS, BYTE, config_of, words
from small_model import write_model
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from flame.analysis.flags import check, parser
from flame.base.log import logger
from flame.config.parse import parse_args
from flame.config.sections import JobConfig
from flame.data.bos import MODES, affixes, for_inference, save_for_inference
from flame.data.prepared import tokenizer_fingerprint
from flame.data.run_data import open_data
from flame.data.tokenizer import TOKENIZER_KEY, tokenizer_sha256
from flame.generate import encode, load, write
from flame.models import SoftpickTransformerForCausalLM, read_config
from flame.run.fingerprint import claim_run_folder, fingerprint, require_same_run, set_bos
from flame.run.finish import _offer_comparison, twin_of
from flame.sweeps.check import _require_one_bos


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
    """A run folder of before --training.bos, or of a mode; and the fingerprint of the run that continues it."""
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
