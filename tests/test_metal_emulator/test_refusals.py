"""Text that a Mac would refuse is refused here, in words that help; right text is taken."""

import pytest
from metal_emulator import KernelRefused, compile_kernel
from test_metal_emulator.bodies import around, compiled
from test_metal_emulator.snippets import RIGHT, WRONG


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_snippet_is_refused_with_its_reason(name):
    snippet = WRONG[name]
    with pytest.raises(KernelRefused) as refusal:
        compiled(snippet.body, snippet.helper, snippet.parameters)
    assert snippet.says in str(refusal.value)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_snippet_is_taken(name):
    snippet = RIGHT[name]
    kernel = compiled(snippet.body, snippet.helper, snippet.parameters)
    assert kernel.parameters


def test_the_tables_are_as_long_as_promised():
    assert len(WRONG) >= 48
    assert len(RIGHT) >= 22


def test_a_refusal_names_the_line_in_the_authors_text():
    with pytest.raises(KernelRefused, match=r"^body\.metal:2:12: error: .*vector components"):
        compiled("\nfloat4 v = float4(1, 2, 3); y[i] = v.x;")
    with pytest.raises(KernelRefused, match=r"^helper\.metal:3: error: 'p': a pointer"):
        compiled("y[i] = 1;", "\n\nfloat f(const float* p) { return *p; }")


def test_an_unknown_kernel_is_named_with_those_there_are():
    with pytest.raises(KernelRefused, match="no kernel 'other' among .*kernel_under_test"):
        compile_kernel(around("y[i] = 1;"), "other")
