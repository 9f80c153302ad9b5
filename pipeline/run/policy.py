"""What follows from a step: a pure function of what all ranks know, so that all of them decide alike."""

from dataclasses import dataclass
from enum import Enum

from pipeline.config import ExperimentConfig


class End(Enum):
    """Why a run ends: its process's exit code, and whether the same command may be worth another try."""

    DONE = "done"
    STOPPED = "stopped"
    TRY_AGAIN = "try again"
    GIVE_UP = "give up"

    @property
    def exit_code(self) -> int:
        return {End.DONE: 0, End.STOPPED: 75}.get(self, 1)


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


def may_run_ahead(policy: Policy, begun: int, bad_in_a_row: int) -> bool:
    """Whether another step may begin before the values of the last one are read.

    It may not where the weights as they are then are wanted: for a checkpoint, an evaluation, or because the run ends.

    Args:
        policy: of the run.
        begun: steps begun so far; the values of all but the last are known.
        bad_in_a_row: how many of these, up to the last, were bad.
    """
    wanted = begun % policy.save_every == 0 or begun == policy.last_step
    evaluated = policy.evaluate_every is not None and begun % policy.evaluate_every == 0
    return not (wanted or evaluated or bad_in_a_row + 1 >= policy.max_bad_steps)


class Save(Enum):
    """Which state to save, if it is not saved yet."""

    NOW = "as it is now"
    GOOD = "after the last good step"


@dataclass(frozen=True)
class Decision:
    """What to do after a step, in this order; `end` is why the run ends with it, None if it goes on."""

    evaluate: bool
    log: bool
    save: Save | None
    end: End | None


def after(policy: Policy, step: int, bad_in_a_row: int, stop: bool) -> Decision:
    """Decide.

    Bad steps change no weights, so what they would save is the last good state under later names, for which retention
    would let the good ones go.

    Args:
        policy: of the run.
        step: completed steps.
        bad_in_a_row: how many of them, up to this one, were bad.
        stop: some rank was asked to stop.
    """
    last = step == policy.last_step
    exhausted = bad_in_a_row >= policy.max_bad_steps
    end = End.GIVE_UP if exhausted else End.DONE if last else End.STOPPED if stop else None
    save = None
    if end is not None or step % policy.save_every == 0:
        save = Save.GOOD if bad_in_a_row and end is not End.DONE else Save.NOW
    return Decision(
        evaluate=policy.evaluate_every is not None and step % policy.evaluate_every == 0,
        log=step % policy.log_every == 0 or last or bad_in_a_row > 0,
        save=save,
        end=end,
    )
