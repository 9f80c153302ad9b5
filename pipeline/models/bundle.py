"""A bundle: a run's whole state in a directory that depends on neither ranks nor engine, for others to begin from.

student.safetensors, teacher.safetensors    fp32 weights of backbone and heads, by parameter name
exp_avg.safetensors, exp_avg_sq.safetensors AdamW's moments, likewise; may be left out
centers.safetensors                         of the teacher's targets, as `cls.HEAD` and `patch.HEAD`
config.yaml, bundle.json                    the experiment; step, family, sizes and checksums, written last
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pipeline.config import ExperimentConfig, ModelConfig, load_config
from pipeline.config.model import BUNDLE
from pipeline.elastic import Grid, build
from pipeline.elastic.backbone import Backbone
from pipeline.elastic.layers import leading, leading_weight
from pipeline.elastic.subnet import Subnet, kept, largest_subnet
from pipeline.errors import UserError, short
from pipeline.files import sha256

FORMAT = 1
_KEYS = {"family": str, "largest": str, "run": str, "step": int, "optimizer_steps": int}
"""What is read of `bundle.json` beside the format and the files."""
_FILES = {"config.yaml", "student.safetensors", "teacher.safetensors", "centers.safetensors"}
"""What no bundle is without."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_LEAST_SHARE = 0.5
_MASK, _POSITIONS, _HEAD_INPUT = "backbone.mask_token", "backbone.pos_embed", ".mlp.0.weight"


@dataclass(frozen=True)
class Fit:
    """What of a bundle a network takes.

    Attributes:
        weights: those that fit, by parameter name.
        left: why each of the others does not.
        whole: all are there, and none was cut or resized.
    """

    weights: dict[str, Tensor]
    left: list[str]
    whole: bool


class Bundle:
    """An intact bundle.

    Args:
        path: the directory.

    Raises:
        UserError: it is damaged, or of another version.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.manifest = json.loads((path / BUNDLE).read_text(encoding="utf-8"))
            problem = None if self.manifest["format"] == FORMAT else f"format {self.manifest['format']}"
            if wrong := [key for key, kind in _KEYS.items() if not isinstance(self.manifest[key], kind)]:
                problem = problem or f"{wrong[0]} is {short(self.manifest[wrong[0]])}"
            if missing := _FILES - self.manifest["files"].keys():
                problem = problem or f"{BUNDLE} has no checksum of {min(missing)}"
            for name, entry in self.manifest["files"].items():
                if problem is None and sha256(path / name) != entry["sha256"]:
                    problem = f"{name} has another checksum than {BUNDLE}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise UserError(f"the bundle is damaged: {problem}", str(path), "write it again by poa extract --bundle")

    @cached_property
    def config(self) -> ExperimentConfig:
        return load_config(self.path / "config.yaml")

    @property
    def has_moments(self) -> bool:
        return f"{MOMENTS[0]}.safetensors" in self.manifest["files"]

    def fit(self, branch: str, wanted: Mapping[str, torch.Size], model: ModelConfig) -> Fit:
        """The weights of a branch for a network; a smaller one is cut out of it, positions are resized.

        Args:
            branch: "teacher" or "student".
            wanted: shapes by parameter name.
            model: of the network.

        Raises:
            UserError: it is of another family, or less than half of the backbone fits.
        """
        if self.manifest["family"] != model.family:
            raise UserError(
                f"the bundle holds a {self.manifest['family']} and the run trains a {model.family}",
                f"model.init_from={self.path}",
                f"set model.family={self.manifest['family']}, or name another bundle",
            )
        own = load_file(self.path / f"{branch}.safetensors")
        cut = self._cut(own, model)
        found = {name: _resized(name, tensor, wanted.get(name), model) for name, tensor in cut.items()}
        left = []
        for name, size in wanted.items():
            if name not in found:
                left.append(f"{name} is not there")
            elif found[name].shape != size:
                left.append(f"{name} is {list(found[name].shape)} there and {list(size)} here")
        names = {name for name, size in wanted.items() if name in found and found[name].shape == size}
        left += [f"{name} is not here" for name in found if name not in wanted and not name.startswith("heads.")]
        sizes = {name: size.numel() for name, size in wanted.items() if name.startswith("backbone.")}
        share = sum(size for name, size in sizes.items() if name in names) / sum(sizes.values())
        if share < _LEAST_SHARE:
            raise UserError(
                f"{100 * share:.0f}% of the backbone fit: {left[0]}",
                f"model.init_from={self.path}",
                f"choose a largest network that the grid of the bundle holds; its own is {self.manifest['largest']}",
            )
        # of blocks that are left out the others bear other names
        whole = not left and cut is own and all(found[name] is own[name] for name in names)
        return Fit({name: found[name] for name in wanted if name in names}, left, whole)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's, by entry of `MOMENTS` and parameter name."""
        return {vector: load_file(self.path / f"{vector}.safetensors") for vector in MOMENTS}

    def centers(self) -> dict[str, Tensor]:
        return load_file(self.path / "centers.safetensors")

    def block_importance(self, model: ModelConfig) -> list[list[float]] | None:
        """By what depths of a network that this holds are chosen, if that was measured."""
        own, subnet = self.config.model, self._subnet(model)
        if own.block_importance is None or subnet is None:
            return None
        pairs = zip(own.block_importance, kept(own, subnet), strict=True)
        return [[scores[block] for block in blocks] for scores, blocks in pairs]

    def _subnet(self, model: ModelConfig) -> Subnet | None:
        """Which one of the grid of the bundle the largest network of a model is."""
        largest, own = largest_subnet(model), self.config.model
        if model.mlp_ratio.max != own.mlp_ratio.max:
            largest = replace(largest, mlp_ratio=model.mlp_ratio.max)
        return largest if largest in Grid(own) else None

    def _cut(self, weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
        """The weights of a smaller network in the grid of the bundle, by the slicing rule; else as they are."""
        largest, own = self._subnet(model), self.config.model
        if largest is None or largest == largest_subnet(own):
            return weights
        source: Backbone = build(own)
        prefix = "backbone."
        source.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
        out = {prefix + name: tensor for name, tensor in source.export(largest).state_dict.items()}
        narrow = build(model)
        out[_MASK] = leading(weights[_MASK], narrow.mask_token.shape[-1])
        dim = narrow.feature_dim(largest)
        for name, weight in weights.items():
            if name.startswith("heads."):
                out[name] = leading_weight(weight, len(weight), dim) if name.endswith(_HEAD_INPUT) else weight
        return out


def _resized(name: str, tensor: Tensor, wanted: torch.Size | None, model: ModelConfig) -> Tensor:
    """Positions of another image size as timm resizes them; anything else as it is."""
    if name != _POSITIONS or wanted is None or tensor.shape == wanted or tensor.shape[-1] != wanted[-1]:
        return tensor
    side = model.image_size // model.patch_size
    return resample_abs_pos_embed(tensor, new_size=[side, side], num_prefix_tokens=wanted[1] - side * side)
