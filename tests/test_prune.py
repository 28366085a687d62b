"""Pruning a ranker and healing it, on a made-up collection and tiny models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsearch.errors import InputError
from jaxsearch.nn.pruning import Search
from jaxsearch.nn.transformer import Decoder
from jaxsearch.ranker import RankerOutput, load_ranker, new_ranker
from jaxsearch.scoring.prefill import ScoreRequest
from tests.tiny_bundle import write_parts
from tests.tiny_collection import tiny_judge, write_collection
from train import prune, sweep
from train import ranker as ranker_trainer
from train.inputs import load_data, offline_scorer
from train.loop import LoopConfig
from train.step import OptimizerConfig
from train.teachers import DistilledLoss, Taught


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    parts = write_parts(root)
    return {"collection": str(write_collection(root / "data"))} | {k: str(path) for k, path in parts.items()}


def prune_config(world, **changes):
    config = prune.PruneConfig(
        ranker=world["ranker"],
        collection=world["collection"],
        vertical=world["vertical"],
        retriever=world["encoder"],
        drop_layers=1,
        mlp_dim=10,
        num_heads=1,
        search=Search(chunk=3, num_swaps=2),
        calibration_queries=4,
        per_query=4,
        layer_queries=2,
        check_queries=3,
        check_depth=4,
    )
    return dataclasses.replace(config, **changes)


def heal_config(world, base, **changes):
    config = ranker_trainer.RankerConfig(
        base=str(base),
        layers=(),
        labels="",
        teacher=world["ranker"],
        collection=world["collection"],
        vertical=world["vertical"],
        retriever=world["encoder"],
        batch_queries=4,
        candidates_per_query=4,
        max_shared_tokens=80,
        max_item_tokens=64,
        check_queries=3,
        check_depth=4,
        loss=dataclasses.replace(ranker_trainer.RankerLoss(), gold_weight=0.0, teacher_weight=1.0),
        loop=LoopConfig(num_steps=40, log_every=1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    return dataclasses.replace(config, **changes)


def divergence(world, folder):
    """Mean distance of the answers from the whole ranker's, over all documents of three queries."""
    collection, vertical = load_data(prune_config(world))
    whole, smaller = load_ranker(world["ranker"]), load_ranker(folder)
    texts = [vertical.document_text(document, whole.view) for document in collection.documents.values()]
    scores = []
    for ranker in (whole, smaller):
        prompts = [ranker.request(query.text, texts) for query in collection.split("train")[:3]]
        scored = offline_scorer(ranker).score(
            [ScoreRequest(prompt.prefix, prompt.items) for prompt in prompts]
        )
        scores.append(np.concatenate([ranker.scores(logits) for logits in scored]))
    return float(np.abs(scores[0] - scores[1]).mean())


def test_a_pruned_ranker_is_smaller_says_what_went_and_can_be_healed(world, tmp_path):
    prune.main(prune_config(world), tmp_path / "prune")
    folder = tmp_path / "prune" / "model"
    whole, pruned = load_ranker(world["ranker"]), load_ranker(folder)
    smaller = dataclasses.replace(whole.decoder.config, num_layers=1, mlp_dim=10, num_heads=1)
    assert pruned.decoder.config == smaller
    assert pruned.prompt.card() == whole.prompt.card()
    report = json.loads((tmp_path / "prune" / "report.json").read_text())
    assert len(report["kept_layers"]) == 1
    assert {*report["kept_layers"], report["dropped"][0]["layer"]} == {0, 1}
    assert report["dropped"][0]["damage"] > 0
    assert all(0 < lost < 1 for part in report["lost_energy"].values() for lost in part)
    assert report["weights"]["after"]["layers"] < report["weights"]["before"]["layers"] / 2
    card = json.loads((folder / "jaxsearch.json").read_text())
    assert card["trained"]["pruned_from"] == whole.version
    assert card["trained"]["validation"] == report["validation"]["after"]

    ranker_trainer.main(heal_config(world, folder), tmp_path / "heal")
    healed = load_ranker(tmp_path / "heal" / "model")
    assert healed.decoder.config == smaller
    assert divergence(world, tmp_path / "heal" / "model") < 0.5 * divergence(world, folder)
    lines = (tmp_path / "heal" / "metrics.jsonl").read_text().splitlines()
    shares = [record["labelled_share"] for record in map(json.loads, lines) if "labelled_share" in record]
    assert shares
    assert set(shares) == {1.0}


def test_the_layer_that_goes_is_the_one_that_the_answers_need_least(world):
    config = prune_config(world)
    ranker = load_ranker(world["ranker"])
    for kernel in (ranker.decoder.layers.self_attn.o_proj.kernel, ranker.decoder.layers.mlp.down_proj.kernel):
        kernel[...] = kernel[...].at[0].set(0.0)
    collection, vertical = load_data(config)
    retriever = prune.load_retriever(config.retriever)
    stage = prune.open_first_stage(collection, vertical, retriever, view=ranker.view)
    prompts = prune.calibration_prompts(config, ranker, collection, vertical, stage)
    kept, dropped = prune.find_layers(config, ranker, prompts)
    assert kept == [1]
    assert dropped[0].damage == pytest.approx(0.0, abs=1e-6)


