"""What a conversion may choose, and the bits that each matrix gets by it."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.checkpoint.quant_format import AFFINE_BITS, FP_FORMATS, Mode, QuantFormat
from magistral_mlx.convert.recipe.recipe_file import (
    DEFAULT_GROUP_SIZE,
    UNPACKED_BITS,
    RecipeFile,
    format_as_json,
)
from magistral_mlx.errors import CheckpointError, OptionError

RECIPES: Mapping[str, tuple[int, str]] = {  # bits of what it does not raise, and what it does
    "4bit": (4, "every matrix in 4 bit"),
    "8bit": (8, "every matrix in 8 bit"),
    "4bit-kv6": (4, "4 bit, k and v projections in 6"),
    "4bit-head6": (4, "4 bit, embedding and lm_head in 6"),
    "mixed_4_6": (
        4,
        "4 bit; lm_head, and v and down projections of some layers in 6: mlx-lm's choice",
    ),
}
AUTO = "auto"  # bits of each matrix by its statistics, so that they are ``target_bits`` in all
METHODS = ("round", "importance", "gptq")
SEARCHED_BITS = range(
    2, 6
)  # of affine formats, which the default method searches: rounded, wider ones are near enough
RAISED_BITS = 6
STORED_BITS = 16  # of a scale, and of a bias
NORMS_BITS = 0.02  # a weight, for what is not packed, at most but in the smallest models
DEFAULT_BITS = 4


@dataclass(frozen=True, slots=True)
class Options:
    """What the output depends on beside the source.

    Raises:
        OptionError: an unknown name, or a combination that does not exist.
    """

    q_bits: int | None = None  # 16: nothing is packed; None: the recipe's, the mode's, or 4
    q_group_size: int | None = None  # None: the mode's, or 64
    q_mode: str = "affine"
    q_method: str | None = (
        None  # None: importance where an affine format of at most 5 bits is written, else round
    )
    recipe: str | None = None  # one of RECIPES, AUTO, or a file
    tokenizer_json: bool = True
    reasoning_format: ReasoningFormat | None = None  # None: what the source's files show
    calibration: str | None = None  # a text file in place of our own texts
    target_bits: float | None = None  # of AUTO: bits a weight in all, scales included
    file: RecipeFile | None = field(
        init=False, default=None
    )  # the recipe's content, where it is one

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, str | os.PathLike | None):
            raise OptionError(
                f"recipe is {self.recipe!r}; it is a name or a file, to which a table has to be written"
            )
        if self.q_mode not in get_args(Mode):
            raise OptionError(f"q_mode is {self.q_mode!r}; known are {', '.join(get_args(Mode))}")
        if self.reasoning_format is not None and self.reasoning_format not in get_args(
            ReasoningFormat
        ):
            raise OptionError(
                f"reasoning_format is {self.reasoning_format!r}; known are text and control"
            )
        if self.q_method not in (None, *METHODS):
            raise OptionError(f"q_method is {self.q_method!r}; known are {', '.join(METHODS)}")
        if (self.recipe == AUTO) != (self.target_bits is not None):
            raise OptionError(
                "the recipe auto and target_bits need each other: --recipe auto --target-bits 4.6"
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
                f"q_method {self.method} is for affine formats, and none is written here (mxfp4, mxfp8 and nvfp4 are "
                "always rounded, 16 bits not at all); leave it out"
            )
        if self.method == "round" and self.calibration is not None:
            other = ", or use q_method importance or gptq" if self._is_any_affine else ""
            raise OptionError(
                f"nothing is calibrated where weights are rounded; leave the calibration out{other}"
            )

    def _check_recipe(self, recipe: str) -> None:
        if self.q_mode != "affine":
            raise OptionError(
                f"the recipe {recipe} is for q_mode affine, not {self.q_mode}; leave one of the two out"
            )
        if self.q_bits is not None and self.q_bits != RECIPES[recipe][0]:
            raise OptionError(f"the recipe {recipe} sets the bits; leave q_bits {self.q_bits} out")

    def _check_auto(self) -> None:
        if self.q_mode != "affine":
            raise OptionError(
                f"the recipe auto is for q_mode affine, not {self.q_mode}; leave one of the two out"
            )
        if self.q_method == "round":
            raise OptionError(
                "the recipe auto goes by a forward pass, and round takes none; leave q_method out"
            )
        if self.q_bits is not None:
            raise OptionError(f"the recipe auto sets the bits; leave q_bits {self.q_bits} out")

    def _read_recipe(self, path: Path) -> None:
        if not os.path.lexists(path):
            raise OptionError(
                f"recipe is {self.recipe!r}; a recipe is one of the names {', '.join([*RECIPES, AUTO])}, or a JSON "
                "file, and there is none of that name"
            )
        if self.q_bits is not None or self.q_group_size is not None or self.q_mode != "affine":
            raise OptionError(
                f"the recipe {path} sets the bits; leave q_bits, q_group_size and q_mode out"
            )
        object.__setattr__(self, "file", RecipeFile.read(path))

    @property
    def default(self) -> QuantFormat | None:
        """The format of every matrix that the recipe says nothing of; None: it is not packed."""
        if self.file is not None:
            return self.file.default
        if self.q_bits == UNPACKED_BITS:
            if self.q_group_size is not None or self.q_mode != "affine":
                raise OptionError(
                    "with q_bits 16 nothing is packed; leave q_group_size and q_mode out"
                )
            return None
        bits, group_size = FP_FORMATS.get(self.q_mode, (DEFAULT_BITS, DEFAULT_GROUP_SIZE))
        if self.recipe is not None and self.recipe != AUTO:
            bits = RECIPES[self.recipe][0]
        bits = bits if self.q_bits is None else self.q_bits
        group_size = group_size if self.q_group_size is None else self.q_group_size
        if (
            self.target_bits is not None
        ):  # the most that all matrices may have; none may: the least there are
            overhead = 2 * STORED_BITS / group_size + NORMS_BITS
            bits = max(
                (b for b in AFFINE_BITS if b + overhead <= self.target_bits),
                default=min(AFFINE_BITS),
            )
        try:
            return QuantFormat(bits, group_size, cast(Mode, self.q_mode))
        except CheckpointError as error:
            raise OptionError(str(error)) from None

    @property
    def method(self) -> str:
        """One of METHODS."""
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
        """Every format that may be written, by the default or a rule of the recipe's file."""
        rules = () if self.file is None else self.file.rules
        return [
            quant for quant in (self.default, *(rule.quant for rule in rules)) if quant is not None
        ]

    def as_json(self) -> dict[str, Any]:
        """The options as the provenance file keeps them, what was left out filled in."""
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


