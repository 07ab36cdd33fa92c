"""The Makefile finds a Python, and the wheel holds the package."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Statements that a fake interpreter runs before the Makefile's probe.
GOOD = ""
OLD = "sys.version_info = (3, 9, 6)"
NEW = "sys.version_info = (3, 14, 0)"
NO_VENV = "sys.modules['ensurepip'] = None"
MAC = "platform.system = lambda: 'Darwin'; platform.machine = lambda: 'arm64'"
INTEL = "platform.system = lambda: 'Darwin'; platform.machine = lambda: 'x86_64'"
# Shims of version managers end like this.
BROKEN = "exit 127"

FAKE = """#!/bin/sh
case "$1" in
  -c) exec {real} -c "
import platform, sys
sys.version_info = (3, 12, 0)
{pretence}
exec(sys.argv[1])" "$2" ;;
  -m) mkdir -p .venv && echo {name} > .venv/made-by ;;
  --version) echo "{name}'s version" ;;
esac
"""

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def search(
    folder: Path,
    pythons: dict[str, str],
    *,
    system: str = "Linux",
    compiler: bool = True,
    macos: str = "14.0",
) -> subprocess.CompletedProcess[str]:
    """Make the environment with these interpreters, and no others, on the PATH."""
    tools = folder / "bin"
    tools.mkdir()
    for tool in ("touch", "mkdir", "sh"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    scripts = {"uname": f"#!/bin/sh\necho {system}\n", "sw_vers": f"#!/bin/sh\necho {macos}\n"}
    if compiler:
        scripts["g++"] = "#!/bin/sh\n"
    for name, pretence in pythons.items():
        fake = FAKE.format(real=sys.executable, name=name, pretence=pretence or "pass")
        scripts[name] = f"#!/bin/sh\n{BROKEN}\n" if pretence == BROKEN else fake
    for name, script in scripts.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    shutil.copy(ROOT / "Makefile", folder)
    return subprocess.run(
        [str(shutil.which("make")), ".venv/.created"],
        cwd=folder,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_make
@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": GOOD}, "python3"),
        ({"python3": GOOD, "python3.11": GOOD}, "python3.11"),
        (
            {"python3.13": BROKEN, "python3.12": NO_VENV, "python3.11": OLD, "python3": GOOD},
            "python3",
        ),
        ({"python3": MAC}, "python3"),
        ({"python3.13": INTEL, "python3.11": MAC, "python3": OLD}, "python3.11"),
    ],
)
def test_make_takes_the_first_python_fit_for_use(
    tmp_path: Path, pythons: dict[str, str], chosen: str
) -> None:
    done = search(tmp_path, pythons)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv" / "made-by").read_text().strip() == chosen
    assert f"using {chosen} ({chosen}'s version)" in done.stdout


@needs_make
@pytest.mark.parametrize(
    ("pythons", "said"),
    [
        ({}, "brew install python@3.13"),
        ({"python3": OLD}, "python3 is python3's version"),
        ({"python3": NEW}, "python3 is python3's version"),
        ({"python3": NO_VENV}, "python3-venv"),
        ({"python3.12": INTEL}, "python3.12 is an Intel program"),
        ({"python3": BROKEN}, "sudo apt install python3"),
    ],
)
def test_make_says_how_to_get_a_python(tmp_path: Path, pythons: dict[str, str], said: str) -> None:
    done = search(tmp_path, pythons)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / ".venv").exists()


@needs_make
def test_linux_needs_a_compiler_and_a_mac_does_not(tmp_path: Path) -> None:
    linux, mac = tmp_path / "linux", tmp_path / "mac"
    linux.mkdir()
    mac.mkdir()
    done = search(linux, {"python3": GOOD}, compiler=False)
    assert done.returncode != 0
    assert "sudo apt install g++" in done.stderr
    assert search(mac, {"python3": MAC}, system="Darwin", compiler=False).returncode == 0


@needs_make
@pytest.mark.parametrize("macos", ["13.7.8", "14.0", "26.1"])
def test_mlx_needs_macos_14(tmp_path: Path, macos: str) -> None:
    done = search(tmp_path, {"python3": MAC}, system="Darwin", macos=macos)
    assert (done.returncode == 0) == (macos != "13.7.8")
    assert ("MLX needs macOS 14" in done.stderr) == (macos == "13.7.8")


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_runs_elsewhere(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        archive.extractall(tmp_path / "site")
    package = tree / "magistral_mlx"
    files = [*package.rglob("*"), *(package / "convert").rglob("*")]
    on_disk = {path for path in files if path.is_file() and path.name != "README.md"}
    on_disk -= {*(package / "training").rglob("*")}
    assert names == {f"magistral_mlx/{path.relative_to(package)}" for path in on_disk}
    assert {"demo", "convert", "serving"} <= {name.split("/")[1] for name in names}
    assert len(licenses) == 1
    generate = [sys.executable, "-m", "magistral_mlx.generate", "--model", "demo"]
    site, cache = tmp_path / "site", tmp_path / "cache"
    done = subprocess.run(
        [*generate, "-p", "What is 48 + 76?", "--temp", "0"],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site), "MAGISTRAL_MLX_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "124" in done.stdout
    assert list(cache.iterdir())