def test_calibration_counts_every_computed_token_once(world):
    config, ranker = prune_config(world), load_ranker(world["ranker"])
    collection, vertical = load_data(config)
    retriever = prune.load_retriever(config.retriever)
    stage = prune.open_first_stage(collection, vertical, retriever, view=ranker.view)
    prompts = prune.calibration_prompts(config, ranker, collection, vertical, stage)
    assert [len(prompt.items) for prompt in prompts] == [4] * 4
    batches = list(prune.packed_batches(prompts, pad_id=0, longest=144, pieces=2))
    expected = sum(len(prompt.prefix) + sum(map(len, prompt.items)) for prompt in prompts)
    assert sum(int(batch.where.sum()) for batch in batches) == expected
    counted = sorted(token for batch in batches for token in batch.tokens[batch.where].tolist())
    assert counted == sorted(t for prompt in prompts for part in (prompt.prefix, *prompt.items) for t in part)
    assert all(len(batch.tokens) % 2 == 0 for batch in batches)


def test_a_ranker_teaches_what_it_would_answer(world):
    """The loss with a ranker in the step is that with its stored answers, and least where they are the student's."""
    config = heal_config(world, world["ranker"])
    teacher, student = load_ranker(world["ranker"]), load_ranker(world["ranker"])
    student.decoder.norm.weight[...] = student.decoder.norm.weight[...] * 1.5
    collection, vertical = load_data(config)
    data = ranker_trainer.RankerData(student, collection, vertical, {}, [], config)
    model, loss, make_batch = ranker_trainer.set_up_learning(student, teacher, data, config.loss)
    assert isinstance(model, Taught)
    assert isinstance(loss, DistilledLoss)
    batch = make_batch(0)
    stored = np.zeros_like(batch.teacher).reshape(-1, batch.teacher.shape[-1])
    stored_logits = np.zeros_like(stored)
    for row, (query_id, keys) in enumerate(data.draw(0)):
        texts = [vertical.document_text(collection.documents[key], teacher.view) for key in keys]
        prompt = teacher.request(collection.queries[query_id].text, texts)
        (logits,) = offline_scorer(teacher).score([ScoreRequest(prompt.prefix, prompt.items)])
        stored_logits[row, : len(keys)] = teacher.scores(logits)
        stored[row, : len(keys)] = 1 / (1 + np.exp(-teacher.scores(logits)))
    labelled = dataclasses.replace(batch, teacher=stored.reshape(batch.teacher.shape))
    answers = jnp.asarray(stored_logits.reshape(batch.teacher.shape))
    batch, labelled = jax.tree.map(jnp.asarray, (batch, labelled))
    unseen = jnp.full((*batch.item_tokens.shape, 1), jnp.nan)  # without hidden_weight nothing reads them
    expected = config.loss(student.ranker, labelled, RankerOutput(unseen, answers))[0]
    assert float(loss(model, batch)[0]) == pytest.approx(float(expected), rel=1e-5)

    def slope(student_logits):
        return jax.grad(lambda logits: config.loss.of_logits(logits, labelled, answers)[0])(student_logits)

    assert jnp.abs(slope(answers)).max() < 1e-6  # measured 3.7e-8
    assert jnp.abs(slope(1.5 * answers)).max() > 1e-4


def test_a_teachers_hidden_states_heal_a_cut_whose_answers_are_not_compared(world, tmp_path):
    prune.main(prune_config(world), tmp_path / "prune")
    folder = tmp_path / "prune" / "model"
    loss = ranker_trainer.RankerLoss(teacher_weight=0.0, gold_weight=0.0, list_weight=0.0, hidden_weight=1.0)
    ranker_trainer.main(heal_config(world, folder, loss=loss), tmp_path / "heal")
    lines = (tmp_path / "heal" / "metrics.jsonl").read_text().splitlines()
    errors = [record["hidden_error"] for record in map(json.loads, lines) if "hidden_error" in record]
    assert errors[-1] < 0.5 * errors[0]
    assert divergence(world, tmp_path / "heal" / "model") < 0.8 * divergence(world, folder)


