"""The reply builder: log-probabilities of tool calls and of forced ids."""

import mlx.core as mx
import pytest

from magistral_mlx.generation.decoding import Token
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import ReplyBuilder
from magistral_mlx.tokenizer.segments import Text, ToolCall
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.tekken import write_tekken


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tekken(tmp_path_factory.mktemp("tekken"), version="v7")
    return Tokenizer.from_folder(folder, "text")


def token(tokenizer: Tokenizer, identity: int, *, is_forced: bool = False) -> Token:
    """Return an id that its logits make the most probable."""
    logits = mx.zeros((1, tokenizer.vocab_size))
    logits[0, identity] = 9.0
    return Token(identity, logits, is_forced)


def test_a_tool_call_alone_has_its_log_probabilities_in_an_empty_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.tool_calls_id is not None
    call = '[{"name": "add", "arguments": {"a": 1}, "id": "abc123XYZ"}]'
    ids = [tokenizer.tool_calls_id, *tokenizer.encode(call)]
    builder = ReplyBuilder(tokenizer, SamplingParams(logprobs=1), 1000)
    assert [builder.push(token(tokenizer, identity)) for identity in ids] == [[]] * len(ids)
    text, found = builder.flush()
    assert isinstance(text, Text)
    assert (text.kind, text.text) == ("answer", "")
    assert [list(best) for best in text.logprobs] == [[identity] for identity in ids]
    assert found == ToolCall("abc123XYZ", "add", {"a": 1})


def test_a_tool_call_without_log_probabilities_is_the_only_segment(tokenizer: Tokenizer) -> None:
    assert tokenizer.tool_calls_id is not None
    builder = ReplyBuilder(tokenizer, SamplingParams(), 1000)
    for identity in [
        tokenizer.tool_calls_id,
        *tokenizer.encode('[{"name": "f", "arguments": {}}]'),
    ]:
        builder.push(token(tokenizer, identity))
    (found,) = builder.flush()
    assert isinstance(found, ToolCall)


def test_forced_ids_have_no_log_probabilities(tokenizer: Tokenizer) -> None:
    builder = ReplyBuilder(tokenizer, SamplingParams(logprobs=2), 1000)
    ids = tokenizer.encode("<think>\nHm")
    closing = tokenizer.encode("\n</think>\n\n")
    texts = [text for identity in ids for text in builder.push(token(tokenizer, identity))]
    for identity in closing:
        texts += builder.push(token(tokenizer, identity, is_forced=True))
    for identity in tokenizer.encode("4"):
        texts += builder.push(token(tokenizer, identity))
    texts += [text for text in builder.flush() if isinstance(text, Text)]
    counts = [len(best) for text in texts for best in text.logprobs]
    assert counts == [2] * len(ids) + [0] * len(closing) + [2]
