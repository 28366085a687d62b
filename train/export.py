"""Puts encoder, ranker, vertical, documents and index into one bundle that the server loads.

    python -m train.export --config configs/demo/export.py --workdir work/demo/export

On the way it fits, on validation queries and seen documents, every order in which results can be served (BM25, encoder,
their rank fusion and weighted sum, the ranker, the ranker's weighted sum with them) and each order's calibration, and
takes the weighted sum, or what is better than it by more than chance. It also records known answers
for the server's self-test. Writes `bundle/` and `report.json`; `train.evaluate` measures the bundle, then
`python -m serve.main --bundle work/demo/export/bundle` serves it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from jaxsearch.bundle import MANIFEST, write_bundle
from jaxsearch.checkpoints import read_card
from jaxsearch.data.records import Collection, Query
from jaxsearch.data.verticals import Vertical
from jaxsearch.encoder import load_encoder
from jaxsearch.errors import InputError
from jaxsearch.files import read_json, read_object, write_json
from jaxsearch.ranker import TextRanker, load_ranker
from jaxsearch.retrieval.exact import ExactIndex
from jaxsearch.search.candidates import RETRIEVE_DEPTH
from jaxsearch.search.fitting import NothingToFitError, WorseOrderError, fit_orders, held_out_error
from jaxsearch.search.orders import NAMES, Orders
from train.card import CardFacts, measure_speed, model_card, order_rows, trained_elsewhere
from train.config import Bound, Count, CountOrNone
from train.first_stage import FirstStage, draw, open_first_stage
from train.inputs import load_data, offline_scorer
from train.options import run, say


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What goes into the bundle."""

    name: str = ""
    """The model name that the server's clients see; empty: the vertical's."""
    encoder: str = "work/encoder/model"
    """Folder of the encoder."""
    ranker: str = "work/ranker/model"
    """Folder of the ranker."""
    index: str = "work/index/index"
    """Folder of the exact index, made by train.index with this encoder."""
    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet); its documents are searched."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    order: str = ""
    """How results are sorted: bm25, encoder, rrf, sum, ranker or sum+ranker; empty: sum, or what is better than it on
    validation queries by more than chance."""
    allow_worse: bool = False
    """Serve `order` even where another one is better on validation queries; with no order named, serve the best one
    that uses the ranker."""
    validation_queries: Count = 200
    """Validation queries, drawn by the seed from those that the sum's weight is fitted on (500 at most), on which all
    else is fitted and orders are compared."""
    rank_depth: Annotated[int, Bound(1, RETRIEVE_DEPTH)] = 20
    """The first stage's best documents, which the ranker sorts."""
    known_answers: CountOrNone = 8
    """(query, relevant, irrelevant document) triples to try for the self-test; those ranked wrongly are left
    out."""
    max_batch_tokens: Count = 2048
    """Padded tokens of one launch; more on an accelerator."""
    seed: int = 0


def load_index(config: ExportConfig, collection: Collection) -> ExactIndex:
    """The index, if it was made from this data.

    Raises: InputError when it was not.
    """
    index = ExactIndex.load(config.index)
    if index.metadata.get("data") != collection.fingerprint():
        raise InputError(
            f"{config.index} was made from other data than {config.collection}; run train.index again"
        )
    return index


def check_made_from(config: ExportConfig, models: Mapping[str, Mapping[str, Any]], index: ExactIndex) -> None:
    """Raises: InputError unless the index was made by this encoder."""
    indexed, encoder = index.metadata.get("encoder"), models["encoder"]["version"]
    if indexed != encoder:
        raise InputError(
            f"{config.index} was made by encoder {indexed}, {config.encoder} is {encoder}: run train.index again with "
            f"--set encoder={config.encoder}"
        )


def find_orders(config: ExportConfig, stage: FirstStage) -> tuple[Orders, dict[str, float | int]]:
    """The orders, fitted where there are graded queries, and facts about the served one's calibration.

    Raises: InputError when the wanted order is unknown or worse than another.
    """
    if config.order and config.order not in NAMES:
        raise InputError(
            f"unknown order {config.order!r}: set order to one of {', '.join(NAMES)}, or leave it empty"
        )
    queries, why = draw(stage.queries, config.validation_queries, config.seed), stage.unfitted
    if not why:
        graded = stage.graded(queries)
        scores = stage.rank(graded.candidates, config.rank_depth)
        graded = graded.of(list(scores))
        try:
            orders = fit_orders(
                graded,
                stage.order,
                scores,
                rank_depth=config.rank_depth,
                wanted=config.order,
                allow_worse=config.allow_worse,
            )
        except WorseOrderError as error:
            raise InputError(
                f"{error}; leave order empty, or export it all the same with --allow-worse"
            ) from None
        except NothingToFitError:
            lacking = "has a graded seen document" if scores else "is short enough for the ranker"
            why = f"none of the {len(queries)} validation queries that were drawn {lacking}"
        else:
            served = orders[orders.default]
            facts: dict[str, float | int] = {"num_queries": len(scores)}
            error = held_out_error(graded, served, stage.order, scores if served.uses_ranker else None)
            if error is not None:
                facts["held_out_error"] = round(error, 4)
            return orders, facts
    orders = Orders.unfitted(why, rank_depth=config.rank_depth)
    if wanted := config.order or ("ranker" if config.allow_worse else ""):
        reason = f"Served: {wanted}, as it was asked for; nothing could be compared, since {why}."
        orders = dataclasses.replace(orders, default=orders[wanted].name, reason=reason)
    return orders, {}


