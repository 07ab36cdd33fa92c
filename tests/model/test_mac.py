"""Names of Macs, their memory, and the speed that their chips are predicted to reach."""

import re

import pytest

from benchmarks.macs.predict import CHIPS as MEASURED
from benchmarks.macs.predict import predict
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import OptionError
from magistral_mlx.model import mac, mac_table
from magistral_mlx.model.footprint import tensor_bytes
from magistral_mlx.model.mac import CHIPS, Mac


@pytest.mark.parametrize(
    ("text", "chip", "memory_gb"),
    [
        ("M4 Pro 24GB", "M4 Pro", 24),
        ("apple m1, 8 gb", "M1", 8),
        ("MacBook Pro M3 Max 128 GiB", "M3 Max", 128),
        ("Mac Studio m3-ultra/512g", "M3 Ultra", 512),
        ("m4pro-24GB", "M4 Pro", 24),
    ],
)
def test_a_mac_is_read_from_its_name(text: str, chip: str, memory_gb: int) -> None:
    assert Mac.of_name(text) == Mac(memory_gb, CHIPS[chip])


@pytest.mark.parametrize(
    "text",
    ["", "24GB", "M4 Pro", "M4 Pro 24", "M4 Pro 0GB", "M4 24GB x", "M4 " + "9" * 5000 + "GB"],
)
def test_a_name_without_chip_or_memory_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--memory 24GB"):
        Mac.of_name(text)


def test_an_unknown_chip_is_refused_with_the_list() -> None:
    with pytest.raises(OptionError, match=r"chip M9 Max.*M1, M1 Pro.*--memory 36GB"):
        Mac.of_name("M9 Max 36GB")


@pytest.mark.parametrize("text", ["24", "24GB", " 24 gb ", "24GiB", "24g"])
def test_memory_is_in_whole_gigabytes(text: str) -> None:
    assert Mac.of_memory(text) == Mac(24)


@pytest.mark.parametrize("text", ["", "0", "-1", "2.5GB", "1e3", "٢٤", "9" * 5000])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="such as 24GB"):
        Mac.of_memory(text)


def test_the_benchmarks_predict_the_same_speeds() -> None:
    read = mac_table.small_bytes_per_token("4")
    for chip in MEASURED:
        found = predict(chip, mac_table.SPEED_CONTEXT, {}).per_second
        low, high = CHIPS[chip.name].tokens_per_second(read)
        assert high == pytest.approx(found.high, rel=1e-3)
        assert low <= found.low * 1.001


def test_bytes_of_a_packed_matrix() -> None:
    assert tensor_bytes((4, 64), None) == 4 * 64 * 2
    assert tensor_bytes((4, 64), QuantFormat(3, 64)) == 4 * (64 * 3 // 8 + 2 + 2)
    # 32 codes of 4 bits and a scale of 8.
    assert tensor_bytes((4, 64), QuantFormat(4, 32, "mxfp4")) == 4 * 2 * (16 + 1)


def test_this_machine_is_a_mac_only_with_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: False)
    assert mac.this_mac() is None
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr("mlx.core.device_info", lambda: {"device_name": "Apple M4 Pro"})
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": 24 * 65536}.get)
    assert mac.this_mac() == Mac(24, CHIPS["M4 Pro"])


def test_chips_have_apples_names() -> None:
    assert all(re.fullmatch(r"M\d( Pro| Max| Ultra)?", name) for name in CHIPS)
