"""A stranger's template cannot take the machine: steps, sizes and time are bounded."""

import time
import tracemalloc

import jinja2
import pytest

from internvl3_mlx.errors import CheckpointError
from internvl3_mlx.prompt.jinja_template import _compile
from internvl3_mlx.prompt.template_sandbox import MAX_CHARACTERS, BoundedEnvironment

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x OPERATOR ns.x %}{% endfor %}"
)
HOSTILE = {
    "loops": LOOP,
    "nested loops": "{% for c in range(99999) %}" + LOOP + "{% endfor %}",
    "product": "{{ 'a' * 20000000000 }}",
    "product of a list": "{{ ([1] * 20000000000)|length }}",
    "product from the left": "{{ 20000000000 * 'a' }}",
    "doubling by ~": DOUBLING.replace("OPERATOR", "~"),
    "doubling by +": DOUBLING.replace("OPERATOR", "+"),
    "power": "{{ 9 ** 999999999 }}",
    "width of %": "{{ '%2000000000d' % 1 }}",
    "starred width": "{{ '%*d' % (2000000000, 1) }}",
    "format filter": "{{ '%2000000000d'|format(1) }}",
    "format method": "{{ '{:>2000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "center filter": "{{ 'a'|center(2000000000) }}",
    "indent": "{{ 'a\nb'|indent(2000000000) }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x|replace('a', x) }}",
    "replace method": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ (x|list)|join(x) }}",
    "join method": "{% set x = 'a' * 100000 %}{{ x.join(x) }}",
    "expandtabs": "{% set x = '\t' * 100000 %}{{ x.expandtabs(9999) }}",
    "text in a loop": "{% for a in range(49999) %}" + "text " * 900 + "{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "filters in a loop": (
        "{% set x = 'a' * 1000000 %}{% for a in range(49999) %}{% if x|upper %}{% endif %}"
        "{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_stopped(name):
    environment = BoundedEnvironment()
    template = environment.compile_bounded(HOSTILE[name])
    start = time.monotonic()
    environment.start()
    tracemalloc.start()
    try:
        with pytest.raises((jinja2.TemplateError, RecursionError)):
            template.render()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 20  # the deadline is 5 s on an idle machine
    assert peak < 40 * MAX_CHARACTERS


ORDINARY = {
    "{% for m in messages %}{{ loop.index }}{{ m.role|upper }}{% endfor %}": "1USER2BOT",
    "{{ 'ab' * 3 }}{{ 'a' ~ 1 ~ 'b' }}{{ '%s-%03d' % ('x', 7) }}": "abababa1bx-007",
    "{{ messages|map(attribute='role')|join(', ') }}": "user, bot",
    "{{ '{}:{:>4}'.format('a', 1) }}{{ 2 ** 5 }}{{ 3 * 4 }}": "a:   132" + "12",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}{{ f('b') }}": "<a><b>",
    "{{ messages[-1].role|trim|replace('b', 'c') }}{{ [1, 2]|tojson }}": "cot[1, 2]",
    "{% for m in messages if m.role == 'bot' %}{{ m.role }}{% break %}{% endfor %}": "bot",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}": "2",
}


@pytest.mark.parametrize("source", ORDINARY)
def test_an_ordinary_template_renders_as_in_jinja(source):
    messages = [{"role": "user"}, {"role": "bot"}]
    environment = BoundedEnvironment()
    environment.start()
    assert environment.compile_bounded(source).render(messages=messages) == ORDINARY[source]
    plain = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    assert plain.from_string(source).render(messages=messages) == ORDINARY[source]


@pytest.mark.parametrize(
    "source",
    ["{{ " + "[" * 5000 + "]" * 5000 + " }}", "{{ 1 }" * 3, "x" * (2**20 + 1), "{{ x|nosuch }}"],
)
def test_a_template_that_cannot_be_compiled_is_one_line(source):
    with pytest.raises(
        CheckpointError, match=r"is not a valid chat template \(.*built-in"
    ) as found:
        _compile(source, "chat_template.jinja")
    assert "\n" not in str(found.value)


def test_two_prompts_each_have_their_budget():
    environment = BoundedEnvironment()
    template = environment.compile_bounded("{% for a in range(30000) %}x{% endfor %}")
    for _ in range(4):
        environment.start()
        assert len(template.render()) == 30000
