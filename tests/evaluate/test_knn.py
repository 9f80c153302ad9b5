"""Weighted k-NN against hand-computed votes, sklearn and the known yardsticks of the photographs."""

import io
import math
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluate import knn
from pipeline.evaluate.evaluation import Evaluation
from pipeline.evaluate.knn import knn_accuracy, knn_votes
from pipeline.evaluate.targets import PIXELS, pixels_target


def clusters(samples: int, seed: int, classes: int = 7, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters: about half of the samples are classified rightly."""
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    return centers[labels] + 2 * torch.randn(samples, dim, generator=generator), labels


def sklearn_classifier(neighbours: int = 20) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda d: torch.tensor((1 - d) / 0.07).exp().numpy()
    )


def test_votes_of_four_neighbours_by_hand():
    angles = torch.tensor([0.1, -0.2, 0.3, 3.0])
    train = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5.0], [0.1], [9.0]])
    labels = torch.tensor([4, 9, 9, 2])
    one = math.exp(math.cos(0.1) / 0.07)
    two = math.exp(math.cos(0.2) / 0.07) + math.exp(math.cos(0.3) / 0.07)
    assert one < two  # two neighbours a little farther off outvote the nearest
    assert knn_votes(train, labels, torch.tensor([[3.0, 0.0]]), neighbours=4).tolist() == [[9, 4, 2]]
    assert knn_votes(train, labels, torch.tensor([[3.0, 0.0]]), neighbours=1).tolist() == [[4, -1, -1]]
    assert knn_votes(train, labels, torch.tensor([[3.0, 0.0]]), neighbours=4, temperature=0.03).tolist() == [[4, 9, 2]]


def test_predictions_equal_those_of_sklearn():
    (x, y), (queries, truth) = clusters(900, 1), clusters(300, 2)
    expected = sklearn_classifier().fit(x.double(), y).predict(queries.double())
    found = knn_votes(x, y, queries)[:, 0]
    assert (found.numpy() == expected).all()
    score = knn_accuracy(x, y, queries, truth)
    assert score["accuracy"] == pytest.approx((expected == truth.numpy()).mean(), abs=1e-12)
    assert 0.3 < score["accuracy"] < 0.9
    assert score["accuracy"] < score["top5"] < 1
    assert (score["neighbours"], score["temperature"]) == (20, 0.07)


def test_scale_of_features_and_chunks_of_queries_change_nothing(monkeypatch):
    (x, y), (queries, _) = clusters(200, 1), clusters(50, 2)
    expected = knn_votes(x, y, queries)
    assert torch.equal(knn_votes(x * 8, y, queries / 4), expected)
    monkeypatch.setattr(knn, "_SIMILARITIES", 3 * len(x))
    assert torch.equal(knn_votes(x, y, queries), expected)


def test_few_samples_and_unknown_classes_are_counted_as_they_are():
    x = torch.eye(3)
    score = knn_accuracy(x, torch.tensor([5, -2, 7]), x[:2], torch.tensor([5, 6]))
    assert score == {"accuracy": 0.5, "top5": 0.5, "neighbours": 3, "temperature": 0.07}


def pixels(shards: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Squeezed to 32 x 32, with labels, by tarfile and Pillow alone."""
    rows, labels = [], []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".cls"):
                    labels.append(int(data))
                else:
                    image = Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
                    rows.append(np.asarray(image, np.float64).transpose(2, 0, 1).ravel() / 255)
    return np.array(rows), np.array(labels)


def test_raw_pixels_reach_the_known_yardstick(photos):
    train, val = (sorted(map(str, photos.glob(f"{split}-*.tar"))) for split in ("train", "val"))
    result = Evaluation("knn", train, val).run(pixels_target())[PIXELS]
    (x, y), (queries, truth) = pixels(train), pixels(val)
    expected = sklearn_classifier().fit(x - x.mean(0), y).predict(queries - x.mean(0)) == truth
    assert (result["train_images"], result["val_images"]) == (len(y), len(truth))
    assert result["accuracy"] == pytest.approx(expected.mean(), abs=1 / len(truth))  # fp32 may turn one tie
    chance = np.bincount(truth).max() / len(truth)
    assert chance + 0.2 < result["accuracy"] < 0.98
    if photos.name == "clothing":  # measured elsewhere, see the README beside it
        assert (len(y), len(truth)) == (3068, 713)
        assert result["accuracy"] == pytest.approx(0.447, abs=0.0015)
