"""What a step tells, one value per concern; `pipeline.run.step` fills it in, the loop and the monitor read it."""

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.elastic.subnet import Subnet
from pipeline.engine.agreement import Agreement
from pipeline.measure.health import BranchHealth
from pipeline.method.schedules import StepValues


class Timing(NamedTuple):
    """Wall seconds of this rank; a step ends when its values are known, or what it was queued behind is over."""

    data_wait: float
    step: float


class Health(NamedTuple):
    """Signs of collapse.

    Attributes:
        branches: by slot of `measure.health`.
        center_norms: norm of the centers by kind of token.
    """

    branches: dict[str, BranchHealth]
    center_norms: dict[str, float]


@dataclass(frozen=True)
class StepReport:
    """What is known after a step.

    Attributes:
        agreed: the same on all ranks.
        values: the schedules of this step.
        subnet: the elastic student of this rank, if there is one.
        timing: of this rank.
        phases: seconds by phase up to this step, since the process started, of this rank.
        health: at every `metrics.health_every_steps` steps, else None.
    """

    agreed: Agreement
    values: StepValues
    subnet: Subnet | None
    timing: Timing
    phases: dict[str, float]
    health: Health | None
