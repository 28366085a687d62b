"""What launchers start from: the collection, models, pairs, a scorer."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxsearch.buckets import Lattice
from jaxsearch.checkpoints import read_card
from jaxsearch.data.assets import licence_of, resolve
from jaxsearch.data.batches import CandidateSampler
from jaxsearch.data.records import Collection, FieldValue, Query, Run
from jaxsearch.data.sources import load_collection
from jaxsearch.data.verticals import Vertical, load_vertical
from jaxsearch.encoder import TextEncoder, load_encoder
from jaxsearch.errors import InputError
from jaxsearch.judge import TextJudge
from jaxsearch.metrics import rank_metrics, restrict
from jaxsearch.nn.convert import load_pretrained
from jaxsearch.nn.transformer import Decoder
from jaxsearch.ranker import TextRanker
from jaxsearch.scoring.prefill import PrefillScorer
from train.first_stage import FirstStage


class DataConfig(Protocol):
    """The fields that every launcher's config has for its data."""

    @property
    def collection(self) -> str: ...
    @property
    def vertical(self) -> str: ...
    @property
    def skip_bad_lines(self) -> bool: ...


def load_data(
    config: DataConfig, *, needs: Sequence[str] = (), view: str = "", field: str = "view"
) -> tuple[Collection, Vertical]:
    """The collection and the vertical of a config; of an own folder the console says what was left out and is odd.

    Args: `needs` are the splits that must have queries; the vertical must have the `view`, the documents its fields;
        `field` is the config's name for it.
    Raises: InputError for bad lines (all of them, unless they are skipped), a vertical that is not whole, an
        empty split, an unknown view, or a field of the view that no document has.
    """
    vertical = load_vertical(config.vertical)
    collection = load_collection(config.collection, skip_bad_lines=config.skip_bad_lines)
    if needs and not collection.qrels:
        raise InputError(
            f"{collection.name} has no grades, which this needs: add grades.jsonl or grades.parquet with query_id, "
            "document_id and grade 0..4 (BEIR: qrels/*.tsv)"
        )
    if empty := [split for split in needs if not collection.split(split)]:
        raise InputError(
            f"{collection.name} has no graded queries in {' and '.join(empty)}: give them a split (train, "
            "validation, test), or leave the split out everywhere to have one made"
        )
    if view:
        check_view(collection, vertical, view, field=field)
    if Path(config.collection).is_dir():
        odd = [*mixed_fields(collection), *without_text(collection, vertical, view)]
        for line in [collection.notice, *odd] if collection.notice else odd:
            print(f"{collection.name}: {line}", file=sys.stderr)
    return collection, vertical


def mixed_fields(collection: Collection) -> list[str]:
    """A sentence for each field of several types, which filters compare by equality only: how many of each, where."""
    found: dict[str, dict[str, list[str]]] = {}
    for document in collection.documents.values():
        for field, value in document.fields.items():
            found.setdefault(field, {}).setdefault(_kind(value), []).append(document.id)
    lines = []
    for field, kinds in sorted(found.items()):
        (usual, ids), *others = sorted(kinds.items(), key=lambda item: -len(item[1]))
        if others:
            rare = ", ".join(f"{kind} in {len(there)} (first {there[0]})" for kind, there in others)
            lines.append(
                f"field {field} is {usual} in {len(ids)} documents but {rare}: no filter compares it by size and no "
                "facet counts it until all have one type"
            )
    return lines


def without_text(collection: Collection, vertical: Vertical, view: str) -> list[str]:
    """A sentence on the documents of which a view shows nothing, if there are any and a view is given."""
    documents = collection.documents.values() if view else ()
    empty = [document.id for document in documents if not vertical.document_text(document, view)]
    if not empty:
        return []
    return [
        f"{len(empty)} of {len(documents)} documents have no text in view {view} (first {empty[0]}): no words find them"
    ]


def _kind(value: FieldValue) -> str:
    kinds = {bool: "true/false", str: "text", list: "a list"}
    return kinds.get(type(value), "a number")


