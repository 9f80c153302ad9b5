"""What a figure came from: the code, the libraries and the environment of this process."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

# Variables that decide how a run behaves; names that hold secrets (SLURM_JWT) are left out.
_ENVIRONMENT = ("SLURM_", "POA_", "NCCL_", "CUDA_", "TORCH_", "TRITON_", "OMP_", "MASTER_", "GLOO_", "DS_")
_SECRETS = ("JWT", "TOKEN", "KEY", "SECRET", "PASS")
_PACKAGES = ("poa-pretrain", "torch", "deepspeed", "timm", "triton", "numpy", "pydantic", "safetensors")


def code_revision() -> str:
    """Commit of the checkout that this code runs from, with `-dirty` if it was changed; "unknown" if installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def environment() -> dict[str, str]:
    """Variables that decide how a run behaves."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_ENVIRONMENT) and not any(word in name for word in _SECRETS)
    }


def versions() -> dict[str, str]:
    """Of Python and the libraries that a run depends on."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, "nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
