"""Chat templates, which are foreign code: compiled and rendered in a sandbox where all of them end.

Work and text are counted, not timed, so what is refused depends on the template and the chat alone.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from functools import lru_cache, partial, wraps
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, parser, visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lacuna.config import UserError

# Characters that a render may make and that one value may have, and what a turn of a loop or a list counts as.
RENDER_BUDGET, VALUE_LIMIT, STEP = 2**27, 2**24, 128
WIDENING = set("* ** // center ljust rjust zfill expandtabs to_bytes indent tojson round batch slice replace".split())
WIDENING |= {"%", "format", "format_map", "join", "translate", "wordwrap", "urlize", "sum", "fromkeys"}
# Nodes that use the values of the expressions in them up at once.
USING = nodes.Output | nodes.If | nodes.Compare | nodes.Test | nodes.Not | nodes.Add | nodes.Sub | nodes.Concat
USING |= nodes.Filter | nodes.CallBlock
budget: ContextVar[int] = ContextVar("budget")  # what is left of it in this render


class GenerationTag(ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: prints its body between two variables that are empty unless given."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        edges = [nodes.Output([nodes.Name(f"generation_{edge}", "load")]) for edge in ("start", "end")]
        return nodes.Scope([edges[0], *body, edges[1]]).set_lineno(line)


class Namespace(jinja2.utils.Namespace):
    """A template's variables, whose text does not hold theirs, which may hold others, or it."""

    def __repr__(self) -> str:
        return "<Namespace>"


def spend(cost: int) -> None:
    """Take a cost from the budget; raises UserError if that does not cover it, or no value should cost as much."""
    if (left := budget.get() - cost) < 0 or cost > VALUE_LIMIT:
        raise UserError("the chat template loops or writes without end, or far more than any chat needs; fix it")
    budget.set(left)


def text_size(value: Any, depth: int = 1) -> int:
    """Characters of a value's text, or somewhat more, with what its depth may indent it."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, dict | list | tuple):
        return value.bit_length() if isinstance(value, int) else 1
    spend(STEP)
    parts = chain(value, value.values()) if isinstance(value, dict) else value
    return sum(32 + depth + (len(part) if type(part) is str else text_size(part, depth + 1)) for part in parts)


def paid(value: Any) -> Any:
    """The value, once its text is paid for."""
    if (size := len(value) if type(value) is str else text_size(value)) > STEP:
        spend(size)
    return value


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else paid(str(value))


def turned(items: Any) -> Any:
    """What a loop runs over, once each turn is paid for."""
    items = items if isinstance(items, Sized) else paid(list(items))
    spend(STEP * (1 + len(items)))
    return items


def most(name: str, first: Any, *rest: Any) -> int:
    """The most characters that an operator, a filter or a method makes of these values."""
    copies, widths = (size := text_size(first)), [abs(value) for value in rest if isinstance(value, int)]
    if name in ("%", "format", "format_map") and isinstance(first, str):
        found = re.findall(r"\d+|%[^a-zA-Z%]*\*|:[^}\s]*\{", first)  # the last two take their width from a value
        copies, widths = len(re.findall("[%{]", first)), [int(each) if each.isdigit() else 2**63 for each in found]
    inserted = text_size(rest) + (size if name == "sum" else 0)  # a sum of lists copies those before for each
    return size + (1 + copies) * (1 + inserted + sum(widths))


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, an operator or a method whose result is bounded before it is made, and then paid for."""
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    owners = [owner] if isinstance(owner, str | bytes | int) else []
    skipped = int(hasattr(function, "jinja_pass_arg"))  # its context

    @wraps(function)
    def call(*values: Any, **named: Any) -> Any:
        values = tuple(list(value) if isinstance(value, Iterator) else value for value in values)
        texts_first = sorted([*owners, *values[skipped:], *named.values()], key=lambda value: isinstance(value, int))
        if most(name, *texts_first) > RENDER_BUDGET:
            spend(RENDER_BUDGET)
        return paid(function(*values, **named))

    return call


class Payments(visitor.NodeTransformer):
    """Makes the loops of a template pay, and its expressions where their value is not used up at once."""

    def generic_visit(self, node: Any, parent: Any = None) -> Any:
        is_passed_on = isinstance(node, nodes.And | nodes.Or | nodes.CondExpr)
        node, is_kept = super().generic_visit(node, parent if is_passed_on else node), not isinstance(parent, USING)
        match node:
            case nodes.For():
                node.iter, node.recursive = nodes.Filter(node.iter, "turned", [], [], None, None), False
            case nodes.Getitem(arg=nodes.Slice()) if is_kept and not isinstance(parent, nodes.For):
                return nodes.Filter(node, "paid", [], [], None, None)
            case (
                nodes.Add() | nodes.Concat() | nodes.Filter() | nodes.Call()
                | nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load")
            ) if is_kept:  # fmt: skip
                return nodes.Filter(node, "paid", [], [], None, None)
        return node


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox for templates, which are foreign code: they end, and can't fill the memory.

    What a template keeps for its next step is paid from a budget by its size, and so is each turn of a loop, each call,
    and all that it writes. Within an expression values grow with its source alone, but for the operations in
    `WIDENING`, which are bounded before they begin.
    """

    intercepted_binops = frozenset(WIDENING) & {"*", "**", "//", "%"}

    def concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        spend(sum(map(len, pieces)))
        return "".join(pieces)

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:
        spend(8 * STEP)
        if (name := getattr(function, "__name__", "")) in WIDENING:
            function = guarded(name, function)
        return super().call(context, function, *values, **named)


def names_read(source: str) -> set[str]:
    """The variables that a template may read, whatever the chat."""
    tree = jinja2.Environment(extensions=[GenerationTag, ext.loopcontrols]).parse(source)
    return meta.find_undeclared_variables(tree) - {"raise_exception", "strftime_now"}


def compile_template(source: str, origin: Path, template_date: str) -> jinja2.Template:
    """A sandboxed template with the filters and functions that chat templates expect, as transformers gives them."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    added: list[Any] = [GenerationTag, ext.loopcontrols]
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=added, finalize=as_text)
    # Jinja's own filter would write `<` and `'` as HTML entities.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    for table in (environment.filters, environment.binop_table):
        table |= {name: guarded(name, function) for name, function in table.items() if name in WIDENING}
    environment.filters |= {"paid": paid, "turned": turned}
    today = lru_cache(8)(guarded("format", datetime.datetime.fromisoformat(template_date).strftime))
    functions = {"raise_exception": raise_exception, "strftime_now": today, "namespace": Namespace, "lipsum": None}
    budget.set(RENDER_BUDGET)
    try:
        return environment.from_string(Payments().visit(environment.parse(source)), functions)
    except Exception as error:  # of Jinja, or of Python if the template is nested too deeply
        line = f"line {error.lineno} of the " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = getattr(error, "message", error)
        raise UserError(f"{origin}: {line}chat template: {reason}; fix the template") from error


def rendered(template: jinja2.Template, values: dict[str, Any]) -> str:
    """What a template writes of these values.

    Raises:
        UserError: it would write or run without end.
        ValueError: it refuses the values, or fails.
    """
    budget.set(RENDER_BUDGET)
    try:
        return template.render(values)
    except UserError:
        raise
    except Exception as error:
        raise ValueError(f"the chat template refuses this chat: {error or type(error).__name__}") from error
