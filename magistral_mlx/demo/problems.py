"""The embedded model's world: small arithmetic and counting letters, asked and reasoned in six languages.

Every step of a trace is a local look-up, so that a model of two million parameters can learn it:
digits from right to left with their carry, words piece by piece as the tokenizer cuts them.
Pure Python; `train.py` learns from it, tests and benchmarks ask from it.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

LANGUAGES = ("en", "fr", "de", "es", "it", "pt")
KINDS = ("add", "subtract", "multiply", "letters")
ARITHMETIC = KINDS[:3]
SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}

Pieces = Callable[[str], list[bytes]]  # text -> the tokenizer's pieces, in UTF-8


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, the trace and answer expected of the model, and the number that decides."""

    kind: str
    language: str
    question: str
    trace: str
    answer: str
    expected: int


@dataclass(frozen=True, slots=True)
class Phrases:
    """One language. `{a}`, `{b}` are operands, `{s}` a sign, `{c}` a letter, `{w}` a word."""

    symbolic: tuple[str, ...]  # any operation, with its sign
    spoken: dict[str, tuple[str, ...]]  # by kind
    letters: tuple[str, ...]
    intro: str
    carry: str
    borrow: str
    spell: str
    result: str
    count: str
    times: tuple[str, str]  # singular, plural


