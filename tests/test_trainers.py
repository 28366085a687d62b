"""The trainers on a made-up collection and tiny models: whole runs, what they leave, and what they refuse."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.encoder import load_encoder
from jaxsearch.errors import InputError
from jaxsearch.judge import load_judge, save_judge
from jaxsearch.ranker import load_ranker
from tests.eight_devices_trainers import prune_config
from tests.tiny_bundle import write_parts
from tests.tiny_collection import tiny_judge, write_collection
from train import encoder as encoder_trainer
from train import judge as judge_trainer
from train import label as labeller
from train import prune
from train import ranker as ranker_trainer
from train.first_stage import open_first_stage
from train.inputs import load_data, load_retriever, offline_scorer
from train.loop import LoopConfig
from train.step import OptimizerConfig
from train.teachers import OnlineTeacher, Taught, TaughtLoss

OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Paths of the tiny models, the vertical and the collection, as every config wants them."""
    root = tmp_path_factory.mktemp("world")
    parts = write_parts(root)
    judge = root / "judge"
    save_judge(judge, tiny_judge(parts), trained={})
    return {"collection": str(write_collection(root / "data")), "vertical": str(parts["vertical"])} | {
        name: str(path) for name, path in {**parts, "judge": judge}.items() if name != "vertical"
    }


def common(world):
    return {"collection": world["collection"], "vertical": world["vertical"]}


def label_config(world, **changes):
    config = labeller.LabelConfig(
        judge=world["judge"],
        retriever=world["encoder"],
        num_queries=8,
        per_query=4,
        shard_pairs=5,
        **common(world),
    )
    return dataclasses.replace(config, **changes)


