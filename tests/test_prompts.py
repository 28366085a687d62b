"""Prompt templates and their encoding, with SmolLM2's real tokenizer and the templates that ship."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsearch.data import assets
from jaxsearch.data.prompts import PromptEncoder, PromptTemplate
from jaxsearch.data.tokenizer import Tokenizer
from jaxsearch.data.verticals import load_vertical
from jaxsearch.errors import InputError

# SmolLM2's vocabulary lacks the bytes of these control characters and of planes 4 and up, as published.
CHARACTERS = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"
)
VERTICAL = load_vertical(Path(__file__).parents[1] / "configs/verticals/onet_activities")
TEMPLATE = "<|im_start|>user\nActivity: {query}\n---\nJob: {document}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(assets.fetch("smollm2"))


def encoder(tokenizer: Tokenizer, text: str = TEMPLATE, *, shared: int = 64, item: int = 64) -> PromptEncoder:
    template = PromptTemplate.from_text(text)
    return PromptEncoder(template, tokenizer, max_shared_tokens=shared, max_item_tokens=item)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{query}{document}!", "one line '---'"),
        ("{query}\n---\n---\n{document}!", "has 2"),
        ("{query}\n---\n{document}\n", "text after it"),
        ("{query}{document}\n---\nwhat?", "slot {document}"),
        ("hello\n---\n{document}!", "slot {query}"),
        ("{query}{query}\n---\n{document}!", "occurs twice"),
        ("{query}\n---\n{document}{title}!", "unknown slot {title}"),
    ],
)
def test_a_wrong_template_is_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        PromptTemplate.from_text(text)


def test_a_template_keeps_every_character():
    template = PromptTemplate.from_text(TEMPLATE)
    assert template.shared == "<|im_start|>user\nActivity: {query}\n"
    assert template.item == "Job: {document}<|im_end|>\n<|im_start|>assistant\n"
    assert PromptTemplate.from_text(TEMPLATE.replace("\n", "\r\n")).item == template.item
    assert len(template.fingerprint) == 12
    assert template.fingerprint != PromptTemplate.from_text(TEMPLATE.replace("Job", "Post")).fingerprint


@settings(deadline=None)
@given(query=st.text(CHARACTERS, max_size=30), document=st.text(CHARACTERS, max_size=40))
def test_the_tokens_spell_the_template(tokenizer: Tokenizer, query: str, document: str):
    prompt = encoder(tokenizer, shared=200, item=300)
    tokens = prompt.encode_shared(query=query) + prompt.encode_items([{"document": document}])[0].tokens
    filled = TEMPLATE.replace("\n---\n", "\n")
    filled = filled.replace("{query}", query.strip()).replace("{document}", document.strip())
    assert tokenizer.decode(tokens) == filled
    assert [token for token in tokens if token in {0, 1, 2}] == [1, 2, 1]


@settings(deadline=None)
@given(limit=st.integers(10, 40), words=st.integers(0, 60), data=st.data())
def test_only_the_document_is_cut(tokenizer: Tokenizer, limit: int, words: int, data: st.DataObject):
    documents = [
        " ".join(["word"] * words),
        data.draw(st.text(max_size=200)),
        "".join(["x"] * 10_000),
    ]
    whole = encoder(tokenizer, item=20_000).encode_items([{"document": text} for text in documents])
    cut = encoder(tokenizer, item=limit).encode_items([{"document": text} for text in documents])
    suffix = tokenizer.encode_template("<|im_end|>\n<|im_start|>assistant\n")
    for one, other in zip(whole, cut, strict=True):
        assert not one.truncated
        assert other.truncated == (len(one.tokens) > limit)
        assert len(other.tokens) == min(limit, len(one.tokens))
        kept = len(other.tokens) - len(suffix)
        assert other.tokens == one.tokens[:kept] + suffix


def test_a_huge_document_costs_no_more_than_its_limit(tokenizer: Tokenizer):
    item = encoder(tokenizer).encode_items([{"document": "word " * 2_000_000}])[0]
    assert item.truncated
    assert len(item.tokens) == 64


def test_items_do_not_depend_on_their_neighbours(tokenizer: Tokenizer):
    prompt = encoder(tokenizer, item=20)
    documents = ["Baker", "", "Baker", "Chief executives. " * 20, "<|im_end|>"]
    together = prompt.encode_items([{"document": text} for text in documents])
    assert together == [prompt.encode_items([{"document": text}])[0] for text in documents]
    assert prompt.encode_items([]) == []
    request = prompt.encode({"query": "Bake bread."}, [{"document": text} for text in documents])
    assert list(request.prefix) == prompt.encode_shared(query="Bake bread.")
    assert list(request.items) == [item.tokens for item in together]
    assert list(request.truncated) == [False, False, False, True, False]


def test_limits_and_missing_slots_are_said(tokenizer: Tokenizer):
    with pytest.raises(InputError, match="item part of the prompt template takes 8 tokens"):
        encoder(tokenizer, item=8)
    with pytest.raises(InputError, match="shared part of the prompt template takes"):
        encoder(tokenizer, shared=2)
    prompt = encoder(tokenizer, shared=16)
    with pytest.raises(InputError, match=r"takes 36 tokens \(query 30\), but at most 16"):
        prompt.encode_shared(query="word " * 30)
    with pytest.raises(InputError, match=r"needs a text for {query}"):
        prompt.encode_shared(document="x")
    with pytest.raises(InputError, match=r"needs a text for {document}"):
        prompt.encode_items([{"query": "x"}])
    judge = PromptEncoder(VERTICAL.prompts["judge"], tokenizer, max_shared_tokens=256, max_item_tokens=48)
    with pytest.raises(InputError, match="item 1: 100 tokens of query leave no room"):
        judge.encode_items([{"query": query, "document": "Baker"} for query in ("bake", "word " * 100)])


def test_the_prompts_that_ship_are_short(tokenizer: Tokenizer):
    judge = PromptEncoder(VERTICAL.prompts["judge"], tokenizer, max_shared_tokens=200, max_item_tokens=128)
    ranker = PromptEncoder(VERTICAL.prompts["ranker"], tokenizer, max_shared_tokens=64, max_item_tokens=128)
    empty = {"query": "", "document": ""}
    # Measured: policy with its frame 157, frame of the judge's item 19 + 2, ranker's query part 16 + 1, item 9 + 1.
    assert len(judge.encode_shared(policy=VERTICAL.policy)) <= 170
    assert len(judge.encode_items([empty])[0].tokens) <= 25
    assert len(ranker.encode_shared(query="")) <= 30
    assert len(ranker.encode_items([empty])[0].tokens) <= 12
