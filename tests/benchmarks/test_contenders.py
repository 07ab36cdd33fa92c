"""Contenders that take turns, contexts that are left out, and the bandwidth of the machine."""

from functools import partial
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import Comparison, Lap
from benchmarks.runtime.bandwidth import bandwidth
from benchmarks.runtime.contenders import Pool, Workload, times_as_long
from benchmarks.runtime.speed import compare_contexts, workloads
from benchmarks.synthetic import NARROW, write_slice
from magistral_mlx.checkpoint.folder import open_checkpoint


def test_a_peer_that_is_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["speed", "--quick", "--peer", "mlx-lm"]) == 2
    assert "pip install 'magistral-mlx[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_contenders_that_do_not_fit_together_take_turns(one_at_a_time: bool) -> None:
    held: list[str] = []
    most = 0

    class Contender:
        def __init__(self, name: str) -> None:
            held.append(name)
            self.name = name

        def __call__(self) -> dict[str, Lap]:
            return {"decode": Lap(1, 1, 1)}

        def __del__(self) -> None:
            held.remove(self.name)

    pool = Pool(one_at_a_time)
    runs = pool.runs({name: partial(Contender, name) for name in "ab"})
    for _ in range(2):
        for run in runs.values():
            run()
            most = max(most, len(held))
    assert most == (1 if one_at_a_time else 2)
    pool.clear()
    assert held == []


def test_contexts_are_cut_to_the_model_and_to_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_slice(tmp_path, NARROW)
    checkpoint = open_checkpoint(tmp_path)
    one = Workload(1, 127, 3)
    found = list(workloads(checkpoint, (512, 4096, 99_999), one))
    assert [w.prompt_tokens + w.decode_tokens + 1 for w in found] == [
        512,
        4096,
        checkpoint.config.max_positions,
    ]
    assert list(workloads(checkpoint, (64,), one)) == []
    asked: list[tuple[Workload, bool]] = []

    def timed(
        title: str, folder: Path, workload: Workload, *, peer: bool, in_bf16: bool
    ) -> Comparison:
        """Ours takes 1 s, mlx-lm 2 s in float32 and 70 s in bf16, half of it for decoding."""
        asked.append((workload, in_bf16))
        comparison = Comparison(title, {})
        seconds = {"magistral-mlx": 1, "mlx-lm, float32": 2} | ({"mlx-lm": 70} if in_bf16 else {})
        for _ in range(workload.repeats):
            for name, s in seconds.items():
                comparison.add(name, dict.fromkeys(("prefill", "decode"), Lap(s / 2, s / 2, 1)))
        return comparison

    monkeypatch.setattr("benchmarks.runtime.speed.compare_models", timed)

    def count(several: list[Workload], seconds: float) -> int:
        return len(list(compare_contexts("x", tmp_path, several, seconds, peer=True)))

    assert count(found, 1e9) == 3
    assert [workload for workload, _ in asked] == found
    assert [in_bf16 for _, in_bf16 in asked] == [True, False, False]
    assert capsys.readouterr().err == ""
    lengths = found[0].prompt_tokens, found[1].prompt_tokens
    longer = times_as_long(checkpoint.config, *lengths) + lengths[1] / lengths[0]
    expected = 4 * 1.5 * longer  # three repeats and a warm-up
    assert [count(found[:2], limit) for limit in (0, expected - 1, expected + 1)] == [1, 1, 2]
    assert "a prompt of 3,968 and longer ones are left out" in capsys.readouterr().err


def test_a_longer_prefill_takes_as_many_multiply_adds_more() -> None:
    """Counted position by position."""
    q, kv = NARROW.num_heads * NARROW.head_dim, NARROW.num_kv_heads * NARROW.head_dim
    D, F = NARROW.hidden_size, NARROW.intermediate_size
    layer = 2 * D * q + 2 * D * kv + 3 * D * F + 2 * D  # norms count as one for each element

    def count(length: int) -> float:
        return (
            NARROW.num_layers * sum(layer + 2 * q * (position + 0.5) for position in range(length))
            + D * length
        )

    assert times_as_long(NARROW, 7, 60) == pytest.approx(count(60) / count(7))


def test_a_streamed_matrix_gives_bytes_a_second() -> None:
    facts = bandwidth(repeats=2, matrix_bytes=2**20).facts
    assert facts["matrix_bytes"] == 2**20
    assert facts["bytes_per_second"] == 2**20 / min(facts["seconds"])
