"""Replies in ``async`` code: many at once, and cancelled tasks leave the model usable."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import magistral_mlx as mm

QUESTION, OTHER = "What is 48 + 76?", "How many r's are in strawberry?"
SHORT = mm.SamplingParams(seed=3, max_tokens=3)
LONG = mm.SamplingParams(temperature=9, top_p=1, seed=1, on_loop="ignore")


def said(reply: mm.Reply) -> tuple[str, str, str]:
    return reply.reasoning, reply.answer, reply.finish_reason


def test_replies_at_once_are_those_of_one_after_another(magistral: mm.Magistral) -> None:
    questions = [QUESTION, OTHER]
    alone = [said(magistral.ask(question, SHORT)) for question in questions]
    threads = threading.active_count()

    async def streamed(question: str) -> mm.Reply:
        stream = magistral.astream(question, SHORT)
        texts = [s.text async for s in stream if isinstance(s, mm.Text)]
        reply = await stream.result()
        assert "".join(texts) == reply.reasoning + reply.answer
        return reply

    async def all_of_them() -> list[mm.Reply]:
        asked = [magistral.aask(question, SHORT) for question in questions]
        return await asyncio.gather(*asked, *map(streamed, questions))

    assert list(map(said, asyncio.run(all_of_them()))) == alone * 2
    assert threading.active_count() == threads


def test_a_cancelled_task_cancels_its_reply(magistral: mm.Magistral) -> None:
    expected = said(magistral.ask(QUESTION, SHORT))

    async def cancelled() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in magistral.astream(QUESTION, LONG):
                begun.set()

        reading = asyncio.create_task(read())
        await begun.wait()
        waiting = asyncio.create_task(magistral.aask(OTHER, LONG))
        await asyncio.sleep(0)
        for task in (waiting, reading):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert said(await magistral.aask(QUESTION, SHORT)) == expected

    asyncio.run(cancelled())
    assert magistral.prefix_cache.cache.length <= len(magistral.prefix_cache.ids)


def test_a_stream_can_be_left_early_and_cancelled(magistral: mm.Magistral) -> None:
    async def left() -> None:
        async with magistral.astream(QUESTION, LONG) as stream:
            async for _ in stream:
                break
        with pytest.raises(mm.MagistralError, match="ended early"):
            await stream.result()
        assert [segment async for segment in stream] == []
        stopped = magistral.astream(QUESTION, LONG)
        await anext(stopped)
        stopped.cancel()
        reply = await stopped.result()
        assert reply is await stopped.result()
        assert reply.finish_reason == "cancelled"

    asyncio.run(left())


def test_an_error_comes_out_of_the_await(
    magistral: mm.Magistral, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device hung")

    with monkeypatch.context() as patch:
        patch.setattr(magistral.model, "logits", fail)
        with pytest.raises(RuntimeError, match="hung"):
            asyncio.run(magistral.aask(QUESTION, SHORT))
    assert asyncio.run(magistral.aask(QUESTION, SHORT)).finish_reason == "length"


def test_a_cache_file_lets_the_event_loop_go_on(magistral: mm.Magistral, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    magistral.ask(OTHER, SHORT, prompt_cache_file=file)

    async def both() -> mm.Reply:
        stream = magistral.astream(QUESTION, SHORT)
        await anext(aiter(stream))
        waiting = asyncio.create_task(magistral.aask(OTHER, SHORT, prompt_cache_file=file))
        await asyncio.sleep(0)
        await stream.result()
        return await waiting

    reply = asyncio.run(both())
    assert reply.usage.cached_tokens == reply.usage.prompt_tokens - 1


def test_a_conversation_keeps_its_turns(magistral: mm.Magistral) -> None:
    plain, chat = magistral.chat(), magistral.chat()
    expected = [said(plain.ask(question, SHORT)) for question in (QUESTION, OTHER)]

    async def converse() -> AsyncIterator[mm.Reply]:
        yield await chat.aask(QUESTION, seed=3, max_tokens=3)
        async with contextlib.AsyncExitStack() as stack:
            stream = await stack.enter_async_context(chat.astream(OTHER, seed=3, max_tokens=3))
            async for _ in stream:
                pass
            yield await stream.result()

    async def all_of_it() -> list[mm.Reply]:
        return [reply async for reply in converse()]

    assert list(map(said, asyncio.run(all_of_it()))) == expected
    assert chat.messages == plain.messages
