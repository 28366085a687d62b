"""What pruning costs and buys: a ranker cut in several ways, each measured on test queries, timed beside the whole one.

    python -m train.sweep --config configs/sweep.py --workdir work/sweep

A point is a cut (`train.prune`), perhaps healed (`train.ranker`, taught by the whole ranker). Finished points are
kept, so that a killed sweep goes on. Writes `report.json`, `report.md` and a picture of speed against quality.
"""

import dataclasses
import datetime
import functools
from pathlib import Path
from typing import Annotated, Any

import jax

from jaxsearch.checkpoints import CARD
from jaxsearch.data.records import Collection
from jaxsearch.data.verticals import Vertical
from jaxsearch.encoder import TextEncoder
from jaxsearch.errors import InputError
from jaxsearch.files import write_json
from jaxsearch.metrics import bootstrap_ci, paired_bootstrap, rank_metrics
from jaxsearch.nn.pruning import Method
from jaxsearch.ranker import load_ranker
from train import prune
from train import ranker as ranker_trainer
from train.config import Bound, Count, CountOrNone
from train.first_stage import open_first_stage
from train.inputs import load_data, load_retriever, offline_scorer
from train.options import progress, run, say
from train.plots import plot_tradeoff
from train.prune import PruneConfig
from train.ranker import RankerConfig, rerank
from train.speed import commit, spread, take_turns, weights_per_token
from train.workdir import claim

WHOLE = "whole"


@dataclasses.dataclass(frozen=True)
class Point:
    """One cut; numbers as in `PruneConfig`, 0 keeps all."""

    name: str
    drop_layers: CountOrNone = 0
    mlp_dim: CountOrNone = 0
    num_heads: CountOrNone = 0
    num_kv_heads: CountOrNone = 0
    method: Method = "osscar"
    heal_steps: CountOrNone = 0
    """Training steps after the cut; 0: none. One cut with several of them is a curve."""
    hidden_weight: Annotated[float, Bound(0)] = 0.0
    """Of the whole ranker's hidden states in the loss of those steps (`RankerLoss`)."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The ranker, how it is cut and healed, and what the results are measured on."""

    points: tuple[Point, ...]
    prune: PruneConfig = dataclasses.field(default_factory=PruneConfig)
    """Ranker, data and search of every cut; the numbers are the points'."""
    heal: RankerConfig = dataclasses.field(default_factory=RankerConfig)
    """Of every point that is healed; base and teacher are the sweep's, the data those of `prune`, steps and
    `hidden_weight` the point's."""
    num_queries: Count = 100
    """Test queries."""
    depth: Count = 20
    """The first stage's best documents, which are re-ranked."""
    timed_queries: Count = 8
    """Of them, those whose scoring is timed."""
    repeats: Count = 5


def make_point(config: SweepConfig, point: Point, workdir: Path) -> Path:
    """The folder of a point's ranker, cut and healed unless it was before."""
    shape = _shape(point)
    search = dataclasses.replace(config.prune.search, method=point.method)
    key = "-".join([point.method, *(str(value) for value in shape.values())])
    folder = workdir / "points" / key
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / CARD).exists():
        say(f"{point.name}: cutting")
        prune.main(dataclasses.replace(config.prune, search=search, **shape), folder)
    if not point.heal_steps:
        return folder / "model"
    healed = folder / f"healed-{point.heal_steps}-{point.hidden_weight}"
    healed.mkdir(exist_ok=True)
    if not (healed / "model" / CARD).exists():
        say(f"{point.name}: healing, {point.heal_steps} steps")
        data = {
            name: getattr(config.prune, name)
            for name in ("collection", "skip_bad_lines", "vertical", "retriever")
        }
        heal = dataclasses.replace(
            config.heal,
            base=str(folder / "model"),
            teacher=config.prune.ranker,
            layers=(),
            labels="",
            loss=dataclasses.replace(config.heal.loss, hidden_weight=point.hidden_weight),
            loop=dataclasses.replace(config.heal.loop, num_steps=point.heal_steps),
            **data,
        )
        ranker_trainer.main(heal, healed)
    return healed / "model"


