"""Compiles every kernel for GPUs that are not there: `python -m kernels.bench.aot`.

The operators run on CPU tensors with their launches turned into compilations, so that what is checked is exactly what a
GPU would be asked to run. Registers, shared memory and spills come from the machine code.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import colours
from kernels.fused import attention, distillation, optimizer, reduce, residual
from kernels.fused import colours as fused_colours

ARCHITECTURES = (80, 90, 100)
# What one thread block may have on the smallest device of an architecture, in bytes.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# tokens, head_dim, bias, mask: crops of 224 and 96 pixels of the presets' ViT and Swin ...
PRESET_ATTENTION = (
    (197, 64, False, False),
    (37, 64, False, False),
    (49, 16, True, False),
    (49, 16, True, True),
    (36, 16, True, False),
    (9, 16, True, False),
)
# ... and other patch sizes, head dimensions and windows
OTHER_ATTENTION = (
    (65, 64, False, False),
    (257, 64, False, False),
    (49, 32, True, True),
    (144, 32, True, True),
)


@dataclass(frozen=True)
class Report:
    """One compiled kernel; sizes in bytes, `spill_bytes` of local memory per thread."""

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int

    @property
    def fits(self) -> bool:
        return self.spill_bytes == 0 and self.shared_bytes <= SHARED_LIMIT[self.arch]


class _AbsentDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Within it a kernel launch compiles for sm_`arch` and appends (kernel name, compiled kernel) to the list."""
    compiled: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = run
    driver.set_active(_AbsentDevice(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        driver._active = None


def cases(dtype: torch.dtype, presets_only: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls that launch every configuration with logits or tokens in `dtype`; or only those that the presets use.

    A bf16 student meets teacher logits in fp16, whose mantissa is longer; the intact student's are bf16 like its own.
    """
    teacher = torch.float16 if dtype == torch.bfloat16 else dtype
    for k in (65536,) if presets_only else (65536, 1000):
        # local crops meet both global crops; global cls tokens and masked patches one row; intact targets have no `col`
        for student_rows, p, centred in ((16, 2, True), (8, 1, True), (8, 1, False)):
            name = f"cross_entropy K={k} P={p}{' col' if centred else ''}"
            yield name, partial(_cross_entropy, dtype, teacher if centred else dtype, student_rows, k, p, centred)
        for logits in dict.fromkeys((teacher, dtype)):
            yield f"reductions K={k} {logits}".replace("torch.", ""), partial(_reductions, logits, k)
    for tokens, dim, with_bias, with_mask in PRESET_ATTENTION + (() if presets_only else OTHER_ATTENTION):
        name = f"attention N={tokens} D={dim}{' bias' if with_bias else ''}{' mask' if with_mask else ''}"
        yield name, partial(_attention, dtype, tokens, dim, with_bias, with_mask)
    for channels in (1024,) if presets_only else (1024, 100):
        yield f"residual C={channels} LayerScale", partial(_residual, dtype, channels, True, False)
        yield f"residual C={channels}", partial(_residual, dtype, channels, False, False)
        yield f"residual C={channels} factors", partial(_residual, dtype, channels, True, True)
    yield "optimizer", partial(_optimizer, dtype)
    yield "colours", partial(_colours, dtype)


def reports(dtype: torch.dtype, arch: int, presets_only: bool = False) -> Iterator[Report]:
    """Compiles all cases and reads off what their kernels need."""
    seen = set()
    for name, run in cases(dtype, presets_only):
        with compile_only(arch) as compiled:
            run()
        for kernel, binary in compiled:
            if binary.hash not in seen:
                seen.add(binary.hash)
                registers, spills = _resources(binary.asm["cubin"])
                meta = binary.metadata
                yield Report(name, kernel, arch, meta.num_warps, registers, meta.shared, spills)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (stack, which only spills use here) per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, f"cuobjdump has another format: {text}"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _cross_entropy(
    dtype: torch.dtype, target_dtype: torch.dtype, student_rows: int, k: int, p: int, centred: bool
) -> None:
    student = torch.zeros(student_rows, k, dtype=dtype, requires_grad=True)
    rows = torch.zeros(student_rows, p, dtype=torch.int64)
    col = torch.zeros(k) if centred else None
    loss, _, _ = distillation.cross_entropy(
        student, torch.zeros(8, k, dtype=target_dtype), torch.zeros(8), col, rows, 0.1, 0.04, False
    )
    loss.sum().backward()


def _reductions(dtype: torch.dtype, k: int) -> None:
    logits = torch.zeros(32, k, dtype=dtype)
    reduce.row_logsumexp(logits, 0.04, None)
    reduce.row_logsumexp(logits, 0.04, torch.zeros(k))
    reduce.column_logsumexp(logits, 0.04, torch.zeros(32))
    reduce.column_sum(logits)


def _attention(dtype: torch.dtype, tokens: int, dim: int, with_bias: bool, with_mask: bool) -> None:
    qkv = torch.zeros(4, tokens, 3, 6, dim, dtype=dtype, requires_grad=True)
    bias = torch.zeros(6, tokens, tokens, dtype=dtype, requires_grad=True) if with_bias else None
    mask = torch.zeros(4, tokens, tokens, dtype=dtype) if with_mask else None
    out, _ = attention.attention(qkv, bias, mask)
    out.sum().backward()


def _residual(dtype: torch.dtype, channels: int, scaled: bool, per_row: bool) -> None:
    x = torch.zeros(8, channels, dtype=dtype, requires_grad=True)
    branch = torch.zeros(6, channels, dtype=dtype, requires_grad=True)
    gamma = torch.zeros(channels, dtype=dtype) if scaled else None
    positions = torch.zeros(8, dtype=torch.int32)
    factors = torch.ones(6, 1) if per_row else None
    out = residual.add_rows(x, branch, torch.arange(6), positions, gamma, factors, 1.25)
    out.sum().backward()


def _optimizer(dtype: torch.dtype) -> None:
    """With gradients reduced in fp32 and in `dtype`."""
    master, first, second, ema = (torch.zeros(4096) for _ in range(4))
    student, teacher = (None if dtype == torch.float32 else torch.zeros(4096, dtype=dtype) for _ in range(2))
    looked_up = optimizer.tables([(0, 3000, 0, 1.0, True)], torch.device("cpu"))
    for gradient in {torch.float32, dtype}:
        optimizer.update_(
            (master, first, second, ema),
            (student, teacher),
            torch.zeros(4096, dtype=gradient),
            looked_up,
            torch.ones(4),
            lr=0.1,
            weight_decay=0.1,
            momentum=0.9,
            betas=(0.9, 0.999),
            eps=1e-8,
            frozen=0,
        )


def _colours(dtype: torch.dtype) -> None:
    crops = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
    table, out = torch.zeros(2, colours.WIDTH), torch.empty(2, 3, 224, 224, dtype=dtype)
    parts = colours.TONE, colours.TURN, colours.BLUR
    fused_colours.colour(crops, table, parts, colours.LUMA, ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--presets", action="store_true", help="only what the presets use")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    table = []
    print(f"{'case':44} {'kernel':18} {'dtype':5} {'arch':>6} {'warps':>5} {'regs':>5} {'shared':>7} {'spills':>6}")
    for dtype in options.dtype:
        for arch in options.arch:
            for r in reports(DTYPES[dtype], arch, options.presets):
                print(
                    f"{r.case:44} {r.kernel:18} {dtype:5} {'sm_' + str(arch):>6} {r.warps:5} {r.registers:5} "
                    f"{r.shared_bytes:7} {r.spill_bytes:6}",
                    flush=True,
                )
                table.append({"dtype": dtype, **asdict(r), "fits": r.fits})
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    unfit = sum(not row["fits"] for row in table)
    print(f"{len(table)} kernels compiled, {unfit} spill or exceed shared memory")
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
