"""The model card of a bundle: what it is made of, how good and how fast it is, and what must be said about its data.

Every number comes from the stages' own reports or is measured when the bundle is made; what is not known is left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxsearch.data.records import Collection
from jaxsearch.data.verticals import Vertical
from jaxsearch.ranker import TextRanker
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from jaxsearch.search.orders import Orders
from train.first_stage import MOST_QUERIES
from train.report import markdown_table, quality_rows
from train.speed import spread, timed

QUALITY = "## Quality"
SPEED_ITEMS = 50
SPEED_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card is written from."""

    name: str
    collection: Collection
    vertical: Vertical
    models: Mapping[str, Mapping[str, Any]]
    """Cards of the model folders by kind."""
    orders: Orders
    calibration: Mapping[str, float | int]
    """Facts about the served order's calibration."""
    speed: Mapping[str, Any]


def measure_speed(
    ranker: TextRanker, scorer: PrefillScorer, query: str, texts: Sequence[str]
) -> dict[str, Any]:
    """Items a second of one request with `SPEED_ITEMS` documents, on this machine, with their spread."""
    prompt = ranker.request(query, list(texts)[:SPEED_ITEMS])
    request = ScoreRequest(prompt.prefix, prompt.items)
    rates = spread(
        [len(prompt.items) / seconds for seconds in timed(lambda: scorer.score([request]), SPEED_REPEATS)]
    )
    return {
        "items_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "items": len(prompt.items),
        "tokens_per_item": round(sum(map(len, prompt.items)) / len(prompt.items), 1),
        "device": jax.devices()[0].device_kind,
    }


def model_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    lines = [
        f"# {facts.name}",
        "",
        f"Search over {facts.collection.name}: {len(facts.collection.documents)} documents.",
    ]
    lines += ["", "## Data", "", *_data(facts)]
    for kind, card in facts.models.items():
        lines += ["", f"## {kind.capitalize()}", "", f"Version {card['version']}.", ""]
        if other := trained_elsewhere(card, facts.collection, facts.vertical):
            lines += [f"This {kind} {other}.", ""]
        lines += [f"- {key}: {value}" for key, value in _flat(card.get("trained", {})).items()]
    lines += ["", "## Order", "", *_orders(facts.orders)]
    lines += [
        "",
        QUALITY,
        "",
        "Not measured on all test queries yet: train.evaluate does, and writes it here.",
    ]
    lines += ["", "## Calibration", ""]
    lines += [f"- {key}: {value}" for key, value in facts.calibration.items()] or ["None was fitted."]
    lines += ["", "## Speed", ""]
    lines += [f"- {key}: {value}" for key, value in _flat(facts.speed).items()]
    return "\n".join(lines) + "\n"


def trained_elsewhere(card: Mapping[str, Any], collection: Collection, vertical: Vertical) -> str:
    """What of a model's training was not this collection and this vertical, as far as its card says; else empty."""
    trained = card.get("trained", {})
    here = {"collection": (collection.name, collection), "vertical": (vertical.name, vertical)}
    other = [
        f"{kind} {trained[kind]}, not {name} ({made.fingerprint()})"
        for kind, (name, made) in here.items()
        if trained.get(kind, made.fingerprint()) != made.fingerprint()
    ]
    return f"was trained on {' and '.join(other)}" if other else ""


def _data(facts: CardFacts) -> list[str]:
    collection = facts.collection
    unseen = len(collection.unseen_documents)
    kept = f"{unseen} documents are kept out of training, mining and calibration (unseen)." if unseen else ""
    grades = sum(map(len, collection.qrels.values()))
    lines = [
        collection.notice,
        kept,
        f"{grades} grades on {len(collection.queries)} queries; {_fingerprints(facts)}.",
    ]
    return [line for line in lines if line]


def _fingerprints(facts: CardFacts) -> str:
    return f"data {facts.collection.fingerprint()}, vertical {facts.vertical.name} {facts.vertical.fingerprint()}"


def order_rows(orders: Orders) -> list[dict[str, Any]]:
    """A row per order: its weights, and its NDCG@10 on validation queries with the interval, None where unmeasured."""
    rows = []
    for order in orders.orders.values():
        value, low, high = order.validation or (None, None, None)
        rows.append(
            {
                "order": order.name,
                "weights": {signal: round(weight, 4) for signal, weight in order.weights.items()},
                "NDCG@10": None if value is None else round(value, 4),
                "low": None if low is None else round(low, 4),
                "high": None if high is None else round(high, 4),
            }
        )
    return rows


def _orders(orders: Orders) -> list[str]:
    rows = [
        row | {"weights": ", ".join(f"{k} {v:g}" for k, v in row["weights"].items())}
        for row in order_rows(orders)
    ]
    return [
        orders.reason,
        "",
        "NDCG@10 on validation queries and seen documents, with 95 % intervals. The weight of sum is fitted on these "
        f"and, where there are more, on up to {MOST_QUERIES} validation queries; the ranker's share in sum+ranker is "
        "cross-fitted.",
        "",
        *_table(rows),
    ]


def with_quality(card: str, report: Mapping[str, Any]) -> str:
    """The card with what train.evaluate measured in the place of its section on quality.

    Args: `report` is what train.evaluate wrote.
    """
    group = report["groups"][0]
    section = [
        f"{group['num_queries']} {group['name']}; intervals are 95 %, by bootstrap over queries.",
        "",
        *_table(quality_rows(report)),
    ]
    before, _, rest = card.partition(f"{QUALITY}\n")
    after = rest.partition("\n## ")[2]
    parts = [before.rstrip(), QUALITY, "\n".join(section), *([f"## {after}".rstrip()] if after else [])]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return markdown_table(
        list(rows[0]), [["" if value is None else str(value) for value in row.values()] for row in rows]
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One line a value: nested names joined, numbers short, lists with commas."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name} ")
        elif isinstance(value, list):
            flat[name] = ", ".join(map(str, value))
        else:
            flat[name] = f"{value:.4g}" if isinstance(value, float) else value
    return flat
