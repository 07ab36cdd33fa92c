"""llama.cpp as a contender, where it is on the machine: its ``llama-server``, or its Python package."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.error import URLError

from benchmarks.measure import Lap, Stopwatch
from benchmarks.runtime.contenders import Job, Loaded, timed
from magistral_mlx.errors import OptionError

SERVER = "llama-server"
PACKAGE = "llama_cpp"
START_SECONDS = 300  # a model of 14 GB from a cold disk
POLL_SECONDS = 0.05
ALL_LAYERS = 999


def check_llama(gguf: Path | None) -> None:
    """Raises OptionError where llama.cpp is not here, or no model is named for it."""
    if shutil.which(SERVER) is None and importlib.util.find_spec(PACKAGE) is None:
        raise OptionError(
            f"--peer llama.cpp needs {SERVER} on the PATH (brew install llama.cpp) or its Python package "
            "(pip install llama-cpp-python); neither is here"
        )
    if gguf is None:
        raise OptionError(
            "--peer llama.cpp reads a GGUF file; name the same model's with --gguf FILE"
        )
    if not gguf.is_file():
        raise OptionError(f"--gguf {gguf}: no such file")


def llama_version() -> str:
    """As it calls itself."""
    if shutil.which(SERVER) is None:
        return f"{PACKAGE} {metadata.version('llama-cpp-python')}"
    done = subprocess.run([SERVER, "--version"], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    return next((line for line in said if "version" in line), f"{SERVER}, which states no version")


def llama_cpp(gguf: Path, job: Job, reply: list[int]) -> Loaded:
    """The server where it is on the PATH, else the package.

    Raises:
        OptionError: it does not start.
    """
    return _served(gguf, job, reply) if shutil.which(SERVER) else _imported(gguf, job, reply)


def _imported(gguf: Path, job: Job, reply: list[int]) -> Loaded:
    import llama_cpp as package  # type: ignore[import-not-found,unused-ignore]

    context = len(job.prompt) + job.total + 8
    model = package.Llama(
        str(gguf), n_ctx=context, n_gpu_layers=-1, n_batch=min(2048, context), verbose=False
    )

    def run() -> Mapping[str, Lap]:
        def ids() -> Any:
            model.reset()
            model.eval(list(job.prompt))
            for left in range(job.total, 0, -1):
                identity = model.sample(temp=0.0)
                yield identity
                if left > 1:
                    model.eval([identity])

        return timed(ids(), len(job.prompt), Stopwatch(), reply)

    return Loaded(run, model.close)


def _served(gguf: Path, job: Job, reply: list[int]) -> Loaded:
    port = _free_port()
    command = [SERVER, "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", str(len(job.prompt) + job.total + 8), "-ngl", str(ALL_LAYERS), "-np", "1"]
    log = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the server
    process = subprocess.Popen(command, stdout=log, stderr=log)

    def close() -> None:
        process.terminate()
        process.wait()
        log.close()

    try:
        _await(process, port, log)
    except BaseException:
        close()
        raise

    def run() -> Mapping[str, Lap]:
        asked = {"prompt": list(job.prompt), "n_predict": job.total, "temperature": 0.0, "seed": 0}
        asked |= {"cache_prompt": False, "ignore_eos": True, "return_tokens": True}
        before = cpu_seconds(process.pid)
        answered = _post(port, asked)
        took = cpu_seconds(process.pid) - before
        reply[:] = answered.get("tokens", [])
        times = answered["timings"]
        prefill, decode = times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
        shares = (took * seconds / (prefill + decode) for seconds in (prefill, decode))
        # Its decode time begins with the first id, which came with the prompt.
        return {
            "prefill": Lap(prefill, next(shares), times["prompt_n"]),
            "decode": Lap(decode, next(shares), max(1, times["predicted_n"] - 1)),
        }

    return Loaded(run, close)


def _await(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    """Until the server has its model."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (URLError, OSError):  # not there yet, or still loading (503)
            time.sleep(POLL_SECONDS)
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()[-3:]
    raise OptionError(
        f"{SERVER} did not start with this model: {' '.join(said) or 'it said nothing'}"
    )


def _post(port: int, asked: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
    except (URLError, OSError, ValueError) as error:
        raise OptionError(f"{SERVER} did not answer: {error}") from None


def cpu_seconds(pid: int) -> float:
    """What a process of ours has used so far."""
    if sys.platform == "linux":
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    done = subprocess.run(
        ["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return clock_seconds(done.stdout)


def clock_seconds(clock: str) -> float:
    """``ps`` writes 1:02.50 or 1:01:02.50."""
    seconds = 0.0
    for part in clock.strip().split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
