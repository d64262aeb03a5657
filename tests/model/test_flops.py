"""The peak of a device is found by its name."""

import pytest
import torch

from laser_fast.model.flops import peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("H100 80GB HBM3", 989.4e12),
        ("H100 NVL", 835e12),
        ("A100-SXM4-80GB", 312e12),
        ("A10", 125e12),
        ("A10G", None),
        ("L4", 121e12),
        ("L40S", 362e12),
        ("L40", None),
        ("GeForce RTX 3090 Ti", None),
        ("GeForce RTX 4090", 165.2e12),
        ("GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_device_is_known_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA {name}")
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
