"""What the project predicts about Macs, and whether a measurement bears it out."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.macs.predict import CHIPS, Chip, Range, counted_drafting, predict
from benchmarks.runtime.cache import OPENED
from benchmarks.runtime.drafting import M4_PRO
from magistral_mlx.model.mac_table import mac_budget_bytes

Verdict = Literal["held", "failed", "not measured", "no prediction"]
ROWS = (2, 3, 4, 8)  # of a pass, whose costs were published
ROW_TOLERANCE = 0.15  # what was published differs by as much between chips
DRAFTING_TOLERANCE = 0.15
SHORT_PROMPT = 16  # of which a pass more is half the time
SOONER = f"first token of a prompt of {SHORT_PROMPT}, sooner than mlx-lm's"
REPLIES = 8
CACHES = ("float", "8-bit", "4-bit")
PLAN = Range(0.95, 1.05)
# Published of M1 and M2: 1.14 and 1.34.
HALF_DECODE, HALF_PREFILL = Range(1.05, 1.25), Range(1.2, 1.5)
FOURTH = "needs Magistral Small in 4 bit: --model"


@dataclass(frozen=True, slots=True)
class Machine:
    """A Mac, as it names itself."""

    chip: str  # "Apple M4 Pro"
    memory_bytes: int

    @property
    def name(self) -> str:
        return self.chip.removeprefix("Apple ").strip()

    @property
    def generation(self) -> int:
        """The 4 of an M4 Pro; 0 of what is named otherwise."""
        found = re.match(r"M(\d+)\b", self.name)
        return int(found[1]) if found else 0

    @property
    def known(self) -> Chip | None:
        return next((chip for chip in CHIPS if chip.name == self.name), None)


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure that is predicted; ``predicted`` is None where nothing is, of this machine."""

    name: str
    unit: str
    predicted: Range | None
    said_in: str
    needs: str = ""  # to be measured


@dataclass(frozen=True, slots=True)
class Judgement:
    """A claim beside what was measured."""

    claim: Claim
    measured: float | None

    @property
    def verdict(self) -> Verdict:
        if self.measured is None:
            return "not measured"
        if self.claim.predicted is None:
            return "no prediction"
        return (
            "held"
            if self.claim.predicted.low <= self.measured <= self.claim.predicted.high
            else "failed"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.claim) | {"measured": self.measured, "verdict": self.verdict}


def claims(machine: Machine, prompt_tokens: int) -> list[Claim]:
    """Everything predicted of a machine, and what would be of one that is known."""
    chip = machine.known
    found = None if chip is None else predict(chip, prompt_tokens, {})
    per_second = None if found is None else found.per_second
    first = None if found is None else found.first_token_seconds
    # The pass that mlx-lm takes for the last id alone; a first token has other differences too.
    alone = None if chip is None else predict(chip, SHORT_PROMPT, {}).pass_seconds
    saved = None if alone is None else Range(0.5 * alone.low, 1.5 * alone.high)
    budget = mac_budget_bytes(round(machine.memory_bytes / 2**30)) / 1e9
    cheap = machine.generation >= 3
    several = Range(REPLIES / 2.9, REPLIES / 2.2) if cheap else None
    half = 1 <= machine.generation <= 2
    predictions, table = "benchmarks predict", "the README's table of what fits"
    return [
        Claim("working set", "GB", Range(0.98 * budget, 1.02 * budget), table),
        Claim("decode", "tokens/s", per_second, predictions, FOURTH),
        Claim("first token", "s", first, predictions, FOURTH),
        Claim(SOONER, "s", saved, predictions, FOURTH),
        Claim(
            "decode, over mlx-lm's", "times", Range(0.98, 1.1), "the README's comparison", FOURTH
        ),
        *(
            Claim(
                f"cost of {rows} rows",
                "passes",
                _row_cost(rows) if cheap else None,
                "drafting's table",
                FOURTH,
            )
            for rows in ROWS
        ),
        *(
            Claim(
                f"drafting, {kind}", "times", _faster(cost) if cheap else None, predictions, FOURTH
            )
            for kind, cost in counted_drafting().items()
        ),
        Claim(
            f"{REPLIES} replies at once, over one by one",
            "times",
            several,
            "drafting's table",
            FOURTH,
        ),
        Claim(
            "float16 over bfloat16, decode",
            "times",
            HALF_DECODE if half else None,
            "loader.py",
            FOURTH,
        ),
        Claim(
            "float16 over bfloat16, prefill",
            "times",
            HALF_PREFILL if half else None,
            "loader.py",
            FOURTH,
        ),
        *(
            Claim(f"memory forecast over measured, {kind} cache", "", PLAN, "magistral plan")
            for kind in CACHES
        ),
        Claim(
            "opening a cache's file",
            "GB/s",
            Range(OPENED.low / 1e9, OPENED.high / 1e9),
            "benchmarks cache",
        ),
        Claim(
            "joined matrices, largest difference",
            "",
            Range(0.0, 0.0),
            "model.py: the same bits as single ones",
        ),
    ]


def judge(every: list[Claim], measured: Mapping[str, float]) -> list[Judgement]:
    """Raises ValueError where something was measured that nobody claims: a name that was changed."""
    unknown = measured.keys() - {claim.name for claim in every}
    if unknown:
        raise ValueError(f"nobody claims {sorted(unknown)}")
    return [Judgement(claim, measured.get(claim.name)) for claim in every]


def _faster(cost: float) -> Range:
    """By a text's cost of an id in plain passes, whose costs of rows and whose texts are others'."""
    return Range((1 - DRAFTING_TOLERANCE) / cost, (1 + DRAFTING_TOLERANCE) / cost)


def _row_cost(rows: int) -> Range:
    cost = M4_PRO[rows - 1]
    return Range(1.0 if rows == ROWS[0] else cost * (1 - ROW_TOLERANCE), cost * (1 + ROW_TOLERANCE))
