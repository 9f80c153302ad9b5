"""Packaging. Static metadata is here rather than in pyproject.toml because the DALI wheel depends on the machine."""

import ctypes
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, find_packages, setup

DALI_WHEELS = {"cuda120": 525, "cuda130": 580}  # wheel -> oldest NVIDIA driver that runs it


def dali_wheel() -> str:
    """Choose the DALI wheel: the two share file paths, so exactly one may be installed.

    POA_DALI=cuda120|cuda130 decides, else the driver; without a driver CUDA 13, whose CPU pipelines need none.
    """
    choice = os.environ.get("POA_DALI", "")
    if choice:
        if choice not in DALI_WHEELS:
            raise SystemExit(f"error: unknown wheel {choice!r} (POA_DALI): use one of {', '.join(DALI_WHEELS)}")
        return choice
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value < 13000:
            return "cuda120"
    except OSError:
        pass  # no driver on this machine
    return "cuda130"


class WithDataFiles(Distribution):
    """Has editable installations copy `data_files` too: setuptools asks for them under this name, which it lacks."""

    has_data = Distribution.has_data_files


ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
PARQUET = ["pyarrow>=17"]
SINKS = {"wandb": ["wandb>=0.19"], "mlflow": ["mlflow-skinny>=2.20"]}
DEVELOPMENT = [
    *ONNX,
    *PARQUET,
    *SINKS["mlflow"],
    *SINKS["wandb"],
    "coverage>=7.6",
    "grafana-foundation-sdk",
    "import-linter>=2.3",
    "moto[server]>=5",
    "mypy>=1.15",
    "pre-commit>=4",
    "pytest>=8.3",
    "pytest-cov>=6",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "ruff>=0.11",
    "types-PyYAML",
    "webdataset>=0.2.100,<2",  # the tests hold our shards against it
]

setup(
    distclass=WithDataFiles,
    name="poa-pretrain",
    version="0.1.0",
    description="Pre-train a vision backbone once, ship every size of it as a plain timm model.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["pipeline*", "kernels*"]),
    package_data={"pipeline": ["*/*.html"]},
    data_files=[(os.path.relpath(sysconfig.get_path("purelib"), sys.prefix), ["poa_safe_path.pth"])],
    install_requires=[
        "torch>=2.9,<2.15",  # each brings its own Triton, and with that of 2.15 three of our kernels spill registers
        "torchvision>=0.24",
        "timm>=1.0.26,<1.1",  # loads safetensors from `local-dir:`; 1.0.20 has a LayerScale of its own
        # The engine reads DeepSpeed's gradient partitions, which are not documented API: the tested range is narrow.
        "deepspeed>=0.19.8,<0.20",
        f"nvidia-dali-{dali_wheel()}>=2.2,<3",  # adjust_orientation of its decoder
        "nvidia-nvimgcodec-cu13>=0.8" if dali_wheel() == "cuda130" else "nvidia-nvimgcodec-cu12>=0.8",
        "braceexpand>=0.1.7",
        "huggingface_hub>=0.34",
        "numpy>=1.26",
        "obstore>=0.12.1,<1",
        "pillow>=10",
        "prometheus-client>=0.21",
        "psutil>=5.9.8",
        "pydantic>=2.9,<3",
        "PyYAML>=6.0.1",
        "safetensors>=0.8",  # writes without a copy, and lets other threads run meanwhile
        "scikit-learn>=1.5",
        "scipy>=1.12",
        "tensorboard>=2.18",
        "tifffile>=2024.8.10",
        "tqdm>=4.66",
    ],
    extras_require={"dev": DEVELOPMENT, "onnx": ONNX, "parquet": PARQUET, **SINKS},
    entry_points={"console_scripts": ["poa=pipeline.cli:main"]},
)
