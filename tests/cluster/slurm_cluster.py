"""A throwaway Slurm cluster on one machine, from Debian's packages: own munge, own ports, nodes on 127.0.0.1, .2, ...

Everything lives below one directory and carries its name in an environment variable, by which leftovers are found.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_MARK = "POA_TEST_CLUSTER"


def why_not() -> str | None:
    """What is missing for a cluster here; None if nothing is."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_PATH)]
    if missing:
        return f"{', '.join(missing)} not installed (run .ci/install-services)"
    return "a Slurm daemon has to be started by root" if os.geteuid() else None


class Cluster:
    """Start it with `with`; `env` is the environment in which its commands work.

    Args:
        directory: for state and logs; short, since it holds a socket.
        nodes: how many; they are called n1, n2, ...
        cpus: per node; they bound how many tasks run at a time.
    """

    def __init__(self, directory: Path, nodes: int = 10, cpus: int = 3):
        self.directory, self.cpus = directory, cpus
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.config = directory / "slurm.conf"
        outer = ("SLURM_", "SBATCH_", "SRUN_", "POA_")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        self.env |= {"SLURM_CONF": str(self.config), "PATH": _PATH, _MARK: str(directory)}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_config()
            self._start("munged", *self._munge_options())
            self._wait_for(lambda: not self._status("munge", "-n", "-S", self.directory / "munge.sock"), "munged")
            self._start("slurmctld", "-D", "-f", self.config)
            for node in self.nodes:
                self.start_node(node)
            self._wait_for(self._ready, "nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", check=False)
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(3)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: object, check: bool = True, **options: object) -> str:
        # by threads too, so with an environment of its own: pytest changes that of this process at any moment, and a
        # process that is being started then finds no environment at all (EFAULT)
        result = subprocess.run(
            list(map(str, command)), env=self.env, text=True, capture_output=True, timeout=60, check=False, **options
        )
        said = f"{command} ended with {result.returncode}: {result.stdout}{result.stderr}"
        assert not check or result.returncode == 0, said
        return result.stdout

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, "-f", self.config, name=node)

    def kill_daemon(self, node: str) -> None:
        """SIGKILL slurmd alone; what it started lives on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def crash_node(self, node: str) -> None:
        """What a power cut does: slurmd, its step daemons and everything they started are gone at once."""
        tasks = [Path(f"/proc/{pid}") for pid in self.processes(SLURMD_NODENAME=node)]
        parents = {Path("/proc", (task / "stat").read_text().rpartition(")")[2].split()[1]) for task in tasks}
        steps = [parent for parent in parents if b"slurmstepd" in (parent / "cmdline").read_bytes()]
        self.kill_daemon(node)
        for process in (*steps, *tasks):  # steps first, so that none tells of its dead tasks
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)

    def processes(self, **variables: object) -> dict[int, str]:
        """Command lines by pid of the cluster's processes whose environment has these values."""
        wanted = {f"{name}={value}".encode() for name, value in {_MARK: self.directory, **variables}.items()}
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((path / "environ").read_bytes().split(b"\0")) and int(path.name) != os.getpid():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def log(self, name: str) -> str:
        path = self.directory / f"{name}.log"
        return f"--- {name}\n{path.read_text(errors='replace')[-3000:]}" if path.exists() else f"--- {name}: no log"

    def says_of(self, job: str) -> str:
        """What the controller logged about a job."""
        lines = (self.directory / "slurmctld.log").read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if re.search(rf"\b(JobId|StepId)={job}\b", line))

    def _status(self, *command: object) -> int:
        return subprocess.run(list(map(str, command)), env=self.env, capture_output=True, check=False).returncode

    def _start(self, program: str, *options: object, name: str | None = None) -> None:
        name = name or program
        with open(self.directory / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *map(str, options)],
                env=self.env,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, condition, what: str, seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            logs = "\n".join(self.log(name) for name in self._daemons)
            assert not dead, f"{dead} died\n{logs}"
            assert time.monotonic() < deadline, f"{what} not up\n{logs}"
            time.sleep(0.1)

    def _ready(self) -> bool:
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        return dict(line.split() for line in lines) == dict.fromkeys(self.nodes, "idle")

    def _munge_options(self) -> list[object]:
        key = self.directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        names = {"socket": "munge.sock", "key-file": key.name, "pid-file": "munged.pid"}
        names |= {"log-file": "munged.own.log", "seed-file": "munged.seed"}
        return ["--foreground", "--force", *(f"--{option}={self.directory / name}" for option, name in names.items())]

    def _write_config(self) -> None:
        self.directory.chmod(0o755)
        ports = _free_ports(1 + len(self.nodes))
        d = self.directory
        settings = {
            "ClusterName": "throwaway",
            "SlurmctldHost": "localhost(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # credentials that outlive a job delay its requeue by as much
            "AuthInfo": f"socket={d}/munge.sock,cred_expire=5",
            "CredType": "cred/munge",
            "StateSaveLocation": d / "state",
            "SlurmdSpoolDir": f"{d}/spool.%n",
            "SlurmctldPidFile": d / "slurmctld.pid",
            "SlurmdPidFile": f"{d}/slurmd.%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "PropagateResourceLimits": "NONE",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SchedulerParameters": "sched_min_interval=0,sched_interval=2,bf_interval=2,batch_sched_delay=0",
            "JobRequeue": 1,
            "ReturnToService": 2,
            "KillWait": 60,
            "UnkillableStepTimeout": 120,
            "SlurmdTimeout": 10,
            "BatchStartTimeout": 10,
            # a node answers the order to kill a step after KillWait at the latest; a controller that has given up by
            # then sends the order again, and it meets the next attempt of the job
            "MessageTimeout": 100,
            "MinJobAge": 3600,
            "SlurmdParameters": "config_overrides",
            "GresTypes": "gpu",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for i, (node, port) in enumerate(zip(self.nodes, ports[1:], strict=True)):
            lines.append(
                f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.{i + 1} Port={port} CPUs={self.cpus} "
                f"RealMemory=64000 Gres=gpu:{self.cpus} State=UNKNOWN"
            )
        lines.append("PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1")
        lines.append("PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10")  # preempts the other
        self.config.write_text("\n".join(lines) + "\n")
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (d / name).mkdir()
        # the plugin is started even where nothing uses cgroups, and other settings want what a container lacks
        (d / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        for i in range(self.cpus):  # slurmd only wants to see that the device files exist
            (d / f"gpu{i}").touch()
        gpus = [f"NodeName={node} Name=gpu File={d}/gpu[0-{self.cpus - 1}]" for node in self.nodes]
        (d / "gres.conf").write_text("\n".join(["AutoDetect=off", *gpus]) + "\n")


class Job:
    """A submitted job.

    Args:
        cluster: where.
        script: the batch script.
        arguments: of the script.
        options: of sbatch.
        cwd: where it is submitted from.
    """

    def __init__(
        self,
        cluster: Cluster,
        script: Path,
        arguments: list[object],
        options: list[str],
        cwd: Path,
        **variables: object,
    ):
        self.cluster = cluster
        self.output = cwd / f"{time.monotonic_ns()}.out"
        command = ["sbatch", "--parsable", f"--output={self.output}", *options, script, *arguments]
        environment = {"env": {**cluster.env, **{name: str(value) for name, value in variables.items()}}}
        result = subprocess.run(
            list(map(str, command)), cwd=cwd, text=True, capture_output=True, timeout=60, check=False, **environment
        )
        assert result.returncode == 0, result.stderr
        self.id = result.stdout.strip()

    def field(self, name: str) -> str:
        """What the controller says of the job. Of thousands of questions one may get no answer: it is asked again."""
        show = ("scontrol", "-o", "show", "job", self.id)
        match = re.search(rf"\b{name}=(\S+)", self.cluster.run(*show, check=False) or self.cluster.run(*show))
        return match[1] if match else ""

    def nodes(self) -> set[str]:
        return set(self.cluster.run("scontrol", "show", "hostnames", self.field("NodeList")).split())

    @property
    def log(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def until(self, condition, seconds: float = 900, every: float = 0.3) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"after {seconds} s: {self.field('JobState')}\n{self.log[-6000:]}"
            time.sleep(every)

    def ends(self, state: str, restarts: int, seconds: float = 900) -> None:
        """Wait for the end, which must be in this state after so many requeues."""
        self.until(lambda: self.field("JobState") in FINAL, seconds, every=1.0)
        found = self.field("JobState"), int(self.field("Restarts"))
        assert found == (state, restarts), f"{found}\n{self.log[-6000:]}\n{self.cluster.says_of(self.id)}"

    def tasks(self, rank: int) -> list[int]:
        """Pids of a rank's Python process."""
        found = self.cluster.processes(SLURM_JOB_ID=self.id, SLURM_PROCID=rank)
        return [pid for pid, command in found.items() if "-m pipeline train" in command and "bash" not in command]


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