def check_view(collection: Collection, vertical: Vertical, view: str, *, field: str) -> None:
    """Whether documents can be read through a view.

    Raises: InputError that names the config's `field` and the views or document fields that there are.
    """
    if view not in vertical.views:
        raise InputError(
            f"vertical {vertical.name} has no view {view!r}: set {field} to {' or '.join(vertical.views)}"
        )
    known = {field for document in collection.documents.values() for field in document.fields}
    if absent := [field for field in vertical.views[view] if field not in known]:
        raise InputError(
            f"view {view!r} of {vertical.directory} reads {', '.join(absent)}, which no document of {collection.name} "
            f"has; they have {', '.join(sorted(known))}"
        )


def load_base(directory: Path, *, dtype: str, use_remat: bool) -> Decoder:
    """The decoder that a judge or a ranker is made of.

    Raises: InputError for another network, or what `load_pretrained` refuses.
    """
    base = load_pretrained(directory, dtype=dtype, use_remat=use_remat)
    if not isinstance(base, Decoder):
        raise InputError(f"{directory} is not a decoder: judge and ranker need a base that can answer")
    return base


def load_retriever(name_or_path: str | Path) -> TextEncoder:
    """An encoder by asset name ("minilm"), hub name or folder."""
    return load_encoder(resolve(str(name_or_path)))


def sample_pairs(
    stage: FirstStage,
    *,
    split: str,
    num_queries: int,
    per_query: int,
    depth: int,
    random_share: float,
    seed: int,
    is_graded: bool,
) -> list[tuple[str, str]]:
    """(query id, document id) of all grades for some queries of a split, seen documents only; fixed by the seed.

    Hard ones are among the first stage's best `depth`.
    """
    queries = stage.collection.split(split, is_graded=is_graded)
    chosen = [queries[i] for i in np.random.default_rng(seed).permutation(len(queries))[:num_queries]]
    sampler = CandidateSampler(
        stage.collection, threshold=stage.threshold, mined=stage.mine(chosen, depth=depth)
    )
    return [
        (query.id, key)
        for number, query in enumerate(chosen)
        for key in sampler.pairs(
            query.id, per_query, np.random.default_rng((seed, number)), random_share=random_share
        )
    ]


def pair_texts(
    collection: Collection, vertical: Vertical, pairs: Sequence[tuple[str, str]], *, view: str
) -> list[tuple[str, str]]:
    """(query text, document text) of each pair of ids."""
    return [
        (collection.queries[query_id].text, vertical.document_text(collection.documents[document_id], view))
        for query_id, document_id in pairs
    ]


def validate(
    collection: Collection,
    vertical: Vertical,
    queries: Sequence[Query],
    ranking: Run,
    metrics: Sequence[str] = ("ndcg@10",),
) -> dict[str, float]:
    """Means over the queries by the grades of seen documents only: what a checkpoint may be chosen by.

    Raises: InputError when no query has a relevant one, so that nothing could be measured.
    """
    seen = restrict(collection.qrels_of(queries), collection.documents.keys() - collection.unseen_documents)
    threshold = vertical.relevant_threshold
    if not any(grade >= threshold for grades in seen.values() for grade in grades.values()):
        raise InputError(
            f"none of the {len(queries)} validation queries that are looked at has a seen document of grade "
            f"{threshold} or above: there is nothing to validate on; grade more or check more queries"
        )
    values = rank_metrics(seen, ranking, threshold=threshold, metrics=metrics)
    return {name: float(np.mean(list(per_query.values()))) for name, per_query in values.items()}


def origin(base: str, collection: Collection, vertical: Vertical) -> dict[str, str]:
    """What a trained model's card says first: from which weights, under which licence, on which data and vertical."""
    made_before = read_card(Path(base)).get("trained", {})
    licence = made_before.get("licence") or licence_of(base)
    made_on = {"collection": collection.fingerprint(), "vertical": vertical.fingerprint()}
    return {"base": base, "licence": licence, **made_on}


def offline_scorer(model: TextJudge | TextRanker, *, max_batch_tokens: int = 2048) -> PrefillScorer:
    """A scorer that compiles a shape at its first use: for labelling and evaluation, not for serving.

    A judge's policy is computed once.
    """
    base = model.pairs([]).prefix if isinstance(model, TextJudge) else ()
    lattice = Lattice.for_prompts(
        max_prefix_tokens=0 if base else model.prompt.max_shared_tokens,
        max_item_tokens=model.prompt.max_item_tokens,
        max_batch_tokens=max_batch_tokens,
    )
    return PrefillScorer(model.decoder, model.label_ids, lattice, base=base)
