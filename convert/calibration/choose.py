"""Choose the ids that a conversion calibrates on, and describe them for the manifest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import DEMO, DEMO_SOURCE, open_checkpoint
from magistral_mlx.convert.calibration.corpus import built_in, digest, read_calibration
from magistral_mlx.convert.calibration.traces import SelfCalibration, check_vocabulary
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.errors import OptionError, named
from magistral_mlx.tokenizer.tekken import Tokenizer

SELF = "self"
# Windows by method: more than 2,048 ids change mean squares little; a Hessian has millions.
WINDOWS = {"importance": 4, "gptq": 16}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Ids that the forward pass reads, and their entry in the manifest.

    Attributes:
        entry: describes the ids by content, without any path.
        ids: ``[B, T]``; None if ``self_calibration`` has to generate them.
    """

    entry: Mapping[str, Any]
    ids: mx.array | None
    self_calibration: SelfCalibration | None = None

    @classmethod
    def of_ids(cls, origin: str, ids: mx.array) -> "Calibration":
        """Make the calibration of known ids ``[B, T]``."""
        sequences, tokens = ids.shape
        counts = {"sequences": sequences, "tokens": tokens}
        return cls({"origin": origin, **counts, "ids_sha256": digest(ids)}, ids)


def make_calibration(
    options: ConvertOptions, tokenizer: Tokenizer, config: ModelConfig
) -> Calibration | None:
    """Make the calibration that the options ask for; None if every weight is rounded.

    Raises:
        OptionError: the user's file cannot calibrate, or a streamed source would be read twice.
        CheckpointError: the writing model cannot be used, or has another vocabulary.
        MemoryLimitError: that model does not fit this machine.
    """
    if options.method == "round":
        return None
    windows = WINDOWS[options.method]
    if options.calibration is None:
        return Calibration.of_ids("built-in", built_in(tokenizer, windows=windows))
    is_demo = options.calibration == DEMO
    path = DEMO_SOURCE if is_demo else Path(options.calibration).expanduser()
    if options.calibration != SELF and not os.path.isdir(path):
        return Calibration.of_ids("file", read_calibration(path, tokenizer, windows=windows))
    if options.calibration == SELF and options.stream:
        raise OptionError(
            f"{named('calibration', 'self')} reads the source twice, and {named('stream')} keeps "
            f"none of it; leave {named('stream')} out, or name the folder of a 4-bit conversion of "
            f"this model as {named('calibration')}"
        )
    writer = None if options.calibration == SELF else open_checkpoint(path)
    if writer is not None:
        check_vocabulary(tokenizer, writer)
    self_calibration = SelfCalibration(tokenizer, windows, writer)
    self_calibration.plan(config)
    return Calibration(self_calibration.as_json(), None, self_calibration)
