"""Every language of the model card: the real vocabulary splits or loses no character."""

import codecs
import unicodedata
from functools import cache

import mlx.core as mx
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

import magistral_mlx as mm
from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.reply import ReplyBuilder
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.phrases import LANGUAGES, PHRASES
from tests.support.tekken import write_tekken

# The first words of the Universal Declaration of Human Rights, article 1.
TEXTS = {
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "Bengali": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "English": "All human beings are born free and equal in dignity and rights.",
    "Farsi": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند.",
    "French": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "German": (
        "Alle Menschen sind frei und gleich an Würde und "
        "Rechten geboren; im Geist der Brüderlichkeit."
    ),
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Hindi": ("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।"),
    "Indonesian": "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama.",
    "Italian": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "Japanese": (
        "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"
    ),
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Malay": "Semua manusia dilahirkan bebas dan samarata dari segi kemuliaan dan hak-hak.",
    "Nepali": "सबै व्यक्तिहरू जन्मजात स्वतन्त्र हुन् ती सबैको समान अधिकार र महत्व छ।",
    "Polish": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Portuguese": (
        "Todos os seres humanos nascem livres e iguais em "
        "dignidade e em direitos; razão e consciência."
    ),
    "Romanian": "Toate ființele umane se nasc libere și egale în demnitate și în drepturi.",
    "Russian": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Serbian": "Сва људска бића рађају се слободна и једнака у достојанству и правима.",
    "Spanish": (
        "Todos los seres humanos nacen libres e iguales en "
        "dignidad y derechos; ¿razón y conciencia? ¡Sí!"
    ),
    "Swedish": "Alla människor är födda fria och lika i värde och rättigheter.",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "Ukrainian": "Всі люди народжуються вільними і рівними у своїй гідності та правах; ґанок, їжа.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
}
FIRST_BYTE = 1000  # the ids of the 256 bytes follow the control ids


@pytest.fixture(scope="module", params=["v11", "v13"])
def real(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tekkenizer]:
    folder = write_tekken(tmp_path_factory.mktemp("real"), 131_072, request.param)
    return Tokenizer.from_folder(folder), Tekkenizer.from_file(folder / "tekken.json")


def forms(text: str) -> list[str]:
    """Return a text as typed, with its marks apart (NFD), and with white space around it."""
    return [text, unicodedata.normalize("NFD", text), f"\n\n {text} 👩‍👩‍👧\n"]


@cache
def ids_of_pieces(theirs: Tekkenizer) -> dict[bytes, int]:
    return {theirs.id_to_byte_piece(i): i for i in range(FIRST_BYTE, theirs.n_words)}


def ways(theirs: Tekkenizer, text: str) -> list[list[int]]:
    """Return ids of a text: by the vocabulary, a byte each, and cut at every third byte."""
    data = text.encode()
    cut = [data[i : i + 3] for i in range(0, len(data), 3)]
    pieces = ids_of_pieces(theirs)
    threes = [
        i
        for piece in cut
        for i in ([pieces[piece]] if piece in pieces else [FIRST_BYTE + b for b in piece])
    ]
    return [theirs.encode(text, bos=False, eos=False), [FIRST_BYTE + byte for byte in data], threes]


@pytest.mark.parametrize("language", TEXTS)
def test_each_id_shows_the_characters_it_completes(
    real: tuple[Tokenizer, Tekkenizer], language: str
) -> None:
    ours, theirs = real
    for text in forms(TEXTS[language]):
        for ids in ways(theirs, text):
            stream, shown, data = ours.detokenizer(), "", b""
            for identity in ids:
                piece = stream.push(identity)
                data += theirs.id_to_byte_piece(identity)
                shown += piece
                # All whole characters so far and nothing else; the rest begins one.
                assert "\ufffd" not in piece
                assert data.startswith(shown.encode())
                rest = data[len(shown.encode()) :]
                assert len(rest) < 4
                assert codecs.getincrementaldecoder("utf-8")().decode(rest) == ""
            assert shown + stream.flush() == shown == text == ours.decode(ids)
    assert ours.encode(TEXTS[language]) == theirs.encode(TEXTS[language], bos=False, eos=False)


@pytest.mark.parametrize("language", TEXTS)
def test_trace_and_answer_of_a_reply_are_streamed_whole(
    real: tuple[Tokenizer, Tekkenizer], language: str
) -> None:
    ours, theirs = real
    text = TEXTS[language]
    for whole in ways(theirs, text):
        if ours.open_id is not None and ours.close_id is not None:
            ids = [ours.open_id, *whole, ours.close_id, *whole]
        else:
            ids = [*ours.encode("<think>\n"), *whole, *ours.encode("\n</think>\n\n"), *whole]
        builder = ReplyBuilder(ours, mm.SamplingParams(temperature=0), 10_000)
        pieces = [
            piece for identity in ids for piece in builder.push(Token(identity, mx.zeros((1, 1))))
        ]
        pieces += [piece for piece in builder.flush() if isinstance(piece, mm.Text)]
        for kind in ("reasoning", "answer"):
            assert "".join(piece.text for piece in pieces if piece.kind == kind) == text
        assert all(piece.text.encode() for piece in pieces)


def test_the_vocabulary_does_split_characters(real: tuple[Tokenizer, Tekkenizer]) -> None:
    """Texts as typed have ids that end inside a character, so the laws above test something."""
    _, theirs = real

    def is_whole(data: bytes) -> bool:
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
        return True

    split = {
        language
        for language, text in TEXTS.items()
        for identity in theirs.encode(text, bos=False, eos=False)
        if not is_whole(theirs.id_to_byte_piece(identity))
    }
    assert split >= {"Chinese", "Greek", "Japanese", "Ukrainian"}


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_demo_answers_in_the_language_asked(language: str) -> None:
    phrases = PHRASES[language]
    question = phrases.symbolic[0].format(a=12, s="+", b=30)
    reply = mm.load("demo").ask(question, mm.SamplingParams(temperature=0))
    assert reply.reasoning.startswith(phrases.intro)
    assert reply.answer == phrases.result.format(r=42)
