"""The judge: read-out, targets, shared policy, and the folder round trip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxsearch.data.batches import pack_tokens
from jaxsearch.errors import InputError
from jaxsearch.judge import (
    Judge,
    JudgeBatch,
    JudgeLoss,
    expected_grade,
    grade_probs,
    grade_targets,
    load_judge,
    save_judge,
    soft_label,
)
from jaxsearch.nn.layers import last_hidden
from jaxsearch.nn.lora import LoRAParam, add_lora, merge_lora
from tests.small_models import LLAMA, make
from tests.tiny_bundle import write_parts
from tests.tiny_collection import tiny_judge

GRADE_IDS = (1, 4, 6, 9, 12)
POLICY = (7, 3, 11)
TOLERANCE = 1e-5  # of logits; measured maximum 3.5e-6 over 60 seeds


@given(st.lists(st.floats(-30, 30), min_size=5, max_size=5))
def test_probabilities_sum_to_one_and_the_label_stays_in_range(logits):
    probs = grade_probs(np.array([logits]))
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=5e-15)  # measured maximum 5.6e-16 over 5,000 cases
    assert 0.0 <= float(soft_label(probs)[0]) <= 1.0
    np.testing.assert_array_equal(expected_grade(probs), 4 * soft_label(probs))


def test_a_certain_judge_gives_its_grade():
    for grade in range(5):
        logits = np.full((1, 5), -50.0)
        logits[0, grade] = 50.0
        # measured maximum 3.7e-43: what the other grades weigh
        np.testing.assert_allclose(expected_grade(grade_probs(logits)), [grade], rtol=0, atol=1e-15)


def test_targets_keep_their_mass_and_their_peak():
    targets = grade_targets([0, 1, 2, 3, 4], smoothing=0.3)
    np.testing.assert_allclose(targets.sum(axis=1), 1.0, rtol=2e-7)  # measured 0
    assert targets.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(grade_targets([3], smoothing=0.0)[0], [0, 0, 0, 1, 0])


def random_batch():
    rng = np.random.default_rng(0)
    items = [[rng.integers(0, 48, size).tolist() for size in (5, 2, 5)]]
    packed = map(jnp.asarray, pack_tokens(items, rows=2, pad_id=0, lengths=(12,)))
    return JudgeBatch(*packed, jnp.asarray(grade_targets([0, 4, 2], smoothing=0.1))[None])


def grade(judge, batch):
    return judge(jnp.asarray(POLICY, jnp.int32), batch.tokens, batch.segment_ids, batch.ends)[0]


def test_a_pair_behind_the_shared_policy_is_graded_as_alone():
    decoder, batch = make(LLAMA), random_batch()
    together = grade(Judge(decoder, grade_ids=GRADE_IDS), batch)
    for row in range(3):
        pair = batch.tokens[batch.segment_ids == row + 1]
        tokens = jnp.concatenate([jnp.asarray(POLICY, jnp.int32), pair])[None]
        alone = decoder.logits(last_hidden(decoder(tokens), jnp.ones(tokens.shape, bool)))[
            0, jnp.asarray(GRADE_IDS)
        ]
        np.testing.assert_allclose(together[row], alone, atol=TOLERANCE)


def test_the_loss_is_the_cross_entropy_of_the_grades():
    judge, batch = Judge(make(LLAMA), grade_ids=GRADE_IDS), random_batch()
    total, count, metrics = JudgeLoss(POLICY)(judge, batch)
    logits = np.asarray(grade(judge, batch), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -(np.asarray(batch.targets[0]) * log_probs).sum()
    np.testing.assert_allclose(float(total), expected, rtol=1e-6)  # measured maximum 1.7e-7 over 60 seeds
    assert float(count) == 3.0
    assert float(metrics["tokens"]) == 12 + len(POLICY)


def test_the_adapter_gets_a_gradient_and_merges_away():
    judge, batch = Judge(make(LLAMA), grade_ids=GRADE_IDS), random_batch()
    before = grade(judge, batch)
    add_lora(judge.decoder, rank=2, alpha=4.0, targets="q_proj|down_proj", rngs=nnx.Rngs(0))
    graph, adapter, rest = nnx.split(judge, LoRAParam, ...)
    gradient = jax.jit(jax.grad(lambda state: JudgeLoss(POLICY)(nnx.merge(graph, state, rest), batch)[0]))(
        adapter
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 0
    random = np.random.default_rng(0)
    nnx.update(
        judge, jax.tree.map(lambda a: jnp.asarray(0.3 * random.normal(size=a.shape), a.dtype), adapter)
    )
    adapted = grade(judge, batch)
    assert float(jnp.abs(adapted - before).max()) > 0.1  # measured minimum 0.82 over 60 seeds
    merge_lora(judge.decoder)
    np.testing.assert_allclose(grade(judge, batch), adapted, atol=TOLERANCE)


def test_a_saved_judge_carries_policy_and_prompt(tmp_path):
    judge = tiny_judge(write_parts(tmp_path))
    save_judge(tmp_path / "judge", judge, trained={})
    again = load_judge(tmp_path / "judge")
    assert again.policy == judge.policy
    assert again.pairs([("bake", "Baker"), ("dig", "Miner")]) == judge.pairs(
        [("bake", "Baker"), ("dig", "Miner")]
    )
    assert again.request("bake", ["Baker"]) == again.pairs([("bake", "Baker")])
    assert len(again.label_ids) == 5


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="ranker"):
        load_judge(write_parts(tmp_path)["ranker"])
