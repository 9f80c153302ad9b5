"""The linear probe against what is known of its data, and against sklearn without our scaling and search."""

import numpy as np
import pytest
import torch

from pipeline.evaluate.linear import STRENGTHS, edge, linear_accuracy, warn_of_edge


@pytest.fixture(scope="module")
def digits_pixels() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def test_probe_of_digits_agrees_with_plain_sklearn(digits_pixels):
    from sklearn.linear_model import LogisticRegression

    x, y = digits_pixels
    score = linear_accuracy(x[:1200], y[:1200], x[1200:], y[1200:])
    spread = x[:1200].std(0, correction=0)
    scaled = ((x - x[:1200].mean(0)) / torch.where(spread > 0, spread, 1)).double().numpy()
    plain = LogisticRegression(C=score["C"], max_iter=2000).fit(scaled[:1200], y[:1200])
    assert score["accuracy"] == pytest.approx(plain.score(scaled[1200:], y[1200:]), abs=0.005)
    assert score["accuracy"] > 0.85
    assert score["converged"]


def test_regularisation_is_chosen_on_samples_that_were_not_fitted():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (800,), generator=generator)
    x = torch.randn(800, 100, generator=generator)
    x[:, 0] += 1.5 * labels  # one direction tells the classes apart, 99 are noise
    score = linear_accuracy(x[:400], labels[:400], x[400:], labels[400:])
    assert score["C"] < max(STRENGTHS)  # the weakest regularisation fits the training samples best
    assert 0.6 < score["accuracy"] < score["train_accuracy"]


def test_labels_that_have_nothing_to_do_with_features_stay_at_chance():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2000, 8, generator=generator), torch.randint(4, (2000,), generator=generator)
    assert linear_accuracy(x[:1000], y[:1000], x[1000:], y[1000:])["accuracy"] == pytest.approx(0.25, abs=0.05)


def test_a_single_class_needs_no_fit():
    x = torch.randn(6, 3)
    score = linear_accuracy(x[:4], torch.full((4,), 2), x[4:], torch.tensor([2, 1]))
    assert (score["accuracy"], score["C"]) == (0.5, None)


def test_the_result_is_the_same_every_time(digits_pixels):
    x, y = digits_pixels
    scores = [linear_accuracy(x[:300], y[:300], x[300:600], y[300:600]) for _ in range(2)]
    assert scores[0] == scores[1]
    assert np.isfinite(scores[0]["accuracy"])


def test_a_best_value_at_the_edge_of_its_grid_is_named(capsys):
    assert edge([0.1, 0.3, 0.2]) is None
    assert edge([0.1, 0.2, 0.3]) == "largest"
    assert edge([0.3, 0.2, 0.1]) == "smallest"
    assert edge([0.3, 0.3, 0.1]) is edge([0.1, 0.3, 0.3]) is edge([0.3]) is None  # the neighbour is as good
    warn_of_edge("32x2", "C", 0.1, None)
    warn_of_edge("32x2", "C", 1.0, "largest")
    assert capsys.readouterr().err == "warning: 32x2: the best C is the largest there is, 1\n"
