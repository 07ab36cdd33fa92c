"""Seeded training conversations for the embedded model, in the form of Magistral Small 2506."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from magistral_mlx.training.demo.calculator import (
    Calculator,
    ask_calculator,
    call_id,
    expression_operands,
    random_result,
    random_tools,
)
from magistral_mlx.training.demo.phrases import HELD_OUT_WORDS, LANGUAGES, PHRASES
from magistral_mlx.training.demo.problems import (
    ARITHMETIC,
    Problem,
    ask_arithmetic,
    ask_letters,
    close_operands,
    is_held_out,
    random_operands,
)
from magistral_mlx.training.demo.script import Example, Script
from magistral_mlx.training.demo.vocabulary import SPECIAL_TOKENS, VOCABULARY

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
TURNS_WITH_TOOLS = (1, 1, 1, 2, 2, 3)


@dataclass(frozen=True, slots=True)
class Mix:
    """The shares of kinds of problems, and the numbers of turns to draw from.

    Attributes:
        letters: share of letter problems.
        negative: share of subtractions with a result below zero.
        compact: share of sums without spaces, as in "What is 7*7?".
        neutral: ask "7 * 7 = ?" in all languages, although the text does not tell which.
        close: share of sums and differences with operands of ``close_operands``.
        kinds: of arithmetic, to draw from.
        tools: share of conversations with a list of tools.
        usual_tools: share of calculators that are called ``calculator``.
        digits: of the calculator's operands, at most.
    """

    letters: float
    negative: float = 0
    compact: float = 0
    neutral: bool = True
    turns: tuple[int, ...] = (1,) * 8 + (2, 3)
    close: float = 0
    kinds: tuple[str, ...] = ARITHMETIC
    tools: float = 0
    usual_tools: float = 0
    digits: int = 6


BASICS = Mix(letters=0.3)
# Weak after the basics: letters, results below zero, sums without spaces, long conversations.
REFINED = Mix(
    letters=0.45, negative=0.4, compact=0.3, neutral=False, turns=(1,) * 10 + (2, 3, 4, 5, 6)
)
# New after that: the signs of small differences, and a calculator.
WITH_TOOLS = Mix(
    letters=0.25,
    negative=0.4,
    compact=0.3,
    neutral=False,
    turns=(1,) * 12 + (2, 3, 4),
    close=0.6,
    kinds=(*ARITHMETIC, "subtract", "subtract"),
    tools=0.3,
)
# The same, mostly with one name of the calculator.
WITH_CALCULATOR = replace(WITH_TOOLS, usual_tools=0.6, digits=5)


class Examples:
    """An endless, seeded stream of conversations in the form of Magistral Small 2506."""

    def __init__(self, tokenizer: Tekkenizer, seed: int, mix: Mix = BASICS) -> None:
        self.tokenizer = tokenizer
        self.mix = mix
        self.rng = random.Random(seed)
        self.held_out = {
            word.lower() for words in HELD_OUT_WORDS.values() for word in words.split()
        }
        texts = [tokenizer.id_to_byte_piece(i) for i in range(len(SPECIAL_TOKENS), VOCABULARY)]
        words = [t.decode() for t in texts if _is_text(t)]
        self.starts = [w[1:] for w in words if re.fullmatch(r" [a-zà-öø-ÿ]+", w)]
        self.inner = [w for w in words if re.fullmatch(r"[a-zà-öø-ÿ]+", w)]
        self.names = [w for w in self.inner if w.isascii()]

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
                problem = self._letters(language)
            else:
                kind = rng.choice(self.mix.kinds)
                a, b = self._operands(kind)
                if is_held_out(kind, a, b):
                    continue
                problem = self._asked(ask_arithmetic(rng, kind, a, b, language))
            if problem is not None:
                return problem

    def calculation(self) -> tuple[Problem, str]:
        """Draw a problem for the calculator, and its expression."""
        rng = self.rng
        language = rng.choice(LANGUAGES)
        while True:
            kind = rng.choice(ARITHMETIC)
            if rng.random() < 0.6:
                a, b = expression_operands(rng, kind, self.mix.digits)
            else:
                a, b = random_operands(rng, kind)
            if is_held_out(kind, a, b):
                continue
            problem, expression = ask_calculator(rng, kind, a, b, language)
            asked = self._asked(problem)
            if asked is not None:
                return asked, expression

    def _letters(self, language: str) -> Problem | None:
        rng, word = self.rng, self.word()
        letter = rng.choice(word.lower() if rng.random() < 0.85 else "abcdefghijklmnopqrstuvwxyz")
        if not letter.isascii():
            return None
        try:
            return ask_letters(rng, letter, word, language, self.pieces)
        # A piece ends inside a character, or spans the word and its neighbour.
        except ValueError:
            return None

    def _operands(self, kind: str) -> tuple[int, int]:
        rng, mix = self.rng, self.mix
        if mix.close and kind != "multiply" and rng.random() < mix.close:
            return close_operands(rng)
        a, b = random_operands(rng, kind)
        if mix.negative and kind == "subtract" and rng.random() < mix.negative:
            return min(a, b), max(a, b)
        return a, b

    def _asked(self, problem: Problem) -> Problem | None:
        """Return a problem as the mix asks it; None if its text does not tell the language."""
        mix = self.mix
        tells = mix.neutral or problem.language == "en" or re.search(r"[a-wyz]", problem.question)
        if not tells:
            return None
        if mix.compact and self.rng.random() < mix.compact:
            question = re.sub(r"(\d) ([-\u2212+*×x]) (?=\d)", r"\1\2", problem.question)
            return replace(problem, question=question)
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
        rng, mix, script = self.rng, self.mix, Script(self.tokenizer, self.rng)
        tools = (
            random_tools(rng, self.names, mix.usual_tools)
            if mix.tools and rng.random() < mix.tools
            else None
        )
        if (system := self.system()) is not None:
            script.add("[SYSTEM_PROMPT]", system, "[/SYSTEM_PROMPT]")
        keep = rng.random() < 0.5
        turns = rng.choice(mix.turns if tools is None else TURNS_WITH_TOOLS)
        for turn in range(turns):
            is_last = turn == turns - 1
            if tools is not None and is_last:
                definitions = json.dumps(tools.definitions, ensure_ascii=False)
                script.add("[AVAILABLE_TOOLS]", definitions, "[/AVAILABLE_TOOLS]")
            # The list stands before the newest question only, so older replies teach nothing.
            learn = is_last or (keep and tools is None)
            if tools is not None and tools.calculator is not None and rng.random() < 0.9:
                self._call(script, tools.calculator, keep=keep or is_last, learn=learn)
                continue
            problem = self.problem()
            script.add("[INST]", problem.question, "[/INST]")
            if is_last or keep:
                script.reply(problem.trace, [problem.answer], learn=learn)
            else:
                script.add(problem.answer, "</s>")
        return script.ids, script.learned

    def _call(self, script: Script, calculator: Calculator, *, keep: bool, learn: bool) -> None:
        """Write a turn in which the calculator is called and its result is the answer."""
        problem, expression = self.calculation()
        number, result = random_result(self.rng, expression, problem.expected)
        script.calls += 1
        identity = call_id(script.calls)
        call = [
            "[TOOL_CALLS]", calculator.name, "[CALL_ID]", identity,
            "[ARGS]", calculator.arguments(expression),
        ]  # fmt: skip
        answer = PHRASES[problem.language].result.format(r=number)
        script.add("[INST]", problem.question, "[/INST]")
        if keep:
            script.reply(problem.trace, call, learn=learn)
        else:
            script.add(*call, "</s>")
        script.add("[TOOL_RESULTS]", identity, "[TOOL_CONTENT]", result, "[/TOOL_RESULTS]")
        if keep:
            script.reply(f"= {number}", [answer], learn=learn)
        else:
            script.add(answer, "</s>")

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
