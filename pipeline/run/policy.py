"""What follows from a step: a pure function of what all ranks know, so that all of them decide alike."""

from dataclasses import dataclass
from enum import Enum

from pipeline.config import ExperimentConfig


class End(Enum):
    """Why a run ends. The value is the process's exit code."""

    DONE = 0
    FAILED = 1
    STOPPED = 75


@dataclass(frozen=True)
class Policy:
    """What a run does when, in completed steps.

    Attributes:
        last_step: where it ends.
        log_every: steps between records.
        save_every: steps between checkpoints.
        evaluate_every: steps between evaluations, None for none.
        max_bad_steps: bad steps in a row that end it.
    """

    last_step: int
    log_every: int
    save_every: int
    evaluate_every: int | None
    max_bad_steps: int

    @classmethod
    def of(cls, config: ExperimentConfig) -> "Policy":
        total = config.optim.total_steps
        return cls(
            last_step=min(total, config.run.max_steps or total),
            log_every=config.run.log_every_steps,
            save_every=config.run.checkpoint_every_steps,
            evaluate_every=config.eval.every_steps,
            max_bad_steps=config.optim.max_bad_steps,
        )


@dataclass(frozen=True)
class Decision:
    """What to do after a step, in this order; `end` is why the run ends with it, None if it goes on."""

    evaluate: bool
    log: bool
    save: bool
    end: End | None


def after(policy: Policy, step: int, bad_in_a_row: int, stop: bool) -> Decision:
    """Decide.

    Args:
        policy: of the run.
        step: completed steps.
        bad_in_a_row: how many of them, up to this one, were bad.
        stop: some rank was asked to stop.
    """
    last = step == policy.last_step
    exhausted = bad_in_a_row >= policy.max_bad_steps
    end = End.FAILED if exhausted else End.DONE if last else End.STOPPED if stop else None
    return Decision(
        evaluate=policy.evaluate_every is not None and step % policy.evaluate_every == 0,
        log=step % policy.log_every == 0 or last or bad_in_a_row > 0,
        save=step % policy.save_every == 0 or end is not None,
        end=end,
    )