def is_readable(ranker: TextRanker, query: Query) -> bool:
    """False for a query that is too long for the ranker's prompt."""
    try:
        ranker.request(query.text, [])
    except InputError:
        return False
    return True


def choose_triples(
    queries: list[Query], collection: Collection, vertical: Vertical, *, view: str, count: int, seed: int
) -> list[tuple[str, str, str]]:
    """(query, its best graded document, one of grade 0) as texts."""
    random = np.random.default_rng(seed)
    ids = list(collection.documents)
    triples = []
    for query in queries:
        graded = collection.qrels.get(query.id, {})
        best = max(graded, key=lambda document: graded[document], default=None)
        if len(triples) == count:
            break
        if best is None or graded[best] < vertical.relevant_threshold:
            continue
        other = next((d for d in (ids[i] for i in random.permutation(len(ids))) if not graded.get(d)), None)
        if other is None:
            continue
        texts = [vertical.document_text(collection.documents[d], view) for d in (best, other)]
        triples.append((query.text, texts[0], texts[1]))
    return triples


def main(config: ExportConfig, workdir: Path) -> None:
    collection, vertical = load_data(config)
    index = load_index(config, collection)
    models = {"encoder": read_card(Path(config.encoder)), "ranker": read_card(Path(config.ranker))}
    check_made_from(config, models, index)
    for kind, card in models.items():
        if other := trained_elsewhere(card, collection, vertical):
            say(f"{getattr(config, kind)}: {other}; the model card says so too")
    name, lexical_view = config.name or vertical.name, vertical.words_of(index.metadata["view"])
    ranker = load_ranker(config.ranker)
    scorer = offline_scorer(ranker, max_batch_tokens=config.max_batch_tokens)
    stage = open_first_stage(
        collection,
        vertical,
        load_encoder(config.encoder),
        view=index.metadata["view"],
        index=index,
        ranker=ranker,
        make_scorer=lambda: scorer,
    )
    if stage.searcher.bm25 is None:
        raise InputError("a bundle searches by words too: pip install 'jaxsearch[search]'")
    queries = [query for query in collection.split("validation") if is_readable(ranker, query)]
    random = np.random.default_rng(config.seed)
    queries = [queries[i] for i in random.permutation(len(queries))]
    orders, facts = find_orders(config, stage)
    texts = [vertical.document_text(collection.documents[key], ranker.view) for key in index.ids]
    card = CardFacts(
        name=name,
        collection=collection,
        vertical=vertical,
        models=models,
        orders=orders,
        calibration=facts,
        speed=measure_speed(ranker, scorer, queries[0].text if queries else "a", texts),
    )
    triples = choose_triples(
        queries, collection, vertical, view=ranker.view, count=config.known_answers, seed=config.seed
    )
    bundle = write_bundle(
        workdir / "bundle",
        name=name,
        encoder_directory=config.encoder,
        ranker_directory=config.ranker,
        vertical_directory=config.vertical,
        documents=[collection.documents[key] for key in index.ids],
        index=index,
        lexical_view=lexical_view,
        max_batch_tokens=config.max_batch_tokens,
        orders=orders,
        triples=triples,
        model_card=model_card(card),
    )
    manifest = read_object(bundle / MANIFEST)
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    answers = len(read_json(bundle / "selftest.json"))
    made = {
        "size_bytes": size,
        "lattice": manifest["lattice"],
        "known_answers": answers,
        "orders": {row["order"]: row for row in order_rows(orders)},
        "served": orders.default,
        "reason": orders.reason,
        "calibration": facts,
    }
    write_json(workdir / "report.json", made | {"speed": card.speed})
    error = f" (error {facts['held_out_error']} on held-out queries)" if "held_out_error" in facts else ""
    fitted = f"calibrated on {facts['num_queries']} queries{error}" if facts else "not calibrated"
    say(orders.reason)
    say(f"{bundle}: {size / 1e6:.0f} MB, {answers} known answers, {fitted}")
    if triples and not answers:
        say(
            "no known answer: this ranker orders no tried pair rightly, the server's self-test will check nothing"
        )
    say(f"serve it: python -m serve.main --bundle {bundle}")


if __name__ == "__main__":
    run(main, ExportConfig)
