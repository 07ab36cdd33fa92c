"""The JSON Schema of events, made from their types: ``python -m magistral_mlx.serving.event_schema > FILE`` writes SCHEMA."""

import json
import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

from magistral_mlx.serving.events import Event

SCHEMA = Path(__file__).with_name("bridge_events.schema.json")
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def event_schema() -> dict[str, Any]:
    """What ``next_event`` gives as ``event``: one of the definitions, told by its ``kind``."""
    events = get_args(Event)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Event of magistral_mlx.bridge",
        "oneOf": [{"$ref": f"#/$defs/{event.__name__}"} for event in events],
        "$defs": {event.__name__: _of(event) for event in events},
    }


def _of(annotation: Any) -> dict[str, Any]:
    if is_typeddict(annotation):
        fields = get_type_hints(annotation)
        return {
            "type": "object",
            "description": (annotation.__doc__ or "").strip(),
            "properties": {name: _of(hint) for name, hint in fields.items()},
            "required": list(fields),
            "additionalProperties": False,
        }
    if get_origin(annotation) is Literal:
        return {"enum": list(get_args(annotation))}
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is not None:
        return {"anyOf": [_of(choice) for choice in get_args(annotation)]}
    return {"type": TYPES[annotation]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(event_schema(), indent=2) + "\n")
