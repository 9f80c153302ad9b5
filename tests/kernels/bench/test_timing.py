"""The benchmark measures what it says, and a rival that cannot run is a line of its table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.bench import clock, timing
from kernels.bench.rivals import OPERATIONS, Case


class FixedClock(clock.Clock):
    """Calls once; 2 ms for the first contender's calls, 1 ms for all later ones."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), 1)
        self.calls = 0

    def median_ms(self, call: Any) -> float:
        call(0)
        self.calls += 1
        return 2.0 if self.calls <= 2 else 1.0


def test_rates_follow_from_times_and_ceilings() -> None:
    def inputs() -> tuple[torch.Tensor]:
        return (torch.ones(4, requires_grad=True),)

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this device\nmore")

    contenders = {"plain": lambda x: 2 * x, "wrong": lambda x: 3 * x, "broken": broken}
    case = Case("x", inputs, contenders, 1e6, 2e6, 1e9, 2e9, missing={"other": "not installed"})
    limits = {"copy_bytes_per_s": 6e9, "matmul_flop_per_s": 6e12}
    plain, wrong, broken_result, other = timing.measure("op", case, FixedClock(), limits)
    assert (plain.total_ms, plain.speedup, plain.difference) == (2.0, 1.0, 0.0)
    assert plain.gb_per_s == pytest.approx(1.5)
    assert plain.copy_share == pytest.approx(0.25)
    assert plain.tflop_per_s == pytest.approx(1.5)
    assert plain.matmul_share == pytest.approx(0.25)
    assert (wrong.speedup, wrong.difference) == (2.0, 0.5)
    assert broken_result.note == "RuntimeError: not on this device"
    assert broken_result.total_ms is None
    assert other.note == "not installed"


@pytest.mark.parametrize("op", OPERATIONS)
def test_tiny_run_on_the_cpu(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All contenders agree (torch.compile stands aside here: it would compile C++ for half a minute)."""

    def refuse(function: Any, **_: Any) -> Any:
        def run(*_: Any, **__: Any) -> Any:
            raise RuntimeError("stands aside")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    paths = tmp_path / "bench.json", tmp_path / "bench.md"
    arguments = ["--op", op, "--device", "cpu", "--scale", "tiny", "--repeats", "1"]
    assert timing.main([*arguments, "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    document = json.loads(paths[0].read_text())
    assert document["ceilings"]["copy_bytes_per_s"] > 0
    results = {r["contender"]: r for r in document["results"]}
    assert all("stands aside" in r["note"] for name, r in results.items() if name.startswith("torch.compile"))
    assert results["Liger LayerNorm" if op == "norm" else "triton"]["note"] == "no GPU"
    ran = [r for r in results.values() if r["total_ms"]]
    assert len(ran) >= (1 if op == "norm" else 2)
    assert all(r["difference"] < 1e-4 for r in ran)
    assert all(f"| {name} |" in paths[1].read_text() for name in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        timing.main(["--device", "cuda"])
    assert "there is no GPU here; use --device cpu" in capsys.readouterr().err
