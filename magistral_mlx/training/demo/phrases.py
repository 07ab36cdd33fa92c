"""Phrases of the embedded model's problems in six languages, and words to count letters in."""

from dataclasses import dataclass

LANGUAGES = ("en", "fr", "de", "es", "it", "pt")


@dataclass(frozen=True, slots=True)
class Phrases:
    """The phrases of one language.

    ``{a}`` and ``{b}`` are operands, ``{s}`` a sign, ``{c}`` a letter, ``{w}`` a word, ``{r}`` a
    result and ``{t}`` the word for "times".

    Attributes:
        symbolic: questions with a sign, for any operation.
        spoken: questions in words, by kind.
        letters: questions that count a letter.
        times: singular and plural.
        tool: first line of a trace that ends in a call of the calculator.
    """

    symbolic: tuple[str, ...]
    spoken: dict[str, tuple[str, ...]]
    letters: tuple[str, ...]
    intro: str
    carry: str
    borrow: str
    spell: str
    result: str
    count: str
    times: tuple[str, str]
    tool: str


PHRASES = {
    "en": Phrases(
        (
            "What is {a} {s} {b}?",
            "{a} {s} {b} = ?",
            "Calculate {a} {s} {b}.",
            "How much is {a} {s} {b}?",
            "{a}{s}{b}",
        ),
        {
            "add": ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
            "subtract": (
                "What is {a} minus {b}?",
                "Subtract {b} from {a}.",
                "Take {b} away from {a}.",
            ),
            "multiply": (
                "What is {a} times {b}?",
                "Multiply {a} by {b}.",
                "What is the product of {a} and {b}?",
            ),
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
        "With the tool:",
    ),
    "fr": Phrases(
        (
            "Combien font {a} {s} {b} ?",
            "{a} {s} {b} = ?",
            "Calcule {a} {s} {b}.",
            "Quel est le résultat de {a} {s} {b} ?",
        ),
        {
            "add": (
                "Combien font {a} plus {b} ?",
                "Additionne {a} et {b}.",
                "Quelle est la somme de {a} et {b} ?",
            ),
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
        "Avec l'outil :",
    ),
    "de": Phrases(
        (
            "Was ist {a} {s} {b}?",
            "{a} {s} {b} = ?",
            "Berechne {a} {s} {b}.",
            "Wie viel ist {a} {s} {b}?",
        ),
        {
            "add": (
                "Was ist {a} plus {b}?",
                "Addiere {a} und {b}.",
                "Wie groß ist die Summe von {a} und {b}?",
            ),
            "subtract": (
                "Was ist {a} minus {b}?",
                "Subtrahiere {b} von {a}.",
                "Ziehe {b} von {a} ab.",
            ),
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
        "Mit dem Werkzeug:",
    ),
    "es": Phrases(
        (
            "¿Cuánto es {a} {s} {b}?",
            "{a} {s} {b} = ?",
            "Calcula {a} {s} {b}.",
            "¿Cuál es el resultado de {a} {s} {b}?",
        ),
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
        "Con la herramienta:",
    ),
    "it": Phrases(
        (
            "Quanto fa {a} {s} {b}?",
            "{a} {s} {b} = ?",
            "Calcola {a} {s} {b}.",
            "Qual è il risultato di {a} {s} {b}?",
        ),
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
        "Con lo strumento:",
    ),
    "pt": Phrases(
        (
            "Quanto é {a} {s} {b}?",
            "{a} {s} {b} = ?",
            "Calcule {a} {s} {b}.",
            "Qual é o resultado de {a} {s} {b}?",
        ),
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
        "Com a ferramenta:",
    ),
}

# Real words that are never trained on: training words are random strings of tokenizer pieces.
HELD_OUT_WORDS = {
    "en": "strawberry banana elephant mountain bottle garden letter window coffee butter summer "
    "winter kitchen pepper rabbit yellow mirror hammer ladder pillow dinner carrot cherry "
    "balloon castle planet rocket teacher student science picture morning evening village "
    "forest orange potato tomato lemon",
    "fr": "fromage maison voiture fenêtre jardin bouteille montagne fraise cerise pomme tomate "
    "lumière chapeau escalier fourchette couteau assiette grenouille papillon soleil "
    "bibliothèque rivière école famille musique château gâteau semaine hiver bonjour merci "
    "livre",
    "de": "Erdbeere Apfel Garten Fenster Wasser Sommer Winter Schule Blume Katze Hund Butter "
    "Kaffee Tasse Messer Gabel Löffel Teller Mutter Vater Bruder Schwester Himmel Sonne "
    "Mond Stern Straße Brücke Zimmer Küche Kartoffel Bahnhof",
    "es": "fresa manzana naranja ventana cocina jardín montaña escuela libro perro gato zapato "
    "camisa carretera hermano abuela primavera verano otoño invierno ciudad pueblo camino "
    "tierra guitarra playa arena tortuga mariposa caballo",
    "it": "fragola arancia finestra cucina giardino montagna scuola libro cane gatto scarpa "
    "camicia strada fratello sorella nonna primavera estate autunno inverno paese cammino "
    "terra chitarra spiaggia sabbia farfalla cavallo bottiglia formaggio",
    "pt": "morango laranja janela cozinha jardim montanha escola livro cachorro gato sapato "
    "camisa estrada irmão primavera verão outono inverno cidade caminho terra violão praia "
    "areia tartaruga borboleta cavalo garrafa queijo cenoura",
}
