"""Stage a: what machine this is, and the ceilings that the other stages are held against."""

import os
import shutil
import subprocess
import time
from functools import partial

import torch

from kernels.attention import attention
from kernels.bench.clock import Clock, ceilings
from kernels.bench.timing import environment
from pipeline.bench.gpu.stage import Stage
from pipeline.measure.provenance import versions

# rows, inner and columns of products in a step of ViT-L with 50 images: students, narrow students, teacher, prototypes
PRODUCTS = [
    (27600, 1024, 3072),
    (27600, 1024, 4096),
    (27600, 4096, 1024),
    (4096, 27600, 1024),
    (27600, 704, 2816),
    (27600, 384, 1536),
    (19700, 1024, 4096),
    (2000, 256, 65536),
]
_CALLS = 200


def run(stage: Stage) -> None:
    """Card, versions, copy and matrix products, and the host's time for one operator."""
    found, device = stage.found, stage.device
    found["card"] = environment(device)["device"]
    found["versions"] = versions()
    found["cpus"] = os.cpu_count()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = properties.total_memory / 2**30
        found["nvidia_smi"] = _nvidia_smi()
    clock = Clock(device, 3 if stage.tiny else 20)
    limits = ceilings(clock, stage.dtype, "tiny" if stage.tiny else "full")
    found |= limits
    copied, multiplied = limits["copy_bytes_per_s"] / 1e9, limits["matmul_flop_per_s"] / 1e12
    stage.say(f"copy {copied:.0f} GB/s, square product {multiplied:.1f} TFLOP/s")
    found["products_tflop_per_s"] = {}
    for rows, inner, columns in [(64, 32, 64)] if stage.tiny else PRODUCTS:
        a, b = (torch.randn(shape, device=device).to(stage.dtype) for shape in ((rows, inner), (inner, columns)))
        ms = clock.median_ms(partial(_product, a, b))
        found["products_tflop_per_s"][f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / max(ms, 1e-6) / 1e9
    products = found["products_tflop_per_s"].values()
    stage.say(f"products of the step {min(products):.1f} to {max(products):.1f} TFLOP/s")
    found["attention_host_us"] = _host_us(stage)
    stage.say(f"attention takes {found['attention_host_us']:.0f} us of the host")


def _product(a: torch.Tensor, b: torch.Tensor, _: int) -> torch.Tensor:
    return a @ b


def _host_us(stage: Stage) -> float:
    """Microseconds until an operator's call returns, while nothing waits for the device."""
    qkv = torch.randn(4, 37, 3, 2, 64, device=stage.device, dtype=stage.dtype)
    for _ in range(3):
        attention(qkv, impl=stage.impl)
    began = time.perf_counter()
    for _ in range(_CALLS):
        attention(qkv, impl=stage.impl)
    return 1e6 * (time.perf_counter() - began) / _CALLS


def _nvidia_smi() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
