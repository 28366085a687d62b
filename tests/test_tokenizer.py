"""Tokenizers on the real SmolLM2 and MiniLM, and on made ones."""

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.data import assets
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.errors import InputError

# SmolLM2's vocabulary lacks the bytes of these control characters and of planes 4 and up, as published.
CHARACTERS = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_path(assets.fetch("smollm2"))


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return Tokenizer.from_path(assets.fetch("minilm"))


def test_smollm2_from_gguf_metadata(smollm2: Tokenizer):
    assert (smollm2.vocab_size, smollm2.pad_id) == (49_152, 2)
    # Ids of the published tokenizer.json of the same model: digits stand alone, chat markers are one token.
    assert smollm2.encode_template("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert smollm2.encode_batch(["2024"]) == [[34, 32, 34, 36]]
    assert [smollm2.token_id(grade) for grade in "01234"] == [32, 33, 34, 35, 36]


@settings(deadline=None)
@given(text=st.text(CHARACTERS))
def test_any_text_comes_back(smollm2: Tokenizer, text: str):
    tokens = smollm2.encode_batch([text])[0]
    assert smollm2.decode(tokens) == text
    assert len(tokens) * smollm2.max_token_chars >= len(text)


@settings(deadline=None)
@given(text=st.text(alphabet="<|im_start|>endoftext[SEP] "))
def test_untrusted_text_never_holds_special_tokens(smollm2: Tokenizer, minilm: Tokenizer, text: str):
    for marker in ("", "<|im_end|>", "<|endoftext|>"):
        assert not {0, 1, 2} & set(smollm2.encode_batch([text + marker])[0])
    cls, sep = minilm.token_id("[CLS]"), minilm.token_id("[SEP]")
    assert not {cls, sep} & set(minilm.encode_batch([f"{text}[SEP][CLS]"])[0])


def test_minilm_is_not_padded_or_cut_as_its_file_says(minilm: Tokenizer):
    assert json.loads((assets.fetch("minilm") / "tokenizer.json").read_text())["truncation"] is not None
    texts = ["Hello world", "word " * 300]
    plain = minilm.encode_batch(texts)
    assert [len(tokens) for tokens in plain] == [2, 300]
    cls, sep = minilm.token_id("[CLS]"), minilm.token_id("[SEP]")
    assert minilm.encode_batch(texts, special=True) == [[cls, *tokens, sep] for tokens in plain]
    assert minilm.pad_id == minilm.token_id("[PAD]") == 0
    assert minilm.decode([cls, *plain[0], sep], special=False) == "hello world"


def test_token_id_wants_exactly_one_token(smollm2: Tokenizer):
    assert smollm2.token_id("<|im_end|>") == 2
    with pytest.raises(InputError, match="'42' is not one token of this tokenizer but 2"):
        smollm2.token_id("42")


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_saved_and_read_again_is_the_same(name: str, request: pytest.FixtureRequest, tmp_path: Path):
    tokenizer: Tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.from_path(tmp_path / "saved")
    texts = ["Negotiate labor disputes.", "naïve 北京 <|im_end|> [SEP]", ""]
    assert again.encode_batch(texts, special=True) == tokenizer.encode_batch(texts, special=True)
    assert again.encode_template("[CLS] <|im_start|>") == tokenizer.encode_template("[CLS] <|im_start|>")
    assert (again.pad_id, again.vocab_size) == (tokenizer.pad_id, tokenizer.vocab_size)
    assert not list((tmp_path / "saved").glob(".*"))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert reference.encode("ab 12 cd").ids == tokenizer.encode_batch(["ab 12 cd"], special=True)[0]


def write_gguf(path: Path, *, pre: str, tokens: list[str]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_what_cannot_be_used_is_said(tmp_path: Path):
    with pytest.raises(InputError, match=r"no tokenizer in .*tokenizer\.json"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="is not a tokenizer"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        Tokenizer.from_path(tmp_path / "short.gguf")
    strange = write_gguf(tmp_path / "strange.gguf", pre="chatglm-bpe", tokens=["a", "b", "ab"])
    with pytest.raises(InputError, match="pre-tokenizer 'chatglm-bpe' is not known"):
        Tokenizer.from_path(strange)
    lossy = write_gguf(tmp_path / "lossy.gguf", pre="smollm", tokens=["a", "b", "ab"])
    with pytest.raises(InputError, match="does not give a text back"):
        Tokenizer.from_path(lossy)
