"""Which keys of an experiment may change from one start of a run to the next, and from which step each value held."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ExperimentConfig, LossConfig, OptimConfig
from pipeline.config.section import Resume, marked_keys
from pipeline.errors import UserError
from pipeline.method.schedules import LAID_OUT, Rise, Schedules

FREE_KEYS = tuple(marked_keys(ExperimentConfig, Resume.FREE))
CHANGEABLE_KEYS = tuple(marked_keys(ExperimentConfig, Resume.NOTED))

Values = dict[str, Any]
Course = list[tuple[int, float]]


@dataclass(frozen=True)
class Settings:
    """What the changeable keys are for a start.

    Attributes:
        config: with the values that hold from now on.
        history: for the manifest; entries of `from_step`, `values` and, where they differ from those before, `rise` and
            `courses`, rising.
        changes: by key, the value before and the one from now on.
        rise: see `Schedules`.
        courses: by schedule that is laid out anew, its `Schedules.course` as it was to be and as it is from now on.
    """

    config: ExperimentConfig
    history: list[dict[str, Any]]
    changes: dict[str, tuple[Any, Any]]
    rise: Rise | None = None
    courses: dict[str, tuple[Course, Course]] = field(default_factory=dict)


def settle(
    config: ExperimentConfig,
    there: ExperimentConfig | None,
    manifest: dict[str, Any],
    step: int,
    where: Path,
    global_batch: int | None = None,
) -> Settings:
    """Decide what the changeable keys are from a step on.

    The images among which KoLeo seeks a neighbour are a rank's batch at the first start, and stay as many when the run
    goes on with another number of ranks, unless `loss.koleo_group` says otherwise.

    Args:
        config: of this start.
        there: `config.yaml` of the run directory, if there is one; of the run that is forked, if one is.
        manifest: as earlier starts left it.
        step: where the run goes on.
        where: the run directory.
        global_batch: images of a step from now on, those of one rank by default.

    Raises:
        UserError: KoLeo's group does not divide the batch.
    """
    values = {key: value for key, value in _flat(config) if key in CHANGEABLE_KEYS}
    past: list[dict[str, Any]] = []
    if step and there is not None:
        first = _values_of(there, manifest)  # a version that kept fewer keys, or none, let the others not change
        kept = manifest.get("settings") or [{"from_step": 0, "values": first}]
        past = [{**entry, "values": first | entry["values"]} for entry in kept if entry["from_step"] < step]
    before = past[-1]["values"] if past else None
    if values["loss.koleo_group"] is None:
        values["loss.koleo_group"] = before["loss.koleo_group"] if before else config.data.batch_size
    here = _with_group(config, values["loss.koleo_group"], where)
    if before is None or there is None:
        return Settings(here, [{"from_step": step, "values": values}], {})
    rise = Rise(**past[-1]["rise"]) if past[-1].get("rise") else None
    batch = global_batch or config.data.batch_size
    old = _schedules(there, before, manifest.get("global_batch") or batch, rise)
    new = _schedules(here, values, batch, rise)
    if new.at(step).lr > old.at(step).lr:
        rise = Rise(step, old.at(step).lr)
        new = _schedules(here, values, batch, rise)
    courses = {name: (old.course(name, step), new.course(name, step)) for name in LAID_OUT}
    courses = {name: pair for name, pair in courses.items() if pair[0] != pair[1] and not _constant(*pair)}
    if before == values and not courses:
        return Settings(here, past, {}, rise)
    entry = {"from_step": step, "values": values, "rise": rise and rise._asdict(), "courses": courses}
    changes = {key: (before[key], values[key]) for key in values if before[key] != values[key]}
    return Settings(here, [*past, entry], changes, rise, courses)


def _constant(*courses: Course) -> bool:
    return len({value for course in courses for _, value in course}) == 1


def require_same_experiment(there: ExperimentConfig, here: ExperimentConfig, where: Path) -> None:
    """Refuse to mix two experiments in one directory, naming the first key that differs.

    Raises:
        UserError: a key that decides what is computed differs.
    """
    old, new = (dict(_flat(config)) for config in (there, with_measured(here, there)))
    for key in old:
        if key not in CHANGEABLE_KEYS and old[key] != new[key]:
            raise UserError(
                f"the run directory holds another experiment: {key} is {old[key]} there and {new[key]} here",
                str(where),
                "choose another run.dir (--fork-from begins there from a checkpoint of this run), or the same value",
            )


def with_measured(config: ExperimentConfig, there: ExperimentConfig) -> ExperimentConfig:
    """A config that leaves `model.block_importance` open, with what the run that it goes on with has measured."""
    found = there.model.block_importance
    if found is None or config.model.block_importance is not None:
        return config
    if [*map(len, found)] != [choices[-1] for choices in config.model.depth_ranges]:
        return config  # of another network, which is refused for that
    return config.with_model(block_importance=found)


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


def _schedules(config: ExperimentConfig, values: Values, global_batch: int, rise: Rise | None) -> Schedules:
    """The schedules of a config with other values of the changeable keys."""
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return Schedules(OptimConfig(**tree["optim"]), LossConfig(**tree["loss"]), global_batch, rise)


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
