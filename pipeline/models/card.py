"""The README.md of an extracted model."""

from collections.abc import Mapping
from shlex import quote
from typing import Any

from pipeline.config import ExperimentConfig, ModelConfig
from pipeline.config.model import MLP_RATIO
from pipeline.data.intake import CHANNELS
from pipeline.elastic import Subnet
from pipeline.elastic.subnet import kept, mlp_ratio
from pipeline.models.account import Account
from pipeline.models.formats import FORMATS
from pipeline.models.loading import RunModels

Measured = Mapping[str, dict[str, Any]]
"""Results of one network by method of `poa eval`."""

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

{use}

## Proof

`proof.json`: loaded through timm from these files, the model differs from the sub-network in place by at most
{difference:.1e} on {images} images ({shards}), in fp32.{formats}

## What it took

{account}

## What was measured, and what was not

{measured}

## Licence

The code that made this model is under Apache-2.0. The weights are under the terms of whoever trained them, who also
answers for the rights in the training images.
"""

_USE = """```python
{imports}
model = timm.create_model("local-dir:PATH_OF_THIS_DIRECTORY", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg), is_training=False)
{lines}  # [1, {feature_dim}]
```

Nothing but timm is needed{reading}. It opens the model in other ways too, by arguments beside `pretrained=True`:

| argument | what comes of it |
|---|---|
| `num_classes=N` | an untrained classifier to fine-tune |
| `features_only=True` | maps of features, {maps} |{in_chans}
| `img_size=S` | {img_size} |"""

_IN_CHANS = "\n| `in_chans=1` | grey images: the weights of the three colours are added up |"  # timm adapts only these
_OF_RGB = "features = model(transform(image).unsqueeze(0))"
_OF_VALUES = """low, high = {low!r}, {high!r}  # the `value_range` of config.json: the values that become 0 and 1
values = np.nan_to_num(np.atleast_3d(image).astype(np.float32), nan=low, posinf=high, neginf=low)
values = torch.from_numpy(((values - low) / (high - low)).clip(0, 1)).permute(2, 0, 1)
features = model(transform(values).unsqueeze(0))"""
_READING = ", and something that reads `image`, {shape} as stored, for instance `tifffile.imread` or `numpy.load`"

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
    models: RunModels, subnet: Subnet, hub: dict[str, Any], proof: dict[str, Any], measured: Measured, account: Account
) -> str:
    """The card as Markdown.

    Args:
        models: what the model was cut out of.
        subnet: which part.
        hub, proof: contents of config.json and proof.json.
        measured: its entries of the run's `eval/METHOD.json`, by method, of this very checkpoint.
        account: what it took to train it.
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
        objective=_objective(config),
        accuracy=_accuracy(measured.get("knn")),
        account=_account(models, subnet, account),
        measured=_measured(subnet, measured),
        other_sizes=_OTHER_SIZES[config.model.family].format(stride=config.model.stride, patch=config.model.patch_size),
        use=use(config, subnet, hub["num_features"]),
        difference=proof["max_abs_difference"],
        images=proof["images"],
        shards=_summary(proof["shards"]),
        formats=_formats(proof["formats"]),
    )


def _objective(config: ExperimentConfig) -> str:
    loss = config.loss
    own = "DINO and iBOT losses" if loss.ibot_weight else "DINO loss"
    between = loss.same_view_weight and config.sampling.assignment != "none"
    return f"{own}{' with distillation between sizes' if between else ''}, {loss.centering} centering"


def use(config: ExperimentConfig, subnet: Subnet, feature_dim: int) -> str:
    """How images are made ready for the model, which timm alone cannot tell of other than 8-bit RGB."""
    values, channels = config.data.value_range, config.model.in_chans
    lines, imports, reading = _OF_RGB, "import timm\n", ""
    if values:
        lines = _OF_VALUES.format(low=values[0], high=values[1])
        imports = "import numpy as np\nimport timm\nimport torch\n"
        reading = _READING.format(shape="`[H, W]`" if channels == 1 else f"`[H, W, {channels}]`")
    return _USE.format(
        imports=imports,
        lines=lines,
        reading=reading,
        feature_dim=feature_dim,
        maps=_maps(config.model.family, subnet),
        in_chans=_IN_CHANS if channels == CHANNELS else "",
        img_size=_IMG_SIZE[config.model.family],
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


def _account(models: RunModels, subnet: Subnet, account: Account) -> str:
    """In plain numbers: what trained this network, and what training it alone would have taken."""
    if not account.steps:
        return "Not known: the run's manifest does not tell its steps."
    largest = subnet == models.grid.largest
    alone = models.config.sampling.alone
    if alone:
        role = "It is the only network of its run: every image of every step trained it."
    elif largest:
        role = "It is the largest network: every image of every step trained it, as the intact student."
    else:
        role = (
            f"It was the elastic student of a rank {account.draws:,} times and so saw {account.own_images:,} images. "
            f"Its weights are part of larger ones, trained at every step; {len(models.grid)} networks came of the run."
        )
    lines = [f"The run made {account.steps:,} steps on {account.images:,} images. {role}"]
    if account.before:
        lines.append(f"Weights began at step {account.before:,} of another run, which is in no number here.")
    elif models.config.model.init_from:
        lines.append("Weights began from others (`model.init_from`), whose training is in no number here.")
    if account.gpu_hours is None or account.own_hours is None or account.alone_hours is None:
        lines.append("The run's records do not tell its hours.")
        return "\n".join(lines)
    lines += [
        "",
        "| | GPU-hours |",
        "|---|---|",
        f"| the run, all networks (of a CPU: hours of its ranks) | {account.gpu_hours:.3g} |",
        f"| of these in passes of this network, by FLOPs | {account.own_hours:.3g} ({100 * account.share:.2g}%) |",
        f"| this network alone on as many images and steps | {account.alone_hours:.3g} |",
        "",
        "The last line is computed, not run: FLOPs as `poa plan` counts them for `sampling.assignment=none`, at the "
        "FLOP/s that this run had.",
    ]
    return "\n".join(lines)


METHODS = {"knn": "20-NN accuracy", "linear": "linear probe", "segment": "segmentation"}
_NEVER = "fine-tuning, detection, robustness, fairness, and how it does on other images than these"


def _measured(subnet: Subnet, measured: Measured) -> str:
    """Results with the commands that found them."""
    lines = []
    for method, entry in measured.items():
        value = f"{100 * entry['accuracy']:.1f}%"
        if "miou" in entry:
            value = f"mIoU {100 * entry['miou']:.1f}% (linear), {100 * entry['knn_miou']:.1f}% (k-NN); pixels {value}"
        shards = " ".join(
            f"--{split} {' '.join(map(quote, entry[split]))}" for split in ("train", "val") if split in entry
        )
        lines.append(f"- {METHODS[method]}: {value}, by `poa eval {method} RUN {shards} --subnets {subnet.name}`")
    missing = [f"{title} (`poa eval {method}`)" for method, title in METHODS.items() if method not in measured]
    never = [*missing, "latency (`poa select`)", _NEVER]
    return "\n".join([*lines, f"- Not measured: {', '.join(never)}."])


def _accuracy(knn: dict[str, Any] | None) -> str:
    if knn is None:
        return "not measured (`poa eval knn`)"
    return f"{100 * knn['accuracy']:.1f}% ({knn['train_images']} training, {knn['val_images']} validation images)"


def _summary(shards: list[str]) -> str:
    return shards[0] if len(shards) == 1 else f"{shards[0]} ... {shards[-1]}"
