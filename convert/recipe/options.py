"""The options of a conversion."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from magistral_mlx.checkpoint.hub_api import Layout
from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.checkpoint.quant_format import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FP_FORMATS,
    Mode,
    QuantFormat,
)
from magistral_mlx.convert.recipe.named import AUTO, RECIPES
from magistral_mlx.convert.recipe.recipe_file import DEFAULT_GROUP_SIZE, UNPACKED_BITS, RecipeFile
from magistral_mlx.errors import CheckpointError, OptionError, named, quoted
from magistral_mlx.options import FILE, option, refused

Method = Literal["round", "importance", "gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
# Affine bits that the default method searches; more bits are close enough when rounded.
SEARCHED_BITS = range(2, 6)
# Bits of a stored scale and of a stored bias.
STORED_BITS = 16
# Bits a weight for unpacked tensors; only the smallest models need more.
NORMS_BITS = 0.02
DEFAULT_BITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Choices of a conversion. The output depends on the source and on ``as_json`` alone.

    Raises:
        OptionError: an unknown name, or a combination that does not exist.
    """

    q_bits: int | None = option(None, "2, 3, 4, 5, 6 or 8; 16 packs nothing; else 4.", metavar="B")
    q_group_size: int | None = option(None, "32, 64 or 128; 64 by default.", metavar="N")
    q_mode: Mode = option("affine", "Kind of number format.")
    q_method: Method | None = option(
        None, "See below; importance for affine 2 to 5 bit, else round."
    )
    calibration: str | None = option(
        None,
        "What the forward pass reads; see below.",
        metavar="FILE|self|MODEL",
        completes=("self", FILE),
    )
    recipe: str | None = option(
        None,
        "Bits by kind of matrix, in place of --q-bits; see below.",
        metavar="NAME|FILE",
        aliases=("--quant-predicate",),
        completes=(*RECIPES, AUTO, FILE),
    )
    target_bits: float | None = option(
        None, "Bits a weight in all, of the recipe auto; such as 4.6.", metavar="X"
    )
    layout: Layout | None = option(None, "Which weights, where SRC has both; else hf.")
    revision: str | None = option(None, "Branch, tag or commit of a hub id.", metavar="R")
    stream: bool = option(
        False, "Fetch, convert and delete a hub id's files one by one, past its cache."
    )
    hash_source: bool = option(False, "Record the whole sha256 of each of SRC's weight files.")
    tokenizer_json: bool = option(True, "Leave out tokenizer.json, which Swift and LM Studio need.")
    tokenizer: str | Path | None = option(
        None,
        "A folder or hub id whose tekken.json is used; by default SRC's, or that of the base "
        "model that SRC's files name.",
        metavar="T",
    )
    reasoning_format: ReasoningFormat | None = option(
        None, "How SRC writes its traces, where its files show that wrongly."
    )
    force: bool = option(
        False,
        "Replace a checkpoint at OUT, once the new one is complete; "
        "give up another one unfinished.",
    )
    # The content of the recipe, if it is a file.
    file: RecipeFile | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str | os.PathLike | None):
            raise refused("recipe", self.recipe, "a name or a file: write the table to a JSON file")
        if self.q_mode not in get_args(Mode):
            raise refused("q_mode", self.q_mode, f"one of {', '.join(get_args(Mode))}")
        if self.reasoning_format is not None and self.reasoning_format not in get_args(
            ReasoningFormat
        ):
            raise refused("reasoning_format", self.reasoning_format, "text or control")
        if self.layout not in (None, *get_args(Layout)):
            raise refused("layout", self.layout, f"one of {', '.join(get_args(Layout))}")
        if self.q_method not in (None, *METHODS):
            raise refused("q_method", self.q_method, f"one of {', '.join(METHODS)}")
        if (self.recipe == AUTO) != (self.target_bits is not None):
            raise OptionError(
                f"the recipe auto and {named('target_bits')} need each other: "
                f"{named('recipe', 'auto')} {named('target_bits', 4.6)}"
            )
        if self.recipe == AUTO:
            self._check_auto()
        elif self.recipe is not None and self.recipe in RECIPES:
            self._check_recipe(self.recipe)
        elif self.recipe is not None:
            self._read_recipe(Path(os.path.expanduser(self.recipe)))
        self._check_method()

    def _check_method(self) -> None:
        if self.method != "round" and not self._is_any_affine:
            raise OptionError(
                f"{named('q_method', self.method)} is for affine formats, and none is written here "
                "(mxfp4, mxfp8 and nvfp4 are always rounded, 16 bits not at all); leave it out"
            )
        if self.method == "round" and self.calibration is not None:
            other = (
                f", or use {named('q_method')} importance or gptq" if self._is_any_affine else ""
            )
            raise OptionError(
                f"rounding weights needs no calibration; leave {named('calibration')} out{other}"
            )

    def _check_recipe(self, recipe: str) -> None:
        if self.q_mode != "affine":
            raise OptionError(
                f"the recipe {recipe} is for {named('q_mode', 'affine')}, not {self.q_mode}; "
                "leave one out"
            )
        if self.q_bits is not None and self.q_bits != RECIPES[recipe][0]:
            raise OptionError(f"the recipe {recipe} sets the bits; leave {named('q_bits')} out")

    def _check_auto(self) -> None:
        if not isinstance(self.target_bits, int | float) or isinstance(self.target_bits, bool):
            raise refused("target_bits", self.target_bits, "a number, such as 4.6")
        if self.q_group_size not in (None, *AFFINE_GROUP_SIZES):
            sizes = ", ".join(map(str, AFFINE_GROUP_SIZES))
            raise refused("q_group_size", self.q_group_size, f"one of {sizes}")
        if self.q_mode != "affine":
            raise OptionError(
                f"the recipe auto is for {named('q_mode', 'affine')}, not {self.q_mode}; "
                "leave one out"
            )
        if self.q_method == "round":
            raise OptionError(
                "the recipe auto needs a forward pass, and round takes none; leave "
                f"{named('q_method')} out"
            )
        if self.q_bits is not None:
            raise OptionError(f"the recipe auto sets the bits; leave {named('q_bits')} out")

    def _read_recipe(self, path: Path) -> None:
        if not os.path.lexists(path):
            raise OptionError(
                f"{named('recipe')} is {quoted(self.recipe)}; a recipe is one of the names "
                f"{', '.join([*RECIPES, AUTO])}, or a JSON file, and there is none of that name"
            )
        if self.q_bits is not None or self.q_group_size is not None or self.q_mode != "affine":
            raise OptionError(
                f"the recipe {path} sets the bits; leave {named('q_bits')}, "
                f"{named('q_group_size')} and {named('q_mode')} out"
            )
        object.__setattr__(self, "file", RecipeFile.read(path))

    @property
    def default(self) -> QuantFormat | None:
        """Format of the matrices that no rule matches; None: they are not packed."""
        if self.file is not None:
            return self.file.default
        if self.q_bits == UNPACKED_BITS:
            if self.q_group_size is not None or self.q_mode != "affine":
                raise OptionError(
                    f"with {named('q_bits', 16)} nothing is packed; leave "
                    f"{named('q_group_size')} and {named('q_mode')} out"
                )
            return None
        bits, group_size = FP_FORMATS.get(self.q_mode, (DEFAULT_BITS, DEFAULT_GROUP_SIZE))
        if self.recipe is not None and self.recipe != AUTO:
            bits = RECIPES[self.recipe][0]
        bits = bits if self.q_bits is None else self.q_bits
        group_size = group_size if self.q_group_size is None else self.q_group_size
        if self.target_bits is not None:
            # The most bits that all matrices can have within the target, or the fewest possible.
            overhead = 2 * STORED_BITS / group_size + NORMS_BITS
            affordable = (b for b in AFFINE_BITS if b + overhead <= self.target_bits)
            bits = max(affordable, default=min(AFFINE_BITS))
        try:
            return QuantFormat(bits, group_size, self.q_mode)
        except CheckpointError as error:
            raise OptionError(str(error)) from None

    @property
    def method(self) -> Method:
        """Chosen method, or the default one for the formats."""
        if self.q_method is not None:
            return self.q_method
        if self.recipe == AUTO:
            return "importance"
        is_searched = any(
            quant.mode == "affine" and quant.bits in SEARCHED_BITS for quant in self._formats()
        )
        return "importance" if is_searched else "round"

    @property
    def _is_any_affine(self) -> bool:
        return any(quant.mode == "affine" for quant in self._formats())

    def _formats(self) -> list[QuantFormat]:
        """Return the formats of the default and of each rule."""
        rules = () if self.file is None else self.file.rules
        return [
            quant for quant in (self.default, *(rule.quant for rule in rules)) if quant is not None
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the options for the manifest, with missing values filled in."""
        default = self.default
        return {
            "q_bits": UNPACKED_BITS if default is None else default.bits,
            "q_group_size": None if default is None else default.group_size,
            "q_mode": self.q_mode if default is None else default.mode,
            "q_method": self.method,
            "recipe": self.recipe if self.file is None else self.file.as_json(),
            "tokenizer_json": self.tokenizer_json,
        } | {
            name: value
            for name, value in (
                ("reasoning_format", self.reasoning_format),
                ("target_bits", self.target_bits),
            )
            if value is not None
        }
