"""`poa doctor`: what would make a job fail, found before it waits in the queue.

Run it alone on a login node, or the way the job will run (torchrun, srun): then it also tries the ranks' collectives.
"""

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline import forecast
from pipeline.config import ExperimentConfig, load_config
from pipeline.elastic import cost
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.distributed import Ranks

_GIB = 1 << 30
_SAMPLES = 64  # images that are decoded, spread over the shards
_PROBE_BYTES = 32 << 20
_SKEW_SECONDS = 2.0
_DRIVER = Path("/proc/driver/nvidia/version")  # there as long as the kernel module is loaded, in containers too
OLDEST_DRIVER = {"nvidia-dali-cuda120": 525, "nvidia-dali-cuda130": 580}  # setup.py chooses by it


class Check(NamedTuple):
    """One line of the table; `status` is pass, warn or fail."""

    name: str
    status: str
    finding: str
    fix: str = ""


def run(args: argparse.Namespace) -> int:
    """The command, with the arguments of `pipeline.cli`."""
    config = load_config(args.config, args.overrides)
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"{args.gpus} GPUs", "--gpus", "name one or more")
    from pipeline import distributed

    ranks = distributed.initialize(120)
    try:
        checks = examine(config, ranks, args.gpus or ranks.world_size)
    finally:
        distributed.shut_down()
    if ranks.is_main:
        print(json.dumps([check._asdict() for check in checks]) if args.json else table(checks))
    return int(any(check.status == "fail" for check in checks))


def table(checks: list[Check]) -> str:
    """The checks line by line, each with what to do about it, and a count."""
    lines = []
    for check in checks:
        lines.append(f"{check.status:<5} {check.name:<13} {check.finding}")
        if check.fix:
            lines.append(f"{'':<19} -> {check.fix}")
    count = {status: sum(check.status == status for check in checks) for status in ("pass", "warn", "fail")}
    return "\n".join([*lines, ", ".join(f"{n} {status}" for status, n in count.items())])


def examine(config: ExperimentConfig, ranks: "Ranks", world_size: int) -> list[Check]:
    """All checks; collective over the ranks at hand, with the same result on each.

    Args:
        config: the experiment.
        ranks: at hand.
        world_size: ranks of the job to come.
    """
    on_main: dict[str, Callable[[], Check]] = {
        "software": lambda: check_software(config),
        "driver": check_driver,
        "device": lambda: check_device(config),
        "memory": lambda: check_memory(config, world_size),
        "shards": lambda: check_shards(config, world_size),
        "images": lambda: check_images(config),
        "run directory": lambda: check_directory(config),
        "disk": lambda: check_disk(config),
        "signal lead": lambda: check_lead(config, world_size),
    }
    checks = [ranks.agree(lambda n=name, c=check: _guarded(n, c)) for name, check in on_main.items()]  # type: ignore[misc]
    checks.append(check_kernels(config, ranks))
    checks.append(check_clocks(ranks))
    checks.append(check_collectives(ranks, world_size))
    return checks


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except UserError as error:
        return Check(name, "fail", f"{error.what} ({error.where})", error.fix)


