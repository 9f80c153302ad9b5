"""Linear probe: multinomial logistic regression on frozen features, its regularisation chosen on a held-out split."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.distributed import Ranks

STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # sklearn's C, on features of unit variance
HELD_OUT = 0.2
_ITERATIONS = 500


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    ranks: Ranks | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Accuracy of the probe; with `ranks`, rank 0 fits it and all learn the result.

    Args:
        train, val: `[N, D]` features.
        train_labels, val_labels: `[N]` int64 class indices.
        ranks: the processes that call this together.
        device: not used, the solver runs on the CPU.

    Returns:
        accuracy and train_accuracy as fractions of 1, the chosen C, and whether the solver converged.
    """

    def fit() -> dict[str, Any]:
        return _probe(train.numpy(), train_labels.numpy(), val.numpy(), val_labels.numpy())

    return ranks.agree(fit) if ranks else fit()


def _probe(x: np.ndarray, y: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> dict[str, Any]:
    if len(np.unique(y)) == 1:
        return {"accuracy": float((val_labels == y[0]).mean()), "train_accuracy": 1.0, "C": None, "converged": True}
    held_out = np.random.default_rng(0).random(len(x)) < HELD_OUT
    scores = {c: _held_out_score(c, x, y, held_out) for c in STRENGTHS}
    chosen = max(STRENGTHS, key=lambda c: scores[c])  # the strongest regularisation of equals
    classifier, converged = _fit(chosen, x, y)
    return {
        "accuracy": float(classifier.score(val, val_labels)),
        "train_accuracy": float(classifier.score(x, y)),
        "C": chosen,
        "converged": converged,
    }


def _held_out_score(strength: float, x: np.ndarray, y: np.ndarray, held_out: np.ndarray) -> float:
    if not held_out.any() or len(np.unique(y[~held_out])) < 2:  # a handful of samples: nothing to choose by
        return 0.0
    classifier, _ = _fit(strength, x[~held_out], y[~held_out])
    return float(classifier.score(x[held_out], y[held_out]))


def _fit(strength: float, x: np.ndarray, y: np.ndarray) -> tuple[Any, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported as a result instead
        classifier.fit(x, y)
    return classifier, int(classifier[-1].n_iter_.max()) < _ITERATIONS
