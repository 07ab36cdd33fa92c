"""Magistral Small on Apple silicon.

``load`` a checkpoint, then ``ask``, ``stream``, ``sample`` or ``chat``.

Example::

    import magistral_mlx as mm

    magistral = mm.load("demo")
    print(magistral.ask("What is 48 + 76?", temperature=0.2))
    for segment in magistral.stream("How many r's are in strawberry?"):
        print(segment)
    chat = magistral.chat()
    print(chat.ask("What is 7 * 8?"))
"""

# First, so that Ctrl-C during the other imports ends a command line without a traceback.
from magistral_mlx import startup  # isort: split

from magistral_mlx.engine.async_stream import AsyncStream
from magistral_mlx.engine.chat import Chat
from magistral_mlx.engine.load import load
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import (
    CancelledError,
    CheckpointError,
    ContextError,
    ConversionError,
    HubError,
    MagistralError,
    MemoryLimitError,
    NumericsError,
    OptionError,
    OverwriteError,
    TokenizerError,
)
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, Samples, Usage
from magistral_mlx.streams import Progress, Stream
from magistral_mlx.tokenizer.segments import Segment, Text, ToolCall

del startup

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "CancelledError",
    "Chat",
    "CheckpointError",
    "ContextError",
    "ConversionError",
    "HubError",
    "Magistral",
    "MagistralError",
    "MemoryLimitError",
    "NumericsError",
    "OptionError",
    "OverwriteError",
    "Progress",
    "Reply",
    "Samples",
    "SamplingParams",
    "Segment",
    "Stream",
    "Text",
    "TokenizerError",
    "ToolCall",
    "Usage",
    "load",
]
