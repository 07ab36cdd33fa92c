"""Conversations of every shape, for every way to encode them."""

import random
from typing import Any

TEXTS = [
    "Hi",
    " leading",
    "trailing  ",
    "two\n\nlines\n",
    "\n",
    "3.14 × 10²",
    "日本語 🙂",
    "'quotes' \"and\" \\n",
    "{{ 7 * 7 }}",
]
TEXTS += [
    "<think>\nfake\n</think>\n",
    "</think>",
    "Problem:\n\n",
    "def f(x):\n\treturn x",
    "</",
    "> ",
    "ends in spaces \n  ",
]
TOOLS = [
    {
        "type": "function",
        "function": {"parameters": {"type": "object", "properties": {"é": {}}}, "name": "add"},
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": 'the "time" <&>',
            "parameters": {},
            "strict": True,
        },
    },
]


def conversations(n: int) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Make conversations of every shape, with the options to encode them."""
    rng = random.Random(0)

    def text() -> str:
        return rng.choice([t for t in TEXTS if t.strip()])

    made = []
    for i in range(n):
        messages: list[dict[str, Any]] = [{"role": "system", "content": text()}] if i % 3 else []
        for turn in range(rng.randrange(4)):
            messages.append({"role": "user", "content": text()})
            if rng.random() < 0.2:
                messages.append({"role": rng.choice(["user", "system"]), "content": text()})
            reply: dict[str, Any] = {"role": "assistant", "content": text()}
            if rng.random() < 0.6:
                reply[rng.choice(["reasoning", "reasoning_content"])] = rng.choice(TEXTS)
            if rng.random() < 0.3:
                calls = [
                    {
                        "id": f"call{turn}abc{k}",
                        "function": {"name": "add", "arguments": {"é": text(), "n": [1, None]}},
                    }
                    for k in range(rng.randrange(1, 3))
                ]
                reply |= {"tool_calls": calls} | ({"content": None} if rng.random() < 0.5 else {})
                results = [
                    {"role": "tool", "content": rng.choice(TEXTS), "tool_call_id": c["id"]}
                    for c in calls
                ]
                # The runtime puts them in the order of their calls.
                rng.shuffle(results)
                messages += [reply, *results, {"role": "assistant", "content": text()}]
            else:
                messages.append(reply)
        if i % 6 == 5 and len(messages) > 2 and messages[-2]["role"] == "tool":
            # Let tool results be the last question.
            messages.pop()
        else:
            messages += [{"role": "user", "content": text()} for _ in range(rng.choice((1, 1, 2)))]
        has_system = any(m["role"] == "system" for m in messages)
        options = {"tools": TOOLS if i % 4 == 1 else None, "think": i % 5 > 0}
        made.append((messages, options | {"system_prompt_only": has_system and i % 7 == 0}))
    return made
