"""Which keys of an experiment may change from one start of a run to the next, and from which step each value held."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.errors import UserError

FREE_KEYS = (
    *("run", "checkpoint", "engine", "metrics", "eval"),
    *("data.train", "data.segment", "data.val", "data.threads", "data.batch_size"),
)
"""They change how or where a run is computed but not what it computes."""

CHANGEABLE_KEYS = (
    *("optim.base_lr", "optim.min_lr", "optim.weight_decay", "optim.clip_grad", "optim.max_bad_steps"),
    "loss.koleo_group",
)
"""They may change when a run goes on; the manifest holds from which step on each value did."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the changeable keys are for a start.

    Attributes:
        config: with the values that hold from now on.
        history: for the manifest; entries of `from_step` and `values`, rising.
        changes: by key, the value before and the one from now on.
    """

    config: ExperimentConfig
    history: list[dict[str, Any]]
    changes: dict[str, tuple[Any, Any]]


def settle(
    config: ExperimentConfig, there: ExperimentConfig | None, manifest: dict[str, Any], step: int, where: Path
) -> Settings:
    """Decide what the changeable keys are from a step on.

    The images among which KoLeo seeks a neighbour are a rank's batch at the first start, and stay as many when the run
    goes on with another number of ranks, unless `loss.koleo_group` says otherwise.

    Args:
        config: of this start.
        there: `config.yaml` of the run directory, if there is one.
        manifest: as earlier starts left it.
        step: where the run goes on.
        where: the run directory.

    Raises:
        UserError: KoLeo's group does not divide the batch.
    """
    values = {key: value for key, value in _flat(config) if key in CHANGEABLE_KEYS}
    past = [entry for entry in manifest.get("settings", []) if entry["from_step"] < step]
    if step and not past and there is not None:  # of a version that did not keep them
        past = [{"from_step": 0, "values": _values_of(there, manifest)}]
    before = past[-1]["values"] if step and past else None
    if values["loss.koleo_group"] is None:
        values["loss.koleo_group"] = before["loss.koleo_group"] if before else config.data.batch_size
    changes = {key: (before[key], values[key]) for key in values if before and before.get(key) != values[key]}
    history = past if before == values else [*past, {"from_step": step, "values": values}]
    return Settings(_with_group(config, values["loss.koleo_group"], where), history, changes)


def require_same_experiment(there: ExperimentConfig, here: ExperimentConfig, where: Path) -> None:
    """Refuse to mix two experiments in one directory, naming the first key that differs.

    Raises:
        UserError: a key that decides what is computed differs.
    """
    old, new = (dict(_flat(config)) for config in (there, here))
    for key in old:
        if key not in CHANGEABLE_KEYS and old[key] != new[key]:
            raise UserError(
                f"the run directory holds another experiment: {key} is {old[key]} there and {new[key]} here",
                str(where),
                "choose another run.dir, or the same value",
            )


def _flat(config: ExperimentConfig) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of all but the free keys."""

    def visit(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key in FREE_KEYS:
                continue
            if isinstance(value, dict):
                yield from visit(value, f"{key}.")
            else:
                yield key, value

    return visit(config.model_dump(mode="json"), "")


def _values_of(there: ExperimentConfig, manifest: dict[str, Any]) -> Values:
    values = {key: value for key, value in _flat(there) if key in CHANGEABLE_KEYS}
    if values["loss.koleo_group"] is None:
        starts = manifest.get("starts")
        ranks = starts[0]["world_size"] if starts else 1
        values["loss.koleo_group"] = manifest.get("global_batch", there.data.batch_size) // ranks
    return values


def _with_group(config: ExperimentConfig, group: int, where: Path) -> ExperimentConfig:
    batch = config.data.batch_size
    if not config.loss.koleo_weight:
        return config
    if batch % group:
        raise UserError(
            f"KoLeo sought neighbours among {group} images of a rank, which has {batch} now",
            str(where),
            f"use a data.batch_size that is a multiple of {group}, or set loss.koleo_group to a divisor of {batch}",
        )
    return config.model_copy(update={"loss": config.loss.model_copy(update={"koleo_group": group})})
