"""How this process was launched: by torchrun, as a task of a Slurm job step, or alone. Imports no torch."""

import os
from typing import NamedTuple

from pipeline.errors import UserError


class Launch(NamedTuple):
    """A process among its peers, as its launcher numbered them; `together` is false for one that is alone."""

    rank: int
    world_size: int
    local_rank: int
    together: bool


def launch() -> Launch:
    """What the environment says of this process.

    A RANK that is set (torchrun) wins over Slurm's variables. Of these, an interactive shell of an allocation hands on
    those of the job (SLURM_NTASKS) and those of its own step, which has one task: only a step of several tasks makes
    this process one of several.

    Raises:
        UserError: the variables are incomplete, or no numbers.
    """
    environ = os.environ
    names = None
    if "RANK" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if names is None:
        return Launch(0, 1, 0, together=False)
    try:
        rank, world_size, local_rank = (number_of(name) for name in names)
        number_of("MASTER_PORT")
        environ["MASTER_ADDR"]
    except KeyError as error:
        fix = "launch with torchrun or a script of slurm/, which set it"
        raise UserError(f"{error.args[0]} is missing", "environment", fix) from error
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}", "environment", f"number ranks from 0 in {names[0]}")
    return Launch(rank, world_size, local_rank, together=True)


def number_of(name: str, unset: int | None = None) -> int:
    """A variable that holds a number.

    Args:
        unset: what it is where it is missing or empty.

    Raises:
        KeyError: it is missing, and `unset` is not given.
        UserError: it is no number.
    """
    if unset is not None and not os.environ.get(name):
        return unset
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise UserError(
            f"{name}={os.environ[name]} is no number", "environment", "unset it, or set a number"
        ) from error
