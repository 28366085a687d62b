"""A made-up collection of a few queries and documents, and a tiny judge, for the tests of the trainers."""

import json
from pathlib import Path

import numpy as np
from flax import nnx

from jaxsearch.data.prompts import PromptEncoder, PromptTemplate
from jaxsearch.judge import TextJudge, new_judge
from jaxsearch.nn.transformer import Decoder
from jaxsearch.ranker import load_ranker
from tests.tiny_bundle import JUDGE_PROMPT

WORDS = ["bake", "bread", "write", "code", "forge", "iron", "care", "teach", "dig", "paint", "sew", "drive"]
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


def write_words(folder: Path, *, num_queries: int = 24) -> Path:
    """Forty documents of three words and queries of two, of two kinds, graded by the words that they share.

    A third of the queries is for validation, the others for testing.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 3, replace=False)) for _ in range(40)]
    queries = [" ".join(rng.choice(WORDS, 2, replace=False)) for _ in range(num_queries)]
    files = {
        "documents": [
            {"id": f"d{number:02}", "title": text, "tasks": [f"{WORDS[number % 12]} often."]}
            for number, text in enumerate(texts)
        ],
        "queries": [
            {
                "id": f"q{number:02}",
                "text": text,
                "split": ("test", "test", "validation")[number % 3],
                "kind": ("even", "odd")[number % 2],
            }
            for number, text in enumerate(queries)
        ],
        "grades": [
            {
                "query_id": f"q{q:02}",
                "document_id": f"d{d:02}",
                "grade": 2 * len(set(query.split()) & set(text.split())),
            }
            for q, query in enumerate(queries)
            for d, text in enumerate(texts)
        ],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_judge(parts: dict[str, Path]) -> TextJudge:
    """A judge with random weights on the tiny tokenizer."""
    ranker = load_ranker(parts["ranker"])
    template = PromptTemplate.from_text(JUDGE_PROMPT)
    prompt = PromptEncoder(template, ranker.tokenizer, max_shared_tokens=64, max_item_tokens=80)
    decoder = Decoder(ranker.decoder.config, rngs=nnx.Rngs(3))
    return new_judge(decoder, prompt, policy="Grade 4 when it fits.", view="short")