PHRASES = {
    "en": Phrases(
        ("What is {a} {s} {b}?", "{a} {s} {b} = ?", "Calculate {a} {s} {b}.", "How much is {a} {s} {b}?", "{a}{s}{b}"),
        {
            "add": ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
            "subtract": ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."),
            "multiply": ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is the product of {a} and {b}?"),
        },
        (
            "How many {c}'s are in {w}?",
            "How many times does the letter {c} appear in {w}?",
            "Count the letter {c} in {w}.",
            "How many {c}s are there in the word {w}?",
        ),
        "Right to left:",
        "carry",
        "borrow",
        "Letter by letter:",
        "The answer is **{r}**.",
        "The letter {c} appears **{r}** {t}.",
        ("time", "times"),
    ),
    "fr": Phrases(
        (
            "Combien font {a} {s} {b} ?",
            "{a} {s} {b} = ?",
            "Calcule {a} {s} {b}.",
            "Quel est le résultat de {a} {s} {b} ?",
        ),
        {
            "add": ("Combien font {a} plus {b} ?", "Additionne {a} et {b}.", "Quelle est la somme de {a} et {b} ?"),
            "subtract": ("Combien font {a} moins {b} ?", "Soustrais {b} de {a}."),
            "multiply": ("Combien font {a} fois {b} ?", "Multiplie {a} par {b}."),
        },
        (
            "Combien de {c} y a-t-il dans {w} ?",
            "Combien de fois la lettre {c} apparaît-elle dans {w} ?",
            "Compte la lettre {c} dans {w}.",
        ),
        "De droite à gauche :",
        "retenue",
        "retenue",
        "Lettre par lettre :",
        "Le résultat est **{r}**.",
        "La lettre {c} apparaît **{r}** {t}.",
        ("fois", "fois"),
    ),
    "de": Phrases(
        ("Was ist {a} {s} {b}?", "{a} {s} {b} = ?", "Berechne {a} {s} {b}.", "Wie viel ist {a} {s} {b}?"),
        {
            "add": ("Was ist {a} plus {b}?", "Addiere {a} und {b}.", "Wie groß ist die Summe von {a} und {b}?"),
            "subtract": ("Was ist {a} minus {b}?", "Subtrahiere {b} von {a}.", "Ziehe {b} von {a} ab."),
            "multiply": ("Was ist {a} mal {b}?", "Multipliziere {a} mit {b}."),
        },
        (
            "Wie viele {c} sind in {w}?",
            "Wie oft kommt der Buchstabe {c} in {w} vor?",
            "Zähle den Buchstaben {c} in {w}.",
        ),
        "Von rechts nach links:",
        "Übertrag",
        "geliehen",
        "Buchstabe für Buchstabe:",
        "Das Ergebnis ist **{r}**.",
        "Der Buchstabe {c} kommt **{r}** {t} vor.",
        ("Mal", "Mal"),
    ),
    "es": Phrases(
        ("¿Cuánto es {a} {s} {b}?", "{a} {s} {b} = ?", "Calcula {a} {s} {b}.", "¿Cuál es el resultado de {a} {s} {b}?"),
        {
            "add": ("¿Cuánto es {a} más {b}?", "Suma {a} y {b}."),
            "subtract": ("¿Cuánto es {a} menos {b}?", "Resta {b} de {a}."),
            "multiply": ("¿Cuánto es {a} por {b}?", "Multiplica {a} por {b}."),
        },
        (
            "¿Cuántas {c} hay en {w}?",
            "¿Cuántas veces aparece la letra {c} en {w}?",
            "Cuenta la letra {c} en {w}.",
        ),
        "De derecha a izquierda:",
        "llevo",
        "debo",
        "Letra por letra:",
        "El resultado es **{r}**.",
        "La letra {c} aparece **{r}** {t}.",
        ("vez", "veces"),
    ),
    "it": Phrases(
        ("Quanto fa {a} {s} {b}?", "{a} {s} {b} = ?", "Calcola {a} {s} {b}.", "Qual è il risultato di {a} {s} {b}?"),
        {
            "add": ("Quanto fa {a} più {b}?", "Somma {a} e {b}."),
            "subtract": ("Quanto fa {a} meno {b}?", "Sottrai {b} da {a}."),
            "multiply": ("Quanto fa {a} per {b}?", "Moltiplica {a} per {b}."),
        },
        (
            "Quante {c} ci sono in {w}?",
            "Quante volte compare la lettera {c} in {w}?",
            "Conta la lettera {c} in {w}.",
        ),
        "Da destra a sinistra:",
        "riporto",
        "prestito",
        "Lettera per lettera:",
        "Il risultato è **{r}**.",
        "La lettera {c} compare **{r}** {t}.",
        ("volta", "volte"),
    ),
    "pt": Phrases(
        ("Quanto é {a} {s} {b}?", "{a} {s} {b} = ?", "Calcule {a} {s} {b}.", "Qual é o resultado de {a} {s} {b}?"),
        {
            "add": ("Quanto é {a} mais {b}?", "Some {a} e {b}."),
            "subtract": ("Quanto é {a} menos {b}?", "Subtraia {b} de {a}."),
            "multiply": ("Quanto é {a} vezes {b}?", "Multiplique {a} por {b}."),
        },
        (
            "Quantos {c} há em {w}?",
            "Quantas vezes a letra {c} aparece em {w}?",
            "Conte a letra {c} em {w}.",
        ),
        "Da direita para a esquerda:",
        "vai",
        "empresta",
        "Letra por letra:",
        "O resultado é **{r}**.",
        "A letra {c} aparece **{r}** {t}.",
        ("vez", "vezes"),
    ),
}

