"""The sub-networks of a trained run as plain timm modules."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from pipeline.config import ExperimentConfig, load_config
from pipeline.elastic import Grid, Subnet, build, cost
from pipeline.elastic.head import ProjectionHeads
from pipeline.elastic.uninitialised import Uninitialised
from pipeline.engine.saved import BRANCHES, load_weights
from pipeline.errors import UserError
from pipeline.models.timm_format import timm_module


class RunModels:
    """The weights of one branch, from which any sub-network is cut.

    Attributes:
        config: of the run.
        grid: its sub-networks.
        backbone: all of them in place, fp32 on the CPU.
        step: completed training steps; 0 for the untrained network.
        fingerprint: identifies the checkpoint; empty for the untrained network.
    """

    def __init__(self, config: ExperimentConfig, weights: dict[str, Tensor] | None, step: int, fingerprint: str):
        self.config, self.step, self.fingerprint = config, step, fingerprint
        self.grid = Grid(config.model)
        torch.manual_seed(config.data.seed)  # as the run began
        with nullcontext() if weights is None else Uninitialised():
            self.backbone = build(config.model).eval().requires_grad_(False)
        if weights is not None:
            self.backbone.load_state_dict(weights)

    @classmethod
    def open(cls, run_dir: str | Path, branch: str = "teacher") -> "RunModels":
        """Load the newest intact checkpoint of a run.

        Args:
            run_dir: a run directory.
            branch: "teacher" or "student".

        Raises:
            UserError: it is no run directory, or holds no usable checkpoint.
        """
        path = Path(run_dir)
        config = run_config(path)
        if branch not in BRANCHES:
            raise UserError(f"no branch {branch!r}", "branch", f"choose from {', '.join(BRANCHES)}")
        weights, manifest = load_weights(path / "checkpoints", branch)
        digest = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
        own = {n.removeprefix("backbone."): w for n, w in weights.items() if n.startswith("backbone.")}
        try:
            return cls(config, own, manifest["step"], digest)
        except RuntimeError as error:
            raise UserError(
                "the checkpoint is of another model than config.yaml", str(path), "restore the run's own config.yaml"
            ) from error

    @classmethod
    def untrained(cls, config: ExperimentConfig, run_dir: Path | None = None) -> "RunModels":
        """The network as the run began: initialised from its seed, or from `model.init_from`, in the order put then.

        Raises:
            UserError: it cannot be loaded, or the run does not know the order any more.
        """
        models = cls(config, None, 0, "")
        if config.model.init_from:
            from pipeline.models.start import load_start  # which opens runs

            load_start(models.backbone, config.model.init_from)
            if config.model.init_order != "none":
                from pipeline.models.order import restore_order

                restore_order(models.backbone, run_dir)
        return models

    def module(self, subnet: Subnet) -> nn.Module:
        """A sub-network alone, in eval mode."""
        return timm_module(self.config, self.backbone.export(subnet))

    def params(self, subnet: Subnet) -> int:
        return cost.params(self.config.model, subnet)

    def gflops(self, subnet: Subnet) -> float:
        """Of a forward pass over one image of the training size, a multiply-accumulate as 2."""
        return cost.flops(self.config.model, subnet) / 1e9


def open_heads(run_dir: str | Path, branch: str = "teacher") -> ProjectionHeads:
    """The projection heads of a branch in a run's newest intact checkpoint, fp32 on the CPU.

    Raises:
        UserError: see `RunModels.open`.
    """
    config = run_config(Path(run_dir))
    weights, _ = load_weights(Path(run_dir) / "checkpoints", branch)
    with Uninitialised():
        heads = ProjectionHeads(cost.feature_dim(config.model, Grid(config.model).largest), config.heads)
    heads.load_state_dict({n.removeprefix("heads."): w for n, w in weights.items() if n.startswith("heads.")})
    return heads.eval().requires_grad_(False)


def run_config(run_dir: Path) -> ExperimentConfig:
    """The config of a run.

    Raises:
        UserError: `run_dir` is no run directory.
    """
    if not (run_dir / "config.yaml").is_file():
        what = "the directory holds no run" if run_dir.is_dir() else "no such run directory"
        raise UserError(what, str(run_dir), "name a directory that `poa train` wrote")
    return load_config(run_dir / "config.yaml")


def choose(grid: Grid, names: Iterable[str | Subnet] | str) -> list[Subnet]:
    """Sub-networks by name, each once; "all" or ["all"] is the whole grid.

    Raises:
        UserError: a name is not in the grid, or there is none.
    """
    names = [names] if isinstance(names, str) else list(names)
    if names == ["all"]:
        return list(grid.subnets)
    chosen = list(dict.fromkeys(grid.parse(name.name if isinstance(name, Subnet) else name) for name in names))
    if not chosen:
        raise UserError("no sub-network is named", "subnet", f"name some, e.g. {grid.smallest} {grid.largest}, or all")
    return chosen


def load_subnet(path: str | Path, subnet: str | Subnet | None = None, branch: str = "teacher") -> nn.Module:
    """A sub-network as a plain timm module in eval mode, fp32 on the CPU.

    Args:
        path: a directory that `poa extract` wrote, or a run directory.
        subnet: which one to cut from a run, the largest if None; an extracted directory holds one already.
        branch: "teacher" or "student" of a run.

    Raises:
        UserError: `path` is neither, or has no such sub-network.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        if subnet is not None and str(subnet) != path.name:
            raise UserError(f"asked for {subnet}, but this is one extracted model", str(path), "leave the name out")
        return load_directory(path)
    models = RunModels.open(path, branch)
    return models.module(models.grid.largest if subnet is None else choose(models.grid, [subnet])[0])


def load_directory(path: Path) -> nn.Module:
    """A model directory in timm's format, in eval mode.

    Raises:
        UserError: timm cannot load it.
    """
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    except Exception as error:  # timm, safetensors and JSON each have their own
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"timm cannot load the model: {reason}", str(path), "extract or copy it again") from error
