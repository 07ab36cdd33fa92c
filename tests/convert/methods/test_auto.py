"""The recipe ``auto``: bits are spent where they lower the error most, or refused."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert import ConvertOptions, check_conversion, stream_conversion
from magistral_mlx.convert.__main__ import main
from magistral_mlx.convert.methods.auto import allocate_bits
from magistral_mlx.convert.output.staging import CALIBRATION
from magistral_mlx.errors import MagistralError, OptionError
from tests.support.faults.killing import in_small_pieces
from tests.support.sources import content, convert_quickly, write_hf

AUTO: dict[str, Any] = {"recipe": "auto", "q_method": None}
BITS = (4, 5, 6, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_pieces(monkeypatch.setattr)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_bits_of_the_same_size_leave_less_error(seed: int) -> None:
    """Try every assignment: the greedy one is best if errors fall ever more slowly."""
    rng = np.random.default_rng(seed)
    units = {f"m{i}": int(rng.integers(1, 9)) for i in range(5)}
    sizes = {m: {b: b * unit for b in BITS} for m, unit in units.items()}
    errors = {
        m: {b: float(scale * 2.0 ** (-2 * b)) for b in BITS}
        for m, scale in zip(units, rng.exponential(1, 5), strict=True)
    }
    budget = int(rng.integers(1, 60))
    bits = allocate_bits(errors, sizes, budget)
    spent = sum(sizes[m][b] for m, b in bits.items())
    assert spent <= sum(table[4] for table in sizes.values()) + budget
    left = sum(errors[m][b] for m, b in bits.items())
    for choice in product(BITS, repeat=5):
        if sum(sizes[m][b] for m, b in zip(units, choice, strict=True)) <= spent:
            assert sum(errors[m][b] for m, b in zip(units, choice, strict=True)) >= left * (
                1 - 1e-12
            )


def test_bits_that_gain_nothing_are_not_spent() -> None:
    errors = {"a": {4: 0.0, 8: 0.0}, "b": {4: 1.0, 8: 1.0}}
    assert allocate_bits(errors, {"a": {4: 1, 8: 2}, "b": {4: 1, 8: 2}}, 100) == {"a": 4, "b": 4}


@pytest.mark.parametrize(
    ("target_bits", "least"),
    [(4.75, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3.8, 3), (6.9, 6)))],
)
@pytest.mark.slow
def test_the_target_bits_are_spent_on_v_and_k_first(
    tmp_path: Path, source: Path, target_bits: float, least: int
) -> None:
    summary = convert_quickly(source, tmp_path / "out", **AUTO, target_bits=target_bits)
    assert target_bits - 0.15 < summary.bits_per_weight <= target_bits
    formats = open_checkpoint(tmp_path / "out").formats
    bits = {module: quant.bits for module, quant in formats.items() if quant is not None}
    assert min(bits.values()) == least
    raised = {module.rpartition(".")[2] for module, b in bits.items() if b > least}
    assert {"k_proj", "v_proj"} <= raised
    assert convert_quickly(
        source, tmp_path / "out", **AUTO, target_bits=target_bits
    ).already_complete


@pytest.mark.slow
@pytest.mark.parametrize("method", ["importance", "gptq"])
def test_closed_anywhere_it_resumes_to_the_same_bytes(
    tmp_path: Path, source: Path, method: str
) -> None:
    options: dict[str, Any] = {
        "q_method": method,
        "recipe": "auto",
        "target_bits": 4.8,
        "tokenizer_json": False,
    }
    convert_quickly(source, tmp_path / "whole", recipe="auto", target_bits=4.8, q_method=method)
    count = 0
    while not (tmp_path / "out").exists():
        for taken, _ in enumerate(steps := stream_conversion(source, tmp_path / "out", **options)):
            if taken == 2 + 14 * count:
                break
        steps.close()
        assert (tmp_path / "out").exists() or any(
            (tmp_path / "out.partial" / CALIBRATION).iterdir()
        )
        count += 1
    assert count >= 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_bits": 2.2},
            r"target_bits 2.2 is out of reach: 2 bit everywhere takes 2\.5\d\d .* at least 2\.5",
        ),
        (
            {"target_bits": 2.501},
            r"target_bits 2.501 is out of reach: 2 bit everywhere takes 2\.5\d\d",
        ),
        (
            {"target_bits": 9.0},
            r"target_bits 9 is out of reach: 8 bit everywhere takes 8\.5\d\d .* 8bit instead",
        ),
        ({"target_bits": float("nan")}, "target_bits nan is out of reach"),
        ({}, "need each other"),
        ({"target_bits": 4.6, "recipe": "4bit"}, "need each other"),
        ({"target_bits": 4.6, "q_method": "round"}, "round takes none; leave q_method out"),
        ({"target_bits": 4.6, "q_bits": 4}, "leave q_bits out"),
        ({"target_bits": 4.6, "q_mode": "mxfp4"}, "is for q_mode=affine"),
        ({"target_bits": 4.6, "stream": True}, "fetch them twice"),
    ],
    ids=str,
)
def test_impossible_targets_are_refused_before_any_work(
    tmp_path: Path, source: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        convert_quickly(source, tmp_path / "out", **(AUTO | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target_bits", "least"), [(4.5, 3), (4.519, 3), (4.53, 4), (8.5, 6), (2.53, 2)]
)
def test_scales_and_norms_leave_no_gap_between_the_least_bits(
    tmp_path: Path, source: Path, target_bits: float, least: int
) -> None:
    plan = check_conversion(
        source,
        tmp_path / "out",
        ConvertOptions(**AUTO, target_bits=target_bits, tokenizer_json=False),
    ).plan
    assert set(plan.bits.values()) == {least}
    assert plan.bits_per_weight <= target_bits


@pytest.mark.slow
def test_another_target_is_another_conversion(tmp_path: Path, source: Path) -> None:
    convert_quickly(source, tmp_path / "out", **AUTO, target_bits=4.8)
    with pytest.raises(MagistralError, match=r"another target_bits: 4\.8, now 4\.9"):
        check_conversion(
            source,
            tmp_path / "out",
            ConvertOptions(recipe="auto", target_bits=4.9, tokenizer_json=False),
        )


def test_the_forecast_names_the_contexts_of_each_mac(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--no-tokenizer-json"]
    flags += ["--recipe", "auto", "--target-bits", "4.8"]
    assert main([*flags, "--dry-run"]) == 0
    text = capfd.readouterr().out
    assert "  24 GB Mac     4,096 tokens\n" in text
    assert "raised where this lowers the error most" in text
    assert main([*flags, "--dry-run", "--json"]) == 0
    forecast = json.loads(capfd.readouterr().out)
    assert forecast["contexts"]["24"] == 4096
    assert not list(tmp_path.iterdir())
    assert main(flags) == 0
    text = capfd.readouterr().out
    assert "  24 GB Mac     4,096 tokens\n" in text
    assert re.search(
        r"\n  [kv]_proj +4 bit in \d of \d layers, \d bit in|\n  [kv]_proj +[568] bit\n", text
    )
    assert open_checkpoint(tmp_path / "out").nbytes <= forecast["most_bytes_out"]
