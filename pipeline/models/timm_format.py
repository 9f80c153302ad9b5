"""Sub-networks in timm's terms: the module, the `config.json` that rebuilds it, and how images are prepared for it."""

from typing import Any

import timm
from torch import nn

from pipeline.config import ModelConfig
from pipeline.data.augment import MEAN, STD
from pipeline.elastic import Export

CROP_FRACTION = 0.875  # centre crop of the resized image in evaluation, as DINO's k-NN protocol has it


def timm_module(config: ModelConfig, export: Export) -> nn.Module:
    """An exported sub-network as timm builds it, fp32 on the CPU, in eval mode."""
    entry = hub_config(config, export)
    model = timm.create_model(export.architecture, pretrained_cfg=dict(entry["pretrained_cfg"]), **entry["model_args"])
    model.load_state_dict(export.state_dict)
    return model.eval()


def hub_config(config: ModelConfig, export: Export) -> dict[str, Any]:
    """The `config.json` with which timm rebuilds an extracted model and prepares images for it."""
    template = timm.get_pretrained_cfg(export.architecture, allow_unregistered=False)
    assert template is not None
    args = dict(export.model_args)
    if config.family == "swin":
        args["strict_img_size"] = False  # timm then takes any size that the patches divide
    return {
        "architecture": export.architecture,
        "num_classes": 0,
        "num_features": export.feature_dim,
        "global_pool": export.pool,
        "model_args": args,
        "pretrained_cfg": {
            "tag": "poa",
            "custom_load": False,
            **preprocessing(config),
            "fixed_input_size": False,
            "num_classes": 0,
            "pool_size": None if config.one_stage else [config.image_size // config.stride] * 2,
            "first_conv": template.first_conv,
            "classifier": template.classifier,
        },
    }


def preprocessing(config: ModelConfig) -> dict[str, Any]:
    """How images are prepared for evaluation, in timm's terms."""
    return {
        "input_size": [config.in_chans, config.image_size, config.image_size],
        "interpolation": "bicubic",
        "crop_pct": CROP_FRACTION,
        "crop_mode": "center",
        "mean": list(MEAN),
        "std": list(STD),
    }
