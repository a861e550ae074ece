"""The table of forms: what counts as an answer that fits, and as one that is right."""

from types import SimpleNamespace

import pytest

from benchmarks.smollm2_forms import FORMS, PEOPLE, measure


class Scripted:
    """A model that answers with the given texts in turn."""

    def __init__(self, *texts):
        self.texts = iter(texts)

    def ask(self, prompt, **options):
        return SimpleNamespace(text=next(self.texts), token_ids=[1, 2, 3])


@pytest.mark.parametrize(
    ("form", "right", "wrong", "unfit"),
    [
        (
            "JSON schema",
            '{{"name": "{0}", "age": {1}, "city": "{2}"}}',
            '{{"name": "{0}", "age": 5, "city": "{2}"}}',
            'Here you are: {{"name": "{0}", "age": {1}, "city": "{2}"}}',
        ),
        ("regular expression", "{1}", "99", "{1} years"),
        ("choice", "{2}", "Lyon", "in {2}"),
    ],
)
def test_an_answer_fits_or_is_right_or_neither(form, right, wrong, unfit):
    scripts = (right, right, wrong, unfit)
    said = [text.format(*person) for text, person in zip(scripts, PEOPLE, strict=True)]
    row = measure(Scripted(*said), FORMS[form], {})
    assert row.startswith("3 of 4 | 2 of 4 | 12 | ")


def test_json_without_a_field_does_not_fit():
    said = ['{"name": "Maria Lopez", "age": 34}', "[34]", "34", "{"]
    assert measure(Scripted(*said), FORMS["JSON schema"], {}).startswith("0 of 4 | 0 of 4 |")
