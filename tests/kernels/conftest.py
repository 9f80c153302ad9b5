"""Fixtures of the kernel tests.

The same tests run for `impl="eager"` and, in a process with a GPU or under Triton's interpreter (test_interpreter.py),
for `impl="triton"`. Memory that an operator leaves unwritten reads NaN.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor

from kernels.dispatch import interpreted

if interpreted():
    from interpreting import patch_once

    patch_once()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "impl" in metafunc.fixturenames:
        fused = interpreted() or torch.cuda.is_available()
        eager = not interpreted()
        metafunc.parametrize("impl", ["eager"] * eager + ["triton"] * fused)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on `device` is for a GPU too."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
    if interpreted():
        items[:] = _dtypes_in_turn(items)


def _dtypes_in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of tests over shapes (or the like) and dtypes, every shape and every dtype, but each shape in one dtype alone.

    The interpreter takes a second where a GPU takes microseconds, and no shape goes another way for its dtype. Eager
    kernels, and those that are compiled for a GPU, see every shape in every dtype.
    """
    parameters = [getattr(getattr(item, "callspec", None), "params", {}) for item in items]
    dtypes: dict[str, dict[str, int]] = {}
    cases: dict[str, dict[str, int]] = {}  # number of each, in the order of collection
    places = []
    for item, params in zip(items, parameters, strict=True):
        function = item.nodeid.partition("[")[0]
        case = repr({name: value for name, value in params.items() if name != "dtype"})
        for known, found in ((dtypes, str(params.get("dtype"))), (cases, case)):
            known.setdefault(function, {}).setdefault(found, len(known[function]))
        places.append((function, str(params.get("dtype")), case))
    return [
        item
        for item, (function, dtype, case) in zip(items, places, strict=True)
        if len(cases[function]) < (count := len(dtypes[function]))
        or cases[function][case] % count == dtypes[function][dtype]
    ]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """PyTorch's deterministic mode fills fresh memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Check(Protocol):
    def __call__(
        self,
        result: Tensor,
        plain: Tensor,
        oracle: Tensor,
        exponent: float = 1.0,
        terms: int = 1,
        cancelled: float = 0.0,
    ) -> None: ...


@pytest.fixture
def earned() -> Check:
    """Checks that a result is at most twice as far from fp64 as plain PyTorch in the same dtype.

    The floor is what plain PyTorch may be spared by chance, in an order of summing that is another on every processor:
    one step of the output's dtype at the largest value (the interpreter truncates bf16), or in fp32 the error of exp(x)
    for |x| up to `exponent` after sums of `terms` numbers, whose roundings add up like the steps of a random walk.
    Where the result is nothing but the difference of equal numbers, `cancelled` is how large these are.
    """

    def check(
        result: Tensor,
        plain: Tensor,
        oracle: Tensor,
        exponent: float = 1.0,
        terms: int = 1,
        cancelled: float = 0.0,
    ) -> None:
        assert result.shape == oracle.shape
        oracle = oracle.double()
        step = max(torch.finfo(result.dtype).eps, exponent * terms**0.5 * torch.finfo(torch.float32).eps)
        floor = step * max(float(oracle.abs().max()) if oracle.any() else 1.0, cancelled)
        earned = (plain.double() - oracle).abs().max()
        error = (result.double() - oracle).abs().max()
        assert error <= 2 * earned + floor, f"error {error:.3g}, plain PyTorch's {earned:.3g}, floor {floor:.3g}"

    return check


@pytest.fixture
def triton() -> str:
    """The name of the fused implementation, for tests that eager code has no part in."""
    if not (interpreted() or torch.cuda.is_available()):
        pytest.skip("Triton wants a GPU or TRITON_INTERPRET=1, under which test_interpreter.py runs this")
    return "triton"
