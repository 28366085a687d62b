"""The rungs of the scoring ladder: each a way to score a request, with the requests as that way reads them.

Rungs are plain lists from small functions; `train.ladder` puts them in order and measures them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxsearch.data.records import Collection, Query, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.errors import InputError
from jaxsearch.metrics import PerQuery, rank_metrics
from jaxsearch.ranker import TextRanker, label_ids, load_prompt, load_ranker
from train.inputs import check_view, load_retriever
from train.ways import SHARED_PREFIX, Request, Way, our_ways, their_ways


@dataclasses.dataclass(frozen=True)
class Rung:
    """A way to score, and its requests in the order of the queries.

    `make` can be pickled, so that another process can make the way too. `kind` is for the picture; `is_same` says that
    it computes what the whole ranker computes on its full text.
    """

    name: str
    kind: Literal["torch", "ours", "pruned", "bfloat16", "neighbour"]
    make: Callable[[], Way]
    requests: Sequence[Request]
    is_same: bool = False

    @functools.cached_property
    def way(self) -> Way:
        return self.make()


@dataclasses.dataclass(frozen=True)
class Stage:
    """What all rungs score: queries and the documents found for them."""

    collection: Collection
    vertical: Vertical
    queries: Sequence[Query]
    candidates: Run

    def requests(self, ranker: TextRanker, view: str) -> list[Request]:
        made = []
        for query in self.queries:
            keys = self.candidates[query.id]
            texts = [self.vertical.document_text(self.collection.documents[key], view) for key in keys]
            made.append(Request(query.text, texts, ranker.request(query.text, texts)))
        return made

    def ndcg(self, scores: Sequence[np.ndarray]) -> PerQuery:
        """NDCG@10 of each query, by the grades of all documents."""
        ranked: Run = {}
        for query, values in zip(self.queries, scores, strict=True):
            ranked[query.id] = dict(zip(self.candidates[query.id], map(float, values), strict=True))
        qrels, threshold = self.collection.qrels_of(self.queries), self.vertical.relevant_threshold
        return rank_metrics(qrels, ranked, threshold=threshold, metrics=("ndcg@10",))["ndcg@10"]


@functools.cache
def ranker_of(folder: str, dtype: str) -> TextRanker:
    """Read once a process, for all rungs that it has."""
    return load_ranker(folder, dtype=dtype)


@functools.cache
def _our_ways(folder: str, dtype: str) -> dict[str, Way]:
    return our_ways(ranker_of(folder, dtype))


@functools.cache
def _their_ways(folder: str, dtype: str) -> dict[str, Way]:
    prompt = load_prompt(folder)
    return their_ways(Path(folder), prompt, label_ids(prompt), dtype)


def our_way(folder: str, dtype: str, name: str) -> Way:
    return _our_ways(folder, dtype)[name]


def their_way(folder: str, dtype: str, name: str) -> Way:
    return _their_ways(folder, dtype)[name]


def torch_rungs(stage: Stage, folder: str, dtype: str) -> list[Rung]:
    """The ranker in `folder` run by torch."""
    return _whole_rungs(stage, folder, dtype, "torch", _their_ways(folder, dtype), their_way)


def our_rungs(stage: Stage, folder: str, dtype: str) -> list[Rung]:
    """`shared prefix` is the last one."""
    return _whole_rungs(stage, folder, dtype, "ours", _our_ways(folder, dtype), our_way)


def _whole_rungs(
    stage: Stage,
    folder: str,
    dtype: str,
    kind: Literal["torch", "ours"],
    names: Iterable[str],
    make: Callable[[str, str, str], Way],
) -> list[Rung]:
    ranker = ranker_of(folder, dtype)
    requests = stage.requests(ranker, ranker.view)
    return [
        Rung(name, kind, functools.partial(make, folder, dtype, name), requests, is_same=True)
        for name in names
    ]


def pruned_names(folders: Sequence[str]) -> dict[str, str]:
    """Folders by name: a folder's own, or its parent's where it is called `model`.

    Raises: InputError when two have the same name.
    """
    paths = [Path(folder) for folder in folders]
    names = [path.parent.name if path.name == "model" else path.name for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"pruned: folders need names of their own; got {', '.join(names)}")
    return dict(zip(names, folders, strict=True))


def shared_prefix_rungs(
    stage: Stage, folders: Mapping[str, str], kind: Literal["pruned", "bfloat16"], dtype: str
) -> list[Rung]:
    """The shared prefix with rankers from `folders`, whose keys name the rungs."""
    rungs = []
    for name, folder in folders.items():
        ranker = ranker_of(folder, dtype)
        check_view(stage.collection, stage.vertical, ranker.view, field="pruned")
        make = functools.partial(our_way, folder, dtype, SHARED_PREFIX)
        rungs.append(Rung(name, kind, make, stage.requests(ranker, ranker.view)))
    return rungs


def short_view_rungs(stage: Stage, folder: str, dtype: str, view: str) -> list[Rung]:
    """The whole ranker on less text, where a view is named."""
    if not view:
        return []
    make = functools.partial(our_way, folder, dtype, SHARED_PREFIX)
    requests = stage.requests(ranker_of(folder, dtype), view)
    return [Rung("shared prefix, short view", "neighbour", make, requests)]


def encoder_rungs(stage: Stage, ranker: TextRanker, folder: str, view: str) -> list[Rung]:
    """No ranker at all, where an encoder is named."""
    if not folder:
        return []
    requests = stage.requests(ranker, view)
    texts = tuple(dict.fromkeys(text for request in requests for text in request.documents))
    return [Rung("encoder alone", "neighbour", functools.partial(encoder_way, folder, texts), requests)]


def encoder_way(folder: str, texts: Sequence[str]) -> Way:
    """Cosine of the query's embedding, made when it is asked for, with documents' that are made here."""
    encoder = load_retriever(folder)
    embeds = encoder.embed_documents(texts)
    place = {text: row for row, text in enumerate(texts)}

    def score(request: Request) -> np.ndarray:
        query = encoder.embed_queries([request.query])[0]
        return embeds[[place[text] for text in request.documents]] @ query

    return Way(score)
