"""Real faults on a real (throwaway) Slurm cluster: each run ends as complete as if nothing had happened.

A start takes longer than everything else, so a run meets several faults in its life, one in each attempt. Scenarios
run side by side: their waiting times overlap, and yet a run starts before it is taken for one that hangs. A run that
waits for Slurm is paused, so that it does not take the processors from the others. Where only the batch script is
looked at, which does not know how many ranks a run has, there is one.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from observed_run import SAVE_EVERY, Run, read_records
from slurm_cluster import Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tests" / "workers" / "train.py"
UNHURRIED = ROOT / "tests" / "workers" / "unhurried.py"
PAUSE = 0.25  # seconds before each step: from a fault's moment to a run's end are ten seconds and more
STEPS = 60
LONG = 120  # for several faults in a row
SIDE_BY_SIDE = 5
ACROSS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
TWO_NODES = [*ACROSS, "--nodelist=n1,n2"]
WITHIN = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
ALONE = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--exclude=n[1-8]"]


class Lab:
    """What a scenario needs: where to work, the cluster, and the undisturbed run, which knows nothing of Slurm."""

    def __init__(self, directory: Path, cluster: Cluster, tree: dict, launch: Callable[..., list[str]]):
        self.directory, self.cluster, self.tree, self.launch = directory, cluster, tree, launch
        self.plain = self.run_plainly("plain", 2, f"run.max_steps={LONG}")
        assert len(self.plain) == LONG
        self.jobs: dict[int, list[Job]] = {}  # by the thread of their scenario

    def submit(
        self,
        name: str,
        *overrides: str,
        options: list[str] | None = None,
        script: str = "pretrain",
        arguments: list[object] | None = None,
        site: str = "",
        steps: int = STEPS,
    ) -> Run:
        """Submit the real job script, with the options that this cluster wants in place of its defaults."""
        cwd = self.directory / name
        cwd.mkdir(exist_ok=True)
        slurm = cwd / "slurm"
        if not slurm.exists():
            shutil.copytree(ROOT / "slurm", slurm)
            python = f"POA_PYTHON=({sys.executable} -P {UNHURRIED})\nexport PAUSE={PAUSE} PYTHONPATH={ROOT}"
            (slurm / "site.sh").write_text(f"{python}\n{site}\n")
            (cwd / "config.yaml").write_text(yaml.safe_dump(self.tree))
        sbatch = ["--cpus-per-task=1", "--time=30", *(options or TWO_NODES)]
        words = [*(arguments or ["config.yaml"]), f"run.max_steps={steps}", *overrides]
        job = Job(self.cluster, slurm / f"{script}.sbatch", words, sbatch, cwd)
        self.jobs.setdefault(threading.get_ident(), []).append(job)
        return Run(job, cwd / "run", self.plain[:steps])

    def evaluate(self, name: str, after: Job) -> Job:
        """Submit the real script that evaluates a run once its job is done."""
        cwd, shards = self.directory / name, self.tree["data"]["train"].rpartition("/")[0]
        words = ["knn", "run", "--train", f"{shards}/train-000000.tar", "--val", f"{shards}/val-000000.tar"]
        options = ["--cpus-per-task=1", f"--dependency=afterok:{after.id}", "--kill-on-invalid-dep=yes"]
        return Job(self.cluster, cwd / "slurm" / "evaluate.sbatch", [*words, "--subnets", "32x2"], options, cwd)

    def run_plainly(self, name: str, ranks: int, *overrides: str) -> list[dict]:
        """Records of the same experiment in plain processes on this machine."""
        directory = self.directory / name
        self.launch(TRAIN, ranks, self.directory / "config.yaml", f"run.dir={directory}", *overrides, timeout=600)
        return read_records(directory)


def requeue(lab: Lab, run: Run) -> None:
    run.saves()
    with run.next_attempt(stops=True, asks=False):  # Slurm does it
        lab.cluster.run("scontrol", "requeue", run.job.id)


def usr1(lab: Lab, run: Run) -> None:
    run.makes_steps()
    with run.next_attempt(stops=True, asks=True):
        for _ in range(3):  # the second and third change nothing
            lab.cluster.run("scancel", "--signal=USR1", run.job.id, check=False)


def killed_rank(run: Run) -> None:
    run.saves()
    with run.next_attempt(stops=False, asks=True):
        (pid,) = run.job.tasks(1)
        os.kill(pid, signal.SIGKILL)
        run.job.until(lambda: "requeueing" in run.said, 120)


def stopped_rank(run: Run) -> None:
    """Rank 1 does nothing any more; `run.hang_timeout_seconds` is short."""
    run.saves()
    with run.next_attempt(stops=False, asks=True):
        (pid,) = run.job.tasks(1)
        os.kill(pid, signal.SIGSTOP)
        run.job.until(lambda: "requeueing" in run.said)
    assert re.search(rf"error: rank 1 of 2 \(.*process {pid}\) stopped: last seen \d+ s ago in", run.said)
    assert "Last known stack of rank 1:" in run.said


def full_disk(run: Run) -> None:
    """The job fails; afterwards there is room again. The run directory has a small disk of its own."""
    run.saves()
    run.begun, restarts = len(run.job.log), run.restarts
    with open(run.directory / "ballast", "wb", buffering=0) as ballast:

        def given_up() -> bool:
            """Room for log lines, none for a checkpoint; what the run frees by deleting an older one is taken too."""
            with contextlib.suppress(OSError):
                while shutil.disk_usage(run.directory).free > 300_000:
                    ballast.write(bytes(4096))
            return "without a new checkpoint: not trying again" in run.said

        run.job.until(given_up, every=0.05)
    run.job.ends("FAILED", restarts + 1)  # tried once more, for there was a new checkpoint
    assert re.search(r"error: cannot write the checkpoint of step \d+: .*No space left on device", run.said)
    (run.directory / "ballast").unlink()


def scancel(lab: Lab, run: Run) -> int:
    """Nobody brings the run back to life; gives the step at which it stopped."""
    run.makes_steps()
    run.begun, restarts = len(run.job.log), run.restarts
    lab.cluster.run("scancel", run.job.id)
    run.job.ends("CANCELLED", restarts, 120)
    run.job.until(lambda: not run.job.tasks(0) + run.job.tasks(1), 60)
    assert "requeueing" not in run.said
    (stopped,) = run.stopped_at()
    return stopped


def crashed_node(lab: Lab, run: Run) -> None:
    """A node dies with all that runs on it; the batch script and rank 0 are on another, and a third one is free."""
    run.saves()
    (dead,) = run.job.nodes() - {run.job.field("BatchHost")}
    try:
        with run.next_attempt(stops=False):
            lab.cluster.crash_node(dead)
        assert dead not in run.job.nodes()
    finally:
        lab.cluster.start_node(dead)


def warned_of_its_limit(lab: Lab, run: Run) -> None:
    """The job wants to be warned 175 s before its time limit, like the job script itself."""
    run.saves()
    restarts = run.restarts
    with run.next_attempt(stops=True, asks=True):
        run.pause()  # Slurm wakes it before it sends USR1
        hours, minutes, _ = map(int, run.job.field("RunTime").split(":"))
        # 120 to 180 s are left, so the signal is due the next time that Slurm looks
        lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", f"timelimit={60 * hours + minutes + 3}")
        run.job.until(lambda: run.restarts > restarts)
        lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", "timelimit=30")
    assert "DUE TO TIME LIMIT" not in run.said


def at_its_limit(lab: Lab, run: Run) -> int:
    """Bring a run to its time limit, of which Slurm gives no warning; rank 1, whose pid is given, is stopped.

    Slurm looks at limits every 30 s; a stopped run leaves the processors to the others until then.
    """
    (pid,) = run.job.tasks(1)
    os.kill(pid, signal.SIGSTOP)
    lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", "EndTime=now+2")
    return pid


def limit_with_time_to_save(lab: Lab, run: Run) -> None:
    run.saves()
    restarts = run.restarts
    with run.next_attempt(stops=True, asks=True):  # and not from the checkpoint before
        at_its_limit(lab, run)  # Slurm wakes it, then sends TERM
        run.job.until(lambda: run.restarts > restarts)
        lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", "timelimit=30")
    assert "DUE TO TIME LIMIT" in run.said


def limit_without_time_to_save(lab: Lab, run: Run) -> None:
    """The job is over."""
    run.saves()
    run.begun, restarts = len(run.job.log), run.restarts
    pid = at_its_limit(lab, run)
    deadline = time.monotonic() + 240
    with contextlib.suppress(ProcessLookupError):  # until KILL
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.005)
    run.job.ends("TIMEOUT", restarts, 60)
    assert not run.stopped_at()
    assert "requeueing" not in run.said


def preemption(lab: Lab, run: Run) -> None:
    """A job of higher priority wants the node that the run is on."""
    run.saves()
    with run.next_attempt(stops=True):
        run.pause()  # Slurm wakes it, then sends TERM
        urgent = ["--partition=urgent", f"--nodelist={run.job.field('NodeList')}", "--exclusive"]
        lab.cluster.run("sbatch", *urgent, "--output=/dev/null", "--wrap=true")
    assert "DUE TO PREEMPTION" in run.said


def killed_daemon(lab: Lab, run: Run) -> None:
    """Only slurmd dies: Slurm starts the job again elsewhere, and the old ranks, which live on, must not interfere."""
    run.saves()
    node, restarts = run.job.field("NodeList"), run.restarts
    try:
        with run.next_attempt(stops=False):
            old = run.pause()
            lab.cluster.kill_daemon(node)
            owner = run.directory / ".owner"
            run.job.until(lambda: f"{run.job.id}.{restarts + 1}" in owner.read_text())
            for pid in old:
                os.kill(pid, signal.SIGCONT)
        assert not Path(f"/proc/{old[0]}").exists()
        run.job.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), 60)
        run.job.ends("COMPLETED", restarts + 1)
    finally:
        lab.cluster.start_node(node)


def ended_by_another_job(lab: Lab, run: Run, *overrides: str) -> None:
    """Cancel a run and let another job end it."""
    stopped = scancel(lab, run)
    again = lab.submit(run.directory.parent.name, *overrides, steps=LONG)
    again.expected = run.expected
    again.job.ends("COMPLETED", 0)
    again.is_complete()
    assert again.resumed_at() == [stopped]


def requeue_usr1_a_killed_rank_a_stopped_rank_a_full_disk_scancel(lab: Lab) -> None:
    directory = lab.directory / "zero" / "run"
    directory.mkdir(parents=True)
    lab.cluster.run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", directory)
    try:
        run = lab.submit("zero", "run.keep=1", "run.hang_timeout_seconds=90", steps=LONG)
        requeue(lab, run)
        usr1(lab, run)
        killed_rank(run)
        stopped_rank(run)
        full_disk(run)
        run = lab.submit("zero", "run.keep=1", steps=LONG)
        run.job.until(run.resumed_at)
        assert run.resumed_at()[0] % SAVE_EVERY == 0
        ended_by_another_job(lab, run, "run.keep=1")
    finally:
        lab.cluster.run("umount", "--lazy", directory)


def fsdp2_requeue_usr1_a_killed_rank_scancel(lab: Lab) -> None:
    keys = ("engine.backend=fsdp2", "engine.zero_stage=null", "engine.reshard_after_forward=true")
    expected = lab.run_plainly("plain_fsdp2", 2, f"run.max_steps={LONG}", *keys)
    run = lab.submit("fsdp2", *keys, steps=LONG)
    run.expected = expected
    requeue(lab, run)
    usr1(lab, run)
    killed_rank(run)
    ended_by_another_job(lab, run, *keys)
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert len(manifest["starts"]) == 5


def a_crashed_node_time_limits_preemption_a_killed_daemon(lab: Lab) -> None:
    # the script asks for USR1, while this signal has no effect; on nodes of their own, stopped runs are in nobody's way
    run = lab.submit("limits", options=[*ACROSS, "--exclude=n[1-5,9-10]", "--signal=CONT@1"], steps=LONG)
    crashed_node(lab, run)
    limit_with_time_to_save(lab, run)
    limit_without_time_to_save(lab, run)
    run = lab.submit("limits", options=[*WITHIN, "--exclude=n[1-2,6-10]", "--signal=USR1@175"], steps=LONG)
    run.job.until(run.resumed_at)
    assert run.resumed_at()[0] % SAVE_EVERY == 0
    warned_of_its_limit(lab, run)
    preemption(lab, run)
    killed_daemon(lab, run)
    run.is_complete()


def scancel_while_requeueing(lab: Lab) -> None:
    """The signal of a cancellation ends `scontrol requeue` too; asked again, Slurm would bring the job back to life."""
    slow = 'scontrol() { [ "$1" != requeue ] || sleep 20; command scontrol "$@"; }'
    run = lab.submit("resurrected", options=ALONE, site=slow)
    run.saves()
    lab.cluster.run("scancel", "--signal=USR1", run.job.id)
    run.job.until(lambda: "requeueing" in run.job.log)
    lab.cluster.run("scancel", run.job.id)
    run.job.until(lambda: "ended by Slurm" in run.job.log, 120)
    run.job.ends("CANCELLED", 0, 120)


def usr1_without_requeue(lab: Lab) -> None:
    run = lab.submit("stay", "run.requeue=false", options=ALONE)
    run.saves()
    lab.cluster.run("scancel", "--signal=USR1", run.job.id)
    run.job.ends("FAILED", 0)
    assert run.job.field("ExitCode") == "75:0"


def diverged(lab: Lab) -> None:
    """A run whose steps are no longer finite: another attempt would end alike, so there is none."""
    run = lab.submit("diverged", "optim.base_lr=1e30", "optim.max_bad_steps=3", options=ALONE)
    run.job.ends("FAILED", 0)
    assert "3 steps in a row were not finite" in run.job.log
    assert re.search(r"gave up at step \d+: another attempt would end alike", run.job.log)
    records = read_records(run.directory)
    good = [r["step"] for r in records if "bad" not in r]
    assert [path.name for path in (run.directory / "checkpoints").glob("step_*")] == [f"step_{good[-1]:08d}"]


def sweep(lab: Lab) -> None:
    """An array of two, the second (which carries the array's own number) stopped and requeued by itself."""
    expected = lab.run_plainly("plain1", 1, f"run.max_steps={STEPS}")
    cwd = lab.directory / "sweep"
    cwd.mkdir()
    (cwd / "lines").write_text(f"run.dir={cwd}/run\noptim.base_lr=0.01 run.dir={cwd}/slow\n")
    run = lab.submit("sweep", options=[*ALONE, "--array=1-2"], script="sweep", arguments=["config.yaml", "lines"])
    run.expected = expected
    slow = cwd / "slow" / "metrics.jsonl"
    run.job.until(lambda: slow.exists() and slow.read_text().count("\n") > 12, every=0.05)
    lab.cluster.run("scancel", "--signal=USR1", f"{run.job.id}_2")
    jobs = lambda: lab.cluster.run("scontrol", "-o", "show", "job", run.job.id).splitlines()  # noqa: E731
    run.job.until(lambda: all("JobState=COMPLETED" in line for line in jobs()), every=1.0)
    restarts = {re.search(r"ArrayTaskId=(\d+)", j)[1]: re.search(r"Restarts=(\d+)", j)[1] for j in jobs()}
    assert restarts == {"1": "0", "2": "1"}
    run.is_complete()


def four_ranks_then_an_evaluation(lab: Lab) -> None:
    """Two tasks on each of two nodes against four plain processes, undisturbed, and what waits for their end."""
    expected = lab.run_plainly("plain4", 4, f"run.max_steps={SAVE_EVERY}")
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--nodelist=n9,n10"]
    run = lab.submit("four", options=options, steps=SAVE_EVERY)
    evaluation = lab.evaluate("four", after=run.job)
    run.job.ends("COMPLETED", 0)
    run.expected = expected
    assert len(expected) == SAVE_EVERY
    run.is_complete()
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["starts"][0]["environment"]["SLURM_JOB_ID"] == run.job.id
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["run"]["max_steps"] == SAVE_EVERY
    evaluation.ends("COMPLETED", 0)
    assert "32x2" in json.loads((run.directory / "eval" / "knn.json").read_text())


def doctor(lab: Lab) -> None:
    """The doctor on two nodes, started like the job."""
    run = lab.submit("doctor", script="doctor")
    run.job.ends("COMPLETED", 0)
    assert re.search(r"^0: pass  all-reduce +2 ranks at hand \(gloo\)", run.job.log, re.MULTILINE)
    assert re.search(r"^0: pass  clocks +2 ranks within", run.job.log, re.MULTILINE)
    assert not re.search("^1: (pass|warn|fail)", run.job.log, re.MULTILINE)  # one table


SCENARIOS: dict[str, Callable[[Lab], None]] = {
    scenario.__name__: scenario
    for scenario in (
        a_crashed_node_time_limits_preemption_a_killed_daemon,  # those that take longest first
        requeue_usr1_a_killed_rank_a_stopped_rank_a_full_disk_scancel,
        fsdp2_requeue_usr1_a_killed_rank_scancel,
        sweep,
        four_ranks_then_an_evaluation,
        scancel_while_requeueing,
        usr1_without_requeue,
        diverged,
        doctor,
    )
}


@pytest.fixture(scope="module")
def lab(cluster: Cluster, launch, experiment, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    directory = tmp_path_factory.mktemp("faults")
    tree = experiment(  # as little to compute as will do
        model={"depth": {"min": 2, "max": 3, "step": 1}},
        heads={"prototypes": [48]},
        data={"local_crops": {"count": 1, "size": 16}},
        optim={"epochs": 50_000, "steps_per_epoch": 2},
        run={"dir": "run", "checkpoint_every_steps": SAVE_EVERY, "hang_timeout_seconds": 300},
        metrics={"port": 0, "tensorboard": False},
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    return Lab(directory, cluster, tree, launch)


@pytest.fixture(scope="module")
def outcomes(lab: Lab, request: pytest.FixtureRequest):
    """The selected scenarios, under way."""
    own = [item for item in request.session.items if item.path == request.path and "outcomes" in item.fixturenames]
    selected = {item.callspec.params["scenario"] for item in own}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {n: pool.submit(_supervised, scenario, lab) for n, scenario in SCENARIOS.items() if n in selected}


def _supervised(scenario: Callable[[Lab], None], lab: Lab) -> None:
    """Free the nodes for the others when a scenario fails."""
    try:
        scenario(lab)
    except BaseException:
        for job in lab.jobs.get(threading.get_ident(), []):
            lab.cluster.run("scancel", job.id, check=False)
        raise


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_run_survives(outcomes: dict[str, Future], scenario: str):
    outcomes[scenario].result()
