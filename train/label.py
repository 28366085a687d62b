"""Labels pairs with a trained judge, in resumable shards.

    python -m train.label --config configs/demo/label.py --workdir work/demo/label

Each line of `labels-*.jsonl`: query_id, document_id, grade_probs, expected_grade, soft_label, judge_version,
prompt_hash. A shard appears whole or not at all, so a killed run continues with no pair twice and none lost.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxsearch.data.records import Collection
from jaxsearch.data.sources import read_pairs
from jaxsearch.data.verticals import Vertical
from jaxsearch.errors import InputError
from jaxsearch.files import read_object, write_json
from jaxsearch.judge import TextJudge, expected_grade, grade_probs, load_judge, soft_label
from jaxsearch.scoring.prefill import PrefillScorer, ScoreRequest
from train.config import Count, Share
from train.first_stage import open_first_stage
from train.inputs import load_data, load_retriever, offline_scorer, pair_texts, sample_pairs
from train.options import progress, run, say
from train.workdir import claim


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Which pairs are labelled by which judge."""

    judge: str = "work/judge/model"
    """Folder of a trained judge."""
    collection: str = "onet_activities"
    """A built-in collection or the folder of your own (BEIR, JSONL, Parquet)."""
    skip_bad_lines: bool = False
    """Leave out bad lines of collection and pairs, counted, instead of stopping with a list of them."""
    vertical: str = "configs/verticals/onet_activities"
    """Folder with fields, views, policy and prompts."""
    pairs: str = ""
    """JSONL or Parquet with query_id and document_id; empty: pairs of train queries are drawn as below."""
    retriever: str = "minilm"
    """The encoder of the first stage, whose best documents become hard negatives."""
    num_queries: Count = 310
    per_query: Count = 8
    """Documents of all grades for a query: graded ones, the first stage's best, random ones."""
    mined_depth: Count = 30
    random_share: Share = 0.25
    """Of the documents below the threshold, how many are random ones instead of graded or mined ones."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the judge's computation."""
    shard_pairs: Count = 256
    """Pairs a file; a killed run loses at most one file's work."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Label:
    """The judge's view of one pair: five probabilities and their mean as a relevance in [0, 1]."""

    query_id: str
    document_id: str
    grade_probs: tuple[float, ...]
    expected_grade: float
    soft_label: float
    judge_version: str
    prompt_hash: str


def label_pairs(
    judge: TextJudge,
    scorer: PrefillScorer,
    collection: Collection,
    vertical: Vertical,
    pairs: Sequence[tuple[str, str]],
) -> list[Label]:
    encoded = judge.pairs(pair_texts(collection, vertical, pairs, view=judge.view))
    probs = grade_probs(scorer.score([ScoreRequest(encoded.prefix, encoded.items)])[0].astype(np.float64))
    return [
        Label(
            query_id,
            document_id,
            tuple(round(float(p), 6) for p in row),
            round(float(expected_grade(row)), 6),
            round(float(soft_label(row)), 6),
            judge.version,
            judge.prompt.template.fingerprint,
        )
        for (query_id, document_id), row in zip(pairs, probs, strict=True)
    ]


def read_labels(directory: str | Path, *, data: str | None = None) -> list[Label]:
    """All labels of a folder, in shard order.

    Args: `data` is the fingerprint of the collection that they must have been made from.
    Raises: InputError when there are none or not yet all, when two judges' labels are mixed, or for other data.
    """
    paths = sorted(Path(directory).glob("labels-*.jsonl"))
    if not paths:
        raise InputError(
            f"no labels-*.jsonl in {directory}: run python -m train.label with this --workdir first"
        )
    labels = []
    for path in paths:
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                labels.append(Label(**{**row, "grade_probs": tuple(row["grade_probs"])}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it and repeat its python -m train.label"
            ) from None
    stated = read_object(Path(directory) / "labels.json", hint="repeat its python -m train.label command")
    if len(labels) != stated["num_pairs"]:
        raise InputError(
            f"{directory} holds {len(labels)} of {stated['num_pairs']} labels: repeat its python -m train.label command"
        )
    if data is not None and stated["data"] != data:
        raise InputError(
            f"{directory} was labelled on other data ({stated['data']}, not {data}): give labels=FOLDER of labels on "
            "this data, made by train.label, or labels= to go without"
        )
    versions = {(label.judge_version, label.prompt_hash) for label in labels}
    if len(versions) > 1:
        raise InputError(
            f"{directory} mixes labels of {len(versions)} judges: label again in an empty folder"
        )
    return labels


def write_shard(path: Path, labels: Sequence[Label]) -> None:
    """Whole or not at all: written beside its place, flushed to disk, then renamed."""
    temporary = path.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(label)) + "\n" for label in labels)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main(config: LabelConfig, workdir: Path) -> None:
    collection, vertical = load_data(config)
    judge = load_judge(config.judge, dtype=config.dtype)
    if config.pairs:
        pairs, notice = read_pairs(config.pairs, collection, skip_bad_lines=config.skip_bad_lines)
        if notice:
            say(notice)
    else:
        retriever = load_retriever(config.retriever)
        pairs = sample_pairs(
            open_first_stage(collection, vertical, retriever, view=judge.view),
            split="train",
            num_queries=config.num_queries,
            per_query=config.per_query,
            depth=config.mined_depth,
            random_share=config.random_share,
            seed=config.seed,
            is_graded=False,
        )
    claim(
        workdir,
        config,
        judge=judge.version,
        prompt=judge.prompt.template.fingerprint,
        data=collection.fingerprint(),
        vertical=vertical.fingerprint(),
        pairs=hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12],
    )
    write_json(workdir / "labels.json", {"data": collection.fingerprint(), "num_pairs": len(pairs)})
    scorer = offline_scorer(judge)
    starts = range(0, len(pairs), config.shard_pairs)
    paths = {start: workdir / f"labels-{start // config.shard_pairs:05d}.jsonl" for start in starts}
    missing = [start for start in starts if not paths[start].exists()]
    say(f"{len(pairs)} pairs, {len(starts) - len(missing)} of {len(starts)} shards already labelled")
    with progress("labelling", len(starts), done=len(starts) - len(missing)) as advance:
        for start in missing:
            part = pairs[start : start + config.shard_pairs]
            write_shard(paths[start], label_pairs(judge, scorer, collection, vertical, part))
            advance()
    say(f"labels: {workdir}")


if __name__ == "__main__":
    run(main, LabelConfig)