# Real words, never trained on: the model sees words only as random strings of the tokenizer's pieces.
HELD_OUT_WORDS = {
    "en": "strawberry banana elephant mountain bottle garden letter window coffee butter summer winter kitchen "
    "pepper rabbit yellow mirror hammer ladder pillow dinner carrot cherry balloon castle planet rocket "
    "teacher student science picture morning evening village forest orange potato tomato lemon",
    "fr": "fromage maison voiture fenêtre jardin bouteille montagne fraise cerise pomme tomate lumière chapeau "
    "escalier fourchette couteau assiette grenouille papillon soleil bibliothèque rivière école famille "
    "musique château gâteau semaine hiver bonjour merci livre",
    "de": "Erdbeere Apfel Garten Fenster Wasser Sommer Winter Schule Blume Katze Hund Butter Kaffee Tasse Messer "
    "Gabel Löffel Teller Mutter Vater Bruder Schwester Himmel Sonne Mond Stern Straße Brücke Zimmer Küche "
    "Kartoffel Bahnhof",
    "es": "fresa manzana naranja ventana cocina jardín montaña escuela libro perro gato zapato camisa carretera "
    "hermano abuela primavera verano otoño invierno ciudad pueblo camino tierra guitarra playa arena "
    "tortuga mariposa caballo",
    "it": "fragola arancia finestra cucina giardino montagna scuola libro cane gatto scarpa camicia strada fratello "
    "sorella nonna primavera estate autunno inverno paese cammino terra chitarra spiaggia sabbia farfalla "
    "cavallo bottiglia formaggio",
    "pt": "morango laranja janela cozinha jardim montanha escola livro cachorro gato sapato camisa estrada irmão "
    "primavera verão outono inverno cidade caminho terra violão praia areia tartaruga borboleta cavalo "
    "garrafa queijo cenoura",
}


def is_held_out(kind: str, a: int, b: int) -> bool:
    """One arithmetic problem in sixteen is never trained on in this order, whatever its wording."""
    return crc32(f"{a}{SIGNS[kind]}{b}".encode()) % 16 == 0


def is_unseen(kind: str, a: int, b: int) -> bool:
    """Whether training saw the problem in no order: 5 * 941 would give 941 * 5 away, and 7 - 9 is -(9 - 7)."""
    return is_held_out(kind, a, b) and is_held_out(kind, b, a)


def arithmetic(kind: str, a: int, b: int, language: str, question: str) -> Problem:
    """The problem `a (kind) b` with its worked trace."""
    phrases = PHRASES[language]
    if kind == "add":
        lines, expected = _sum_lines(a, b, phrases.carry), a + b
    elif kind == "subtract":
        lines, expected = _difference_lines(a, b, phrases.borrow), a - b
    else:
        lines, expected = _product_lines(max(a, b), min(a, b), phrases.carry), a * b
    trace = "\n".join([phrases.intro, *lines, f"= {expected}"])
    return Problem(kind, language, question, trace, phrases.result.format(r=expected), expected)


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of both numbers, units first, zeros before the shorter."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True)]


def _sum_lines(a: int, b: int, word: str) -> list[str]:
    lines, carry = [f"{a}+{b}"], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        terms = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        lines.append(f"{terms}={total}: {total % 10}" + (f" {word} 1" if total > 9 else ""))
        carry = total // 10
    return lines + ["1"] * carry


def _difference_lines(a: int, b: int, word: str) -> list[str]:
    lines, borrow = [f"{a}-{b}"], 0
    if a < b:
        lines.append(f"{a}<{b}: -({b}-{a})")
        a, b = b, a
    for x, y in _columns(a, b):
        ten = 10 * (x - y - borrow < 0)
        terms = f"{x + ten}-{y}-1" if borrow else f"{x + ten}-{y}"
        lines.append(f"{terms}={x + ten - y - borrow}" + (f" {word} 1" if ten else ""))
        borrow = ten // 10
    return lines


def _product_lines(a: int, b: int, word: str) -> list[str]:
    lines, carry = [f"{a}*{b}"], 0
    for digit in map(int, reversed(str(a))):
        total = digit * b + carry
        terms = f"{digit}*{b}={digit * b}+{carry}={total}" if carry else f"{digit}*{b}={total}"
        lines.append(f"{terms}: {total % 10}" + (f" {word} {total // 10}" if total > 9 else ""))
        carry = total // 10
    return lines + [str(carry)] * (carry > 0)


