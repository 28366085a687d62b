"""Scores into probabilities: a monotone map fitted by isotonic regression, stored as plain numbers.

Fitting needs scikit-learn; applying needs NumPy only, so a server can apply what a trainer fitted. Losses are
in `losses`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from jaxsearch.errors import InputError


@dataclasses.dataclass(frozen=True)
class IsotonicMap:
    """Piecewise linear and non-decreasing from `x` (scores, strictly ascending) to `y`; constant outside.

    Raises:
      InputError: fewer than one point, different lengths, x not ascending, y not ascending, not finite.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        x, y = np.asarray(self.x, np.float64), np.asarray(self.y, np.float64)
        if x.ndim != 1 or x.shape != y.shape or not x.size:
            raise InputError("a calibration map needs as many x as y, at least one")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise InputError("a calibration map must be finite")
        if (np.diff(x) <= 0).any() or (np.diff(y) < 0).any():
            raise InputError("a calibration map must ascend: x strictly, y weakly")

    def __call__(self, scores: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """Calibrated values, float64, of the scores' shape.

        Example: half-way between two points.

        >>> float(IsotonicMap((0.0, 2.0), (0.25, 0.75))(np.array(1.0)))
        0.5
        """
        return np.asarray(np.interp(scores, self.x, self.y))


def fit_isotonic(
    scores: Sequence[float] | Float[np.ndarray, "n"],
    targets: Sequence[float] | Float[np.ndarray, "n"],
    *,
    where: Bool[np.ndarray, "n"] | None = None,
) -> IsotonicMap:
    """The non-decreasing map with the least squared error from scores to targets.

    Args:
      scores: uncalibrated scores, any range, finite.
      targets: what the calibrated score should mean, for example 1 for relevant and 0 for not, or a soft
        label.
      where: pairs that count.

    Raises:
      InputError: no pairs, different lengths, numbers that are not finite.

    Source: Zadrozny, Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates",
    KDD 2002.

    Example: the middle two are in the wrong order, so they are pooled at one half.

    >>> fit_isotonic([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 1.0])
    IsotonicMap(x=(1.0, 2.0, 3.0, 4.0), y=(0.0, 0.5, 0.5, 1.0))
    """
    from sklearn.isotonic import IsotonicRegression

    x, y = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"scores and targets must be equally long lists, got shapes {x.shape} and {y.shape}")
    if where is not None:
        x, y = x[where], y[where]
    if not x.size or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("calibration needs at least one pair, all finite")
    model = IsotonicRegression(out_of_bounds="clip").fit(x, y)
    return IsotonicMap(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


def calibration_error(
    probs: Float[np.ndarray, "n"], targets: Float[np.ndarray, "n"], *, num_bins: int = 10
) -> float:
    """Expected calibration error: |mean target - mean probability| over equally filled bins, weighted by
    their size.

    Example: the sure half is right, the other half says 0.2 where 0.5 is true.

    >>> probs, targets = np.array([0.2, 0.2, 1.0, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])
    >>> round(calibration_error(probs, targets, num_bins=2), 3)
    0.15
    """
    if not len(probs) or len(probs) != len(targets):
        raise InputError("calibration error needs equally many probabilities and targets, at least one")
    bins = np.array_split(np.argsort(probs, kind="stable"), min(num_bins, len(probs)))
    return float(
        sum(abs(targets[part].mean() - probs[part].mean()) * len(part) for part in bins) / len(probs)
    )
