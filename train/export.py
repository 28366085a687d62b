"""Puts encoder, ranker, vertical, documents and index into one bundle that the server loads.

    python -m train.export --config configs/demo/export.py --workdir work/demo/export

On the way it fits the calibration (the ranker's score → probability that a document is relevant) on
validation queries and seen documents, and records known answers for the server's self-test. Writes `bundle/`
and `report.json`; serve it with `python -m serve.main --bundle work/demo/export/bundle`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsearch.bundle import MANIFEST, write_bundle
from jaxsearch.calibration import IsotonicMap, calibration_error, fit_isotonic
from jaxsearch.checkpoints import read_card
from jaxsearch.data.records import Collection, Query, Run
from jaxsearch.data.verticals import Vertical
from jaxsearch.encoder import load_encoder
from jaxsearch.errors import InputError
from jaxsearch.files import read_json, read_object, write_json
from jaxsearch.ranker import load_ranker
from jaxsearch.retrieval.exact import ExactIndex
from train.card import CardFacts, measure_speed, model_card, trained_elsewhere
from train.config import Count, CountOrNone
from train.inputs import load_data, mine, offline_scorer
from train.options import run, say
from train.ranker import rerank
from train.report import quality_rows


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
    report: str = ""
    """report.json of train.evaluate, for the model card and the status page; empty: they say nothing of quality."""
    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet); its documents are searched."""
    skip_bad_lines: bool = False
    """Leave out the collection's bad lines, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    lexical_view: str = ""
    """Which view of a document BM25 searches; empty: the one that was embedded."""
    calibration_queries: CountOrNone = 60
    """Validation queries, drawn by the seed, on which the calibration is fitted; 0: no calibration."""
    calibration_depth: Count = 10
    """The encoder's best seen documents for each of them."""
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


def check_made_from(
    config: ExportConfig,
    models: Mapping[str, Mapping[str, Any]],
    index: ExactIndex,
    report: Mapping[str, Any],
    data: str,
) -> None:
    """Whether index and report belong to these models, and the report to the collection of fingerprint `data`.

    A report that was written before reports stated their data, or their models, is believed.

    Raises: InputError when they do not.
    """
    indexed, encoder = index.metadata.get("encoder"), models["encoder"]["version"]
    if indexed != encoder:
        raise InputError(
            f"{config.index} was made by encoder {indexed}, {config.encoder} is {encoder}: run train.index again with "
            f"--set encoder={config.encoder}"
        )
    notes = report.get("notes", {})
    if notes.get("data", data) != data:
        raise InputError(
            f"{config.report} was made from other data than {config.collection}; run train.evaluate again, or leave "
            "report empty"
        )
    for kind, measured in notes.get("models", {}).items():
        if measured != models[kind]["version"]:
            raise InputError(
                f"{config.report} measured {kind} {measured}, {getattr(config, kind)} is {models[kind]['version']}: "
                "give the report of train.evaluate with these models, or leave report empty"
            )


def calibrate(
    scores: Run, collection: Collection, *, threshold: int
) -> tuple[IsotonicMap, dict[str, float | int]]:
    """The map fitted on all queries, and its expected calibration error when fitted on one half and asked on
    the other.

    Args: `scores` are the ranker's, per query and document.
    """
    queries = list(scores)

    def pairs(chosen: list[str]) -> tuple[np.ndarray, np.ndarray]:
        values = [
            (score, collection.grade(q, d) >= threshold) for q in chosen for d, score in scores[q].items()
        ]
        return np.array([v for v, _ in values], np.float64), np.array([t for _, t in values], np.float64)

    fitted_on, asked = pairs(queries[::2]), pairs(queries[1::2])
    everything = pairs(queries)
    facts: dict[str, float | int] = {"num_queries": len(queries), "num_pairs": len(everything[0])}
    if len(queries) > 1:
        error = calibration_error(fit_isotonic(*fitted_on)(asked[0]), asked[1])
        facts["held_out_error"] = round(error, 4)
    return fit_isotonic(*everything), facts


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


def load_report(path: str) -> dict[str, Any]:
    """What train.evaluate wrote, empty without a path. Raises: InputError for a report of another launcher."""
    report = read_object(path, hint="run train.evaluate, or leave report empty") if path else {}
    if path and not report.get("groups"):
        raise InputError(f"{path} is not a report of train.evaluate: give that one, or leave report empty")
    return report


def main(config: ExportConfig, workdir: Path) -> None:
    report = load_report(config.report)
    collection, vertical = load_data(
        config,
        needs=("validation",) if config.calibration_queries else (),
        view=config.lexical_view,
        field="lexical_view",
    )
    index = load_index(config, collection)
    models = {"encoder": read_card(Path(config.encoder)), "ranker": read_card(Path(config.ranker))}
    check_made_from(config, models, index, report, collection.fingerprint())
    for kind, card in models.items():
        if other := trained_elsewhere(card, collection, vertical):
            say(f"{getattr(config, kind)}: {other}; the model card says so too")
    name, lexical_view = config.name or vertical.name, config.lexical_view or index.metadata["view"]
    ranker = load_ranker(config.ranker)
    queries = collection.split("validation")
    random = np.random.default_rng(config.seed)
    queries = [queries[i] for i in random.permutation(len(queries))]
    scorer = offline_scorer(ranker, max_batch_tokens=config.max_batch_tokens)
    calibration, facts = None, {}
    if config.calibration_queries:
        candidates = mine(
            load_encoder(config.encoder),
            collection,
            queries[: config.calibration_queries],
            vertical,
            view=index.metadata["view"],
            depth=config.calibration_depth,
        )
        scores = rerank(ranker, scorer, collection, vertical, candidates)
        calibration, facts = calibrate(scores, collection, threshold=vertical.relevant_threshold)
    texts = [vertical.document_text(collection.documents[key], ranker.view) for key in index.ids]
    card = CardFacts(
        name=name,
        collection=collection,
        vertical=vertical,
        models=models,
        calibration=facts,
        speed=measure_speed(ranker, scorer, queries[0].text if queries else "a", texts),
        report=report,
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
        calibration=calibration,
        triples=triples,
        model_card=model_card(card),
        quality=quality_rows(report) if report else [],
    )
    manifest = read_object(bundle / MANIFEST)
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    answers = len(read_json(bundle / "selftest.json"))
    made = {
        "size_bytes": size,
        "lattice": manifest["lattice"],
        "known_answers": answers,
        "calibration": facts,
    }
    write_json(workdir / "report.json", made | {"speed": card.speed})
    error = f" (error {facts['held_out_error']} on held-out queries)" if "held_out_error" in facts else ""
    fitted = f"calibrated on {facts['num_queries']} queries{error}" if facts else "not calibrated"
    say(f"{bundle}: {size / 1e6:.0f} MB, {answers} known answers, {fitted}")
    if triples and not answers:
        say(
            "no known answer: this ranker orders no tried pair rightly, the server's self-test will check nothing"
        )
    say(f"serve it: python -m serve.main --bundle {bundle}")


if __name__ == "__main__":
    run(main, ExportConfig)
