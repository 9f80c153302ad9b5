"""What slurm/common.sh makes of the end of a run, with stand-ins for Slurm's commands (real ones: `tests/cluster`)."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_INS = """
POA_SLURM={root}/slurm
source "$POA_SLURM/common.sh"
sleep() {{ :; }}
getent() {{ :; }}
srun() {{ {srun}; }}
scontrol() {{
    case "$*" in
        "show hostnames "*) echo n1 ;;
        requeue*) echo "scontrol $*" >>"$LOG" ;;
        *)
            if [ "$(wc -l <"$LOG")" -lt {away} ]; then echo away >>"$LOG"; return 1; fi
            echo "JobState=X Reason={reason} Restarts=0 "
            ;;
    esac
}}
"""


def run(tmp_path: Path, srun: str, reason: str = "None", away: int = 0, command: str = "train_and_requeue"):
    """Exit code, what was printed, and what Slurm was asked for; it answers from the `away`-th question on."""
    log = tmp_path / "log"
    log.write_text("")
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "LOG": str(log)}
    environment |= {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    script = STAND_INS.format(root=ROOT, srun=srun, reason=reason, away=away) + command
    words = ["bash", "-uo", "pipefail", "-c", script]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr, log.read_text()


def ends(how: str, code: int, step: int) -> str:
    return f'echo {step} >"$POA_JOB_DIR/progress"; echo "{how}" >"$POA_JOB_DIR/end.0"; return {code}'


@pytest.mark.parametrize(
    ("srun", "code", "message", "requeued"),
    [
        (ends("done", 0, 9), 0, "done", False),
        (ends("stopped", 75, 9), 1, "stopped on a signal at step 9; requeueing", True),
        (ends("stay", 75, 9), 75, "run.requeue is off", False),
        (ends("give up", 1, 9), 1, "gave up at step 9: another attempt would end alike", False),
        (ends("give up", 2, 9), 2, "gave up", False),
        (ends("try again", 1, 9), 1, "failed (exit code 1) after saving step 9; requeueing", True),
        (ends("try again", 1, 0), 1, "without a new checkpoint: not trying again", False),
        ('echo 9 >"$POA_JOB_DIR/progress"; return 137', 1, "failed (exit code 137) after saving step 9", True),
        ("return 137", 137, "without a new checkpoint: not trying again", False),
    ],
)
def test_job_does_what_the_run_says(tmp_path, srun, code, message, requeued):
    found, output, log = run(tmp_path, srun)
    assert found == code, output
    assert message in output
    assert ("scontrol requeue 7" in log) == requeued


def test_word_of_an_earlier_job_with_the_same_number_does_not_count(tmp_path):
    directory = tmp_path / "runs" / ".jobs" / "7"
    directory.mkdir(parents=True)
    (directory / "end.0").write_text("done\n")
    code, output, _ = run(tmp_path, "return 1")
    assert code == 1
    assert "without a new checkpoint" in output


TERMINATED = 'kill -TERM $$; echo 9 >"$POA_JOB_DIR/progress"; echo stopped >"$POA_JOB_DIR/end.0"; return 75'


@pytest.mark.parametrize(("reason", "requeued"), [("TimeLimit", True), ("None", False)])
def test_controller_that_does_not_answer_is_asked_again_before_a_job_counts_as_cancelled(tmp_path, reason, requeued):
    code, output, log = run(tmp_path, TERMINATED, reason=reason, away=3)
    assert code == 1
    assert output.count("no answer from Slurm") == 3
    assert ("scontrol requeue 7" in log) == requeued
    assert ("ended by Slurm" in output) != requeued


@pytest.mark.parametrize(
    ("variables", "cpus"),
    [
        ("SLURM_CPUS_PER_TASK=12", 12),
        ("SLURM_CPUS_PER_GPU=6", 6),
        ("SLURM_CPUS_PER_GPU=6 SLURM_GPUS_PER_TASK=h100:2", 12),
        ("SLURM_CPUS_PER_TASK=4 SLURM_CPUS_PER_GPU=6", 4),
        ("OTHER=1", 1),
    ],
)
def test_cpus_of_a_task_follow_from_those_of_a_gpu(tmp_path, variables, cpus):
    code, output, _ = run(tmp_path, "true", command=f"{variables}; cpus_per_task")
    assert (code, output.strip()) == (0, str(cpus))


TASK = 'while [ "$1" != bash ]; do shift; done; "$@"'
SHOW_CACHES = """POA_PYTHON=(bash -c 'echo "<$TORCHINDUCTOR_CACHE_DIR> <$TRITON_CACHE_DIR>"'); run_tasks train"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", "<{0}/cache/inductor> <{0}/cache/triton>"),
        ("export SLURM_RESTART_COUNT=3 SLURM_JOB_ID=8", "<{0}/cache/inductor> <{0}/cache/triton>"),  # found again
        ("export TRITON_CACHE_DIR=/mine", "<{0}/cache/inductor> </mine>"),
        ("ln -s elsewhere {0}/cache", "<> <>"),  # where another user could put what will be run
        ("touch {0}/cache", "<> <>"),
    ],
)
def test_compilers_keep_what_they_made_on_a_disk_of_the_node_in_a_directory_of_the_users_own(
    tmp_path, before, expected
):
    (tmp_path / "elsewhere").mkdir()
    command = f"POA_CACHE={tmp_path}/cache; {before.format(tmp_path)}\n{SHOW_CACHES}"
    code, output, _ = run(tmp_path, TASK, command=command)
    assert code == 0
    assert expected.format(tmp_path) in output.splitlines()
    assert ("is no directory of this user" in output) == (expected == "<> <>")
    if not before:
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


