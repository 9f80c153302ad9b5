"""Sub-networks in timm's terms: the module, the `config.json` that rebuilds it, and how images are prepared for it."""

from typing import Any

import timm
from torch import nn

from pipeline.config import ExperimentConfig
from pipeline.data.intake import Intake
from pipeline.elastic import Export
from pipeline.elastic.uninitialised import Uninitialised

VALUE_RANGE = "value_range"
"""Key of `config.json`: the values that become 0 and 1, where images are not 8-bit RGB."""
CROP_FRACTION = 0.875  # centre crop of the resized image in evaluation, as DINO's k-NN protocol has it


def timm_module(config: ExperimentConfig, export: Export) -> nn.Module:
    """An exported sub-network as timm builds it, fp32 on the CPU, in eval mode."""
    entry = hub_config(config, export)
    words = {"pretrained_cfg": dict(entry["pretrained_cfg"]), **entry["model_args"]}
    with Uninitialised():
        model = timm.create_model(export.architecture, **words)
    model.load_state_dict(export.state_dict)
    return model.eval()


def hub_config(config: ExperimentConfig, export: Export) -> dict[str, Any]:
    """The `config.json` with which timm rebuilds an extracted model and prepares images for it."""
    template = timm.get_pretrained_cfg(export.architecture, allow_unregistered=False)
    assert template is not None
    args, model, values = dict(export.model_args), config.model, config.data.value_range
    if model.family == "swin":
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
            "pool_size": None if model.one_stage else [model.image_size // model.stride] * 2,
            "first_conv": template.first_conv,
            "classifier": template.classifier,
        },
        **({} if values is None else {VALUE_RANGE: list(values)}),
    }


def preprocessing(config: ExperimentConfig) -> dict[str, Any]:
    """How images are prepared for evaluation, in timm's terms."""
    intake = Intake.of_experiment(config)
    return {
        "input_size": [config.model.in_chans, config.model.image_size, config.model.image_size],
        "interpolation": "bicubic",
        "crop_pct": CROP_FRACTION,
        "crop_mode": "center",
        "mean": list(intake.mean),
        "std": list(intake.std),
    }
