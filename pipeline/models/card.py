"""The README.md of an extracted model."""

from typing import Any

from pipeline.config import ModelConfig
from pipeline.config.model import MLP_RATIO
from pipeline.elastic import Subnet
from pipeline.elastic.subnet import kept, mlp_ratio
from pipeline.models.formats import FORMATS
from pipeline.models.loading import RunModels

_CARD = """---
library_name: timm
tags:
- image-feature-extraction
- timm
- self-supervised
---
# {name}

An image encoder ({family}, {feature_dim} features per image) without a classifier, cut out of a larger network that was
pre-trained once, self-supervised, together with all of its sub-networks (POA, arXiv 2408.01031).

| | |
|---|---|
| Sub-network | {name}: width {width}, blocks per stage {depths}{mlp} |
| Cut out of | {largest}{blocks} |
| Parameters | {params:.2f} M |
| GFLOPs | {gflops:.3g} per image of {side} x {side} px (a multiply-accumulate counts as 2) |
| Weights | {branch} after {step} steps; {objective} |
| 20-NN accuracy | {accuracy} |
| Image size | {side} x {side} px in training; {other_sizes} |

## Use

```python
import timm

model = timm.create_model("local-dir:PATH_OF_THIS_DIRECTORY", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg), is_training=False)
features = model(transform(image).unsqueeze(0))  # [1, {feature_dim}]
```

Nothing but timm is needed. It opens the model in other ways too, by arguments beside `pretrained=True`:

| argument | what comes of it |
|---|---|
| `num_classes=N` | an untrained classifier to fine-tune |
| `features_only=True` | maps of features, {maps} |
| `in_chans=1` | grey images: the weights of the three colours are added up |
| `img_size=S` | {img_size} |

## Proof

`proof.json`: loaded through timm from these files, the model differs from the sub-network in place by at most
{difference:.1e} on {images} images ({shards}), in fp32.{formats}

## Licence

The code that made this model is under Apache-2.0. The weights are under the terms of whoever trained them, who also
answers for the rights in the training images.
"""

_TIMMS_LAST = 3  # blocks of a ViT whose features timm gives if nobody says which
_MAPS = {
    "vit": "`[B, D, rows, columns]` of the last three blocks",
    "eva": "`[B, D, rows, columns]` of the last three blocks",
    "swin": "one per stage, `[B, rows, columns, D]`",
    "resnet": "one per stage, `[B, D, rows, columns]`",
}
_IMG_SIZE = {
    "vit": "images of another size, positions interpolated once",
    "eva": "images of another size, angles computed for it",
    "swin": "images of another size, bias tables and windows fitted to it",
    "resnet": "refused by timm and not needed, any size works as it is",
}
_OTHER_SIZES = {
    "vit": "other sizes divisible by {stride} work, positions are interpolated",
    "eva": "other sizes divisible by {stride} work, positions are relative to the sides",
    "swin": "other sizes divisible by {patch} work, best near the training size",
    "resnet": "any other size works",
}


def model_card(
    models: RunModels, subnet: Subnet, hub: dict[str, Any], proof: dict[str, Any], knn: dict[str, Any] | None
) -> str:
    """The card as Markdown.

    Args:
        models: what the model was cut out of.
        subnet: which part.
        hub, proof: contents of config.json and proof.json.
        knn: its entry of the run's eval/knn.json, if it has one.
    """
    config = models.config
    return _CARD.format(
        name=subnet.name,
        family=hub["architecture"],
        feature_dim=hub["num_features"],
        width=subnet.width,
        depths=", ".join(map(str, subnet.depths)),
        mlp=_mlp(config.model, subnet),
        blocks=_blocks(config.model, subnet),
        largest=models.grid.largest,
        params=models.params(subnet) / 1e6,
        gflops=models.gflops(subnet),
        side=config.model.image_size,
        branch="teacher (moving average of the student)" if proof["branch"] == "teacher" else "student",
        step=models.step,
        objective=f"DINO and iBOT losses with distillation between sizes, {config.loss.centering} centering",
        accuracy=_accuracy(knn),
        other_sizes=_OTHER_SIZES[config.model.family].format(stride=config.model.stride, patch=config.model.patch_size),
        maps=_maps(config.model.family, subnet),
        img_size=_IMG_SIZE[config.model.family],
        difference=proof["max_abs_difference"],
        images=proof["images"],
        shards=_summary(proof["shards"]),
        formats=_formats(proof["formats"]),
    )


def _mlp(config: ModelConfig, subnet: Subnet) -> str:
    usual = config.mlp_ratio.min == config.mlp_ratio.max == MLP_RATIO["max"]
    return "" if usual else f", {mlp_ratio(config, subnet)} hidden units of an MLP per channel"


def _blocks(config: ModelConfig, subnet: Subnet) -> str:
    """Where blocks and channels are not those that everybody would expect."""
    if config.block_importance is None:
        return ""
    stages = "; ".join(", ".join(map(str, blocks)) for blocks in kept(config, subnet))
    order = "" if config.init_order == "none" else f" ({config.init_order}), which also sorted channels, heads and MLPs"
    return f": its blocks {stages} (from 0), chosen by the importance measured before training{order}"


def _maps(family: str, subnet: Subnet) -> str:
    if family == "vit" and subnet.depths[0] < _TIMMS_LAST:
        indices = ", ".join(map(str, range(subnet.depths[0])))
        return f"with `out_indices=({indices},)` beside it: timm wants {_TIMMS_LAST} blocks and there are fewer"
    return _MAPS[family]


def _formats(proofs: dict[str, dict[str, Any]]) -> str:
    if not proofs:
        return ""
    rows = [
        f"| `{proof['file']}` | `{FORMATS[name].use}` | {proof['max_abs_difference']:.1e} |"
        for name, proof in proofs.items()
    ]
    head = [
        "",
        "",
        "| file | use, with any number of images | largest difference from timm on these images |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows])


def _accuracy(knn: dict[str, Any] | None) -> str:
    if knn is None:
        return "not measured (`poa eval knn`)"
    return f"{100 * knn['accuracy']:.1f}% ({knn['train_images']} training, {knn['val_images']} validation images)"


def _summary(shards: list[str]) -> str:
    return shards[0] if len(shards) == 1 else f"{shards[0]} ... {shards[-1]}"