def check_software(config: ExperimentConfig) -> Check:
    """Are the libraries there, in versions that the package declares?"""
    from packaging.requirements import Requirement

    versions = {name: _version(name) for name in ("torch", "deepspeed", "triton", "timm")}
    dali = {name: found for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if (found := _version(name))}
    finding = ", ".join(f"{name} {version or 'missing'}" for name, version in {**versions, **dali}.items())
    if len(dali) != 1:
        return Check(
            "software",
            "fail",
            f"{finding}; {len(dali)} DALI wheels",
            "install exactly one of nvidia-dali-cuda120|cuda130",
        )
    if config.engine.kernels == "triton" and versions["triton"] is None:
        return Check("software", "fail", finding, "install triton, or set engine.kernels=eager")
    declared = metadata.requires("poa-pretrain") if _version("poa-pretrain") else None
    for wanted in map(Requirement, declared or []):
        found = versions.get(wanted.name)
        if found and not wanted.marker and not wanted.specifier.contains(found, prereleases=True):
            return Check("software", "warn", finding, f"this package is tested with {wanted.name}{wanted.specifier}")
    return Check("software", "pass", finding)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_driver(loaded: Path = _DRIVER) -> Check:
    """Which NVIDIA driver is loaded, and is it new enough for the DALI wheel that is installed?"""
    try:
        text = loaded.read_text(encoding="utf-8")
    except OSError:
        return Check("driver", "pass", "no NVIDIA driver on this machine")
    version = re.search(r"Kernel Module.*?\s(\d+)(\.\d+)+\s", text)
    if not version:
        return Check("driver", "warn", f"NVIDIA, of a version that {loaded} does not tell", "see nvidia-smi")
    finding = f"NVIDIA {version[0].split()[-1]}"
    for wheel, oldest in OLDEST_DRIVER.items():
        if _version(wheel) and int(version[1]) < oldest:
            fix = f"install a driver {oldest} or newer, or another wheel of DALI (POA_DALI, see the README)"
            return Check("driver", "fail", f"{finding}; {wheel} needs {oldest} or newer", fix)
    return Check("driver", "pass", finding)


def check_device(config: ExperimentConfig) -> Check:
    """Is there a GPU that can do what the config asks for?"""
    import torch

    if not torch.cuda.is_available():
        if config.engine.kernels == "triton":
            return Check(
                "device", "warn", "no GPU here", "run this on a compute node; to train on CPUs set engine.kernels=eager"
            )
        finding = f"CPU, {os.cpu_count()} cores"
        if config.engine.precision == "bf16":
            # a sum of ones ends at 256; GPUs sum in fp32
            finding += ": PyTorch sums the gradients of LayerNorm's bias there in bf16"
            return Check("device", "warn", finding, "to train on CPUs set engine.precision=fp32")
        return Check("device", "pass", finding)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    finding = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, NCCL {nccl}"
    if config.engine.precision == "bf16" and not torch.cuda.is_bf16_supported():
        return Check("device", "fail", f"{finding}: no bf16", "set engine.precision=fp32")
    return Check("device", "pass", finding)


def check_memory(config: ExperimentConfig, world_size: int) -> Check:
    """Does the estimate of one rank fit its device, and what is offloaded of a node's ranks the node?"""
    import torch

    from pipeline.plan import memory_estimate, offloaded_bytes

    cuda = torch.cuda.is_available()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = torch.cuda.get_device_properties(0).total_memory if cuda else machine
    needed = sum(memory_estimate(config, world_size).values())
    finding = f"about {needed / _GIB:.1f} GiB per rank (estimate), {'the card' if cuda else 'this machine'} has "
    finding += f"{card / _GIB:.1f}"
    fix = "lower data.batch_size, or set engine.activation_checkpointing=true or a higher engine.zero_stage"
    share = needed / card
    if config.engine.offload_optimizer:
        on_node = min(world_size, torch.cuda.device_count() if cuda else 1)
        offloaded = on_node * offloaded_bytes(config, world_size)
        finding += f"; {on_node} x {offloaded / on_node / _GIB:.1f} offloaded, the host has {machine / _GIB:.1f}"
        if not cuda:
            share += offloaded / machine  # the same memory
        elif offloaded / machine > share:
            share, fix = offloaded / machine, "use more GPUs in all, or set engine.offload_optimizer=null"
    if share <= 0.9:
        return Check("memory", "pass", finding)
    return Check("memory", "fail" if share > 1.1 and cuda else "warn", finding, fix)


