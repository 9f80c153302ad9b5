"""Is this machine fit for the job: libraries, driver, device, memory?"""

import os
import re
from importlib import import_module, metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from pipeline.config import ExperimentConfig
from pipeline.plan.check import Check
from pipeline.plan.memory import OUTSIDE, host_bytes, memory_estimate

_GIB = 1 << 30
_DRIVER = Path("/proc/driver/nvidia/version")  # there as long as the kernel module is loaded, in containers too
OLDEST_DRIVER = {"nvidia-dali-cuda120": 525, "nvidia-dali-cuda130": 580}  # setup.py chooses by it


def check_software(config: ExperimentConfig) -> Check:
    """Are the libraries there, in versions that the package declares, and do the wheels that read images load?"""
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
    if config.uses_triton() and versions["triton"] is None:
        return Check("software", "fail", finding, "install triton, or set engine.kernels=eager")
    for module in ("nvidia.dali.fn", "nvidia.nvimgcodec"):
        import_module(module)  # a wheel that is broken has a version all the same
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
    if not torch.cuda.is_available():
        if config.uses_triton():
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
    """Does the estimate of one rank fit its device, and what a node's ranks hold in the host's memory the node?"""
    cuda = torch.cuda.is_available()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card = torch.cuda.get_device_properties(0).total_memory if cuda else machine
    needed = sum(memory_estimate(config, world_size).values()) + (OUTSIDE if cuda else 0)
    finding = f"about {needed / _GIB:.1f} GiB per rank (estimate), {'the card' if cuda else 'this machine'} has "
    finding += f"{card / _GIB:.1f}"
    less = "engine.reshard_after_forward=true" if config.engine.backend == "fsdp2" else "a higher engine.zero_stage"
    fix = f"lower data.batch_size, or set engine.activation_checkpointing=true or {less}"
    share = needed / card
    on_node = min(world_size, torch.cuda.device_count() if cuda else 1)
    host = {purpose: size for purpose, size in host_bytes(config, world_size).items() if size}
    words = ", ".join(f"{purpose} {size / _GIB:.1f}" for purpose, size in host.items())
    finding += f"; {on_node} x ({words}) of the host's {machine / _GIB:.1f}"
    in_host = on_node * sum(host.values()) / machine
    if not cuda:
        share += in_host  # the same memory
    elif in_host > share:
        share, fix = in_host, "use more GPUs in all"
        if config.engine.offload_optimizer:
            fix += ", or set engine.offload_optimizer=null"
    if share <= 0.9:
        return Check("memory", "pass", finding)
    return Check("memory", "fail" if share > 1.1 and cuda else "warn", finding, fix)
