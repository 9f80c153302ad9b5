"""Whether a process is one of several ranks."""

import pytest

from pipeline.engine.launch import Launch, launch
from pipeline.errors import UserError

MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "20000"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**JOB, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", **MASTER}
ALONE = Launch(0, 1, 0, together=False)


@pytest.fixture
def environment(monkeypatch):
    def use(variables: dict[str, str]) -> None:
        for name in {**TORCHRUN, **SRUN}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, Launch(3, 8, 1, together=True)),
        (SRUN, Launch(5, 8, 1, together=True)),
        ({**SRUN, **TORCHRUN}, Launch(3, 8, 1, together=True)),
        (JOB, ALONE),  # a batch script
        ({**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # salloc's interactive step
        ({**SRUN, "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "8"}, Launch(5, 8, 1, together=True)),  # srun -n 8
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # srun -n 1 within a job of eight
    ],
)
def test_several_ranks_take_evidence_of_torchrun_or_of_a_step_of_several_tasks(environment, variables, expected):
    environment(variables)
    assert launch() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE= is no number"),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, "MASTER_PORT=abc is no number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is missing"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "4"}, "rank 5 of 4"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment, variables, message):
    environment(variables)
    with pytest.raises(UserError, match=message):
        launch()