def check_shards(config: ExperimentConfig, world_size: int) -> Check:
    """Are the shards there, indexed, and enough for the ranks?"""
    from pipeline.data.reader import Dataset, expand_shards
    from pipeline.data.tars import index_path

    paths = expand_shards(config.data.train)
    bare = [path for path in paths if not index_path(path).exists()]
    dataset = Dataset(config.data.train)
    batch = config.data.batch_size * world_size
    finding = f"{len(paths)} shards, {len(dataset)} images, global batch {batch}"
    if len(dataset) < batch:
        return Check("shards", "fail", finding, "lower data.batch_size, or use fewer ranks")
    if bare:
        return Check("shards", "warn", f"{finding}; {len(bare)} have no index", f"poa shards index {bare[0]} ...")
    if world_size > len(paths):
        fix = "many ranks read from one file at a time: build more, smaller shards (poa shards build --per-shard)"
        return Check("shards", "warn", f"{finding}; fewer shards than {world_size} ranks", fix)
    cores = len(os.sched_getaffinity(0))
    if config.data.threads > cores:
        return Check(
            "shards", "warn", f"{finding}; {config.data.threads} threads on {cores} cores", "lower data.threads"
        )
    return Check("shards", "pass", finding)


def check_images(config: ExperimentConfig) -> Check:
    """Can images from all over the shards be decoded?"""
    from pipeline.data.images import BadImage, decode, inspect
    from pipeline.data.reader import Dataset

    dataset = Dataset(config.data.train)
    count = min(_SAMPLES, len(dataset))
    bad: dict[int, str] = {}
    for record in (i * len(dataset) // count for i in range(count)):
        try:
            data = dataset.image(record)
            inspect(data, config.data.max_pixels)
            decode(data)
        except BadImage as error:
            bad[record] = error.reason
        except OSError:
            bad[record] = "read"
    finding = f"{count - len(bad)} of {count} images are sound"
    if not bad:
        return Check("images", "pass", finding)
    record, reason = next(iter(bad.items()))
    finding += f"; {dataset.key(record)} of {dataset.shard(record)}: {reason}"
    fix = f"poa shards verify {dataset.shard(record)}; training leaves bad images out and counts them"
    return Check("images", "fail" if len(bad) > count / 2 else "warn", finding, fix)


def check_directory(config: ExperimentConfig) -> Check:
    """Can the run directory be used, and is what it holds of this experiment?"""
    from pipeline.checkpoint import list_checkpoints
    from pipeline.run import RunDirectory, require_same_experiment

    path = Path(config.run.dir)
    parent = _existing(path)
    if not os.access(parent, os.W_OK):
        return Check("run directory", "fail", f"{parent} is not writable", "set run.dir to another")
    if (path / "config.yaml").exists():
        require_same_experiment(load_config(path / "config.yaml"), config, path)
        saved = [c.name for c in list_checkpoints(RunDirectory(path).checkpoints)]
        return Check("run directory", "pass", f"{path}: {f'resumes from {saved[0]}' if saved else 'starts anew'}")
    return Check("run directory", "pass", f"{path}: new")


def check_disk(config: ExperimentConfig) -> Check:
    """Is there room for the retained checkpoints and the one being written?"""
    free = shutil.disk_usage(_existing(Path(config.run.dir))).free
    needed = (config.run.keep + 1) * _checkpoint_bytes(config)
    finding = (
        f"{free / _GIB:.1f} GiB free, {config.run.keep} checkpoints and one in the making take {needed / _GIB:.1f}"
    )
    if free < needed:
        return Check("disk", "fail", finding, "make room, lower run.keep, or set run.dir to another file system")
    if free < 2 * needed:
        return Check("disk", "warn", finding, "make room: others may fill the rest")
    return Check("disk", "pass", finding)


def check_lead(config: ExperimentConfig, world_size: int) -> Check:
    """Is the time between Slurm's signal and the end of the job enough to save?"""
    lead = config.checkpoint.signal_lead_seconds
    parent = _existing(Path(config.run.dir))
    rate = _write_rate(parent)
    seconds = _checkpoint_bytes(config) / rate  # as if the file system gave all ranks together what it gives one
    finding = f"{lead:.0f} s; a checkpoint takes about {seconds:.1f} s at the {rate / 2**20:.0f} MiB/s of {parent}"
    if lead < 2 * seconds:
        fix = f"set checkpoint.signal_lead_seconds={2 * seconds + 60:.0f} and submit with --signal=USR1@ the same"
        return Check("signal lead", "warn", finding, fix)
    return Check("signal lead", "pass", finding)


def check_kernels(config: ExperimentConfig, ranks: "Ranks") -> Check:
    """Do a kernel and, if it is on, `torch.compile` run on every rank? Both build with a C compiler at first use."""
    import torch

    from kernels.dispatch import interpreted

    if config.engine.kernels == "triton" and not torch.cuda.is_available() and not interpreted():
        return Check("kernels", "warn", "not tried: no GPU here", "run this on a compute node")
    failures = [failure for failure in ranks.gather(_kernel_failure(config, ranks.device)) if failure]
    finding = config.engine.kernels + (", torch.compile" if config.engine.compile else "")
    if failures:
        fix = "install gcc, g++ and Python's headers on every node, or set engine.kernels=eager engine.compile=false"
        return Check("kernels", "fail", f"{finding}: fails on {len(failures)} ranks, first {failures[0]}", fix)
    return Check("kernels", "pass", f"{finding} on {ranks.world_size} ranks")


def _kernel_failure(config: ExperimentConfig, device: "torch.device") -> str | None:
    """Host and error if the smallest use fails."""
    import torch

    from kernels.ema import ema_update_

    average = torch.zeros(16, device=device)
    try:
        ema_update_([average], [torch.ones_like(average)], 0.5, impl=config.engine.kernels)
        if config.engine.compile:
            average = torch.compile(lambda x: x * x + 0.25)(average)
        found = average.tolist()
    except Exception as error:  # of a compiler, of the driver, of the loader
        return f"{platform.node()}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if found == [0.5] * 16 else f"{platform.node()}: a wrong result"


def check_clocks(ranks: "Ranks") -> Check:
    """Do the nodes agree about the time? Heartbeats of different nodes are compared by it."""
    import torch.distributed as dist

    dist.barrier(group=ranks.control)
    times = ranks.gather(time.time())
    skew = max(times) - min(times)
    finding = f"{len(times)} ranks within {skew:.2f} s"
    if skew > _SKEW_SECONDS:
        return Check("clocks", "warn", finding, "start NTP on the nodes: the rank that hangs would be misjudged")
    return Check("clocks", "pass", finding)


def check_collectives(ranks: "Ranks", world_size: int) -> Check:
    """Does an all-reduce over the ranks at hand give the right sum, and how fast?"""
    import torch
    import torch.distributed as dist

    value = torch.full((_PROBE_BYTES // 4,), float(ranks.rank + 1), device=ranks.device)
    dist.all_reduce(value.clone())  # connections are made at the first
    began = time.perf_counter()
    dist.all_reduce(value)
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    wrong = sum(ranks.gather(bool((value != expected).any())))
    seconds = time.perf_counter() - began
    finding = f"{ranks.world_size} ranks at hand ({dist.get_backend()}), {_PROBE_BYTES >> 20} MiB in {seconds:.3f} s"
    if wrong:
        return Check("all-reduce", "fail", f"{finding}: wrong sum on {wrong} ranks", "check the network and its driver")
    if ranks.world_size < world_size:
        return Check("all-reduce", "pass", finding, f"run this under srun or torchrun to try all {world_size}")
    return Check("all-reduce", "pass", finding)


def _checkpoint_bytes(config: ExperimentConfig) -> int:
    return 4 * forecast.VECTORS * cost.trained_params(config).total


def _existing(path: Path) -> Path:
    """The nearest directory above that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def _write_rate(directory: Path) -> float:
    """Bytes per second to disk."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            began = time.perf_counter()
            file.write(os.urandom(1 << 20) * (_PROBE_BYTES >> 20))
            file.flush()
            os.fsync(file.fileno())
            return _PROBE_BYTES / (time.perf_counter() - began)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", str(directory), "set run.dir to another") from error