CONTAINER = """#!/bin/bash
# stands in for a container: what Slurm brings to the node is not in it, and the variables of the job are
echo "container $0 $*" >>"$LOG"
while [ "$1" != bash ]; do shift; done
unset -f scontrol
PATH=${0%/*}/inside exec "$@"
"""
SRUN = 'while [[ $1 == --* ]]; do echo "srun $1" >>"$LOG"; shift; done; "$@"'
SEEN = (
    """POA_PYTHON=(bash -c 'echo "rank at $MASTER_ADDR, cache $TRITON_CACHE_DIR, scontrol: $(command -v scontrol)"')"""
)


def test_apptainer_is_what_each_task_runs_in(tmp_path):
    image = tmp_path / "apptainer"
    image.write_text(CONTAINER)
    image.chmod(0o755)
    (tmp_path / "inside").mkdir()
    for name in ("bash", "mkdir"):
        (tmp_path / "inside" / name).symlink_to(shutil.which(name))
    settings = f"POA_CONTAINER=({image} exec --nv --bind /scratch poa.sif); POA_CACHE={tmp_path}/cache; {SEEN}"
    script = f"scontrol() {{ echo n1; }}; export -f scontrol\n{settings}\nprepare; run_tasks train a.yaml"
    code, output, log = run(tmp_path, SRUN, command=script)
    assert code == 0, output
    assert f"rank at n1, cache {tmp_path}/cache/triton, scontrol: \n" in output
    assert f"container {image} exec --nv --bind /scratch poa.sif bash -c" in log
    assert "-P -m pipeline train a.yaml" in log


def test_options_of_pyxis_go_to_srun_and_not_into_the_task(tmp_path):
    settings = "POA_CONTAINER=(--container-image=poa.sqsh --container-mounts=/scratch)"
    code, output, log = run(tmp_path, SRUN, command=f"{settings}\nPOA_PYTHON=(echo python)\nrun_tasks doctor a.yaml")
    assert code == 0, output
    assert "srun --container-image=poa.sqsh\nsrun --container-mounts=/scratch\n" in log
    assert output.strip().endswith("python -P -m pipeline doctor a.yaml")


def test_both_recipes_of_a_container_take_the_same_steps_and_know_both_wheels_of_dali():
    folder = ROOT / "slurm" / "container"
    docker, apptainer, steps = ((folder / name).read_text() for name in ("Dockerfile", "poa.def", "install.sh"))
    assert "RUN bash slurm/container/install.sh" in docker
    assert "bash slurm/container/install.sh" in apptainer
    wheels = dict(re.findall(r'"(cuda1\d0)": (\d+)', (ROOT / "setup.py").read_text()))
    assert set(wheels) == {"cuda120", "cuda130"}
    assert all(wheel in docker + apptainer + steps for wheel in wheels)
    subprocess.run(["bash", "-n", folder / "install.sh"], check=True)


def test_what_the_recipes_of_a_container_copy_is_enough_to_install_from(tmp_path):
    folder = ROOT / "slurm" / "container"
    docker, apptainer = ((folder / name).read_text() for name in ("Dockerfile", "poa.def"))
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE) for name in line.split()}
    assert copied == {name for name, _ in re.findall(r"^    (\S+) /src/(\S+)$", apptainer, re.MULTILINE)}
    for name in copied:
        target = tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", ".", "-w", tmp_path],
        cwd=tmp_path / "src",
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("poa_safe_path.pth") for name in names)
    assert "pipeline/cli.py" in names
