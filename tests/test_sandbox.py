"""Templates that loop, or write, without end."""

from pathlib import Path

import pytest

from lacuna import sandbox
from lacuna.config import UserError
from lacuna.sandbox import compile_template, rendered

HUGE = "3000000000"
GROWING = "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"
RECURSIVE = "{% macro f(x, n) %}{% if n %}BODY{% endif %}{% endmacro %}{{ f('ab', 60) }}"
ENDLESS = {
    "nested loops": "{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(999) %}{% for b in range(999) if false %}{% endfor %}{% endfor %}",
    "text in loops": "{% for a in range(999) %}{% for b in range(999) %}text{% endfor %}{% endfor %}",
    "calls of calls": "{% macro f(n) %}{% if n and (f(n - 1) or f(n - 1)) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "lists in loops": "{% set x = ['a' * 99] * 9 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "copies that are kept": GROWING.replace("'ab'", "['a' * 99999]").replace("STEP", "[ns.s[0][1:] ~ i, ns.s]"),
    "times": "{{ 'a' * HUGE }}",
    "times a list": "{{ [1] * HUGE }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "squares": GROWING.replace("'ab'", "3").replace("STEP", "ns.s * ns.s"),
    "%": "{{ '%HUGEd' % 1 }}",
    "% with a width that is a value": "{{ '%*d'|format(HUGE, 1) }}",
    "format": "{{ '{:HUGEd}'.format(1) }}",
    "format with a width that is a value": "{{ '{:{}d}'.format(1, HUGE) }}",
    "format of one value many times": "{{ ('{0}' * 20000).format('a' * 20000) }}",
    "center": "{{ 'a'.center(HUGE) }}",
    "center by another name": "{% set f = 'a'['cen' ~ 'ter'] %}{{ f(HUGE) }}",
    "center of many": "{{ range(9999)|map('string')|map('center', 99999)|join }}",
    "filter center": "{{ 'a'|center(HUGE) }}",
    "zfill": "{{ 'a'.zfill(HUGE) }}",
    "expandtabs": "{{ '\t'.expandtabs(HUGE) }}",
    "to_bytes": "{{ (1).to_bytes(HUGE) }}",
    "indent": "{{ 'a\n\na'|indent(HUGE) }}",
    "tojson": "{{ [1]|tojson(indent=HUGE) }}",
    "tojson of nested lists": GROWING.replace("'ab'", "[1] * 999").replace("STEP", "[ns.s]")[:-8]
    + "ns.s|tojson(indent=300) }}",
    "round": "{{ 1.5|round(HUGE, 'ceil') }}",
    "batch": "{{ [1]|batch(HUGE, 'x')|list }}",
    "slice": "{{ [1]|slice(HUGE)|list }}",
    "a date": "{{ strftime_now('%HUGEd') }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "filter replace": "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
    "translate": "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
    "join": "{{ ('a' * 9999).join(range(9999)|map('string')) }}",
    "filter join": "{{ range(9999)|map('string')|join('b' * 9999) }}",
    "wordwrap": "{{ ('a' * 9999)|wordwrap(1, true, 'b' * 9999) }}",
    "sum of lists": "{{ ([[1] * 10] * 9999)|sum(start=[]) }}",
    "doubling by ~": GROWING.replace("STEP", "ns.s ~ ns.s"),
    "doubling by +": GROWING.replace("STEP", "ns.s + ns.s"),
    "doubling by a block": GROWING.replace("set ns.s = STEP", "set ns.s %}{{ ns.s }}{{ ns.s }}{% endset"),
    "doubling a filtered block": GROWING.replace("set ns.s = STEP", "set ns.s | upper %}{{ ns.s }}{{ ns.s }}{% endset"),
    "doubling lists": GROWING.replace("STEP", "[ns.s, ns.s]"),
    "doubling tuples": GROWING.replace("STEP", "(ns.s, ns.s)"),
    "doubling by * in a list": GROWING.replace("STEP", "[ns.s] * 2"),
    "doubling by map": GROWING.replace("STEP", "[none, none]|map('default', ns.s, true)|list"),
    "doubling an item": GROWING.replace("STEP", "([none]|map('default', ns.s ~ ns.s, true)|list)[0]"),
    "doubling in a filtered loop": RECURSIVE.replace(
        "BODY", "{% for y in [none]|map('default', x ~ x, true) %}{{ f(y, n - 1) }}{% endfor %}"
    ),
    "doubling by fromkeys": GROWING.replace("STEP", "dict().fromkeys([1, 2], ns.s)"),
    "lengthening lists": GROWING.replace("'ab'", "[1]").replace("STEP", "ns.s + ns.s"),
    "doubling objects": GROWING.replace("STEP", "dict(a=ns.s, b=ns.s)"),
    "doubling arguments": RECURSIVE.replace("BODY", "{{ f(x ~ x, n - 1) }}"),
    "doubling listed arguments": RECURSIVE.replace("BODY", "{{ f(*[x ~ x, n - 1]) }}"),
    "doubling named arguments": RECURSIVE.replace("BODY", "{{ f(n=n - 1, x=x ~ x) }}"),
    "doubling in a loop": RECURSIVE.replace("BODY", "{% for y in [x ~ x] %}{{ f(y, n - 1) }}{% endfor %}"),
    "doubling in a scope": RECURSIVE.replace("BODY", "{% with y = x ~ x %}{{ f(y, n - 1) }}{% endwith %}"),
}


def text_of(source: str, **values: object) -> str:
    return rendered(compile_template(source, Path("t.jinja"), "2024-07-26"), values)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_would_run_or_write_without_end_is_refused(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "RENDER_BUDGET", 2**21)
    with pytest.raises(UserError, match="loops or writes without end"):
        text_of(source.replace("HUGE", HUGE))


@pytest.mark.parametrize(
    "source",
    ["{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "{{ " + "(" * 9999],
)
def test_a_template_nested_too_deeply_is_refused(source: str) -> None:
    with pytest.raises(UserError, match=r"t\.jinja: .*chat template: .*; fix the template"):
        text_of(source)


def test_variables_that_hold_each_other_are_not_written() -> None:
    step = "{% set ns.s = namespace(a=ns.s, b=ns.s) %}"
    assert text_of("{% set ns = namespace(s=1) %}{% for i in range(99) %}" + step + "{% endfor %}{{ ns|string }}") == (
        "<Namespace>"
    )


def test_what_chats_need_stays_within_the_budget() -> None:
    messages = [{"role": "user", "content": f"message {number} " * 1000} for number in range(1000)]  # 12 MB
    source = """{% set ns = namespace(last='') %}{% for message in messages[0:] %}
    {%- set text = message.content | trim %}
    {%- set ns.last = text.split('</think>')[-1].lstrip('\\n') %}
    {{- '<s>' + message.role ~ ': ' + ns.last.replace('message', 'm') + '</s>' }}{% endfor %}"""
    expected = "".join(f"<s>user: {message['content'].strip().replace('message', 'm')}</s>" for message in messages)
    assert text_of(source, messages=messages) == expected


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("'a' ~ 1 ~ none ~ missing ~ [1, 'b']", "a1None[1, 'b']"),
        ("'%02d/%s' % (3, 'x') + ('-' * 3)", "03/x---"),
        ("'{:>4}|{}'.format(7, 'y')", "   7|y"),
        ("[3, 1, 2]|sort|map('string')|join(', ')", "1, 2, 3"),
        ("{'a': ['<', \"'\"]}|tojson(indent=1)", '{\n "a": [\n  "<",\n  "\'"\n ]\n}'),
        ("(2 ** 10 * 3) // 7 % 5", "3"),
        ("2.5|round(1) * 2", "5.0"),
        ("'x'.center(5) + 'abc'[1:] + ('yes' if 'b' in 'abc' else 'no')", "  x  bcyes"),
    ],
)
def test_expressions_mean_what_they_mean_in_jinja(expression: str, text: str) -> None:
    assert text_of("{{ " + expression + " }}") == text
