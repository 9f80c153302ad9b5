"""Kernels compile for GPUs that are not there, without spills."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.dispatch import interpreted

if interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from kernels.bench import aot
from kernels.fused import attention


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_configurations_of_the_presets_do_not_spill(arch: int) -> None:
    reports = list(aot.reports(torch.bfloat16, arch, presets_only=True))
    assert {r.kernel for r in reports} >= {"_forward_kernel", "_backward_kernel", "_row_kernel", "_column_kernel"}
    assert all(r.registers > 0 for r in reports)
    assert not [r for r in reports if not r.fits]


def test_a_spilling_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_backward_schedule", lambda *_: {"num_warps": 4, "maxnreg": 40})
    with aot.compile_only(80) as compiled:
        aot._attention(torch.bfloat16, 37, 64, False, False)
    _, spills = aot._resources(compiled[-1][1].asm["cubin"])
    assert spills > 0
    assert not aot.Report("", "", 80, 4, 40, 0, spills).fits


@pytest.mark.runs
def test_the_command_prints_and_stores_its_table(tmp_path: Path) -> None:
    table = tmp_path / "aot.json"
    script = """
import sys, torch, kernels.bench.aot as aot
aot.cases = lambda *_: [("optimizer", lambda: aot._optimizer(torch.bfloat16))]
sys.exit(aot.main())
"""
    command = [sys.executable, "-c", script, "--arch", "90", "--dtype", "bf16", "--json", str(table)]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert "2 kernels compiled, 0 spill or exceed shared memory" in run.stdout
    assert '"spill_bytes": 0' in table.read_text()