def letters(letter: str, word: str, language: str, template: str, pieces: Pieces) -> Problem:
    """Count `letter`, of either case, in a word; `template` holds `{c}` and, once, `{w}`. An é is no e."""
    phrases = PHRASES[language]
    template = template.replace("{c}", letter)
    question = template.replace("{w}", word)
    lines, count = [phrases.spell], 0
    for piece in _pieces_of(question, template.index("{w}"), len(word), pieces):
        shown = []
        for c in piece.strip():
            count += c.lower() == letter
            shown.append(f"{c}{count}")
        lines.append(f"{piece}: {' '.join(shown)}")
    answer = phrases.count.format(c=letter, r=count, t=phrases.times[count != 1])
    return Problem("letters", language, question, "\n".join([*lines, f"= {count}"]), answer, count)


def _pieces_of(question: str, start: int, length: int, pieces: Pieces) -> list[str]:
    """The tokenizer's pieces of question[start : start + length], a space before the first included.

    Raises ValueError where a piece ends inside a character, or spans the word and its neighbour.
    """
    first, last = (len(question[:i].encode()) for i in (start, start + length))
    found, position = [], 0
    for piece in pieces(question):
        end = position + len(piece)
        if end > first and position < last:
            found.append(piece.decode())
        position = end
    if "".join(found).strip() != question[start : start + length]:
        raise ValueError(f"a piece spans {question[start : start + length]!r} and its neighbour")
    return found


def ask_arithmetic(rng: random.Random, kind: str, a: int, b: int, language: str) -> Problem:
    phrases = PHRASES[language]
    if rng.random() < 0.6:
        sign = rng.choice({"add": "+", "subtract": "-\u2212-", "multiply": "*×x"}[kind])
        template = rng.choice(phrases.symbolic)
    else:
        sign, template = "", rng.choice(phrases.spoken[kind])
    return arithmetic(kind, a, b, language, _loosen(rng, template.format(a=a, b=b, s=sign)))


def ask_letters(rng: random.Random, letter: str, word: str, language: str, pieces: Pieces) -> Problem:
    template = _loosen(rng, rng.choice(PHRASES[language].letters))
    if rng.random() < 0.25:
        template = template.replace("{w}", '"{w}"')
    if rng.random() < 0.2 and "{c}'s" not in template and "{c}s" not in template:
        template = template.replace("{c}", '"{c}"')
    return letters(letter, word, language, template, pieces)


def _loosen(rng: random.Random, question: str) -> str:
    """Now and then without its closing mark, as people type."""
    return re.sub(r" ?[?.]$", "", question) if rng.random() < 0.15 else question


def random_operands(rng: random.Random, kind: str) -> tuple[int, int]:
    def number(digits: int) -> int:
        return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    if kind == "multiply":
        a, b = number(rng.choice((1, 2, 2, 3, 3, 3))), number(1)
        return (a, b) if rng.random() < 0.8 else (b, a)
    a, b = number(rng.choice((1, 2, 2, 3, 3, 3))), number(rng.choice((1, 2, 2, 3, 3, 3)))
    return (b, a) if kind == "subtract" and a < b and rng.random() < 0.7 else (a, b)


def held_out_problems(n: int, seed: int, pieces: Pieces, kinds: Sequence[str] = ARITHMETIC) -> list[Problem]:
    """`n` problems that training never saw, kinds and languages in turn."""
    rng = random.Random(seed)
    found: list[Problem] = []
    while len(found) < n:
        kind, language = kinds[len(found) % len(kinds)], rng.choice(LANGUAGES)
        if kind == "letters":
            word = rng.choice(HELD_OUT_WORDS[language].split())
            letter = rng.choice(word.lower() if rng.random() < 0.85 else "aeirst")
            if not letter.isascii():
                continue
            found.append(ask_letters(rng, letter, word, language, pieces))
        else:
            a, b = random_operands(rng, kind)
            if is_unseen(kind, a, b):
                found.append(ask_arithmetic(rng, kind, a, b, language))
    return found


def is_correct(problem: Problem, answer: str) -> bool:
    """Whether the last number of an answer is the expected one."""
    numbers = re.findall(r"-?\d+", answer.replace("\u2212", "-"))
    return bool(numbers) and int(numbers[-1]) == problem.expected
