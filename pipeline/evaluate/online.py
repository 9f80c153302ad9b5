"""k-NN accuracy of three sub-networks while they train."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline.config import ExperimentConfig
from pipeline.data.intake import Intake
from pipeline.elastic import Backbone, Grid, Subnet, cost
from pipeline.engine.distributed import Ranks
from pipeline.errors import UserError
from pipeline.evaluate.evaluation import Evaluation, warn_of_doubt
from pipeline.evaluate.targets import Candidate, Target
from pipeline.files import Journal
from pipeline.models.timm_format import preprocessing, timm_module


class OnlineEvaluation:
    """Evaluates the teacher every `eval.every_steps` steps, the work shared out over all ranks.

    Args:
        config: the experiment.
        ranks: this process and its peers.
        alive: called whenever an evaluation got on, by each rank in its own time.

    Raises:
        UserError: `eval.every_steps` is set, but not what to evaluate on, or its classes are not those of the training
            shards.
    """

    def __init__(self, config: ExperimentConfig, ranks: Ranks, alive: Callable[[], None] = lambda: None):
        self.config, self.ranks = config, ranks
        self._log = Journal(Path(config.run.dir) / "eval" / "online_knn.jsonl")
        self._evaluation: Evaluation | None = None
        if config.eval.every_steps is None:
            return
        train, val = config.eval.train or config.data.train, config.eval.val or config.data.val
        if val is None:
            raise UserError("there is nothing to evaluate on", "eval.val", "name labelled shards, or unset every_steps")
        self._evaluation = Evaluation("knn", train, val, ranks, max_pixels=config.data.max_pixels, alive=alive)
        warn_of_doubt(self._evaluation)

    def accuracies(self, backbone: Backbone, step: int) -> dict[str, float]:
        """20-NN accuracy by name; empty, with a warning, if the shards cannot be used. Collective over the ranks.

        Args:
            backbone: of the teacher.
            step: completed steps.
        """
        assert self._evaluation is not None
        with torch.random.fork_rng():  # building modules draws numbers
            try:
                results = self._evaluation.run(self._target(backbone))
            except UserError as error:
                if self.ranks.is_main:
                    print(f"warning: no k-NN at step {step}: {error}", file=sys.stderr)
                return {}
        accuracies = {name: entry["accuracy"] for name, entry in results.items()}
        if self.ranks.is_main:
            self._log.append({"step": step, **accuracies})
        return accuracies

    def _target(self, backbone: Backbone) -> Target:
        from timm.data import resolve_data_config

        model = self.config.model
        chosen = representative_subnets(backbone.grid)
        candidates = [
            Candidate(
                subnet.name,
                partial(self._module, backbone, subnet),
                backbone.feature_dim(subnet),
                cost.params(model, subnet),
                cost.flops(model, subnet) / 1e9,
                {},
            )
            for subnet in chosen
        ]
        found = resolve_data_config({}, pretrained_cfg=preprocessing(self.config))
        return Target(candidates, found, Intake.of_experiment(self.config))

    def _module(self, backbone: Backbone, subnet: Subnet) -> nn.Module:
        return timm_module(self.config, backbone.export(subnet))


def representative_subnets(grid: Grid) -> list[Subnet]:
    """The smallest, one from the middle, the largest."""
    middle = Subnet(grid.widths[len(grid.widths) // 2], grid.depths[len(grid.depths) // 2])
    return sorted({grid.smallest, middle, grid.largest})
