"""A made-up collection of a few queries and documents, and a tiny judge, for the tests of the trainers."""

import json
from pathlib import Path

from flax import nnx

from jaxsearch.data.prompts import PromptEncoder, PromptTemplate
from jaxsearch.judge import TextJudge, new_judge
from jaxsearch.nn.transformer import Decoder
from jaxsearch.ranker import load_ranker
from tests.tiny_bundle import JUDGE_PROMPT

TOPICS = ("bread", "code", "iron", "wine", "law", "paint")


def write_collection(folder: Path) -> Path:
    """Six topics: two documents and three queries each, graded 4 and 2 within a topic."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, queries, grades = [], [], []
    for place, topic in enumerate(TOPICS):
        for copy, grade in ((0, 4), (1, 2)):
            name = f"{topic}{copy}"
            documents.append({"id": name, "title": f"{topic} worker {copy}", "tasks": [f"Handle {topic}."]})
            grades += [{"query_id": f"{topic}-q{i}", "document_id": name, "grade": grade} for i in range(3)]
        splits = ("train", "train", "validation" if place % 2 else "test")
        queries += [
            {"id": f"{topic}-q{i}", "text": f"work with {topic} {i}", "split": split}
            for i, split in enumerate(splits)
        ]
    for name, rows in (("documents", documents), ("queries", queries), ("grades", grades)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_judge(parts: dict[str, Path]) -> TextJudge:
    """A judge with random weights on the tiny tokenizer."""
    ranker = load_ranker(parts["ranker"])
    template = PromptTemplate.from_text(JUDGE_PROMPT)
    prompt = PromptEncoder(template, ranker.tokenizer, max_shared_tokens=64, max_item_tokens=80)
    decoder = Decoder(ranker.decoder.config, rngs=nnx.Rngs(3))
    return new_judge(decoder, prompt, policy="Grade 4 when it fits.", view="short")
