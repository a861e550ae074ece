"""A sandbox that also bounds what a stranger's chat template may cost: steps, sizes and time.

Jinja's own sandbox keeps a template from reaching Python, not from looping for ever or from making
a string of 20 GB. Here every loop iteration and macro call costs a step, every value that grows
costs its length, and widths and repetitions are checked before they are carried out.
"""

import re
import threading
import time
from collections.abc import Callable, Sized
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE_LENGTH = 2**20  # characters of a template; the longest published one has 15,000
MAX_STEPS = 50_000  # loop iterations and macro calls of one prompt
MAX_CHARACTERS = 2**22  # made on the way to one prompt
MAX_SECONDS = 5.0
MAX_WIDTH = 10_000  # of padding and indentation
MAX_POWER = 64
# a large width in a format string, or one that is computed
LONG_NUMBER = re.compile(r"[0-9]{5,}|\*|\{[^{}]*\{")
COMPILE_FAILURES = (
    jinja2.TemplateError, RecursionError, MemoryError, ValueError, OverflowError, SyntaxError,
)  # fmt: skip


class TemplateBudgetError(jinja2.TemplateError):
    """A template that costs more than any chat template needs."""


class _Budget:
    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.characters = MAX_CHARACTERS
        self.deadline = time.monotonic() + MAX_SECONDS


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of chat templates. ``compile_bounded`` adds the checks to a template."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,  # constants are not computed while compiling, without a budget
        )
        self.local = threading.local()
        self.filters = {name: self._bound_filter(call) for name, call in self.filters.items()}

    def compile_bounded(self, source: str) -> jinja2.Template:
        """Compile a template. Raises one of ``COMPILE_FAILURES``."""
        if len(source) > MAX_SOURCE_LENGTH:
            raise TemplateBudgetError(f"it has {len(source):,} characters")
        return self.from_string(_Metering().visit(self.parse(source)))

    def start(self) -> None:
        """Begin a prompt, with a fresh budget for this thread."""
        self.local.budget = _Budget()

    def tick(self, characters: int) -> str:
        """Pay for a step that may write ``characters`` of the template's own text."""
        budget = self._budget()
        budget.steps -= 1
        budget.characters -= characters
        self._check(budget)
        return ""

    def bounded(self, value: Any) -> Any:
        """Pay for a value's length, and return it."""
        budget = self._budget()
        budget.characters -= _length(value)
        self._check(budget)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [_length(value) for value in (left, right)]
        if operator == "*" and any(sizes):
            count = left if isinstance(left, int) else right
            self._refuse(isinstance(count, int) and max(sizes) * count > MAX_CHARACTERS)
        elif operator == "%" and isinstance(left, str):
            self._refuse(bool(LONG_NUMBER.search(left)))
        elif operator == "**":
            self._refuse(not all(_is_small_number(value) for value in (left, right)))
        elif operator == "*":
            self._refuse(any(isinstance(v, int) and v.bit_length() > 2**12 for v in (left, right)))
        return self.bounded(super().call_binop(context, operator, left, right))

    def call(self, *given: Any, **named: Any) -> Any:
        # given: the environment's context, the callable, and its own arguments
        owner, name = getattr(given[1], "__self__", None), getattr(given[1], "__name__", "")
        if isinstance(owner, str):
            self._check_text_call(name, owner, (*given[2:], *named.values()))
        result = super().call(*given, **named)
        return self.bounded(result) if isinstance(owner, str) else result

    def format_string(self, s: str, args: Any, kwargs: Any, *rest: Any, **named: Any) -> str:
        """Check what Jinja wraps so that its call is not seen: ``str.format``."""
        self._check_text_call("format", s, (*args, *kwargs.values()))
        older: Any = super()  # newer releases of Jinja have no such method, and never call it
        return str(self.bounded(older.format_string(s, args, kwargs, *rest, **named)))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Do the same in newer releases of Jinja, which wrap the method itself."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        owner, call = value.__self__, wrapped

        def checked(*given: Any, **named: Any) -> str:
            self._check_text_call("format", owner, (*given, *named.values()))
            return str(self.bounded(call(*given, **named)))

        return checked

    def _check_text_call(self, name: str, owner: str, arguments: tuple[Any, ...]) -> None:
        """Refuse a method of a string, or a filter, whose result would be huge."""
        numbers = [value for value in arguments if isinstance(value, int)]
        self._refuse(any(abs(number) > MAX_WIDTH for number in numbers))
        if name in ("format", "format_map"):
            self._refuse(bool(LONG_NUMBER.search(owner)))
        if name in ("replace", "join", "expandtabs", "indent", "translate"):
            longest = max(map(_length, arguments), default=0)
            tabs = max(map(abs, numbers), default=1)
            self._refuse((len(owner) + 1) * max(longest, tabs, 1) > MAX_CHARACTERS)

    def _bound_filter(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)  # keeps the mark that asks for the environment as first argument
        def bounded(*given: Any, **named: Any) -> Any:
            own = [value for value in given if not _is_jinja(value)]
            owner, *rest = own or [""]
            self.bounded(owner)
            name = call.__name__.removeprefix("do_").removeprefix("sync_do_")
            as_text = owner if isinstance(owner, str) else "." * _length(owner)
            self._check_text_call(name, as_text, (*rest, *named.values()))
            return self.bounded(call(*given, **named))

        return bounded

    def _budget(self) -> _Budget:
        if not hasattr(self.local, "budget"):
            self.start()
        budget: _Budget = self.local.budget
        return budget

    def _check(self, budget: _Budget) -> None:
        too_much = budget.steps < 0 or budget.characters < 0
        self._refuse(too_much or time.monotonic() > budget.deadline)

    def _refuse(self, too_much: bool) -> None:
        if too_much:
            raise TemplateBudgetError("it takes more steps or memory than a chat template needs")


class _Metering(NodeTransformer):
    """Insert the calls that pay for loops, macros, concatenations and output."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._metered(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._metered(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._metered(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded", node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else _call("bounded", part)
            for part in node.nodes
        ]
        return node

    def _metered(self, node: Any) -> nodes.Node:
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", nodes.Const(literal))))
        return nodes.Node.set_lineno(node, node.lineno)


def _call(name: str, argument: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), [argument], [], None, None)


def _length(value: object) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _is_small_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= MAX_POWER


def _is_jinja(value: object) -> bool:
    """Return whether an argument is one that Jinja adds: its environment or a context."""
    return type(value).__module__.startswith("jinja2") or isinstance(value, jinja2.Environment)
