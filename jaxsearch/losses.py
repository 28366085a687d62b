"""Every training loss, as pure functions of arrays: what one example costs, not how examples are averaged.

Each function returns unreduced float32 values in nats (`relative_error`: no unit), takes `where=` (True = counts),
and gives a masked entry the value 0 and a finite zero gradient whatever the masked inputs hold. The trainer divides by
the number of entries that count. Models, batches and sampling are elsewhere; ranking metrics are in `metrics`.
`token_counts` is no loss: it says how full a batch is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

_FAR_BELOW = -1e30  # stands for minus infinity where a true infinity would give NaN gradients


def _keep(where: Bool[Array, "*b"] | None, values: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return values if where is None else jnp.where(where, values, 0.0)


def _fill(values: Real[Array, "*b"], where: Bool[Array, "*b"] | None, fill: float) -> Float[Array, "*b"]:
    """float32 values with the masked ones replaced, so that neither they nor their gradients can be NaN."""
    values = values.astype(jnp.float32)
    return values if where is None else jnp.where(where, values, fill)


def _fill_rows(
    values: Real[Array, "*b c"], where: Bool[Array, "*b"] | None, fill: float = 0.0
) -> Float[Array, "*b c"]:
    rows = None if where is None else jnp.broadcast_to(where[..., None], values.shape)
    return _fill(values, rows, fill)


def soft_cross_entropy(
    logits: Float[Array, "*b c"],
    target_probs: Float[Array, "*b c"],
    *,
    where: Bool[Array, "*b"] | None = None,
) -> Float[Array, "*b"]:
    """Cross-entropy of a target distribution over the last axis, in nats.

    Args:
      logits: unnormalised scores of the classes; finite, any range.
      target_probs: non-negative, summing to one over the last axis (a one-hot row gives the usual
        cross-entropy).
      where: rows that count; the others are 0.

    Returns:
      One value per row, at least the entropy of the row's target.

    Accuracy: within 1e-6 * (1 + value) of float64 for |logits| <= 100
    (`test_losses.py::test_matches_float64`).

    Example: two equal logits give log 2, whatever the target.

    >>> import jax.numpy as jnp
    >>> print(f"{soft_cross_entropy(jnp.array([3.0, 3.0]), jnp.array([0.2, 0.8])):.4f}")
    0.6931
    """
    log_probs = jax.nn.log_softmax(_fill_rows(logits, where))
    return _keep(where, -jnp.sum(_fill_rows(target_probs, where) * log_probs, axis=-1))


def distillation_kl(
    student_logits: Float[Array, "*b c"],
    teacher_logits: Float[Array, "*b c"],
    *,
    temperature: float = 1.0,
    where: Bool[Array, "*b"] | None = None,
) -> Float[Array, "*b"]:
    """KL divergence from teacher to student, KL(teacher || student), over the last axis, in nats.

    Args:
      student_logits, teacher_logits: unnormalised scores of the same classes; finite. The teacher gets no
        gradient.
      temperature: both sides are divided by it; > 0. The result is not multiplied by its square.
      where: rows that count; the others are 0.

    Returns:
      One value >= 0 per row (down to rounding, -1e-6), 0 when the two distributions are equal.

    Accuracy: within 1e-6 * (1 + value) of float64 for |logits| <= 100
    (`test_losses.py::test_matches_float64`).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Example: teacher (1/2, 1/2), student (1/4, 3/4): (log 2 + log 2/3) / 2.

    >>> import jax.numpy as jnp
    >>> print(f"{distillation_kl(jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2)):.4f}")
    0.1438
    """
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(_fill_rows(teacher_logits, where)) / temperature)
    student = jax.nn.log_softmax(_fill_rows(student_logits, where) / temperature)
    return _keep(where, jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1))


def binary_distillation(
    logits: Float[Array, "*b"], soft_labels: Float[Array, "*b"], *, where: Bool[Array, "*b"] | None = None
) -> Float[Array, "*b"]:
    """Cross-entropy between a probability and sigmoid(logit), in nats: a yes/no ranker and its label.

    Args:
      logits: log-odds of "yes" (logit_yes - logit_no); finite.
      soft_labels: the target probability of "yes", in [0, 1]; 0 and 1 are hard labels.
      where: entries that count; the others are 0.

    Returns:
      One value per entry, at least the binary entropy of its label.

    Source: "Semantic Search At LinkedIn", arXiv 2602.07309: ordinal labels turned into soft binary ones.

    Example: logit log 3 is probability 3/4; label 1 costs log 4/3, label 0 costs log 4.

    >>> import jax.numpy as jnp
    >>> losses = binary_distillation(jnp.log(jnp.array([3.0, 3.0])), jnp.array([1.0, 0.0]))
    >>> print(f"{losses[0]:.4f} {losses[1]:.4f}")
    0.2877 1.3863
    """
    logits, soft_labels = _fill(logits, where, 0.0), _fill(soft_labels, where, 0.0)
    return _keep(where, jax.nn.softplus(logits) - soft_labels * logits)


def relative_error(
    hidden: Float[Array, "*b d"], targets: Float[Array, "*b d"], *, where: Bool[Array, "*b"] | None = None
) -> Float[Array, "*b"]:
    """Squared distance of hidden states from a teacher's, over the squared length of the teacher's; no unit.

    Args:
      hidden, targets: states of one width; finite, no target all zeros. The targets get no gradient.
      where: states that count; the others are 0.

    Returns:
      One value >= 0 per state: 0 when both are equal, 1 for a state of zeros.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, eq. 3, without its half and its map between
    widths, over the squared length of the target.

    Example: (3, 4) against (3, 0): 16 / 9.

    >>> import jax.numpy as jnp
    >>> print(f"{relative_error(jnp.array([3.0, 4.0]), jnp.array([3.0, 0.0])):.4f}")
    1.7778
    """
    targets = jax.lax.stop_gradient(_fill_rows(targets, where, 1.0))
    error = jnp.sum(jnp.square(_fill_rows(hidden, where) - targets), axis=-1)
    return _keep(where, error / jnp.sum(jnp.square(targets), axis=-1))


def info_nce(
    query_embeds: Float[Array, "q e"],
    document_embeds: Float[Array, "n e"],
    positive_index: Int[Array, "q"],
    *,
    temperature: float,
    where: Bool[Array, "q n"] | None = None,
) -> Float[Array, "q"]:
    """Contrastive loss of each query against all documents of the batch, one of which is its positive.

    Args:
      query_embeds, document_embeds: usually of unit length, so that products are cosines.
      positive_index: row of `document_embeds` that is the query's positive, in [0, n).
      temperature: divides the products; > 0.
      where: documents a query is compared with; mask those that are duplicates of its positive or relevant to
        it. A query whose own positive is masked counts 0.

    Returns:
      One value >= 0 per query, in nats; 0 when nothing but the positive remains.

    Source: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018, eq.
    4.

    Example: products 1 and 0 at temperature 1: log(1 + 1/e).

    >>> import jax.numpy as jnp
    >>> documents = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(f"{info_nce(documents[:1], documents, jnp.array([0]), temperature=1.0)[0]:.4f}")
    0.3133
    """
    logits = jnp.einsum(
        "qe,ne->qn",
        query_embeds.astype(jnp.float32),
        document_embeds.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    logits = logits / temperature
    positive_index = positive_index[:, None]
    is_counted = None
    if where is not None:
        is_counted = jnp.take_along_axis(where, positive_index, axis=1)[:, 0]
        logits = jnp.where(where, logits, _FAR_BELOW)
        logits = jnp.where(is_counted[:, None], logits, 0.0)
    positive = jnp.take_along_axis(logits, positive_index, axis=1)[:, 0]
    return _keep(is_counted, jax.nn.logsumexp(logits, axis=1) - positive)


def margin_loss(
    positive_scores: Float[Array, "*b"],
    negative_scores: Float[Array, "*b"],
    *,
    margin: float,
    where: Bool[Array, "*b"] | None = None,
) -> Float[Array, "*b"]:
    """max(0, margin - positive + negative) for curated pairs of documents of one query.

    Args:
      positive_scores, negative_scores: similarities of the better and of the worse document, same unit as
        `margin`.
      margin: by how much the better one should lead; >= 0.
      where: pairs that count; the others are 0.

    Returns:
      One value >= 0 per pair, in the unit of the scores.

    Example: a lead of 0.25 where 0.5 is asked for costs 0.25; a lead of 0.75 costs nothing.

    >>> import jax.numpy as jnp
    >>> print(margin_loss(jnp.array([0.5, 1.0]), jnp.array([0.25, 0.25]), margin=0.5))
    [0.25 0.  ]
    """
    gap = _fill(positive_scores, where, 0.0) - _fill(negative_scores, where, 0.0)
    return _keep(where, jax.nn.relu(margin - gap))


def listwise_softmax(
    logits: Float[Array, "*b c"], gains: Real[Array, "*b c"], *, where: Bool[Array, "*b c"] | None = None
) -> Float[Array, "*b"]:
    """Cross-entropy between a list's gains, normalised to sum one, and the softmax of its scores, in nats.

    Args:
      logits: scores of the candidates of one query; finite.
      gains: >= 0, larger is more relevant; grades or soft labels.
      where: candidates that exist. A list without a candidate of positive gain says nothing and counts 0.

    Returns:
      One value per list, at least the entropy of the normalised gains.

    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", 2007, section 4
    (top-one probabilities); gains normalised instead of exponentiated as in Bruch et al., "An Analysis of the
    Softmax Cross Entropy Loss for Learning-to-Rank with Binary Relevance", 2019.

    Example: softmax (3/4, 1/4), gains 3 and 1, so 3/4 log 4/3 + 1/4 log 4; the third candidate is padding.

    >>> import jax.numpy as jnp
    >>> logits, gains = jnp.log(jnp.array([3.0, 1.0, 9.0])), jnp.array([3.0, 1.0, 4.0])
    >>> print(f"{listwise_softmax(logits, gains, where=jnp.array([True, True, False])):.4f}")
    0.5623
    """
    gains = _fill(gains, where, 0.0)
    total = jnp.sum(gains, axis=-1)
    has_gain = total > 0
    targets = gains / jnp.where(has_gain, total, 1.0)[..., None]
    log_probs = jax.nn.log_softmax(_fill(logits, where, _FAR_BELOW))
    return _keep(has_gain, -jnp.sum(targets * jnp.where(targets > 0, log_probs, 0.0), axis=-1))


def pairwise_logistic(
    logits: Float[Array, "*b c"], gains: Real[Array, "*b c"], *, where: Bool[Array, "*b c"] | None = None
) -> Float[Array, "*b"]:
    """Mean of log(1 + exp(score_j - score_i)) over a list's pairs with gain_i > gain_j, in nats.

    Args:
      logits: scores of the candidates of one query; finite.
      gains: any order-preserving labels; only their order matters.
      where: candidates that exist. A list without an ordered pair counts 0.

    Returns:
      One value >= 0 per list.

    Source: Burges et al., "Learning to Rank using Gradient Descent", 2005, eq. 3 with hard target
    probabilities.

    Example: one ordered pair, scores log 3 apart the right way round: log(1 + 1/3).

    >>> import jax.numpy as jnp
    >>> print(f"{pairwise_logistic(jnp.log(jnp.array([3.0, 1.0])), jnp.array([4, 0])):.4f}")
    0.2877
    """
    logits, gains = _fill(logits, where, 0.0), _fill(gains, where, 0.0)
    is_pair = gains[..., :, None] > gains[..., None, :]
    if where is not None:
        is_pair = is_pair & where[..., :, None] & where[..., None, :]
    losses = jax.nn.softplus(logits[..., None, :] - logits[..., :, None])
    count = jnp.sum(is_pair, axis=(-2, -1)).astype(jnp.float32)
    return jnp.sum(jnp.where(is_pair, losses, 0.0), axis=(-2, -1)) / jnp.maximum(count, 1.0)


def token_counts(*where: Bool[Array, "..."]) -> dict[str, Float[Array, ""]]:
    """The metrics "tokens" and "slots" of a loss: real tokens, and places for tokens, in all the arrays together.

    Example: half of four places hold a token.

    >>> import jax.numpy as jnp
    >>> counts = token_counts(jnp.array([[True, False], [True, False]]))
    >>> print(float(counts["tokens"]), float(counts["slots"]))
    2.0 4.0
    """
    tokens = sum(jnp.sum(kept, dtype=jnp.float32) for kept in where)
    return {
        "tokens": jnp.asarray(tokens),
        "slots": jnp.asarray(sum(kept.size for kept in where), jnp.float32),
    }
