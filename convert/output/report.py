"""Report the predicted output errors of a conversion, relative to those of rounding."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DIGITS = 4
MEASURES = {
    "importance": "squared error of a linear's outputs over the outputs squared, "
    "as if its inputs were independent",
    "gptq": "squared error of a linear's outputs over the outputs squared, "
    "on 256 tokens of the calibration",
}


@dataclass(frozen=True, slots=True)
class Gain:
    """The summary of a report.

    Attributes:
        error_ratio: the sum of all relative errors over that of rounding.
        outliers: the largest E[x_j^2] over the mean of its linear.
        outliers_at: the path of that linear.
    """

    error_ratio: float
    outliers: float
    outliers_at: str


def make_report(
    method: str, errors: Mapping[str, Sequence[float]], without_inputs: Collection[str]
) -> dict[str, Any]:
    """Build the manifest's report.

    Args:
        method: a key of MEASURES.
        errors: by module path, ``methods.error.OutputError`` and the outlier ratio of the inputs.
        without_inputs: modules without measured inputs, such as an embedding.
    """
    tensors = {}
    for module, (rounded, found, signal, outliers) in errors.items():
        whole = signal or 1.0
        figures = {"error_rounded": rounded / whole, "error": found / whole}
        figures |= {} if module in without_inputs else {"outlier_ratio": outliers}
        tensors[module] = {name: _short(value) for name, value in figures.items()}
    lost = sum(tensor["error_rounded"] for tensor in tensors.values())
    ratio = sum(tensor["error"] for tensor in tensors.values()) / lost if lost else 1.0
    return {
        "error_is": MEASURES[method],
        "predicted_error_ratio": _short(ratio),
        "tensors": tensors,
    }


def gain_of(record: Mapping[str, Any]) -> Gain | None:
    """Shorten the report of a manifest; return None if every weight was rounded."""
    report = record.get("report")
    if report is None:
        return None
    ratios = {
        module: tensor.get("outlier_ratio", 0.0) for module, tensor in report["tensors"].items()
    }
    module = max(ratios, key=lambda module: ratios[module])
    return Gain(report["predicted_error_ratio"], ratios[module], module)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
