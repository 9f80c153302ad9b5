"""The peak that utilization is measured against."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.measure.peak import Peak, device_peak


def test_the_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = SimpleNamespace(type="cuda")
    assert device_peak(device, torch.bfloat16) == Peak(989.4e12, "datasheet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_cpu_is_measured(dtype):
    peak = device_peak(torch.device("cpu"), dtype)
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e14