def make_formats(config: ModelConfig, options: Options) -> dict[str, QuantFormat | None]:
    """The format of each matrix, by module path such as ``model.layers.0.mlp.down_proj``; None: it is not packed.

    Raises:
        OptionError: a rule of the recipe's file matches no matrix.
    """
    modules = [
        name.removesuffix(".weight") for name, shape in config.shapes.items() if len(shape) == 2
    ]
    if options.file is not None:
        return options.file.formats(modules)
    default = options.default
    if default is None or options.recipe in (None, AUTO):
        return dict.fromkeys(modules, default)
    raised = QuantFormat(RAISED_BITS, default.group_size)
    return {
        m: raised if _is_raised(m, config.num_layers, options.recipe) else default for m in modules
    }


def quantization_block(
    formats: Mapping[str, QuantFormat | None], default: QuantFormat | None
) -> dict[str, Any] | None:
    """config.json's ``quantization``: the default, and a block for each packed module that differs. Nothing else:
    mlx-swift refuses unknown keys. None where nothing is packed.

    What is not packed has no key: mlx-lm and mlx-swift-lm both take a module as packed by its scales alone.

    Args:
        default: None for the format that most modules have.
    """
    packed = {path: quant for path, quant in formats.items() if quant is not None}
    if not packed:
        return None
    overall = default or Counter(packed.values()).most_common(1)[0][0]
    return format_as_json(overall) | {
        path: format_as_json(q) for path, q in packed.items() if q != overall
    }


def _is_raised(module: str, num_layers: int, recipe: str) -> bool:
    if recipe == "4bit-kv6":
        return module.endswith(("self_attn.k_proj", "self_attn.v_proj"))
    if recipe == "4bit-head6":
        return module in ("model.embed_tokens", "lm_head")
    if recipe != "mixed_4_6":
        return False
    if module == "lm_head":
        return True
    # The first and last eighth of the layers, and every third between: as llama.cpp's Q4_K_M.
    # Source: https://github.com/ggml-org/llama.cpp/blob/917786f43d0f29b7c77a0c56767c0fa4df68b1c5/src/llama.cpp#L5265
    if not module.endswith(("self_attn.v_proj", "mlp.down_proj")):
        return False
    eighth, layer = num_layers // 8, int(module.split(".")[2])
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
