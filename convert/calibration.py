"""Which ids a conversion calibrates on, and how they are known again."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from magistral_mlx.tokenizer import Tokenizer

from .corpus import built_in, digest, read_calibration
from .recipes import Options

WINDOWS = {"importance": 4, "gptq": 16}  # more than 2,048 ids change mean squares little; a Hessian has millions


@dataclass(frozen=True, slots=True)
class Calibration:
    """Ids ``[B, T]``, and where they are from."""

    origin: str
    ids: mx.array

    def stated(self) -> dict[str, Any]:
        """As the provenance file keeps it: the content, and no path."""
        sequences, tokens = self.ids.shape
        return {"origin": self.origin, "sequences": sequences, "tokens": tokens, "ids_sha256": digest(self.ids)}


def make_calibration(options: Options, tokenizer: Tokenizer) -> Calibration | None:
    """What the options ask for; None where every weight is rounded.

    Raises:
        OptionError: the user's file cannot calibrate.
    """
    if options.method == "round":
        return None
    windows = WINDOWS[options.method]
    if options.calibration is None:
        return Calibration("built-in", built_in(tokenizer, windows=windows))
    return Calibration("file", read_calibration(options.calibration, tokenizer, windows=windows))
