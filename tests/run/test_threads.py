"""Small networks compute on one thread, large ones on all, and OMP_NUM_THREADS has the last word."""

from pathlib import Path

import pytest
import torch

from pipeline.config import load_config
from pipeline.run.threads import FLOPS_PER_THREAD, fitting_threads, threads_that_fit

YAML = Path(__file__).parents[2] / "yaml"
CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("preset", "threads"), [("demo", 1), ("recipes/photos_vit", 1), ("vit_base_8gpu", 64)])
def test_threads_grow_with_the_work_of_a_block(preset, threads):
    assert fitting_threads(load_config(YAML / f"{preset}.yaml"), cores=64) == threads


def test_threads_are_the_flops_of_a_block_over_those_that_keep_one_busy():
    """Width 1024, 3 images of 2 global crops of 16 patches and a class token: 24 D^2 + 4 N D FLOPs per token."""
    config = load_config(
        YAML / "demo.yaml",
        [
            *("model.head_dim=64", "model.width={min: 1024, max: 1024, step: 64}", "model.depth={min: 2, max: 2}"),
            *("data.batch_size=3", "data.local_crops.count=0"),
        ],
    )
    tokens = 3 * 2 * 17
    block = tokens * (24 * 1024**2 + 4 * 17 * 1024)
    assert fitting_threads(config, cores=64) == int(block / FLOPS_PER_THREAD) == 2


def test_the_number_of_threads_is_what_it_was_afterwards(monkeypatch, two_threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads_that_fit(load_config(YAML / "demo.yaml"), CPU):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_omp_num_threads_is_obeyed(monkeypatch, two_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with threads_that_fit(load_config(YAML / "demo.yaml"), CPU):
        assert torch.get_num_threads() == 2