def test_what_makes_no_sense_is_refused(world, tmp_path):
    with pytest.raises(InputError, match="nothing is to be cut"):
        prune.main(prune_config(world, drop_layers=0, mlp_dim=0, num_heads=0), tmp_path / "none")
    with pytest.raises(InputError, match=r"num_heads=1 and num_kv_heads=1: .* set the other to 0"):
        prune.main(prune_config(world, num_kv_heads=1), tmp_path)
    with pytest.raises(InputError, match="mlp_dim 25 is not from 1 to the decoder's 24"):
        prune.main(prune_config(world, mlp_dim=25), tmp_path / "wide")
    with pytest.raises(InputError, match="raise calibration_queries or per_query"):
        prune.main(prune_config(world, calibration_queries=1, per_query=1, drop_layers=1), tmp_path / "few")
    with pytest.raises(InputError, match="chunk 0 must be at least 1"):
        Search(chunk=0)
    with pytest.raises(InputError, match="at least one must stay"):
        prune.main(prune_config(world, drop_layers=2), tmp_path / "empty")
    with pytest.raises(InputError, match="set max_shared_tokens, max_item_tokens and view"):
        ranker_trainer.main(heal_config(world, world["ranker"], max_item_tokens=60), tmp_path / "heal")


def test_hidden_states_need_a_ranker_of_the_same_width(world, tmp_path):
    states = ranker_trainer.RankerLoss(gold_weight=0.0, hidden_weight=1.0)
    with pytest.raises(InputError, match="hidden_weight needs another ranker as teacher"):
        ranker_trainer.main(heal_config(world, world["ranker"], teacher="", loss=states), tmp_path / "states")
    ranker = load_ranker(world["ranker"])
    with pytest.raises(InputError, match="hidden_weight needs another ranker as teacher"):
        ranker_trainer.check_teacher(ranker, tiny_judge(world), states)
    wider = dataclasses.replace(ranker.decoder.config, embed_dim=24)
    teacher = new_ranker(Decoder(wider, rngs=nnx.Rngs(0)), ranker.prompt, view=ranker.view)
    with pytest.raises(InputError, match="hidden states of 16 and 24 channels cannot be compared"):
        ranker_trainer.check_teacher(ranker, teacher, states)
    ranker_trainer.check_teacher(ranker, teacher, dataclasses.replace(states, hidden_weight=0.0))


def test_a_sweep_measures_every_point_beside_the_whole_and_goes_on(world, tmp_path, capsys):
    points = (
        sweep.Point("neurons", mlp_dim=10, method="magnitude"),
        sweep.Point("layer, healed by states", drop_layers=1, heal_steps=2, hidden_weight=2.0),
    )
    cut = prune_config(world, drop_layers=0, mlp_dim=0, num_heads=0)
    heal = heal_config(world, "", loop=LoopConfig(num_steps=9))
    config = sweep.SweepConfig(
        points, prune=cut, heal=heal, num_queries=3, depth=4, timed_queries=2, repeats=2
    )
    sweep.main(config, tmp_path)
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert list(rows) == ["whole", *(point.name for point in points)]
    assert [row["layers"] for row in rows.values()] == [2, 2, 1]
    assert [row["mlp_dim"] for row in rows.values()] == [24, 10, 24]
    assert [row["heal_steps"] for row in rows.values()] == [0, 0, 2]
    assert [row["hidden_weight"] for row in rows.values()] == [0, 0, 2]
    (shown,) = (tmp_path / "points" / "osscar-1-0-0-0").glob("healed-2-2.0/metrics.jsonl")
    assert "hidden_error" in json.loads(shown.read_text().splitlines()[0])
    assert rows["whole"]["difference"] == [0.0] * 3
    assert rows["whole"]["weights"] == rows["whole"]["speed"]["median"] == 1.0
    assert rows["neurons"]["weights"] < 0.8
    for row in rows.values():
        mean, low, high = row["ndcg@10"]
        assert 0 <= low <= mean <= high <= 1
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "| neurons | – | 2 | 10 | 2 |" in (tmp_path / "report.md").read_text()
    assert "| layer, healed by states | 2, hidden 2 |" in (tmp_path / "report.md").read_text()
    assert "neurons: cutting" in capsys.readouterr().out
    sweep.main(config, tmp_path)
    assert "cutting" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"prune\.mlp_dim: to be set in the points"):
        sweep.main(dataclasses.replace(config, prune=dataclasses.replace(cut, mlp_dim=10)), tmp_path)
    with pytest.raises(InputError, match="each needs a name of its own"):
        sweep.main(dataclasses.replace(config, points=(points[0], points[0])), tmp_path)
    unhealed = dataclasses.replace(points[0], hidden_weight=1.0)
    with pytest.raises(InputError, match="hidden_weight without heal_steps in neurons"):
        sweep.main(dataclasses.replace(config, points=(unhealed,)), tmp_path)
    shown = dataclasses.replace(heal, loss=dataclasses.replace(heal.loss, hidden_weight=1.0))
    with pytest.raises(InputError, match=r"heal\.loss\.hidden_weight: to be set in the points"):
        sweep.main(dataclasses.replace(config, heal=shown), tmp_path)
