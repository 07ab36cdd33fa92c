"""Programs that a model wrote, run without a network and within limits of time, memory and output.

They run as this user, in an empty folder of their own, and on Linux can read and write what the user can: whoever
allows them should know. On a Mac they may write into that folder alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from magistral_mlx.errors import OptionError

SECONDS = 6.0  # LiveCodeBench's for one test
MEMORY_BYTES = 4 * 2**30
OUTPUT_BYTES = 2**26
POLL_SECONDS = 0.02
MAC_PROFILE = (
    '(version 1)(allow default)(deny network*)(deny file-write*)(allow file-write* (subpath "{folder}"))'
    '(allow file-write* (literal "/dev/null"))'
)

# The limits are set from within, as the first thing that the program does.
START = """import resource, runpy, sys
for limit, value in ((resource.RLIMIT_AS, {memory}), (resource.RLIMIT_CPU, {cpu}), (resource.RLIMIT_FSIZE, {output}),
                     (resource.RLIMIT_CORE, 0)):
    try:
        resource.setrlimit(limit, (value, value))
    except (ValueError, OSError):  # as macOS does with RLIMIT_AS: there the parent watches
        pass
sys.argv = ["program.py"]
runpy.run_path("program.py", run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """How to start a program here, and what it may take."""

    kind: str  # "unshare" or "sandbox-exec"
    seconds: float = SECONDS
    memory_bytes: int = MEMORY_BYTES

    def run(self, program: str, stdin: str) -> str | None:
        """What a Python program prints; None where it fails, or takes more than it may."""
        with tempfile.TemporaryDirectory(prefix="magistral-program-") as name:
            folder = Path(name).resolve()
            (folder / "program.py").write_text(program, encoding="utf-8")
            limits = START.format(
                memory=self.memory_bytes, cpu=int(self.seconds) + 2, output=OUTPUT_BYTES
            )
            (folder / "start.py").write_text(limits)
            (folder / "stdin").write_text(stdin, encoding="utf-8")
            command = [*_confined(self.kind, folder), sys.executable, "-I", "start.py"]
            with (folder / "stdin").open("rb") as source, (folder / "stdout").open("wb") as sink:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    stdin=source,
                    stdout=sink,
                    stderr=subprocess.DEVNULL,
                    env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": name, "TMPDIR": name},
                    start_new_session=True,
                )
                try:
                    done = self._waited(process)
                finally:
                    _end(process)
            if done != 0:
                return None
            return (folder / "stdout").read_text(encoding="utf-8", errors="replace")

    def _waited(self, process: subprocess.Popen[bytes]) -> int | None:
        """Its exit code, None where it was over a limit."""
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            try:
                return process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if self.kind == "sandbox-exec" and resident_bytes(process.pid) > self.memory_bytes:
                    return None
        return None


def find_sandbox() -> Sandbox:
    """What this machine has to take the network away from a program.

    Raises:
        OptionError: it has nothing, or nothing that works.
    """
    tool = "sandbox-exec" if sys.platform == "darwin" else "unshare"
    if shutil.which(tool) is None:
        raise OptionError(
            f"--allow-code-execution needs {tool}, which takes the network away from a program; it is not on the PATH"
            + (
                ""
                if tool == "sandbox-exec"
                else " (on Debian and Ubuntu: sudo apt install util-linux)"
            )
        )
    sandbox = Sandbox(tool)
    if sandbox.run("print(7)", "") != "7\n":
        raise OptionError(
            f"--allow-code-execution needs {tool}, and here it could not run a program without the network"
            + (
                ": the system may forbid it to users (kernel.apparmor_restrict_unprivileged_userns)"
                * (tool == "unshare")
            )
        )
    return sandbox


def resident_bytes(pid: int) -> int:
    """Of a process and its children; 0 where they are gone."""
    done = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=False
    )
    rows = [
        tuple(map(int, line.split())) for line in done.stdout.splitlines() if len(line.split()) == 3
    ]
    family = {pid}
    while more := {own for own, parent, _ in rows if parent in family} - family:
        family |= more
    return 1024 * sum(rss for own, _, rss in rows if own in family)


def _confined(kind: str, folder: Path) -> list[str]:
    if kind == "sandbox-exec":
        return ["sandbox-exec", "-p", MAC_PROFILE.format(folder=folder)]
    return ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The program and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
