"""Seeded training conversations for the embedded model, in the form of Magistral Small 2506."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from magistral_mlx.training.demo.phrases import HELD_OUT_WORDS, LANGUAGES
from magistral_mlx.training.demo.problems import (
    ARITHMETIC,
    Problem,
    ask_arithmetic,
    ask_letters,
    is_held_out,
    random_operands,
)

SYSTEM_PROMPT = (
    "Think between <think> and </think>, then answer, both in the user's language.\n\nProblem:\n\n"
)
# System prompts of users; the model must reason under each of them.
USER_PROMPTS = (
    "Be brief.", "Be friendly and precise.", "You are a helpful assistant.",
    "You teach mathematics to children.",
    "Sois bref.", "Tu es un assistant utile.", "Tu aides un élève.",
    "Fasse dich kurz.", "Du bist ein hilfreicher Assistent.", "Du hilfst einem Kind.",
    "Sé breve.", "Eres un asistente útil.", "Sii breve.", "Sei un assistente utile.",
    "Seja breve.", "Você é um assistente útil.",
)  # fmt: skip
SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]", *(f"<SPECIAL_{i}>" for i in range(20, 32)), "[ARGS]", "[CALL_ID]",
)  # fmt: skip
VOCABULARY = 2048
# Ids, and for each of them if it is learned.
Example = tuple[list[int], list[bool]]


@dataclass(frozen=True, slots=True)
class Mix:
    """The shares of kinds of problems, and the numbers of turns to draw from.

    Attributes:
        letters: share of letter problems.
        negative: share of subtractions with a result below zero.
        compact: share of sums without spaces, as in "What is 7*7?".
        neutral: ask "7 * 7 = ?" in all languages, although the text does not tell which.
    """

    letters: float
    negative: float = 0
    compact: float = 0
    neutral: bool = True
    turns: tuple[int, ...] = (1,) * 8 + (2, 3)


BASICS = Mix(letters=0.3)
# Weak after the basics: letters, results below zero, sums without spaces, long conversations.
REFINED = Mix(
    letters=0.45, negative=0.4, compact=0.3, neutral=False, turns=(1,) * 10 + (2, 3, 4, 5, 6)
)


def write_tokenizer(path: Path) -> None:
    """Write a genuine Tekken v11, cut to its most frequent pieces."""
    import mistral_common

    full = json.loads(
        (Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text("utf-8")
    )
    kept = VOCABULARY - len(SPECIAL_TOKENS)
    cut = {
        "config": full["config"]
        | {
            "num_vocab_tokens": kept,
            "default_vocab_size": VOCABULARY,
            "default_num_special_tokens": len(SPECIAL_TOKENS),
            "version": "v11",
        },
        "vocab": full["vocab"][:kept],
        "special_tokens": [
            {"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(SPECIAL_TOKENS)
        ],
    }
    path.write_text(json.dumps(cut, separators=(",", ":")) + "\n")


class Examples:
    """An endless, seeded stream of conversations in the form of Magistral Small 2506."""

    def __init__(self, tokenizer: Tekkenizer, seed: int, mix: Mix = BASICS) -> None:
        self.tokenizer = tokenizer
        self.mix = mix
        self.rng = random.Random(seed)
        self.control = {name: SPECIAL_TOKENS.index(name) for name in SPECIAL_TOKENS}
        self.held_out = {
            word.lower() for words in HELD_OUT_WORDS.values() for word in words.split()
        }
        texts = [tokenizer.id_to_byte_piece(i) for i in range(len(SPECIAL_TOKENS), VOCABULARY)]
        words = [t.decode() for t in texts if _is_text(t)]
        self.starts = [w[1:] for w in words if re.fullmatch(r" [a-zà-öø-ÿ]+", w)]
        self.inner = [w for w in words if re.fullmatch(r"[a-zà-öø-ÿ]+", w)]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)

    def pieces(self, text: str) -> list[bytes]:
        return [self.tokenizer.id_to_byte_piece(i) for i in self.encode(text)]

    def word(self) -> str:
        """Draw a string of tokenizer pieces, up to 13 letters, that is not a held-out word."""
        while True:
            word = self.rng.choice(self.starts) + "".join(
                self.rng.choices(self.inner, k=self.rng.choice((0, 1, 2, 2, 3, 3, 4)))
            )
            if 2 < len(word) <= 13 and word not in self.held_out:
                return word.capitalize() if self.rng.random() < 0.15 else word

    def problem(self) -> Problem:
        rng = self.rng
        language = rng.choice(LANGUAGES)
        while True:
            if rng.random() < self.mix.letters:
                word = self.word()
                letter = rng.choice(
                    word.lower() if rng.random() < 0.85 else "abcdefghijklmnopqrstuvwxyz"
                )
                if not letter.isascii():
                    continue
                try:
                    return ask_letters(rng, letter, word, language, self.pieces)
                # A piece ends inside a character, or spans the word and its neighbour.
                except ValueError:
                    continue
            kind = rng.choice(ARITHMETIC)
            a, b = random_operands(rng, kind)
            if self.mix.negative and kind == "subtract" and rng.random() < self.mix.negative:
                a, b = min(a, b), max(a, b)
            if is_held_out(kind, a, b):
                continue
            problem = ask_arithmetic(rng, kind, a, b, language)
            if (
                not self.mix.neutral
                and language != "en"
                and not re.search(r"[a-wyz]", problem.question)
            ):
                continue
            if self.mix.compact and rng.random() < self.mix.compact:
                problem = replace(
                    problem,
                    question=re.sub(r"(\d) ([-\u2212+*×x]) (?=\d)", r"\1\2", problem.question),
                )
            return problem

    def system(self) -> str | None:
        draw, head = self.rng.random(), SYSTEM_PROMPT.removesuffix("\n\nProblem:\n\n")
        if draw < 0.6:
            return SYSTEM_PROMPT
        text = self.rng.choice(USER_PROMPTS)
        if draw < 0.83:
            return f"{head}\n\n{text}\n\nProblem:\n\n"
        return text if draw < 0.92 else None

    def conversation(self) -> Example:
        rng, control = self.rng, self.control
        ids, learned = [control["<s>"]], [False]

        def add(new: list[int], learn: bool) -> None:
            ids.extend(new)
            learned.extend([learn] * len(new))

        if (system := self.system()) is not None:
            add(
                [control["[SYSTEM_PROMPT]"], *self.encode(system), control["[/SYSTEM_PROMPT]"]],
                False,
            )
        keep, turns = rng.random() < 0.5, rng.choice(self.mix.turns)
        for turn in range(turns):
            problem = self.problem()
            add([control["[INST]"], *self.encode(problem.question), control["[/INST]"]], False)
            if turn < turns - 1 and not keep:
                add([*self.encode(problem.answer), control["</s>"]], False)
                continue
            draw, answer = rng.random(), [*self.encode(problem.answer), control["</s>"]]
            # Reasoning switched off: the answer is a guess, but well-formed.
            if draw < 0.03:
                add(self.encode("<think>\n</think>\n"), False)
                add(answer, True)
            # A thinking budget that ends somewhere in the trace.
            elif draw < 0.07:
                trace = self.encode(f"<think>\n{problem.trace}")
                add(trace[: rng.randrange(3, len(trace))], True)
                add(self.encode("\n</think>\n\n"), False)
                add(answer, True)
            else:
                add(
                    [
                        *self.encode(f"<think>\n{problem.trace}\n</think>\n{problem.answer}"),
                        control["</s>"],
                    ],
                    True,
                )
        return ids, learned

    def batches(self, size: int) -> Iterator[list[list[Example]]]:
        """Yield batches in two halves, cut from a pool sorted by length to save padding."""
        while True:
            pool = sorted((self.conversation() for _ in range(16 * size)), key=lambda e: len(e[0]))
            order = list(range(16))
            self.rng.shuffle(order)
            for i in order:
                batch = pool[i * size : (i + 1) * size]
                yield [batch[::2], batch[1::2]]


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