def measure(
    config: SweepConfig,
    folders: dict[str, Path],
    collection: Collection,
    vertical: Vertical,
    retriever: TextEncoder,
) -> tuple[int, list[dict[str, Any]]]:
    """The number of test queries and a row for each ranker; NDCG@10 by the grades of all documents."""
    rankers = {name: load_ranker(folder) for name, folder in folders.items()}
    queries = collection.split("test")[: config.num_queries]
    stage = open_first_stage(collection, vertical, retriever, view=rankers[WHOLE].view)
    candidates = stage.mine(queries, depth=config.depth, seen_only=False)
    qrels = collection.qrels_of(queries)
    scorers = {name: offline_scorer(ranker) for name, ranker in rankers.items()}
    values = {}
    with progress("test queries", len(rankers)) as advance:
        for name, ranker in rankers.items():
            reranked = rerank(ranker, scorers[name], collection, vertical, candidates)
            values[name] = rank_metrics(
                qrels, reranked, threshold=vertical.relevant_threshold, metrics=("ndcg@10",)
            )["ndcg@10"]
            advance()
    timed = dict(list(candidates.items())[: config.timed_queries])

    def score(name: str) -> None:
        rerank(rankers[name], scorers[name], collection, vertical, timed)

    calls = {name: functools.partial(score, name) for name in rankers}
    for call in calls.values():  # fewer prompts end in a launch of another size, perhaps not compiled yet
        call()
    with progress("timing", config.repeats * len(calls)) as advance:
        seconds = take_turns(calls, config.repeats, advance)
    weights = {name: weights_per_token(ranker.decoder) for name, ranker in rankers.items()}
    rows = []
    for name, ranker in rankers.items():
        mean, low, high = bootstrap_ci(values[name])
        difference = paired_bootstrap(values[name], values[WHOLE])
        shape = ranker.decoder.config
        rows.append(
            {
                "name": name,
                "layers": shape.num_layers,
                "mlp_dim": shape.mlp_dim,
                "heads": shape.num_heads,
                "kv_heads": shape.num_kv_heads,
                "weights": weights[name] / weights[WHOLE],
                "ndcg@10": [mean, low, high],
                "difference": list(difference),
                "speed": spread(
                    [whole / own for whole, own in zip(seconds[WHOLE], seconds[name], strict=True)]
                ),
            }
        )
    return len(values[WHOLE]), rows


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Pruning a ranker, {report['date']}",
        "",
        f"{report['device']}; commit {report['commit']}; ranker {report['ranker']}. NDCG@10 of re-ranking the "
        f"first stage's best {report['depth']} documents for {report['num_queries']} test queries, 95 % intervals over "
        "queries. *hidden*: healed by the whole ranker's hidden states too, with this weight. "
        "*weights*: those that a token is multiplied with. *speed*: of scoring the same prompts, over the "
        f"whole ranker's, {report['repeats']} repeats taking turns, median [minimum, maximum].",
        "",
        "| ranker | healed, steps | layers | neurons | heads | weights | NDCG@10 | difference | speed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        quality = "{:.3f} [{:.3f}, {:.3f}]".format(*row["ndcg@10"])
        difference = "–" if row["name"] == WHOLE else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["difference"])
        speed = "{median:.2f} [{minimum:.2f}, {maximum:.2f}]".format(**row["speed"])
        shape = f"{row['layers']} | {row['mlp_dim']} | {row['heads']} | {row['weights']:.0%}"
        healing = str(row["heal_steps"] or "–")
        if row["hidden_weight"]:
            healing += f", hidden {row['hidden_weight']:g}"
        lines.append(f"| {row['name']} | {healing} | {shape} | {quality} | {difference} | {speed} |")
    return "\n".join([*lines, "", "![Speed against quality](report.png)"]) + "\n"


def check_points(config: SweepConfig) -> None:
    """Whether the points can be told apart and all are cuts, and no cut stands elsewhere.

    Raises: InputError when not.
    """
    names = [point.name for point in config.points]
    if not names or len(names) != len(set(names)) or WHOLE in names:
        raise InputError(f"points: each needs a name of its own, none is {WHOLE!r}; got {', '.join(names)}")
    if empty := [point.name for point in config.points if not any(_shape(point).values())]:
        raise InputError(f"points: nothing is cut in {', '.join(empty)}")
    if vain := [point.name for point in config.points if point.hidden_weight and not point.heal_steps]:
        raise InputError(f"points: hidden_weight without heal_steps in {', '.join(vain)}")
    set_here = [f"prune.{name}" for name, value in _shape(config.prune).items() if value]
    set_here += ["heal.loss.hidden_weight"] if config.heal.loss.hidden_weight else []
    if set_here:
        raise InputError(f"{', '.join(set_here)}: to be set in the points")


def _shape(cut: Point | PruneConfig) -> dict[str, int]:
    return {name: getattr(cut, name) for name in ("drop_layers", "mlp_dim", "num_heads", "num_kv_heads")}


def main(config: SweepConfig, workdir: Path) -> None:
    check_points(config)
    ranker, retriever = load_ranker(config.prune.ranker), load_retriever(config.prune.retriever)
    collection, vertical = load_data(config.prune, needs=("train", "validation", "test"), view=ranker.view)
    claim(
        workdir,
        dataclasses.replace(config, points=()),
        data=collection.fingerprint(),
        vertical=vertical.fingerprint(),
        ranker=ranker.version,
        retriever=retriever.version,
    )
    folders = {WHOLE: Path(config.prune.ranker)}
    folders |= {point.name: make_point(config, point, workdir) for point in config.points}
    num_queries, rows = measure(config, folders, collection, vertical, retriever)
    points = {point.name: point for point in config.points} | {WHOLE: Point(WHOLE)}
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "commit": commit(),
        "ranker": ranker.version,
        "num_queries": num_queries,
        "depth": config.depth,
        "repeats": config.repeats,
        "rows": [
            row
            | {name: getattr(points[row["name"]], name) for name in ("method", "heal_steps", "hidden_weight")}
            for row in rows
        ],
    }
    write_json(workdir / "report.json", report)
    (workdir / "report.md").write_text(markdown(report), encoding="utf-8")
    plot_tradeoff(workdir / "report.png", report["rows"])
    say(markdown(report))


if __name__ == "__main__":
    run(main, SweepConfig)
