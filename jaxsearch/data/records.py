"""What the system is about: queries, documents, grades, and the collection that holds them.

Nothing here reads a file or touches a device; readers are in `sources`, text views in `verticals`.

Axis letters, the same in einsums, types and comments everywhere: `b` batch, `t` query-side positions, `s` key-side
positions, `d` embed_dim, `f` mlp_dim, `i` and `o` what a linear map takes and gives, `n` heads, `k` kv heads, `g` heads
per kv head, `h` head_dim, `v` vocab, `l` layers, `q` queries (or requests, of a query each), `c` candidates per query,
`p` prefix positions, `e` embedding size, `r` LoRA rank, `w` rows of packed texts, `m` texts in them. Where there are no
heads, in retrieval and losses, `n` is documents.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

NUM_GRADES = 5
MAX_GRADE = NUM_GRADES - 1
SPLITS = ("train", "validation", "test")
SPLIT_SHARES = (0.7, 0.1, 0.2)

FieldValue = str | int | float | bool | list[str]
Qrels = dict[str, dict[str, int]]
"""{query id: {document id: grade}}; a pair that is absent has grade 0."""
Run = dict[str, dict[str, float]]
"""{query id: {document id: score}}; higher is better."""


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    id: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    id: str
    fields: Mapping[str, FieldValue]


@dataclasses.dataclass(frozen=True)
class Collection:
    """Queries, documents and grades with their fixed splits.

    `query_split` maps every query to train, validation or test. `unseen_documents` take no part in training,
    mining or calibration; they are in the corpus that is searched. `notice` is the attribution and what is derived.
    `query_kinds` names the kind of some or all queries; reports then have a column for each.
    """

    name: str
    queries: Mapping[str, Query]
    documents: Mapping[str, Document]
    qrels: Qrels
    query_split: Mapping[str, str]
    unseen_documents: frozenset[str] = frozenset()
    notice: str = ""
    query_kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def split(self, name: str, *, is_graded: bool = True) -> list[Query]:
        """The queries of one split, in the collection's order; those without any grade only on request."""
        return [
            query
            for query in self.queries.values()
            if self.query_split[query.id] == name and (not is_graded or self.qrels.get(query.id))
        ]

    def grade(self, query_id: str, document_id: str) -> int:
        return self.qrels.get(query_id, {}).get(document_id, 0)

    def qrels_of(self, queries: Sequence[Query]) -> Qrels:
        """The grades of these queries, empty for one that has none."""
        return {query.id: self.qrels.get(query.id, {}) for query in queries}

    def fingerprint(self) -> str:
        """Twelve hex digits that change when any query (but for its kind), document, grade or split does."""
        digest = hashlib.sha256()
        for part in (
            {key: query.text for key, query in self.queries.items()},
            {key: dict(document.fields) for key, document in self.documents.items()},
            self.qrels,
            dict(self.query_split),
            sorted(self.unseen_documents),
        ):
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
        return digest.hexdigest()[:12]


def hash_share(key: str) -> float:
    """A number in [0, 1) that a key always has, in every process and release; for splits that never change."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def split_by_hash(key: str) -> str:
    """The split that `SPLIT_SHARES` gives a key; what must stay together shares a key."""
    share, bound = hash_share(key), 0.0
    for name, size in zip(SPLITS[:-1], SPLIT_SHARES[:-1], strict=True):
        bound += size
        if share < bound:
            return name
    return SPLITS[-1]
