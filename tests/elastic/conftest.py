"""Tiny elastic backbones of the four families."""

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.elastic import Backbone, build

TINY = {
    "vit": {
        "image_size": 32,
        "patch_size": 8,
        "head_dim": 8,
        "width": {"min": 16, "max": 32, "step": 8},
        "depth": {"min": 2, "max": 5, "step": 1},
        "layer_scale": 0.5,
    },
    "eva": {
        "image_size": 32,
        "patch_size": 8,
        "head_dim": 8,
        "width": {"min": 16, "max": 32, "step": 8},
        "depth": {"min": 2, "max": 5, "step": 1},
        "layer_scale": 0.5,
        "registers": 3,
        "swiglu": True,
        "mlp_ratio": {"min": 2, "max": 4, "step": 2},
    },
    "swin": {
        "image_size": 96,
        "patch_size": 4,
        "head_dim": 8,
        "width": {"min": 16, "max": 32, "step": 8},
        "depth": {"min": 2, "max": 5, "step": 1},
        "window_size": 4,
    },
    "resnet": {
        "image_size": 64,
        "width": {"min": 32, "max": 96, "step": 32},
        "depth": {"min": [1, 1, 1, 1], "max": [1, 2, 3, 1], "step": 1},
    },
}


def tiny_config(family: str, **changes) -> ModelConfig:
    return ModelConfig.model_validate({"family": family, **TINY[family], **changes})


def scramble(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights everywhere: timm starts some at zero, where a wrong slice would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            if p.ndim == 1 and ("norm" in name or "bn" in name) and name.endswith("weight"):
                p.add_(1)


@pytest.fixture(scope="session", params=["vit", "eva", "swin", "resnet"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def backbones() -> dict[str, Backbone]:
    """One scrambled backbone per family; tests must not change it."""
    models = {name: build(tiny_config(name)) for name in TINY}
    for model in models.values():
        scramble(model)
        model.requires_grad_(False)
    return models


@pytest.fixture
def backbone(family, backbones) -> Backbone:
    return backbones[family]


@pytest.fixture(scope="session")
def other_size() -> dict[str, int]:
    """A valid image size beside the training size."""
    return {"vit": 48, "eva": 48, "swin": 64, "resnet": 96}


@pytest.fixture(scope="session", name="tiny_config")
def _tiny_config():
    return tiny_config


@pytest.fixture(scope="session", name="scramble")
def _scramble():
    return scramble
