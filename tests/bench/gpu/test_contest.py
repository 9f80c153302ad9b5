"""What the contest of kernels makes of attention's times."""

import pytest

from kernels.bench.timing import Result
from pipeline.bench.gpu.contest import attention_rule
from pipeline.config import parse_config


def times(tokens, triton, *sdpa, bias=False):
    case = f"ViT B=4 N={tokens} h=2 d=64{' bias' if bias else ''}"
    ours = [Result("attention", case, "triton", total_ms=triton)] if triton else []
    rivals = [Result("attention", case, f"SDPA {i}", total_ms=ms) for i, ms in enumerate(sdpa)]
    return [*ours, *rivals, Result("attention", case, "eager", total_ms=0.1)]


@pytest.mark.parametrize(
    ("results", "wins", "rule"),
    [
        (times(37, 1, 2, 3) + times(197, 5, 6, None), "triton at 37 tokens, triton at 197 tokens", "triton"),
        (times(197, 5, 9, 4) + times(37, 1, 2), "triton at 37 tokens, sdpa at 197 tokens", "sdpa_above_37"),
        (times(37, 3, 2) + times(197, 5, 4), "sdpa at 37 tokens, sdpa at 197 tokens", "sdpa"),
        # what is won at 50 tokens is less than what would be lost at 197
        (times(37, 1, 2) + times(50, 3, 2) + times(197, 5, 9), "sdpa at 50 tokens, triton at 197 tokens", "triton"),
        (times(37, 1, 2) + times(257, None, 2) + times(49, 9, 1, bias=True), "triton at 37 tokens", "triton"),
    ],
)
def test_the_rule_is_what_takes_least_time_over_all_lengths_without_bias(results, wins, rule):
    line = attention_rule(results)[0]
    assert line.startswith("attention without bias: ")
    assert f"{wins}; engine.kernels.attention={rule}" in line
    assert parse_config({"engine": {"kernels": {"attention": rule}}}).kernels_in_use()["loss"] == "triton"


def test_windows_are_told_apart_and_nothing_is_said_where_nothing_was_compared():
    assert attention_rule(times(49, 2, 1, bias=True)) == ["attention with bias: sdpa at 49 tokens"]
    assert attention_rule(times(37, None, 1)) == []
