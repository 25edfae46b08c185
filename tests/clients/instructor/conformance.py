"""Typed answers through instructor, in the modes that an OpenAI-compatible server has.

Usage: conformance.py URL
"""

import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Place(BaseModel):
    """A place on the map."""

    name: str = Field(max_length=12)
    kind: Literal["city", "country"]


ASK = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Paris is the capital of France. Which place is the capital?"}],
    "temperature": 0,
    "max_tokens": 120,
}

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    api = OpenAI(base_url=sys.argv[1] + "/v1", api_key="unused", max_retries=0)
    client = instructor.from_openai(api, mode=mode)
    # One attempt: the grammar makes the first answer valid.
    place = client.chat.completions.create(response_model=Place, max_retries=0, **ASK)
    assert isinstance(place, Place) and place.kind in ("city", "country"), (mode, place)
    *_, last = client.chat.completions.create_partial(response_model=Place, max_retries=0, **ASK)
    assert (last.name, last.kind) == (place.name, place.kind), (mode, last)
print("instructor: passed")
