"""Metal Shading Language to C++ for OpenCL, token by token; every line keeps its number.

Clang compiles C++ for OpenCL with address spaces kept apart, as Metal does. What differs is spelled
anew here: attributes, explicit instantiations, threadgroup variables, vector constructors, words.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from metal_emulator.signature import Parameter, read_parameters
from metal_emulator.threadgroup import threadgroup_variables
from metal_emulator.tokens import (
    Token,
    attribute_end,
    closing,
    collapse,
    join,
    plain,
    refusal,
    tokenize,
)
from metal_emulator.words import spell_words


@dataclass
class Rewritten:
    """C++ for OpenCL, and what the text says about its kernels."""

    text: str
    kernels: dict[str, list[Parameter]] = field(default_factory=dict)
    instances: dict[str, str] = field(default_factory=dict)  # host name -> "f<float, 4>"


def rewrite(preprocessed: str, constants: Mapping[int, bool | int | float]) -> Rewritten:
    """Rewrite preprocessed Metal text, with these values for its function constants."""
    result = Rewritten("")
    tokens = list(_function_constants(tokenize(preprocessed), constants))
    tokens = list(_instantiations(tokens, result.instances))
    _kernels(tokens, result.kernels)
    tokens = list(_attributes(tokens))
    result.text = join(threadgroup_variables(spell_words(tokens)))
    return result


def _function_constants(
    tokens: Sequence[Token], constants: Mapping[int, bool | int | float]
) -> Iterator[Token]:
    """Give ``constant bool causal [[function_constant(3)]];`` the value it has in this pipeline."""
    for index, token in enumerate(tokens):
        is_one = token.text == "[[" and tokens[index + 1].text == "function_constant"
        if is_one and tokens[attribute_end(tokens, index) + 1].text == ";":
            value = constants.get(int(tokens[index + 3].text), 0)
            written = str(value).lower() if isinstance(value, bool) else str(value)
            kind = tokens[index - 2].text
            yield Token("made", f"= ({kind}){written}", " ", token.file, token.line)
        yield token


def _instantiations(tokens: Sequence[Token], instances: dict[str, str]) -> Iterator[Token]:
    """Take out ``template [[host_name("n")]] ... f<T>;`` and record what the name means."""
    index = 0
    while index < len(tokens):
        starts = index == 0 or tokens[index - 1].text in {";", "}", "{"}
        if tokens[index].text == "template" and starts and tokens[index + 1].text != "<":
            end = index
            while tokens[end].text != ";":
                end += 1
            _note_instance(tokens[index + 1 : end], instances)
            yield collapse(tokens[index : end + 1], ";")
            index = end + 1
        else:
            yield tokens[index]
            index += 1


def _note_instance(tokens: Sequence[Token], instances: dict[str, str]) -> None:
    names = [token.text for token in tokens if token.kind == "string"]
    words = list(_attributes(tokens))
    start = next((i for i, token in enumerate(words) if token.text == "decltype"), None)
    if start is not None:
        expression = words[closing(words, start + 1) + 1 :]
    else:
        start = next(i for i, token in enumerate(words) if token.text == "void") + 1
        end = next(i for i in range(start, len(words)) if words[i].text == "(")
        expression = words[start:end]
    host_name = "".join(name.strip('"') for name in names)
    instances[host_name or plain(expression)] = plain(expression)


def _kernels(tokens: Sequence[Token], kernels: dict[str, list[Parameter]]) -> None:
    """Note each kernel's parameters, blank the word that says it is one, mark its body."""
    attribute = -1  # where the attribute ends that was opened last
    for index, token in enumerate(tokens):
        if token.text == "[[":
            attribute = attribute_end(tokens, index)
        elif token.text == "kernel" and token.kind == "word":
            start = max(index, attribute) + 1
            while tokens[start].text == "[[":
                start = attribute_end(tokens, start) + 1
            token.text = ""
            _kernel(tokens, start, kernels)


def _kernel(tokens: Sequence[Token], start: int, kernels: dict[str, list[Parameter]]) -> None:
    """Read the kernel whose type is at ``start``."""
    if tokens[start].text != "void":
        raise refusal(tokens[start], "a kernel must return void")
    end = closing(tokens, start + 2)
    kernels[tokens[start + 1].text] = read_parameters(tokens[start + 3 : end])
    if tokens[end + 1].text == "{":
        for inside in range(end + 1, closing(tokens, end + 1)):
            tokens[inside].in_kernel = True


def _attributes(tokens: Sequence[Token]) -> Iterator[Token]:
    """Leave out ``[[...]]``, of which the kernels' are read by now."""
    index = 0
    while index < len(tokens):
        if tokens[index].text == "[[":
            end = attribute_end(tokens, index)
            yield collapse(tokens[index : end + 1], "")
            index = end + 1
        else:
            yield tokens[index]
            index += 1


def entry_point(expression: str, parameters: Sequence[Parameter]) -> str:
    """Write what the runtime calls for each thread: raw addresses become typed arguments."""
    arguments = []
    for place, parameter in enumerate(parameters):
        kind = f"__msl_host::nth<__F, {place}>::type"
        if parameter.is_buffer:
            arguments.append(f"__msl_host::pointer<{kind}>::get(a[{parameter.index}])")
        else:
            arguments.append(f"__msl_host::position<{kind}>::get(p + {parameter.index})")
    return (
        '\n# 1 "entry"\n#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable\n'
        'extern "C" void __msl_entry(const ulong* a, const uint* p) {\n'
        f"  typedef decltype({expression}) __F;\n  {expression}({', '.join(arguments)});\n}}\n"
    )


def base_name(expression: str) -> str:
    return re.split(r"[<\s]", expression.strip(), maxsplit=1)[0]
