"""Which package is tested, and the choice of an implementation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.attention import attention
from kernels.dispatch import interpreted
from kernels.distillation import column_sum
from kernels.optimizer import AdamWEma, Shard
from kernels.residual import add_rows, row_positions
from kernels.sinkhorn import sinkhorn

ROOT = Path(__file__).parents[2]


def test_this_repository_is_loaded_and_not_another_package_named_kernels() -> None:
    assert Path(kernels.__file__) == ROOT / "kernels" / "__init__.py"


@pytest.mark.runs
@pytest.mark.skipif(interpreted(), reason="the process that it starts is the same one")
def test_eager_needs_neither_triton_nor_the_pipeline() -> None:
    program = """
import sys, torch
before = set(sys.modules)
from kernels import attention, colours, dispatch, distillation, optimizer, residual, sinkhorn
from kernels.distillation import column_sum
column_sum(torch.zeros(2, 3), impl="eager")
new = set(sys.modules) - before
assert not new & {"triton", "pipeline", "kernels.fused"}, new
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_unknown_implementation_is_refused_with_the_valid_ones(name: str) -> None:
    with pytest.raises(ValueError, match="is unknown; expected one of eager, triton"):
        column_sum(torch.zeros(2, 3), impl=name)


@pytest.mark.skipif(interpreted(), reason="the interpreter runs on the CPU")
def test_triton_on_the_cpu_is_refused_with_the_way_out() -> None:
    x, rows = torch.zeros(2, 3), torch.arange(2)
    calls = (
        lambda: column_sum(torch.zeros(2, 3), impl="triton"),
        lambda: sinkhorn([torch.zeros(2, 3)], 0.1, impl="triton"),
        lambda: attention(torch.zeros(1, 2, 3, 1, 16), impl="triton"),
        lambda: add_rows(x, x, rows, row_positions(rows, 2), 1.0, impl="triton"),
        lambda: AdamWEma(Shard.of(torch.zeros(2), torch.zeros(2)), [], impl="triton"),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=r"tensor on cpu, expected cuda: use impl='eager', or set TRITON_INTERPRET=1"
        ):
            call()


def test_dtypes_without_kernels_are_refused() -> None:
    if not interpreted():
        pytest.skip("needs impl='triton' on the CPU: runs under TRITON_INTERPRET=1")
    with pytest.raises(ValueError, match=r"got torch.float64, expected float32, bfloat16 or float16"):
        column_sum(torch.zeros(2, 3, dtype=torch.float64), impl="triton")


@pytest.mark.parametrize("value", ["1", "True", "on", "y", "yes", "0", "false", "", "2"])
def test_interpreter_is_recognised_as_triton_does(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreted() == bool(triton.knobs.runtime.interpret)
