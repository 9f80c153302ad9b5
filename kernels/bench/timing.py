"""Each kernel against its rivals in one run: `python -m kernels.bench [--op loss ...] [--json FILE]`.

Every figure is a median over calls on rotating inputs: time between events on a GPU, on the CPU the processor time of
this process (which others on the machine disturb less than the wall clock). Bytes and FLOP count what the operation
needs at least, so that a share of the ceilings (a copy and a matrix product of the same run) compares all contenders
alike.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench.clock import Clock, ceilings
from kernels.bench.rivals import OPERATIONS, SCALES, Case, Contender, cases

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = {
    "forward ms": ("forward_ms", "{:.3f}"),
    "total ms": ("total_ms", "{:.3f}"),
    "speedup": ("speedup", "{:.2f}x"),
    "GB/s": ("gb_per_s", "{:.1f}"),
    "of copy": ("copy_share", "{:.0%}"),
    "TFLOP/s": ("tflop_per_s", "{:.2f}"),
    "of matmul": ("matmul_share", "{:.0%}"),
    "peak MiB": ("peak_mib", "{:.0f}"),
    "difference": ("difference", "{:.1e}"),
}
ROTATED_BYTES = 256 << 20  # inputs in turn add up to more than any cache


@dataclass
class Result:
    """One contender on one case; times in milliseconds, `total` is forward and backward."""

    op: str
    case: str
    contender: str
    forward_ms: float | None = None
    total_ms: float | None = None
    speedup: float | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    tflop_per_s: float | None = None
    matmul_share: float | None = None
    peak_mib: float | None = None
    difference: float | None = None
    note: str = ""


def measure(op: str, case: Case, clock: Clock, limits: dict[str, float]) -> list[Result]:
    """All contenders of one case, the missing ones with the reason."""
    rotation = [case.inputs()]
    size = sum(x.nbytes for x in rotation[0])
    rotation += [case.inputs() for _ in range(min(7, ROTATED_BYTES // size))]
    results: list[Result] = []
    reference: tuple[Tensor, ...] | None = None
    for name, contender in case.contenders.items():
        result = Result(op, case.name, name)
        results.append(result)
        try:
            torch.manual_seed(0)
            found = _gradients(contender, case.inputs())
            reference = reference or found
            result.difference = max(_difference(x, y) for x, y in zip(found, reference, strict=True))
            _time(result, contender, case, rotation, clock, limits)
        except Exception as error:  # a rival that cannot run here is a line of the table, not the end of the run
            result.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    first = results[0].total_ms
    for result in results:
        if first and result.total_ms:
            result.speedup = first / result.total_ms
    return results + [Result(op, case.name, name, note=why) for name, why in case.missing.items()]


def _time(
    result: Result,
    contender: Contender,
    case: Case,
    rotation: list[tuple[Tensor, ...]],
    clock: Clock,
    limits: dict[str, float],
) -> None:
    def both(i: int) -> Any:
        return _gradients(contender, rotation[i % len(rotation)])

    result.forward_ms = clock.median_ms(lambda i: contender(*rotation[i % len(rotation)]))
    result.total_ms = clock.median_ms(both) if case.backward_bytes else result.forward_ms
    result.peak_mib = clock.peak_mib(lambda: both(0))
    seconds = result.total_ms / 1e3
    result.gb_per_s = (case.forward_bytes + case.backward_bytes) / seconds / 1e9
    result.copy_share = 1e9 * result.gb_per_s / limits["copy_bytes_per_s"]
    if case.forward_flops:
        result.tflop_per_s = (case.forward_flops + case.backward_flops) / seconds / 1e12
        result.matmul_share = 1e12 * result.tflop_per_s / limits["matmul_flop_per_s"]


def _gradients(contender: Contender, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the inputs that want one, or the output if none does."""
    out = contender(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(out, leaves, torch.ones_like(out)) if leaves else (out,)


def _difference(result: Tensor, reference: Tensor) -> float:
    """Largest deviation as a share of the reference's largest value."""
    result, reference = result.double(), reference.double()
    return float((result - reference).abs().max() / reference.abs().max())


def environment(device: torch.device) -> dict[str, str]:
    """Date, versions and machine, for the head of a table."""
    found = {"date": str(date.today()), "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "liger_kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if device.type == "cuda":
        return {**found, "device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    model = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {**found, "device": f"{model}, {torch.get_num_threads()} threads"}


def heading(head: dict[str, str], limits: dict[str, float]) -> str:
    """First lines of the Markdown table."""
    return (
        ", ".join(f"{key} {value}" for key, value in head.items())
        + f".\n\nCeilings: copy {limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        + f"matrix product {limits['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s.\n"
    )


def section(results: list[Result]) -> str:
    """The Markdown table of one case."""
    lines = [
        f"\n### {results[0].op}: {results[0].case}\n",
        f"| contender | {' | '.join(COLUMNS)} | note |",
        "|---|" + "---:|" * len(COLUMNS) + "---|",
        *map(_row, results),
    ]
    return "\n".join(lines) + "\n"


def _row(r: Result) -> str:
    cells = ["" if getattr(r, name) is None else form.format(getattr(r, name)) for name, form in COLUMNS.values()]
    return f"| {' | '.join([r.contender, *cells, r.note])} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", choices=SCALES, help="shapes; default: full on a GPU, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of logits and tokens; default: bf16 on a GPU, else fp32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; use --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches, and events are recorded, on the current one
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    scale = options.scale or ("cpu" if device.type == "cpu" else "full")
    clock = Clock(device, options.repeats)
    limits = ceilings(clock, dtype, scale)
    head = {**environment(device), "dtype": str(dtype).removeprefix("torch."), "repeats": str(options.repeats)}
    table, results = [heading(head, limits)], []
    print(table[0])
    for op in options.op:
        for case in cases(op, scale, device, dtype):
            found = measure(op, case, clock, limits)
            results += found
            table.append(section(found))
            print(table[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("".join(table))
    if options.json:
        document = {"environment": head, "ceilings": limits, "results": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0
