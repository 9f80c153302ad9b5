"""What can be chosen from: every sub-network of a run, and models of other origin beside them, with what they cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.elastic import Subnet, cost
from pipeline.errors import UserError
from pipeline.evaluate.targets import directory_target, is_run
from pipeline.models.loading import RunModels
from pipeline.select.choice import Network
from pipeline.select.footprint import DTYPES, Footprints, footprint
from pipeline.select.latency import Machine

Costs = tuple[float, float, float]
"""Of a forward pass: operations, FLOPs, bytes written."""


@dataclass(frozen=True)
class Source:
    """A run or a model directory.

    Attributes:
        path: of it.
        networks: in it, by name.
        costs: by name, what latency is predicted from.
        image: shape [C, H, W] of an image.
        build: makes a network by name, with its weights.
        subnets: of a run, by name; empty for a model.
        models: of a run; None for a model.
    """

    path: Path
    networks: dict[str, Network]
    costs: dict[str, Costs]
    image: tuple[int, ...]
    build: Callable[[str], nn.Module]
    subnets: dict[str, Subnet]
    models: RunModels | None = None


def open_sources(paths: Sequence[Path], branch: str | None, machine: Machine) -> list[Source]:
    """Open runs and model directories, runs first. A model that is called like another bears its folder's name too.

    Raises:
        UserError: a path is neither, two networks have one name, or a branch is named and no run.
    """
    runs = [path for path in paths if is_run(path)]
    if branch and not runs:
        raise UserError("no run is named, and models have no branches", "--branch", "leave it out")
    sources: list[Source] = []
    taken: set[str] = set()
    for path in sorted(paths, key=lambda path: path not in runs):
        if path in runs:
            sources.append(_run(path, branch or "teacher", machine, f"{path.resolve().name}/" if len(runs) > 1 else ""))
        else:
            name = path.resolve().name
            sources.append(_model(path, machine, name if name not in taken else f"{path.resolve().parent.name}/{name}"))
        if twice := taken & sources[-1].networks.keys():
            raise UserError(f"two networks are called {min(twice)}", str(path), "name each once, or rename a directory")
        taken |= sources[-1].networks.keys()
    return sources


def _run(path: Path, branch: str, machine: Machine, prefix: str) -> Source:
    models = RunModels.open(path, branch)
    model = models.config.model
    footprints = Footprints(models.backbone, machine.batch, machine.precision)
    subnets = {prefix + subnet.name: subnet for subnet in models.grid.subnets}
    networks, costs = {}, {}
    for name, subnet in subnets.items():
        params, flops, used = models.params(subnet), cost.flops(model, subnet), footprints(subnet)
        memory = DTYPES[machine.precision].itemsize * params + used.activations
        networks[name] = Network(name, str(path), params, flops / 1e9, used.activations, memory)
        costs[name] = (used.operations, flops * machine.batch, used.traffic)
    image = (model.in_chans, model.image_size, model.image_size)
    return Source(path, networks, costs, image, lambda name: models.module(subnets[name]), subnets, models)


def _model(path: Path, machine: Machine, name: str) -> Source:
    target = directory_target(path)
    (candidate,) = target.candidates
    image = tuple(target.preprocessing["input_size"])
    used = footprint(candidate.load, image, machine.batch, machine.precision)
    memory = DTYPES[machine.precision].itemsize * candidate.params + used.activations
    network = Network(name, str(path), candidate.params, candidate.gflops, used.activations, memory, rival=True)
    costs = {name: (used.operations, 1e9 * candidate.gflops * machine.batch, used.traffic)}
    return Source(path, {name: network}, costs, image, lambda _: candidate.load(), {})
