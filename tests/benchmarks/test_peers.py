"""llama.cpp as a contender: found or refused, and what a stand-in for its server is asked and answers."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import Comparison, Lap
from benchmarks.runtime import llama
from benchmarks.runtime.bandwidth import bandwidth
from benchmarks.runtime.contenders import Job, Loaded, Memory
from benchmarks.runtime.lengths import times_as_long
from benchmarks.runtime.llama import check_llama, clock_seconds, cpu_seconds, llama_cpp
from benchmarks.runtime.speed import Peers, Workload, compare_contexts, compare_models, workloads
from benchmarks.synthetic import NARROW, write_slice
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.errors import OptionError

JOB = Job([5, 6, 7], 4)

SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if sys.argv[1:] == ["--version"]:
    sys.exit("version: 1234 (abc)")
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if open(options["-m"]).read() == "broken":
    sys.exit("error: failed to load model")
asked_for_health = 0

class Answers(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        global asked_for_health
        asked_for_health += 1
        self.send_response(503 if asked_for_health == 1 else 200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(options["-m"] + ".asked", "a") as file:
            file.write(json.dumps([options, asked]) + chr(10))
        n = asked["n_predict"]
        timings = {{"prompt_n": len(asked["prompt"]), "prompt_ms": 30.0, "predicted_n": n, "predicted_ms": 200.0}}
        content = json.dumps({{"tokens": list(range(n)), "timings": timings}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

HTTPServer((options["--host"], int(options["--port"])), Answers).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file, and a stand-in for llama-server on the PATH."""
    script = tmp_path / "bin" / "llama-server"
    script.parent.mkdir()
    script.write_text(SERVER.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    gguf = tmp_path / "model.gguf"
    gguf.write_text("GGUF")
    return gguf


def test_the_server_is_asked_for_the_same_work_and_ended(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    popen = llama.subprocess.Popen
    monkeypatch.setattr(
        llama.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    reply: list[int] = []
    loaded = llama_cpp(server, JOB, reply)
    laps = loaded.run()
    assert (laps["prefill"].seconds, laps["prefill"].count) == (0.03, 3)
    assert (laps["decode"].seconds, laps["decode"].count) == (0.2, 4)
    assert reply == [0, 1, 2, 3, 4]
    ((options, asked),) = [
        json.loads(line) for line in (server.parent / "model.gguf.asked").read_text().splitlines()
    ]
    assert options["--host"] == "127.0.0.1"
    assert int(options["-c"]) >= len(JOB.prompt) + JOB.total
    assert (asked["prompt"], asked["n_predict"], asked["temperature"]) == ([5, 6, 7], 5, 0)
    assert (asked["cache_prompt"], asked["ignore_eos"]) == (False, True)
    loaded.close()
    assert started[0].returncode is not None


def test_a_server_that_does_not_start_is_quoted(server: Path) -> None:
    server.write_text("broken")
    with pytest.raises(
        OptionError, match="did not start with this model: error: failed to load model"
    ):
        llama_cpp(server, JOB, [])


def test_it_is_measured_beside_ours(server: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slice"
    folder.mkdir()
    write_slice(folder, replace(NARROW, num_layers=1))
    found = compare_models(
        "x", folder, Workload(5, 4, 2), peers=Peers(gguf=server), report=lambda _: None
    )
    assert {name: len(laps) for name, laps in found.laps["decode"].items()} == {
        "magistral-mlx": 2,
        "llama.cpp": 2,
    }
    assert found.laps["decode"]["llama.cpp"][0].per_second == 20
    assert found.facts["same_ids"]["llama.cpp"] is False
    assert (found.facts["llama_cpp"], found.facts["gguf_bytes"]) == ("version: 1234 (abc)", 4)


class Llama:
    """Stands for the Python package's: certain of the number of ids it has seen."""

    def __init__(self, path: str, **options: Any) -> None:
        self.seen: list[int] = []
        self.is_closed = False

    def reset(self) -> None:
        self.seen = []

    def eval(self, ids: list[int]) -> None:
        self.seen += ids

    def sample(self, temp: float) -> int:
        assert temp == 0
        return len(self.seen)

    def close(self) -> None:
        self.is_closed = True


def test_the_python_package_serves_where_there_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setitem(
        sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __spec__=SimpleNamespace())
    )
    check_llama(Path(__file__))
    reply: list[int] = []
    loaded = llama_cpp(tmp_path / "model.gguf", JOB, reply)
    for _ in range(2):
        laps = loaded.run()
        assert reply == [3, 4, 5, 6, 7]  # every id but the last was fed
        assert (laps["prefill"].count, laps["decode"].count) == (3, 4)


def test_a_peer_that_is_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["speed", "--quick", "--gguf", "x"]) == 2
    assert "add --peer llama.cpp" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["speed", "--quick", "--peer", "llama.cpp", "--gguf", __file__]) == 2
    assert "brew install llama.cpp" in capsys.readouterr().err
    assert main(["speed", "--quick", "--peer", "mlx-lm"]) == 2
    assert "pip install 'magistral-mlx[bench]'" in capsys.readouterr().err
    monkeypatch.setattr("shutil.which", lambda name: name)
    for arguments in ([], ["--gguf", "none.gguf"]):
        assert main(["speed", "--quick", "--peer", "llama.cpp", *arguments]) == 2
        assert "--gguf" in capsys.readouterr().err


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_contenders_that_do_not_fit_together_take_turns(one_at_a_time: bool) -> None:
    held: list[str] = []
    most = 0

    def loader(name: str) -> Loaded:
        held.append(name)
        return Loaded(lambda: {"decode": Lap(1, 1, 1)}, lambda: held.remove(name))

    memory = Memory(one_at_a_time)
    runs = memory.runs({name: lambda name=name: loader(name) for name in "ab"})  # type: ignore[misc]
    for _ in range(2):
        for run in runs.values():
            run()
            most = max(most, len(held))
    assert most == (1 if one_at_a_time else 2)
    memory.clear()
    assert held == []


def test_contexts_are_cut_to_the_model_and_to_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    asked: list[tuple[Workload, Peers]] = []

    def timed(
        title: str, folder: Path, workload: Workload, *, peers: Peers, report: object
    ) -> Comparison:
        """Ours takes 1 s, mlx-lm in float32 2 and, where it takes part, in bf16 70; half of it decoding."""
        asked.append((workload, peers))
        comparison = Comparison(title, {})
        for _ in range(workload.repeats):
            for name, seconds in (
                ("magistral-mlx", 1),
                ("mlx-lm, float32", 2),
                *[("mlx-lm", 70)] * peers.in_bf16,
            ):
                comparison.add(
                    name, dict.fromkeys(("prefill", "decode"), Lap(seconds / 2, seconds / 2, 1))
                )
        return comparison

    monkeypatch.setattr("benchmarks.runtime.speed.compare_models", timed)
    said: list[str] = []
    assert (
        len(
            list(compare_contexts("x", tmp_path, found, 1e9, peers=Peers(True), report=said.append))
        )
        == 3
    )
    assert ([workload for workload, _ in asked], said) == (found, [])
    assert [peers.in_bf16 for _, peers in asked] == [True, False, False]
    lengths = found[0].prompt_tokens, found[1].prompt_tokens
    longer = times_as_long(checkpoint.config, *lengths) + lengths[1] / lengths[0]
    expected = 4 * 1.5 * longer  # three repeats and a warm-up
    for limit, count in ((0, 1), (expected - 1, 1), (expected + 1, 2)):
        assert (
            len(
                list(
                    compare_contexts(
                        "x", tmp_path, found[:2], limit, peers=Peers(True), report=said.append
                    )
                )
            )
            == count
        )
    assert "a prompt of 3,968 and longer ones are left out" in said[0]


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


def test_processor_time_of_a_process() -> None:
    assert cpu_seconds(os.getpid()) == pytest.approx(sum(os.times()[:2]), abs=1)
    assert clock_seconds(" 1:02.50\n") == 62.5
    assert clock_seconds("1:01:02.5") == 3662.5
