"""Chat templates, which are foreign code: compiled and rendered in a sandbox where all of them end.

Work and text are counted, not timed, so what is refused depends on the template and the chat alone.
"""

import datetime
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from functools import partial, update_wrapper
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes
from jinja2.sandbox import MAX_RANGE

from lacuna.config import UserError

RENDER_BUDGET, STEP_COST = 2**27, 256  # characters that a render may make, and what each of its steps counts as
FORMATTING = ("%", "format", "format_map", "strftime")
WIDENING = "* center ljust rjust zfill expandtabs to_bytes indent tojson round batch slice".split()
SQUARING = ("wordwrap", "urlize", "translate", "sum")
PRICED = {"**", "replace", "join", "urlencode", "escape", "e", "forceescape", *FORMATTING, *WIDENING, *SQUARING}


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: prints its body between two variables that are empty unless given."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        edges = [nodes.Output([nodes.Name(f"generation_{edge}", "load")]) for edge in ("start", "end")]
        return nodes.Scope([edges[0], *body, edges[1]]).set_lineno(line)


budget: ContextVar[int] = ContextVar("budget")  # what is left of the budget of this render


def spend(cost: int) -> None:
    """Take a cost from the budget; raises UserError if it does not cover it."""
    if (left := budget.get() - cost) < 0:
        raise UserError("the chat template loops or writes without end, or far more than any chat needs; fix it")
    budget.set(left)


def text_size(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters of a value's text, or somewhat more; a list that is held many times is walked once."""
    if isinstance(value, str | bytes | range):
        return len(value)
    if not isinstance(value, dict | list | tuple):
        return value.bit_length() if isinstance(value, int) else STEP_COST
    known = {} if known is None else known
    if id(value) not in known:
        inner = chain(value.keys(), value.values()) if isinstance(value, dict) else value
        known[id(value)] = 2 + sum(4 + text_size(each, known) for each in inner)
    return known[id(value)]


def cost_of(name: str, values: Sequence[Any]) -> int:
    """The most characters that an operator, a filter or a method of the first value makes of these values."""
    numbers, size = [abs(value) for value in values if isinstance(value, int)], text_size(values)
    if name == "replace" and len(values) > 2:
        return size + str(values[0]).count(str(values[1])) * text_size(values[2])
    if name == "join":  # an iterator does not say how long it is
        return size + math.prod(len(each) if hasattr(each, "__len__") else MAX_RANGE for each in values[:2])
    if name == "**" and len(numbers) == 2:
        return size * numbers[1]
    if name in FORMATTING and values and isinstance(text := values[0], str):
        if re.search(r"%[^a-zA-Z%]*\*|:[^}\s]*\{", text):
            return RENDER_BUDGET + 1  # a width that is a value
        return (size + sum(map(int, re.findall(r"\d+", text)))) * (1 + text.count("%") + text.count("{"))
    if name in SQUARING or (name == "*" and len(numbers) == 2):
        return size**2
    return size * (1 + sum(numbers)) if name in WIDENING else size


def paid(value: Any) -> Any:
    """The value, once its text is paid for."""
    spend(STEP_COST + text_size(value))
    return value


def priced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or operator that costs what it may make, before it does."""
    first = int(hasattr(function, "jinja_pass_arg"))  # after its context

    def call(*values: Any, **named: Any) -> Any:
        spend(cost_of(name, [*values[first:], *named.values()]))
        return function(*values, **named)

    return update_wrapper(call, function) if name in PRICED else function


class Namespace(jinja2.utils.Namespace):
    """A template's variables, whose text does not hold theirs, which may hold others, or it."""

    def __repr__(self) -> str:
        return "<Namespace>"


def is_kept_already(node: Any) -> bool:
    """Whether an expression makes nothing new, but names a part of what is there."""
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        return not isinstance(getattr(node, "arg", None), nodes.Slice) and is_kept_already(node.node)
    return isinstance(node, nodes.Name | nodes.Const)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox for templates, which are foreign code: they end, and can't fill the memory.

    What a template keeps for its next step is paid from a budget by its size, and so is each turn of a loop, each call,
    and all that it writes. An expression without these grows with the template's source alone, but for the operations
    in `PRICED`, which are paid before they begin.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self) -> None:
        extensions = [GenerationTag, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.finalized)
        self.globals = {**self.globals, "namespace": Namespace, "lipsum": None}
        # Jinja's own filter would write `<` and `'` as HTML entities.
        self.filters |= {"tojson": partial(json.dumps, ensure_ascii=False), "paid": paid}
        self.filters = {name: priced(name, function) for name, function in self.filters.items()}
        self.binop_table = {name: priced(name, function) for name, function in self.binop_table.items()}

    def bounded(self, source: str) -> nodes.Template:
        """The parsed template, made to pay."""

        def pay(node: Any) -> Any:
            return node if is_kept_already(node) else nodes.Filter(node, "paid", [], [], None, None)

        tree = self.parse(source)
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        for node in list(tree.find_all(nodes.Node)):
            match node:
                case nodes.For():
                    node.iter, node.test = pay(node.iter), node.test and nodes.And(step, node.test)
                    node.body.insert(0, nodes.ExprStmt(step))
                case nodes.Concat():
                    node.nodes = [nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None)]
                case nodes.Assign() | nodes.Keyword():
                    setattr(node, node.fields[-1], pay(getattr(node, node.fields[-1])))
                case nodes.With():
                    node.values = [pay(each) for each in node.values]
                case nodes.Call():
                    node.args = [pay(each) for each in node.args]
                    node.dyn_args, node.dyn_kwargs = (each and pay(each) for each in (node.dyn_args, node.dyn_kwargs))
                case nodes.Macro() | nodes.CallBlock():
                    node.defaults = [pay(each) for each in node.defaults]
        return tree

    def step(self) -> bool:
        """What each turn of a loop calls, to be counted."""
        return True

    def call(self, context: Any, function: Any, /, *values: Any, **named: Any) -> Any:
        spend(STEP_COST)
        if (name := getattr(function, "__name__", "")) in PRICED:
            owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
            owners = [owner] if isinstance(owner, str | bytes | int) else []
            spend(cost_of(name, [*owners, *values, *named.values()]))
        return super().call(context, function, *values, **named)

    def finalized(self, value: Any) -> Any:
        """What is written, paid for if it has yet to become text."""
        spend(0 if isinstance(value, str) else text_size(value))
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        return "".join(map(paid, pieces))


def compile_template(source: str, origin: Path, template_date: str) -> jinja2.Template:
    """A sandboxed template with the filters and functions that chat templates expect, as transformers gives them."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment, today = BoundedEnvironment(), datetime.datetime.fromisoformat(template_date)
    budget.set(RENDER_BUDGET)
    try:
        tree = environment.bounded(source)
        return environment.from_string(tree, {"raise_exception": raise_exception, "strftime_now": today.strftime})
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
