"""flame.data: tokenizers."""

import pytest
from document_files import go_offline, write
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from flame.data.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")
BOS, EOS, PAD = 256, 257, 258
# no deadline: the first example pays for imports
quick = settings(max_examples=100, deadline=None)


@pytest.fixture
def offline(monkeypatch):
    go_offline(monkeypatch)


class TestByteTokenizer:
    @quick
    @given(st.text())
    @example("")
    @example("  leading, trailing  ")
    @example("don 't , re-join . these")
    @example("\x00\x07\x1b\x7f\x85\u2028\r\n\t")
    @example("👩‍👩‍👧 e\u0301 \U0010ffff \ufeff")
    @example("a<|bos|><|eos|><|pad|>b</s>")
    def test_gives_back_every_string(self, text):
        ids = BYTE(text)["input_ids"]
        assert ids == [BOS, *text.encode()]
        assert BYTE.decode(ids[1:]) == text
        assert BYTE.decode(ids, skip_special_tokens=True) == text

    def test_special_tokens(self):
        assert isinstance(BYTE, PreTrainedTokenizerFast)
        assert (BYTE.bos_token_id, BYTE.eos_token_id, BYTE.pad_token_id) == (BOS, EOS, PAD)
        assert len(BYTE) == 259
        assert BYTE.decode([104, EOS, 105], skip_special_tokens=True) == "hi"
        # reading them from text is possible, and has to be asked for
        assert BYTE("a<|eos|>", split_special_tokens=False)["input_ids"] == [BOS, 97, EOS]

    def test_survives_saving(self, tmp_path):
        BYTE.save_pretrained(tmp_path)
        for reloaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
            assert isinstance(reloaded, PreTrainedTokenizerFast)
            assert reloaded.get_vocab() == BYTE.get_vocab()
            assert (reloaded.eos_token_id, reloaded.pad_token_id) == (EOS, PAD)
            text = " é😀<|eos|>\x00 ."
            assert reloaded(text)["input_ids"] == [BOS, *text.encode()]
            assert reloaded.decode(reloaded(text)["input_ids"][1:]) == text


class TestLoadTokenizerErrors:
    FLAG = r"^--model\.tokenizer_path "

    @pytest.mark.parametrize(
        "value", ["./nowhere", "/nowhere/at/all", "~/no-such-folder", "a/b/c", "t.json"]
    )
    def test_path_that_does_not_exist(self, value):
        with pytest.raises(
            ValueError, match=self.FLAG + f"'{value}': no such file or folder; .*'byte'"
        ):
            load_tokenizer(value)

    def test_empty_value_is_not_the_working_directory(self):
        with pytest.raises(ValueError, match=self.FLAG + "'': empty"):
            load_tokenizer("")

    @pytest.mark.parametrize(
        "files",
        [
            pytest.param({}, id="empty"),
            pytest.param({"config.json": '{"model_type": "llama"}'}, id="model-only"),
            pytest.param(
                {"tokenizer.json": '{"version":', "tokenizer_config.json": "{}"}, id="cut-off"
            ),
            pytest.param({"tokenizer.json": '{"version": "1.0"}'}, id="no-model"),
        ],
    )
    def test_folder_without_a_usable_tokenizer(self, tmp_path, files):
        for name, content in files.items():
            write(tmp_path / name, content)
        with pytest.raises(
            ValueError, match=self.FLAG + r".*no usable tokenizer in this folder \(.+\)"
        ) as info:
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(info.value)

    def test_file(self, tmp_path):
        file = write(tmp_path / "tokenizer.json", "{}")
        with pytest.raises(ValueError, match=self.FLAG + ".*is a file; give the folder"):
            load_tokenizer(file)

    def test_no_eos(self, tmp_path):
        word_tokenizer(4).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.FLAG + ".*no eos token"):
            load_tokenizer(str(tmp_path))

    def test_not_fast(self, tmp_path):
        ByT5Tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.FLAG + ".*ByT5Tokenizer is not a fast tokenizer"):
            load_tokenizer(str(tmp_path))

    @pytest.mark.usefixtures("offline")
    def test_hub_out_of_reach(self):
        with pytest.raises(
            ValueError, match=self.FLAG + "'some/tokenizer': .*hub failed.*'byte'"
        ) as info:
            load_tokenizer("some/tokenizer")
        assert "\n" not in str(info.value)