def test_the_judge_learns_its_pairs_and_reports_agreement(world, tmp_path):
    config = judge_trainer.JudgeConfig(
        base=world["ranker"],
        retriever=world["encoder"],
        lora_rank=4,
        pairs_per_query=4,
        batch_pairs=8,
        check_queries=3,
        max_shared_tokens=48,
        max_item_tokens=80,
        loop=LoopConfig(num_steps=30),
        optimizer=OPTIMIZER,
        **common(world),
    )
    judge_trainer.main(config, tmp_path)
    losses = [json.loads(line).get("loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["test"]["pairs"] == 3 * 4
    assert report["test"]["weighted_kappa_low"] <= report["test"]["weighted_kappa"]
    assert load_judge(tmp_path / "model").policy == "Grade 4 when it fits."


def test_labels_are_one_a_pair_and_say_whose_they_are(world, tmp_path):
    labeller.main(label_config(world), tmp_path)
    labels = labeller.read_labels(tmp_path)
    assert len({(label.query_id, label.document_id) for label in labels}) == len(labels) == 32
    judge = load_judge(world["judge"])
    assert {label.judge_version for label in labels} == {judge.version}
    assert {label.prompt_hash for label in labels} == {judge.prompt.template.fingerprint}
    for label in labels:
        np.testing.assert_allclose(sum(label.grade_probs), 1.0, atol=5e-6)  # measured 1e-6: six decimals
        # measured maximum 5e-7: six decimals
        assert label.soft_label == pytest.approx(label.expected_grade / 4, abs=1e-6)


def test_a_killed_labelling_goes_on_without_losing_or_repeating_a_pair(world, tmp_path):
    labeller.main(label_config(world), tmp_path / "whole")
    labeller.main(label_config(world), tmp_path / "killed")
    shards = sorted((tmp_path / "killed").glob("labels-*.jsonl"))
    untouched = shards[0].stat().st_mtime_ns
    shards[2].unlink()
    shards[4].rename(shards[4].with_suffix(".part"))
    labeller.main(label_config(world), tmp_path / "killed")
    assert shards[0].stat().st_mtime_ns == untouched
    whole, again = (labeller.read_labels(tmp_path / name) for name in ("whole", "killed"))
    assert [(label.query_id, label.document_id) for label in again] == [
        (label.query_id, label.document_id) for label in whole
    ]
    np.testing.assert_allclose(
        [label.soft_label for label in again], [label.soft_label for label in whole], atol=2e-6
    )  # measured 0, of six decimals


def test_two_judges_are_never_mixed(world, tmp_path):
    labeller.main(label_config(world), tmp_path / "labels")
    other = load_judge(world["judge"])
    other.policy = "Another policy."
    save_judge(tmp_path / "other", other, trained={})
    with pytest.raises(InputError, match="judge"):
        labeller.main(label_config(world, judge=str(tmp_path / "other")), tmp_path / "labels")


def test_pairs_from_a_file_are_labelled_and_unknown_ones_refused(world, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query_id": "law-q0", "document_id": "wine1"}\n')
    labeller.main(label_config(world, pairs=str(pairs)), tmp_path / "labels")
    assert [label.document_id for label in labeller.read_labels(tmp_path / "labels")] == ["wine1"]
    pairs.write_text('{"query_id": "law-q0", "document_id": "nothing"}\n')
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: unknown document nothing"):
        labeller.main(label_config(world, pairs=str(pairs)), tmp_path / "others")


def encoder_config(world, **changes):
    config = encoder_trainer.EncoderConfig(
        backbone=world["encoder"],
        batch_queries=4,
        documents_per_query=3,
        max_query_tokens=24,
        max_document_tokens=32,
        loop=LoopConfig(num_steps=3),
        optimizer=OPTIMIZER,
        **common(world),
    )
    return dataclasses.replace(config, **changes)


def test_the_encoder_learns_in_rounds(world, tmp_path):
    encoder_trainer.main(encoder_config(world, rounds=2, loop=LoopConfig(num_steps=30)), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"before", "round-0", "round-1", "kept"}
    assert report[report["kept"]]["ndcg@10"] > report["before"]["ndcg@10"]
    assert load_encoder(tmp_path / "model").query_instruction == "Find: "


def test_a_round_that_does_harm_is_undone(world, tmp_path):
    encoder_trainer.main(encoder_config(world, optimizer=OptimizerConfig(learning_rate=1e-12)), tmp_path)
    before, after = load_encoder(world["encoder"]), load_encoder(tmp_path / "model")
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == "before"
    for left, right in zip(
        *(jax.tree.leaves(nnx.state(one.encoder)) for one in (before, after)), strict=True
    ):
        assert np.array_equal(left, right)


def ranker_config(world, labels, **changes):
    config = ranker_trainer.RankerConfig(
        base=world["ranker"],
        layers=(0,),
        labels=labels,
        retriever=world["encoder"],
        batch_queries=4,
        candidates_per_query=4,
        max_shared_tokens=80,
        max_item_tokens=64,
        check_queries=3,
        check_depth=4,
        loop=LoopConfig(num_steps=20),
        optimizer=OPTIMIZER,
        **common(world),
    )
    return dataclasses.replace(config, **changes)


def test_the_ranker_keeps_the_named_layers_and_its_frozen_embeddings(world, tmp_path):
    labeller.main(label_config(world), tmp_path / "labels")
    ranker_trainer.main(ranker_config(world, str(tmp_path / "labels")), tmp_path / "ranker")
    before, after = load_ranker(world["ranker"]), load_ranker(tmp_path / "ranker" / "model")
    assert after.decoder.config.num_layers == 1
    assert np.array_equal(after.decoder.embed_tokens.weight[...], before.decoder.embed_tokens.weight[...])
    kept = np.asarray(before.decoder.layers.mlp.up_proj.kernel[...])[0]
    assert not np.array_equal(np.asarray(after.decoder.layers.mlp.up_proj.kernel[...])[0], kept)


def test_without_gold_only_labelled_pairs_are_used(world, tmp_path):
    labeller.main(label_config(world, num_queries=5), tmp_path / "labels")
    ranker_trainer.main(ranker_config(world, str(tmp_path / "labels"), use_gold=False), tmp_path / "ranker")
    trained = load_ranker(tmp_path / "ranker" / "model")
    assert trained.version != load_ranker(world["ranker"]).version
    report = json.loads((tmp_path / "ranker" / "report.json").read_text())
    assert report["labels"] == 5 * 4


def test_missing_labels_say_which_command_makes_them(world, tmp_path):
    with pytest.raises(InputError, match=r"train\.label"):
        ranker_trainer.main(ranker_config(world, str(tmp_path / "none")), tmp_path / "ranker")


def test_hard_negatives_replace_random_ones_as_the_ranker_learns(world):
    config = ranker_config(world, "", random_share=(1.0, 0.0))
    ranker = load_ranker(world["ranker"])
    collection, vertical = load_data(config, needs=("train",))
    queries = collection.split("train")
    stage = open_first_stage(collection, vertical, load_retriever(config.retriever), view=config.view)
    mined = stage.mine(queries, depth=6)
    data = ranker_trainer.RankerData(ranker, collection, vertical, mined, [], config)
    sampler = data.sampler
    hard = {key: [one for keys in sampler.buckets(key).values() for one in keys] for key in data.queries}

    def hard_share(step):
        rng = np.random.default_rng(0)
        drawn = [(key, data.candidates(key, step, rng)) for key in data.queries * 9]
        negatives = [(key, one) for key, keys in drawn for one in keys if not sampler.is_relevant(key, one)]
        return np.mean([one in hard[key] for key, one in negatives])

    assert hard_share(config.loop.num_steps) > hard_share(0)


def test_a_run_does_not_go_on_under_another_policy(world, tmp_path):
    vertical = tmp_path / "vertical"
    shutil.copytree(world["vertical"], vertical)
    config = label_config(world, vertical=str(vertical))
    labeller.main(config, tmp_path / "labels")
    (vertical / "policy.md").write_text("Grade 0 always.\n")
    with pytest.raises(InputError, match=r"begun with another vertical \(fingerprint\)"):
        labeller.main(config, tmp_path / "labels")


def test_a_damaged_shard_is_named(world, tmp_path):
    labeller.main(label_config(world), tmp_path)
    with (tmp_path / "labels-00001.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(InputError, match=r"labels-00001\.jsonl is damaged"):
        labeller.read_labels(tmp_path)


def test_trainers_run_on_eight_devices(tmp_path):
    root = Path(__file__).parent
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(root.parent)}
    done = subprocess.run(
        [sys.executable, str(root / "eight_devices_trainers.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "8"
    assert load_ranker(tmp_path / "trained" / "ranker" / "model").decoder.config.num_layers == 1
    prune.main(prune_config(tmp_path), tmp_path / "one")
    kernels = [
        load_ranker(tmp_path / name / "model").decoder.layers.mlp.down_proj.kernel[...]
        for name in ("one", "trained/prune")
    ]
    np.testing.assert_allclose(kernels[1], kernels[0], atol=1e-6)  # measured 1.7e-8


def test_an_online_teacher_makes_the_student_that_its_stored_labels_make(world, tmp_path):
    labels = str(tmp_path / "labels")
    labeller.main(label_config(world), tmp_path / "labels")
    stored = ranker_config(world, labels, use_gold=False, use_frozen_embeddings=False)
    ranker_trainer.main(stored, tmp_path / "stored")
    ranker_trainer.main(dataclasses.replace(stored, teacher=world["judge"]), tmp_path / "online")
    before = load_ranker(world["ranker"])
    students = [load_ranker(tmp_path / name / "model") for name in ("stored", "online")]
    first, second = (nnx.to_flat_state(nnx.state(student.decoder)) for student in students)
    largest = 0.0
    for (_, left), (_, right) in zip(first, second, strict=True):
        scale = float(np.abs(left[...]).max())
        largest = max(largest, float(np.abs(left[...] - right[...]).max()) / scale)
    assert largest < 1e-4  # measured 1.8e-5: stored labels have six decimals
    moved = np.abs(
        students[0].decoder.embed_tokens.weight[...] - before.decoder.embed_tokens.weight[...]
    ).max()
    assert float(moved) > 1e-3


def test_an_online_teacher_grades_what_nobody_labelled(world, tmp_path):
    config = ranker_config(world, "", teacher=world["judge"], use_gold=True)
    ranker_trainer.main(config, tmp_path / "ranker")
    records = [json.loads(line) for line in (tmp_path / "ranker" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "labelled_share" in record]
    assert all(record["labelled_share"] == 1.0 for record in trained)
    assert all(record["teacher"] > 0 for record in trained)
    report = json.loads((tmp_path / "ranker" / "report.json").read_text())
    assert report["teacher"] == load_judge(world["judge"]).version


def loss_in_groups(world, groups, labels=()):
    """The ranker's loss of one batch of four queries, one with too few candidates, packed in so many groups."""
    config = ranker_config(world, "")
    ranker = load_ranker(world["ranker"])
    collection, vertical = load_data(config, needs=("train",))
    data = ranker_trainer.RankerData(ranker, collection, vertical, {}, labels, config)
    drawn = data.draw(0)
    drawn[1] = (drawn[1][0], drawn[1][1][:2])
    data.groups = groups
    batch = data.batch_of(drawn)
    assert batch.gold.shape == (groups, 4 // groups, 4)
    total, count, metrics = config.loss(ranker.ranker, jax.tree.map(jnp.asarray, batch))
    return {"loss": float(total / count)} | {name: float(value) for name, value in metrics.items()}


def test_a_batch_costs_the_same_in_any_number_of_groups(world):
    whole = loss_in_groups(world, 1)
    for groups in (2, 4):
        parts = loss_in_groups(world, groups)
        for name in whole.keys() - {"slots"}:
            assert parts[name] == pytest.approx(whole[name], rel=1e-5), name  # measured maximum 2.4e-7


def test_an_encoder_batch_costs_the_same_in_any_number_of_rows(world):
    config = encoder_config(world)
    encoder = load_encoder(world["encoder"])
    collection, vertical = load_data(config, needs=("train",))
    data = encoder_trainer.EncoderData(encoder, collection, vertical, {}, config)
    totals = []
    for pieces in (1, 8):
        data.pieces = pieces
        batch = jax.tree.map(jnp.asarray, data.batch(0))
        assert batch.tokens.shape[0] % pieces == 0
        totals.append(float(config.loss(encoder.encoder, batch)[0]))
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)  # measured 1e-7


def test_an_online_teacher_gives_each_candidate_its_own_label(world):
    config = ranker_config(world, "")
    ranker, judge = load_ranker(world["ranker"]), load_judge(world["judge"])
    collection, vertical = load_data(config, needs=("train",))
    data = ranker_trainer.RankerData(ranker, collection, vertical, {}, [], config)
    drawn = data.draw(0)
    drawn[1] = (drawn[1][0], drawn[1][1][:2])
    data.groups = 2
    teacher = OnlineTeacher(judge, collection, vertical, draw=lambda _: drawn, batch_of=data.batch_of)
    batch = jax.tree.map(jnp.asarray, teacher.batch(0))
    seen = {}

    class Spy:
        def __call__(self, model, batch):
            seen["teacher"], seen["where"] = batch.teacher, batch.teacher_where
            return config.loss(model, batch)

    TaughtLoss(Spy(), teacher.policy_tokens)(Taught(ranker.ranker, judge.judge), batch)
    pairs = [(query_id, key) for query_id, keys in drawn for key in keys]
    stored = labeller.label_pairs(judge, offline_scorer(judge), collection, vertical, pairs)
    where = np.asarray(seen["where"])
    assert where.sum() == len(pairs) == 14
    np.testing.assert_allclose(
        np.asarray(seen["teacher"])[where], [label.soft_label for label in stored], atol=2e-6
    )  # measured 5e-7: stored labels have six decimals


def test_labelled_queries_without_a_grade_are_learned_from(world, tmp_path):
    config = ranker_config(world, "")
    ranker = load_ranker(world["ranker"])
    collection, vertical = load_data(config, needs=("train",))
    query = next(query.id for query in collection.split("train"))
    ungraded = dataclasses.replace(
        collection, qrels={key: grades for key, grades in collection.qrels.items() if key != query}
    )
    label = labeller.Label(query, "wine1", (0, 0, 0, 0, 1.0), 4.0, 1.0, "judge", "prompt")
    data = ranker_trainer.RankerData(ranker, ungraded, vertical, {}, [label], config)
    assert query in data.queries
    batch = data.batch_of([(query, data.candidates(query, 0, np.random.default_rng(0)))] * 4)
    assert batch.teacher_where.sum() == 4
    assert not batch.gold_where.any()
