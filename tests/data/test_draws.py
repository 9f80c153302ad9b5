"""Parameters of crops against their distributions."""

from typing import Any

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.draws import P, parameters
from pipeline.data.images import Header, inspect

LIMIT = 178956970


def data_config(**keys: Any) -> DataConfig:
    keys = {"global_crops": {"size": 128}, "local_crops": {"count": 0}, "threads": 1} | keys
    return DataConfig.model_validate(keys)


def test_parameters_of_a_sample_depend_on_its_position_alone(pictures: list[bytes]) -> None:
    data, all_headers = data_config(local_crops={"count": 3}), [inspect(file, LIMIT) for file in pictures]
    together = parameters(data, 100, all_headers)
    apart = np.concatenate([parameters(data, 100 + i, [header]) for i, header in enumerate(all_headers)])
    assert np.array_equal(together, apart)
    assert not np.array_equal(parameters(data, 101, all_headers), together)
    assert not np.array_equal(parameters(data.model_copy(update={"seed": 1}), 100, all_headers), together)


def test_parameters_have_the_recipes_distributions() -> None:
    count = 4000
    data = data_config(local_crops={"count": 2, "scale": [0.05, 0.32]}, blur=[0.0, 0.9, 0.5])
    drawn = parameters(data, 0, [Header("jpeg", 480, 640, 1, True, ())] * count)
    height, width = drawn[..., P.BOTTOM] - drawn[..., P.TOP], drawn[..., P.RIGHT] - drawn[..., P.LEFT]
    area, ratio = height * width / (480 * 640), width / height
    assert (drawn[..., [P.TOP, P.LEFT]] >= 0).all()
    assert drawn[..., P.BOTTOM].max() <= 480
    assert drawn[..., P.RIGHT].max() <= 640
    assert (ratio > 0.74).all() and (ratio < 1.35).all()  # noqa: PT018
    for crops, low, high in ((slice(0, 2), 0.32, 1.0), (slice(2, 4), 0.05, 0.32)):
        assert area[:, crops].min() == pytest.approx(low, abs=0.005)
        assert area[:, crops].max() == pytest.approx(high, abs=0.02)
    assert area[:, 2:].mean() == pytest.approx(0.185, abs=0.005)
    assert np.log(ratio[:, 2:]).mean() == pytest.approx(0, abs=0.01)
    assert drawn[..., P.MIRROR_X].mean() == pytest.approx(0.5, abs=0.02)
    jittered = drawn[..., P.BRIGHTNESS] != 1
    assert jittered.mean() == pytest.approx(0.8, abs=0.015)
    for column, centre, reach in ((P.BRIGHTNESS, 1, 0.4), (P.CONTRAST, 1, 0.4), (P.HUE, 0, 36)):
        values = drawn[..., column][jittered]
        assert values.min() == pytest.approx(centre - reach, abs=reach / 50)
        assert values.max() == pytest.approx(centre + reach, abs=reach / 50)
        assert values.mean() == pytest.approx(centre, abs=reach / 40)
        assert (drawn[..., column][~jittered] == centre).all()
    saturation = drawn[..., P.SATURATION]
    assert (saturation == 0).mean() == pytest.approx(0.2, abs=0.015)
    assert saturation[jittered & (saturation > 0)].min() == pytest.approx(0.8, abs=0.01)
    assert saturation.max() == pytest.approx(1.2, abs=0.01)
    assert (drawn[..., P.SIGMA] > 0).mean(0) == pytest.approx([0.0, 0.9, 0.5, 0.5], abs=0.025)
    sigma = drawn[..., P.SIGMA][drawn[..., P.SIGMA] > 0]
    assert (sigma.min(), sigma.mean(), sigma.max()) == pytest.approx((0.1, 1.05, 2.0), abs=0.02)
    assert drawn[..., P.SOLARIZE].mean(0) == pytest.approx([0, 0.2, 0, 0], abs=0.02)


def test_draws_of_the_operations_are_independent() -> None:
    data = data_config(local_crops={"count": 2})
    drawn = parameters(data, 0, [Header("jpeg", 500, 500, 1, True, ())] * 3000)
    for low, high in ((P.TOP, P.BOTTOM), (P.LEFT, P.RIGHT)):  # as shares of the room that the box leaves
        drawn[..., low] /= np.maximum(500 - (drawn[..., high] - drawn[..., low]), 1)
    kinds = [column for column in P if column not in (P.BOTTOM, P.RIGHT, P.TRANSPOSE, P.MIRROR_Y)]
    columns = [drawn[:, 1, column] for column in kinds]
    columns += [drawn[:, crop, column] for crop in (0, 2) for column in kinds[:4]]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.08


@pytest.mark.parametrize(("rows", "cols"), [(8, 1000), (1000, 8), (1, 1), (2, 1)])
def test_strips_and_specks_get_the_central_box_of_torchvision(rows: int, cols: int) -> None:
    data = data_config(global_crops={"size": 32, "scale": [0.9, 1.0]})
    drawn = parameters(data, 0, [Header("png", rows, cols, 1, True, ())] * 200)
    boxes = drawn[..., : P.RIGHT + 1]
    assert (boxes >= 0).all()
    assert (boxes[..., 2] <= rows).all()
    assert (boxes[..., 3] <= cols).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    if (rows, cols) == (8, 1000):  # no tenth of it is as square as 4 : 3, so all boxes are the central one
        assert (boxes == [0, (1000 - 11) // 2, 8, (1000 - 11) // 2 + 11]).all()
