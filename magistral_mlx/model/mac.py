"""Macs: their memory, the part that macOS lets the GPU use, and the bandwidth of their chips."""

import os
import re
from dataclasses import dataclass

import mlx.core as mx

from magistral_mlx.errors import OptionError, quoted

# Sizes that Macs with Apple silicon were sold with.
MAC_GB = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip of Apple.

    Attributes:
        bandwidths: bytes a second, by its maker: of the slowest and the fastest version.
        share: of the bandwidth while decoding, the lowest and the highest.
    """

    name: str
    bandwidths: tuple[float, float]
    share: tuple[float, float]

    def tokens_per_second(self, read_bytes: float) -> tuple[float, float]:
        """Predict the decoding speed, if a token reads so many bytes of weights and cache."""
        (slowest, fastest), (least, most) = self.bandwidths, self.share
        return least * slowest / read_bytes, most * fastest / read_bytes


# Decoding of this shape was published for M4 Pro (17.4 ids a second: 0.82 of the bandwidth) and
# M3 Ultra (40 to 48: 0.63 to 0.76). Max chips are taken as M4 Pro, less a little; other shares are
# assumed. Bandwidths: Apple's technical specifications.
_ASSUMED = (0.70, 0.85)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("M1", (68e9, 68e9), _ASSUMED),
        Chip("M1 Pro", (200e9, 200e9), _ASSUMED),
        Chip("M1 Max", (400e9, 400e9), (0.6, 0.84)),
        Chip("M1 Ultra", (800e9, 800e9), (0.5, 0.76)),
        Chip("M2", (100e9, 100e9), _ASSUMED),
        Chip("M2 Pro", (200e9, 200e9), _ASSUMED),
        Chip("M2 Max", (400e9, 400e9), (0.6, 0.84)),
        Chip("M2 Ultra", (800e9, 800e9), (0.5, 0.76)),
        Chip("M3", (100e9, 100e9), _ASSUMED),
        Chip("M3 Pro", (150e9, 150e9), _ASSUMED),
        Chip("M3 Max", (300e9, 400e9), _ASSUMED),
        Chip("M3 Ultra", (819e9, 819e9), (0.63, 0.76)),
        Chip("M4", (120e9, 120e9), _ASSUMED),
        Chip("M4 Pro", (273e9, 273e9), (0.78, 0.84)),
        Chip("M4 Max", (410e9, 546e9), (0.74, 0.84)),
        Chip("M5", (153e9, 153e9), _ASSUMED),
        Chip("M5 Pro", (307e9, 307e9), _ASSUMED),
        Chip("M5 Max", (460e9, 614e9), (0.74, 0.84)),
    )
}

# Gaps are bounded, so that a long text takes no time.
_GIGABYTES = r"(\d{1,4})\s{0,3}(?:g|gb|gib)"
_PRODUCT = r"(?:(?:apple|macbook|air|pro|mac|mini|studio|imac)[\s,]{1,3}){0,5}"
_CHIP = r"(m\d{1,2})[\s-]{0,3}(pro|max|ultra)?"
_MEMORY = re.compile(rf"{_GIGABYTES}?", re.ASCII | re.IGNORECASE)
_MAC = re.compile(rf"{_PRODUCT}{_CHIP}[\s,/-]{{0,3}}\b{_GIGABYTES}", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Mac:
    """A Mac: its memory in GiB, as Apple counts gigabytes, and its chip if it is known."""

    memory_gb: int
    chip: Chip | None = None

    @property
    def name(self) -> str:
        return f"{f'an {self.chip.name}' if self.chip else 'a Mac'} with {self.memory_gb} GB"

    @property
    def budget_bytes(self) -> int:
        """Bytes that macOS lets the GPU use by default: the working set that Metal recommends.

        Two thirds up to 36 GB, three quarters above: read off published logs of Macs with 16, 32
        and 64 GB, and assumed for the others. A Mac itself is asked for its own.
        """
        whole = self.memory_gb * 2**30
        return whole * 2 // 3 if self.memory_gb <= 36 else whole * 3 // 4

    @classmethod
    def of_memory(cls, text: str) -> "Mac":
        """Return the Mac that a text such as "24GB" names.

        Raises:
            OptionError: it names none.
        """
        found = _MEMORY.fullmatch(text.strip())
        if found is None or not int(found[1]):
            raise OptionError(
                f"--memory is {quoted(text)}; give the memory of a Mac in whole gigabytes, such as "
                "24GB"
            )
        return cls(int(found[1]))

    @classmethod
    def of_name(cls, text: str) -> "Mac":
        """Return the Mac that a text such as "M4 Pro 24GB" names.

        Raises:
            OptionError: it names none, or a chip that is not in the list.
        """
        found = _MAC.fullmatch(text.strip())
        if found is None or not int(found[3]):
            raise OptionError(
                f"--mac is {quoted(text)}; give its chip and its memory, such as 'M4 Pro 24GB', or "
                "the memory alone by --memory 24GB"
            )
        name = " ".join(part.capitalize() for part in found.group(1, 2) if part)
        if name not in CHIPS:
            raise OptionError(
                f"--mac names the chip {name}, whose speed is not known here. Known are "
                f"{', '.join(CHIPS)}. To see what fits, give the memory alone: --memory "
                f"{int(found[3])}GB"
            )
        return cls(int(found[3]), CHIPS[name])


def this_mac() -> Mac | None:
    """Return the Mac that this is; None on another machine."""
    if not mx.metal.is_available():
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = str(mx.device_info().get("device_name", "")).removeprefix("Apple ")
    return Mac(round(memory / 2**30), CHIPS.get(chip))
