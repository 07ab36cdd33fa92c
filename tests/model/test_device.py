"""The memory that a device allows, and the limits of MLX that are set."""

import os
from pathlib import Path

import mlx.core as mx
import pytest

from magistral_mlx.errors import MemoryLimitError, OptionError
from magistral_mlx.model import device


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Record the limits that are set, on no device."""
    found: dict[str, int] = {}
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(
            mx, f"set_{name}_limit", lambda limit, name=name: found.update({name: limit})
        )
    return found


@pytest.mark.parametrize("name", device.TEMPORARY)
def test_a_cpu_needs_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    for each in device.TEMPORARY:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    device.check_temporary_folder()
    monkeypatch.setenv(name, str(tmp_path))
    device.check_temporary_folder()
    monkeypatch.setenv(name, "/nonexistent")
    with pytest.raises(OptionError, match=rf"^{name} is '/nonexistent', which is no folder .*set"):
        device.check_temporary_folder()
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    device.check_temporary_folder()


def test_a_budget_is_what_was_asked_for_or_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.budget_bytes(2.5) == 2_500_000_000
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    assert device.budget_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(
        mx, "device_info", lambda: {"max_recommended_working_set_size": 11, "memory_size": 16}
    )
    assert device.budget_bytes() == 11
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "a new one"})
    assert device.budget_bytes(1) == 10**9
    with pytest.raises(MemoryLimitError, match=r"does not tell how much memory .* memory_gb"):
        device.budget_bytes()


def test_the_wired_limit_is_not_touched_unless_asked(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    device.limit_memory(100, freed=20, wired=None)
    assert limits == {"memory": 100, "cache": 20}
    limits.clear()
    with pytest.raises(OptionError, match="wired=True"):
        device.limit_memory(100, freed=20, wired=50)
    assert limits == {}


def test_memory_is_wired_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    device.limit_memory(100, freed=20, wired=50)
    assert limits == {"memory": 100, "cache": 20, "wired": 50}
    assert "kernel panics" in caplog.text

    def refuse(limit: int) -> None:
        raise ValueError("larger than the maximum working set size")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with pytest.raises(OptionError, match=r"cannot be wired on this Mac .* memory_gb"):
        device.limit_memory(100, freed=20, wired=50)
