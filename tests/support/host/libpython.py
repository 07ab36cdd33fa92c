"""Print the path of the interpreter's shared library, which an app embeds."""

import sys
import sysconfig
from pathlib import Path


def shared_library() -> Path | None:
    """Return this interpreter's shared library, or None if it is not installed."""
    names = [sysconfig.get_config_var(name) for name in ("INSTSONAME", "LDLIBRARY")]
    folders = [sysconfig.get_config_var(name) for name in ("LIBDIR", "PYTHONFRAMEWORKPREFIX")]
    found = [Path(folder) / name for folder in folders if folder for name in names if name]
    return next((path for path in found if path.is_file() and path.suffix != ".a"), None)


def how_to_get_it() -> str:
    package = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"{sys.base_prefix} has no shared libpython, which a host needs to embed it. On Debian and "
        f"Ubuntu: sudo apt install {package}; with pyenv: "
        "PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install"
    )


if __name__ == "__main__":
    library = shared_library()
    print(
        library if library is not None else how_to_get_it(),
        file=sys.stdout if library else sys.stderr,
    )
    sys.exit(library is None)
