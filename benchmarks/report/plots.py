"""Pictures of result files, PNG and SVG: every one that the results have figures for."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.pictures import PICTURES
from magistral_mlx.errors import OptionError

DPI = 160


def check_matplotlib() -> None:
    """Raises OptionError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(
            "--plot needs matplotlib; install it with: pip install 'magistral-mlx[bench]'"
        )


def draw(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw what these result files have, and return the files written: against context, of two contexts or more.

    Raises:
        OptionError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with matplotlib.rc_context({"svg.hashsalt": "magistral", "font.size": 10}):
        for name, make in PICTURES.items():
            figure = make(results)
            if figure is None:
                continue
            for suffix in (".png", ".svg"):
                file = folder / f"{name}{suffix}"
                dated = {"metadata": {"Date": None}} if suffix == ".svg" else {}
                figure.savefig(file, dpi=DPI, bbox_inches="tight", **dated)
                written.append(file)
            pyplot.close(figure)
    return written
