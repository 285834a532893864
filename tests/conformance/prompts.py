"""Function-calling prompts of our own, for when no file is given."""

from __future__ import annotations

from typing import Any

from tests.conformance.schemas import FLAG, NUMBER, TEXT, WHOLE


def prompt(question: str, name: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """A question and the function that answers it; all its parameters are required unless some are named."""
    parameters = {"type": "object", "properties": properties, "required": list(required or properties)}
    return {"question": question, "tool": {"name": name, "description": question, "parameters": parameters}}


PROMPTS = [
    prompt("What is the weather in Oslo in celsius?", "weather", city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}),
    prompt("Add 3 and 4.5.", "add", a=NUMBER, b=NUMBER),
    prompt("Book a table for four at seven, outside.", "book_table", seats=WHOLE, hour=WHOLE, outside=FLAG),
    prompt("Remind me to call Ada tomorrow.", "remind", ("what",), what=TEXT, when=TEXT),
    prompt("Sort 5, 2 and 9.", "sort", numbers={"type": "array", "items": WHOLE, "maxItems": 5}),
    prompt(
        "Draw a red circle of radius two.",
        "draw",
        colour={"enum": ["red", "blue"]},
        shape={"type": "object", "properties": {"kind": TEXT, "radius": NUMBER}, "required": ["kind", "radius"]},
    ),
    prompt("Is the shop open?", "is_open"),
    prompt("Convert 10 miles to kilometres.", "convert", value=NUMBER, to={"enum": ["km", "mi"]}),
]
