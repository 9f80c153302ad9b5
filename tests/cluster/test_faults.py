"""Real faults on a real (throwaway) Slurm cluster: each run ends as complete as if nothing had happened.

Some scenarios run side by side: their waiting times overlap, and yet a run starts before it is taken for one that
hangs. A run that waits for Slurm is paused, so that it does not take the processors from the others.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from slurm_cluster import FINAL, Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "tests" / "workers" / "train.py"
STEPS = 60
LONG = 120  # for several faults in a row
SAVE_EVERY = 10
SIDE_BY_SIDE = 5
AGREED = ("loss", "lr", "momentum", "grad_norm", "subnet", "images")
ACROSS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
TWO_NODES = [*ACROSS, "--nodelist=n1,n2"]
WITHIN = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]


class Lab:
    """What a scenario needs: where to work, the cluster, and the undisturbed run, which knows nothing of Slurm."""

    def __init__(self, directory: Path, cluster: Cluster, tree: dict, launch: Callable[..., list[str]]):
        self.directory, self.cluster, self.tree, self.launch = directory, cluster, tree, launch
        self.long = self.run_plainly("plain", 2, f"run.max_steps={LONG}")
        assert len(self.long) == LONG
        self.expected = self.long[:STEPS]
        self.jobs: dict[int, list[Job]] = {}  # by the thread of their scenario

    def submit(
        self,
        name: str,
        *overrides: str,
        options: list[str] | None = None,
        script: str = "pretrain",
        arguments: list[object] | None = None,
        site: str = "",
    ) -> "Run":
        """Submit the real job script, with the options that this cluster wants in place of its defaults."""
        cwd = self.directory / name
        cwd.mkdir(exist_ok=True)
        slurm = cwd / "slurm"
        if not slurm.exists():
            shutil.copytree(ROOT / "slurm", slurm)
            (slurm / "site.sh").write_text(f"POA_PYTHON=({sys.executable})\nexport PYTHONPATH={ROOT}\n{site}\n")
            (cwd / "config.yaml").write_text(yaml.safe_dump(self.tree))
        sbatch = ["--cpus-per-task=1", "--time=30", *(options or TWO_NODES)]
        ends = any(override.startswith("run.max_steps=") for override in overrides)
        keys = list(overrides) if ends else [f"run.max_steps={STEPS}", *overrides]
        job = Job(self.cluster, slurm / f"{script}.sbatch", [*(arguments or ["config.yaml"]), *keys], sbatch, cwd)
        self.jobs.setdefault(threading.get_ident(), []).append(job)
        return Run(job, cwd / "run", self.expected)

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


def read_records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class Run:
    def __init__(self, job: Job, directory: Path, expected: list[dict]):
        self.job, self.directory, self.expected = job, directory, expected

    @property
    def steps(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def saved(self) -> int:
        path = self.directory / "checkpoints" / "latest"
        return int(path.read_text()[len("step_") :]) if path.exists() else 0

    def reaches(self, step: int) -> None:
        """So many steps are made, and the checkpoint that was due on the way is complete."""
        there = lambda: self.steps >= step and self.saved >= step // SAVE_EVERY * SAVE_EVERY  # noqa: E731
        looks = itertools.count(1)  # the files are looked at often: while the controller is asked, the run goes on
        self.job.until(lambda: there() or (next(looks) % 100 == 0 and self.job.field("JobState") in FINAL), every=0.05)
        assert there(), self.job.log[-6000:]

    def pause(self) -> list[int]:
        """Stop the processes of both ranks; gives their pids."""
        pids = [pid for rank in (0, 1) for pid in self.job.tasks(rank)]
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return pids

    def is_complete(self) -> None:
        """Every step is there once, with the values of the undisturbed run to the last bit."""
        records = read_records(self.directory)
        assert [r["step"] for r in records] == [r["step"] for r in self.expected]
        for record, wanted in zip(records, self.expected, strict=True):
            assert {key: record[key] for key in AGREED} == {key: wanted[key] for key in AGREED}

    def resumed_at(self) -> list[int]:
        return [int(step) for step in re.findall(r"resuming .* at step (\d+)", self.job.log)]


def undisturbed(lab: Lab) -> None:
    run = lab.submit("undisturbed")
    evaluation = lab.evaluate("undisturbed", after=run.job)
    run.job.ends("COMPLETED", 0)
    run.is_complete()
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["starts"][0]["environment"]["SLURM_JOB_ID"] == run.job.id
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["run"]["max_steps"] == STEPS
    evaluation.ends("COMPLETED", 0)
    assert "32x2" in json.loads((run.directory / "eval" / "knn.json").read_text())


def doctor(lab: Lab) -> None:
    """The doctor on two nodes, started like the job."""
    run = lab.submit("doctor", script="doctor")
    run.job.ends("COMPLETED", 0)
    assert re.search(r"^0: pass  all-reduce +2 ranks at hand \(gloo\)", run.job.log, re.MULTILINE)
    assert re.search(r"^0: pass  clocks +2 ranks within", run.job.log, re.MULTILINE)
    assert not re.search("^1: (pass|warn|fail)", run.job.log, re.MULTILINE)  # one table


def four_ranks(lab: Lab) -> None:
    """Two tasks on each of two nodes against four plain processes."""
    expected = lab.run_plainly("plain4", 4, f"run.max_steps={SAVE_EVERY}")
    run = lab.submit(
        "four",
        f"run.max_steps={SAVE_EVERY}",
        options=["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--nodelist=n1,n2"],
    )
    run.job.ends("COMPLETED", 0)
    run.expected = expected
    assert len(expected) == SAVE_EVERY
    run.is_complete()


def requeue_then_usr1_then_a_killed_rank(lab: Lab) -> None:
    run = disturbed_thrice(lab, "thrice", lab.long)
    run.job.ends("COMPLETED", 3)
    run.is_complete()
    assert len(run.resumed_at()) == 3


def the_same_under_fsdp2_then_scancel(lab: Lab) -> None:
    keys = ("engine.backend=fsdp2", "engine.zero_stage=null", "engine.reshard_after_forward=true")
    expected = lab.run_plainly("plain_fsdp2", 2, f"run.max_steps={LONG}", *keys)
    run = disturbed_thrice(lab, "fsdp2", expected, *keys)
    run.reaches(run.resumed_at()[-1] + 5)
    cancelled(lab, run, f"run.max_steps={LONG}", *keys)
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert len(manifest["starts"]) == 5


def disturbed_thrice(lab: Lab, name: str, expected: list[dict], *overrides: str) -> Run:
    run = lab.submit(name, f"run.max_steps={LONG}", *overrides)
    run.expected = expected
    run.reaches(12)
    lab.cluster.run("scontrol", "requeue", run.job.id)
    run.job.until(lambda: len(run.resumed_at()) == 1)
    stopped = re.findall(r"stopped on a signal after saving step (\d+)", run.job.log)
    assert run.resumed_at() == [int(step) for step in stopped]  # nothing is lost
    assert "requeueing" not in run.job.log  # Slurm did it

    run.reaches(run.resumed_at()[-1] + 5)
    for _ in range(3):  # the second and third change nothing
        lab.cluster.run("scancel", "--signal=USR1", run.job.id, check=False)
    run.job.until(lambda: len(run.resumed_at()) == 2)
    stopped = re.findall(r"stopped on a signal after saving step (\d+)", run.job.log)
    assert run.resumed_at() == [int(step) for step in stopped]
    assert run.job.log.count("requeueing") == 1

    run.reaches(max(run.resumed_at()[-1] + 5, SAVE_EVERY * (run.resumed_at()[-1] // SAVE_EVERY + 1) + 2))
    (pid,) = run.job.tasks(1)
    os.kill(pid, signal.SIGKILL)
    run.job.until(lambda: run.job.log.count("requeueing") == 2, 120)
    run.job.until(lambda: len(run.resumed_at()) == 3)
    assert run.resumed_at()[-1] % SAVE_EVERY == 0  # since the last checkpoint, no more
    return run


def usr1_without_requeue(lab: Lab) -> None:
    run = lab.submit("stay", "run.requeue=false")
    run.reaches(12)
    lab.cluster.run("scancel", "--signal=USR1", run.job.id)
    run.job.ends("FAILED", 0)
    assert run.job.field("ExitCode") == "75:0"


def time_limit(lab: Lab) -> None:
    run = lab.submit("limit", options=[*TWO_NODES, "--signal=USR1@175"])
    run.reaches(12)
    run.pause()  # Slurm wakes it before it sends USR1
    hours, minutes, _ = map(int, run.job.field("RunTime").split(":"))
    # 120 to 180 s are left, so the signal is due the next time that Slurm looks
    lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", f"timelimit={60 * hours + minutes + 3}")
    run.job.until(lambda: int(run.job.field("Restarts") or 0) >= 1)
    lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", "timelimit=30")
    run.job.ends("COMPLETED", 1)
    run.is_complete()
    (stopped,) = re.findall(r"stopped on a signal after saving step (\d+)", run.job.log)
    assert run.resumed_at() == [int(stopped)]
    assert "DUE TO TIME LIMIT" not in run.job.log
    assert "requeueing" in run.job.log


def stopped_at_its_limit(lab: Lab, name: str) -> tuple[Run, int]:
    """A run at its time limit, of which Slurm gives no warning; its rank 1, the pid given, is stopped.

    Slurm looks at limits every 30 s; a stopped run leaves the processors to the others until then.
    """
    # the script asks for USR1, while this signal has no effect; on nodes of their own, stopped runs are in nobody's way
    run = lab.submit(name, options=[*ACROSS, "--nodelist=n9,n10", "--signal=CONT@1"])
    run.reaches(12)
    (pid,) = run.job.tasks(1)
    os.kill(pid, signal.SIGSTOP)
    lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", "EndTime=now+2")
    return run, pid


def limit_with_time_to_save(lab: Lab) -> None:
    run, _ = stopped_at_its_limit(lab, "unwarned")  # Slurm wakes it, then sends TERM
    run.job.until(lambda: int(run.job.field("Restarts")) >= 1)
    lab.cluster.run("scontrol", "update", f"jobid={run.job.id}", "timelimit=30")
    run.job.ends("COMPLETED", 1)
    run.is_complete()
    assert "DUE TO TIME LIMIT" in run.job.log
    (stopped,) = re.findall(r"stopped on a signal after saving step (\d+)", run.job.log)
    assert run.resumed_at() == [int(stopped)]
    assert int(stopped) >= 12  # and not the checkpoint before
    assert "requeueing" in run.job.log


def limit_without_time_to_save(lab: Lab) -> None:
    run, pid = stopped_at_its_limit(lab, "overrun")
    deadline = time.monotonic() + 240
    with contextlib.suppress(ProcessLookupError):  # until KILL
        while time.monotonic() < deadline:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.005)
    run.job.ends("TIMEOUT", 0, 60)
    assert "stopped on a signal" not in run.job.log
    assert "requeueing" not in run.job.log
    again = lab.submit("overrun")
    again.job.ends("COMPLETED", 0)
    again.is_complete()
    (resumed,) = again.resumed_at()
    assert resumed % SAVE_EVERY == 0


def preemption(lab: Lab) -> None:
    """A job of higher priority wants the node that the run is on."""
    run = lab.submit("preempted", options=[*WITHIN, "--nodelist=n5"])
    run.reaches(12)
    run.pause()  # Slurm wakes it, then sends TERM
    urgent = ["--partition=urgent", "--nodelist=n5", "--exclusive", "--output=/dev/null", "--wrap=true"]
    lab.cluster.run("sbatch", *urgent)
    run.job.ends("COMPLETED", 1)
    run.is_complete()
    assert "DUE TO PREEMPTION" in run.job.log
    (stopped,) = re.findall(r"stopped on a signal after saving step (\d+)", run.job.log)
    assert run.resumed_at() == [int(stopped)]
    assert int(stopped) >= 12


def scancel(lab: Lab) -> None:
    run = lab.submit("cancelled")
    run.reaches(12)
    cancelled(lab, run)


def cancelled(lab: Lab, run: Run, *overrides: str) -> None:
    """Cancel a run, which nobody brings back to life, and let another job end it."""
    requeued = run.job.log.count("requeueing")
    lab.cluster.run("scancel", run.job.id)
    run.job.ends("CANCELLED", len(run.resumed_at()), 120)
    run.job.until(lambda: not run.job.tasks(0) + run.job.tasks(1), 60)
    assert run.job.log.count("requeueing") == requeued
    again = lab.submit(run.directory.parent.name, *overrides)
    again.expected = run.expected
    again.job.ends("COMPLETED", 0)
    again.is_complete()
    *_, stopped = re.findall(r"stopped on a signal after saving step (\d+)", run.job.log)
    assert again.resumed_at() == [int(stopped)]


def scancel_while_requeueing(lab: Lab) -> None:
    """The signal of a cancellation ends `scontrol requeue` too; asked again, Slurm would bring the job back to life."""
    run = lab.submit("resurrected", site='scontrol() { [ "$1" != requeue ] || sleep 20; command scontrol "$@"; }')
    run.reaches(12)
    lab.cluster.run("scancel", "--signal=USR1", run.job.id)
    run.job.until(lambda: "requeueing" in run.job.log)
    lab.cluster.run("scancel", run.job.id)
    run.job.until(lambda: "ended by Slurm" in run.job.log, 120)
    run.job.ends("CANCELLED", 0, 120)


def stopped_rank(lab: Lab) -> None:
    run = lab.submit("stopped", "run.hang_timeout_seconds=90")
    run.reaches(12)
    (pid,) = run.job.tasks(1)
    os.kill(pid, signal.SIGSTOP)
    run.job.until(lambda: "requeueing" in run.job.log)
    run.job.ends("COMPLETED", 1)
    run.is_complete()
    assert re.search(rf"error: rank 1 of 2 \(.*process {pid}\) stopped: last seen \d+ s ago in", run.job.log)
    assert "Last known stack of rank 1:" in run.job.log


def killed_daemon(lab: Lab) -> None:
    """Only slurmd dies: Slurm starts the job again elsewhere, and the old ranks, which live on, must not interfere."""
    run = lab.submit("daemon", options=[*WITHIN, "--exclude=n[1-2,5-10]"])
    run.reaches(12)
    node = run.job.field("NodeList")
    old = run.pause()
    lab.cluster.kill_daemon(node)
    try:
        owner = run.directory / ".owner"
        run.job.until(lambda: f"{run.job.id}.1" in owner.read_text())
        for pid in old:
            os.kill(pid, signal.SIGCONT)
        run.job.until(lambda: "resuming" in run.job.log)
        assert not Path(f"/proc/{old[0]}").exists()
        run.job.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), 60)
        run.job.ends("COMPLETED", 1)
    finally:
        lab.cluster.start_node(node)
    run.is_complete()
    (resumed,) = run.resumed_at()
    assert resumed % SAVE_EVERY == 0


def crashed_node(lab: Lab) -> None:
    """A node dies with all that runs on it; the batch script and rank 0 are on another, and a third one is free."""
    run = lab.submit("crashed", options=[*ACROSS, "--exclude=n[1-5,9-10]"])
    run.reaches(12)
    (dead,) = run.job.nodes() - {run.job.field("BatchHost")}
    lab.cluster.crash_node(dead)
    try:
        run.job.ends("COMPLETED", 1)
        assert dead not in run.job.nodes()
    finally:
        lab.cluster.start_node(dead)
    run.is_complete()
    (resumed,) = run.resumed_at()
    assert resumed % SAVE_EVERY == 0


def full_disk(lab: Lab) -> None:
    directory = lab.directory / "full" / "run"
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(directory)], check=True)
    try:
        run = lab.submit("full", "run.keep=1")
        run.reaches(12)
        with open(directory / "ballast", "wb", buffering=0) as ballast:
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(4096))
            ballast.truncate(ballast.tell() - 300_000)  # room for log lines, none for a checkpoint
        run.job.ends("FAILED", 1)  # tried once more, for there was a new checkpoint
        assert re.search(r"error: cannot write the checkpoint of step \d+: .*No space left on device", run.job.log)
        assert "without a new checkpoint: not trying again" in run.job.log
        (directory / "ballast").unlink()
        again = lab.submit("full", "run.keep=1")
        again.job.ends("COMPLETED", 0)
        again.is_complete()
        assert again.resumed_at()[0] % SAVE_EVERY == 0
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def diverged(lab: Lab) -> None:
    """A run whose steps are no longer finite: another attempt would end alike, so there is none."""
    run = lab.submit("diverged", "optim.base_lr=1e30", "optim.max_bad_steps=3", f"run.max_steps={STEPS}")
    run.job.ends("FAILED", 0)
    assert "3 steps in a row were not finite" in run.job.log
    assert re.search(r"gave up at step \d+: another attempt would end alike", run.job.log)
    records = read_records(run.directory)
    good = [r["step"] for r in records if "bad" not in r]
    assert [path.name for path in (run.directory / "checkpoints").glob("step_*")] == [f"step_{good[-1]:08d}"]


def sweep(lab: Lab) -> None:
    """An array of two, the second (which carries the array's own number) stopped and requeued by itself."""
    cwd = lab.directory / "sweep"
    cwd.mkdir()
    (cwd / "lines").write_text(f"run.dir={cwd}/run\noptim.base_lr=0.01 run.dir={cwd}/slow\n")
    run = lab.submit("sweep", options=[*TWO_NODES, "--array=1-2"], script="sweep", arguments=["config.yaml", "lines"])
    slow = cwd / "slow" / "metrics.jsonl"
    run.job.until(lambda: slow.exists() and slow.read_text().count("\n") > 12)
    lab.cluster.run("scancel", "--signal=USR1", f"{run.job.id}_2")
    jobs = lambda: lab.cluster.run("scontrol", "-o", "show", "job", run.job.id).splitlines()  # noqa: E731
    run.job.until(lambda: all("JobState=COMPLETED" in line for line in jobs()))
    restarts = {re.search(r"ArrayTaskId=(\d+)", j)[1]: re.search(r"Restarts=(\d+)", j)[1] for j in jobs()}
    assert restarts == {"1": "0", "2": "1"}
    run.is_complete()


SCENARIOS: dict[str, Callable[[Lab], None]] = {
    scenario.__name__: scenario
    for scenario in (
        time_limit,  # those that wait longest first
        limit_without_time_to_save,
        limit_with_time_to_save,
        stopped_rank,
        requeue_then_usr1_then_a_killed_rank,
        the_same_under_fsdp2_then_scancel,
        crashed_node,
        killed_daemon,
        preemption,
        full_disk,
        scancel,
        scancel_while_requeueing,
        usr1_without_requeue,
        sweep,
        diverged,
        undisturbed,
        four_ranks,
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
