"""Messages of errors: safe to show, short, and spelled as each door spells options."""

import pickle

import pytest

from magistral_mlx.errors import OptionError, as_flags, named, quoted


@pytest.mark.parametrize(
    "harmful", ["\x1b]0;title\x07", "\x1b[31m", "\x9b2J", "\u202etxt.exe", "\r", "\x00", "\u2066"]
)
def test_control_characters_in_a_message_are_made_visible(harmful: str) -> None:
    error = OptionError(f"a file says {harmful}, line 1\nline 2\té")
    for text in (str(error), as_flags(error), as_flags(OSError(harmful))):
        assert not [
            c for c in text if (ord(c) < 0x20 and c not in "\n\t") or ord(c) in (0x7F, 0x9B)
        ]
        assert harmful[0] not in text
    assert str(error).endswith(", line 1\nline 2\té")


def test_an_option_is_a_keyword_in_python_and_a_flag_on_a_command_line() -> None:
    values = [named("kv_bits", 8), named("n"), named("wired", True), named("tokenizer_json", False)]
    error = OptionError(f"{named('max_tokens')} is 0; see {', '.join(values)}")
    assert str(error) == "max_tokens is 0; see kv_bits=8, n, wired=True, tokenizer_json=False"
    flags = "--max-tokens is 0; see --kv-bits 8, --samples, --wired, --no-tokenizer-json"
    assert as_flags(error) == flags
    assert as_flags(pickle.loads(pickle.dumps(error))) == flags


def test_a_number_too_long_for_python_to_write_is_quoted() -> None:
    for value in (10**5000, -(10**5000), [10**5000], {"a": {"b": [10**5000]}}):
        assert len(quoted(value)) < 100


def test_a_number_that_people_write_is_quoted_as_it_is() -> None:
    assert quoted(2**64) == str(2**64)
