"""What slurm/sweep.sbatch makes of a line: run as it is, with functions that print in the place of those that train."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "sweep.sbatch"


@pytest.fixture
def sweep(tmp_path):
    """Run the script for a line; returns the words with which training would begin."""
    (tmp_path / "common.sh").write_text("train_and_requeue() { printf '%s\\0' \"$@\"; }\n")

    def run(text: str, number: int, *words: str, name: str = "lines") -> list[str]:
        (tmp_path / name).write_bytes(text.encode())
        environment = {
            **os.environ,
            "POA_SLURM": str(tmp_path),
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_JOB_NAME": "poa-sweep",
        }
        command = ["bash", str(SCRIPT), "c.yaml", name, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 2), done.stderr
        return done.stdout.split("\0")[:-1] if done.returncode == 0 else [done.stderr]

    return run


def test_a_file_of_lines_may_have_any_name(sweep):
    for name in ("-lines.txt", "--help", "my 'lines' \u00fc"):
        assert sweep("run.dir=a\n", 1, name=name) == ["c.yaml", "run.dir=a"]


def test_blanks_within_a_value_do_not_split_it(sweep):
    text = "optim.epochs=3\nheads.prototypes=[64, 128]\t optim.ema=[0.9, 1] run.dir=runs/exp #2  \r\n"
    assert sweep(text, 2) == ["c.yaml", "heads.prototypes=[64, 128]", "optim.ema=[0.9, 1]", "run.dir=runs/exp #2"]


def test_a_run_without_a_directory_gets_one_and_no_key_comes_twice(sweep):
    assert sweep("optim.epochs=3", 1, "data.seed=1") == [
        "c.yaml", "data.seed=1", "optim.epochs=3", "run.dir=runs/poa-sweep-7/1",
    ]  # fmt: skip
    assert sweep("optim.epochs=3", 1, "run.dir=x") == ["c.yaml", "run.dir=x", "optim.epochs=3"]


def test_a_line_that_is_not_there_is_an_error(sweep):
    for text, number in (("a=1\n\nb=2\n", 2), ("a=1\n", 5)):
        assert f"error: no line {number}" in sweep(text, number)[0]
