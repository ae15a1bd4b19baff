"""Final answers: where a text states its answer, and whether two answers say the same.

An answer is read as mathematics where it is a number, alone or with a unit, a currency or a word, or an expression,
tuple, interval, set, matrix or equation of them, and compared exactly, as a sum of products of powers. Arithmetic that
was left undone is no answer, and neither is a hedge. All else is compared as text. Both take bounded time.
"""

import hashlib
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import isqrt
from typing import Any

SEARCHED = 20_000  # characters at the end of a text, in which its answer is looked for
LONGEST = 400  # characters of an answer that is read as mathematics
MOST_TERMS, MOST_STEPS, DEEPEST, MOST_BITS = 40, 4000, 30, 4096
SIGN = r"####|\\boxed\s{0,4}\{|\\fbox\s{0,4}\{|<answer>"
FORMAL_MARK = re.compile(SIGN, re.IGNORECASE)
MARK = re.compile(rf"{SIGN}|\b(?:final\s{{1,4}})?answer\s{{0,4}}(?:is|:|=)", re.IGNORECASE)
ANSWER_END = re.compile(r"</answer>|<\|", re.IGNORECASE)
GROUPED = r"\d{1,3}(?:(?:,|\{,\}|['’ _~\u00a0\u2009\u202f]|\\[,;:! ])\d{3})+(?![\d])"
LAST_NUMBER = re.compile(
    rf"(?<![\w.])[-−–+]?[ ]?(?:[$€£¥]|\\\$)?[ ]?[-−–]?(?:\\[dt]?frac\{{-?\d+\}}\{{-?\d+\}}|(?:{GROUPED}|\d+|(?=\.\d))"
    r"(?:\.\d+)?(?:[eE][-+]?\d{1,2}(?!\w))?(?:(?:[ ]\d+)?[ ]?/[ ]?\d+)?)(?!\d)"
)
ALTERNATIVES = re.compile(r"\d\W{0,9}\bor\b[^\d.]{0,30}\d[\d,.]*\D*$")
HEDGE = re.compile(r"\b(?:or|not|no|maybe|perhaps|possibly|probably|either|neither|between|might|could|but|wait)\b")
REMARK = re.compile(  # in brackets, the next sentence, a clause
    r"\s\((?=[^()]*(?:[a-z]{2}|[*=×]))[^()]*\)\.?$|[.!?]\s+[A-Z].*$|,?\s(?:which|so|as|because|since)\s.*$|,\s(?:the|an?)\s.*$"
)
LETTERED = re.compile(r"\(?([A-J])[).:]\s")  # a choice, and what it is

# What is the same in all answers, in the order in which it is replaced
SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|boxed|fbox)(?![a-zA-Z])", ""),
        (r"\\(?:text|mbox|mathrm|textbf|mathbf|mathit|textit|operatorname\*?)\s{0,4}\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\\?[$%]|[€£¥]|\*\*|(?<!\\)\\[()\[\]]", ""),
        (r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s?(\d)\s?\{", r"\\frac{\1}{"),
        (r"\^?\\circ(?![a-z])|\^\{\\circ\}|°|\\degree(?![a-z])", ""),
        (r"\\[{]", "⟨"), (r"\\[}]", "⟩"), (r"[−–]", "-"), (r"\\(?:cdot|times|ast)(?![a-z])|[×·⋅]", "*"),
        (r"\\div(?![a-z])|÷", "/"), (r"π", r"\\pi "), (r"√", r"\\sqrt "), (r"∞", r"\\infty "), (r"∪", r"\\cup "),
        (r"(?<=\d)½", r"\\frac{1}{2}"), ("½", "(1/2)"), ("¼", "(1/4)"), ("¾", "(3/4)"), ("²", "^2"), ("³", "^3"),
        (r"±", r"\\pm "), (r"\\q?quad(?![a-z])|(?<!\\)\\[,;:! ]|[~\u00a0\u2009\u202f]", " "),
        (r"\b(?:minus|negative)\s+(?=\d)", "-"), (r"^\s*[a-zA-Z]\s*(?:\\in(?![a-z])|∈)", ""),
    )
]  # fmt: skip
TOKEN = re.compile(r"\\[a-zA-Z]+|\d+(?:\.\d+)?|\.\d+|[a-zA-Z]|\S")
UNIT = re.compile(  # words beside a number, the short ones by name, as xy may be a product
    r"(?<![\\a-zA-Z])(?:[^\W\d_]{4,}|(?<!\d)[^\W\d_]{3}|[kcm]m|[km]g|m[lL]|lbs?|oz|ft|in|hrs?|of|is|at)(?![a-zA-Z])\.?"
    r"(?:\s{0,2}\^\{?\d\}?)?(?:/[a-zA-Z]{1,9}(?:\^\{?\d\}?)?)?|/\s?[^\W\d_]{3,}"
)
LETTER_UNIT = re.compile(r"(?<=\d)\s[a-zA-Z](?:\^\{?\d\}?)?$")
FUNCTIONS = ("ln", "log", "exp", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan")
SIGNS = ("\\pm", "\\mp")
FUNCTION = re.compile(rf"(?<![\\a-zA-Z])({'|'.join((*FUNCTIONS, 'sqrt', 'pi'))})(?![a-zA-Z])")
REPEATING = re.compile(r"(\d{0,30})\.(\d{0,30})\\overline\s?\{(\d{1,30})\}")
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,2})(?!\w)")
CONSTANTS = {"pi", "infty", "alpha", "beta", "gamma", "theta", "phi", "lambda", "mu", "omega", "sigma"}
BRACKETS = {"(": ")", "[": "]", "⟨": "⟩", "{": "}"}

Value = tuple[Any, ...]

Atom = tuple[str, Fraction]  # a symbol or what is opaque, and its exponent
Terms = dict[tuple[Atom, ...], Fraction]  # a sum of products of atoms, each with its factor


def final_answer(text: str) -> str | None:
    """What follows the last of the marks `####`, `\\boxed{}`, `<answer>` and "answer is", else the last number, unless
    it is one of several that "or" joins."""
    if found := marked_answer(text, MARK):
        return found
    text = text[-SEARCHED:]
    numbers = [match[0].strip() for match in LAST_NUMBER.finditer(text)]
    return numbers[-1] if numbers and not ALTERNATIVES.search(text[-LONGEST:]) else None


def marked_answer(text: str, mark: re.Pattern[str]) -> str | None:
    """What follows the last of the marks that anything follows."""
    text = text[-SEARCHED:]
    for match in reversed(list(mark.finditer(text))):
        rest = text[match.end() :]
        found = inside_braces(rest)[0] if match[0].endswith("{") else ANSWER_END.split(rest, 1)[0]
        if not match[0].startswith(("<", "\\")):
            found = found.strip().split("\n", 1)[0]
        if found := found.strip(" :*\n\t").rstrip(". "):
            return found
    return None


def inside_braces(text: str) -> tuple[str, bool]:
    """The text up to the brace that closes the one opened before it, or all of it where none does, and whether one
    does."""
    depth = 1
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return text[: match.start()], True
    return text, False


def expected_answers(reference: str | Sequence[str]) -> list[str]:
    """The final answers that a reference accepts; one without a mark is taken whole."""
    given = [reference] if isinstance(reference, str) else reference
    return [marked_answer(each, MARK) or each for each in given]


def is_right(completion: str, reference: str | Sequence[str]) -> bool:
    """Whether a completion's final answer is one that the reference accepts, or all of it is."""
    found = [final_answer(completion)]
    found += [completion] if marked_answer(completion, MARK) is None and len(completion) <= LONGEST else []
    return any(is_same_answer(each, expected) for each in found for expected in expected_answers(reference))


def is_same_answer(answer: str | None, expected: str) -> bool:
    """Whether two answers have the same value or, if one of them has none, the same text; of what is said, a remark
    after the answer does not count."""
    if answer is None:
        return False
    answer, expected = answer[-SEARCHED:], expected[-SEARCHED:]
    head = REMARK.sub("", answer) if len(answer) <= LONGEST else answer
    stated = [answer] if HEDGE.search(answer[len(head) :].casefold()) else list(dict.fromkeys((answer, head)))
    return any(is_same_value(each, expected) for each in stated)


def is_same_value(answer: str, expected: str) -> bool:
    one, other = meaning(answer), meaning(expected)
    if (choice := LETTERED.match(spelled(answer))) and choice[1] == expected.strip("() ."):
        return True
    if one is None or other is None:
        words = plain_words(expected)
        return bool(words) and plain_words(answer) == words
    if "equation" in (one[0], other[0]) and one[0] != other[0]:  # x = 5 and 5
        one, other = (each[2] if each[0] == "equation" else each for each in (one, other))
    return one == other


def number_of(answer: str) -> Fraction | None:
    """The number that an answer states, if it states one and nothing else but a unit, a currency or a word."""
    value = meaning(answer)
    while value is not None and value[0] == "equation":
        value = value[2]
    if value is None or value[0] != "sum" or any(product for product, _ in value[1]):
        return None
    return value[1][0][1] if value[1] else Fraction(0)


def plain_words(answer: str) -> str:
    """An answer in lower case, without markup, spaces that say nothing, and punctuation at its ends."""
    plain = " ".join(re.sub(r"\{(\w)\}", r"\1", spelled(answer)).casefold().split())
    plain = re.sub(r"\s?([^\w\s])\s?", r"\1", plain).strip(" .,:;?\"'*")
    return re.sub(r"^\(([a-z])\)$", r"\1", re.sub(r"^(?:the|an?) (?=\w\w)", "", plain))


def spelled(answer: str) -> str:
    """An answer with one spelling for what has several."""
    for pattern, spelling in SPELLINGS:
        answer = pattern.sub(spelling, answer)
    return answer.strip()


# Values


class Unreadable(ValueError):
    """It is no mathematics that is understood, or too much of it."""


@lru_cache(4096)
def meaning(answer: str) -> Value | None:
    """The value of an answer in a form that is equal where values are; None if it has none that is understood."""
    if len(answer) > LONGEST or "\n\n" in answer.strip():
        return None
    plain = REPEATING.sub(repeating, FUNCTION.sub(r"\\\1 ", spelled(answer))).strip().rstrip(".,;: ")
    if not re.search(r"[(\[⟨]", plain):  # where a comma parts numbers
        plain = re.sub(rf"(?<![\d.,]){GROUPED}", lambda match: re.sub(r"\D", "", match[0]), plain)
    plain = SCIENTIFIC.sub(r"\1*10^{\2}", re.sub(r"(?<![\d.,])0,(?=\d+$)", "0.", plain))
    try:
        return structure(plain, 0)
    except (Unreadable, ZeroDivisionError):
        return None


def repeating(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, start, cycle = match.groups()
    below = 10 ** len(start) * (10 ** len(cycle) - 1)
    return f"({int(whole + start + cycle) - int(whole + start or 0)}/{below})"


def structure(text: str, depth: int) -> Value:
    """The value of a list, tuple, interval, set, union, matrix, equation, ratio or expression."""
    text = text.strip()
    if depth > DEEPEST:
        raise Unreadable
    parts = [part for each in re.split(r"\s(?:and|or)\s", text) for part in split_apart(each.strip(" ,"), ",", ";")]
    if len(parts) > 1:
        items = [structure(part, depth + 1) for part in parts]
        if len({item[1] for item in items if item[0] == "equation"}) == 1:  # x = 1 or x = 2
            items = [item[2] if item[0] == "equation" else item for item in items]
        return "list", tuple(sorted(items, key=repr))
    if HEDGE.search(text.casefold()):
        raise Unreadable
    if len(parts := split_apart(text, "=")) > 1:
        value = structure(parts[-1], depth + 1)
        if not re.search("[a-zA-Z]", "".join(parts[:-1])):  # 8 * 9 = 72
            return value
        if len(parts) > 2 or re.search(r"[-+*/^\d]", re.sub(r"_\{?\w\}?", "", parts[0])):
            return "relation", tuple(structure(part, depth + 1) for part in parts)
        return "equation", "".join(parts[0].split()), value
    if text[:1] in BRACKETS and closing(text) == len(text) - 1:
        items = split_apart(text[1:-1], ",")
        if len(items) > 1:
            found = [structure(item, depth + 1) for item in items]
            is_set = text[0] == "⟨"
            return ("list", tuple(sorted(found, key=repr))) if is_set else (text[0] + text[-1], *found)
        if text[0] in "⟨[":
            return structure(text[1:-1], depth + 1)
    alone = UNIT.sub(" ", text) if len(re.findall("[a-zA-Z]+", text)) > 1 else LETTER_UNIT.sub("", UNIT.sub(" ", text))
    terms = Expression(alone).whole()
    if alone != text and any(terms):
        raise Unreadable  # words are not beside a number
    return "sum", tuple(sorted(terms.items(), key=repr))


def closing(text: str) -> int:
    """Where the bracket that begins a text is closed, by whatever kind, as intervals are; -1 if it is not."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{⟨") - (character in ")]}⟩")
        if not depth:
            return place
    return -1


def split_apart(text: str, *signs: str) -> list[str]:
    """The parts of a text between signs that are in no bracket."""
    parts, depth, start = list[str](), 0, 0
    for match in re.finditer(rf"[()\[\]{{}}⟨⟩]|{'|'.join(map(re.escape, signs))}", text):
        if match[0] in signs:
            if not depth:
                parts.append(text[start : match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in "([{⟨" else -1
    return [*parts, text[start:]]


class Expression:
    """An expression, read from left to right as a sum of products of powers of symbols, square roots and whatever is
    opaque."""

    def __init__(self, text: str) -> None:
        self.tokens, self.place, self.steps, self.depth = TOKEN.findall(text), 0, 0, 0

    def whole(self) -> Terms:
        terms = self.sum()
        if self.place < len(self.tokens):
            raise Unreadable
        return terms

    def next(self, *wanted: str) -> str:
        """The next token if it is one of these, which is then read; else nothing."""
        token = self.tokens[self.place] if self.place < len(self.tokens) else ""
        if token not in wanted:
            return ""
        self.place += 1
        return token

    def need(self, wanted: str) -> None:
        if not self.next(wanted):
            raise Unreadable

    def sum(self) -> Terms:
        total, number_count = Terms(), 0
        sign = self.next("+", "-", *SIGNS) or "+"
        while sign:
            terms = self.product()
            number_count += not any(terms)
            if sign in SIGNS:
                terms = self.times(terms, symbol(sign))
            for key, factor in terms.items():
                total[key] = total.get(key, Fraction(0)) + (-factor if sign == "-" else factor)
            sign = self.next("+", "-", *SIGNS)
        if number_count > 1:  # 18 + 2
            raise Unreadable
        return {key: factor for key, factor in total.items() if factor}

    def product(self) -> Terms:
        terms, is_divided = self.factor(), False
        while (sign := self.next("*", "/")) or self.begins_factor():
            start = self.place
            other = self.factor()
            is_power_of_ten = self.tokens[start : start + 2] == ["10", "^"]
            if sign == "/":
                other = self.power(other, Fraction(-1))
            if not any(terms) and not any(other) and not (is_power_of_ten or (sign == "/" and not is_divided)):
                raise Unreadable  # 8 * 9
            is_divided |= sign == "/"
            terms = self.times(terms, other)
        return terms

    def begins_factor(self) -> bool:
        """Whether what follows is multiplied without a sign."""
        token = self.tokens[self.place] if self.place < len(self.tokens) else ""
        return token[:1] in ("(", "{", "\\") and token not in SIGNS or token.isalpha()

    def factor(self) -> Terms:
        sign = 1
        while self.next("-"):
            sign = -sign
        terms, place = self.base(), self.place
        if self.next("_"):
            self.group()
            name = "".join(token for token in self.tokens[place - 1 : self.place] if token not in "{}")
            terms = symbol(name)
        if self.next("^"):
            exponent = self.group()
            terms = opaque("^", terms, exponent) if any(exponent) else self.power(terms, exponent.get((), Fraction(0)))
        return self.times(terms, number(sign))

    def group(self) -> Terms:
        """What is in braces, or the next thing alone."""
        if self.next("{"):
            terms = self.sum()
            self.need("}")
            return terms
        return self.times(self.base(), number(-1)) if self.next("-") else self.base()

    def base(self) -> Terms:
        """What may have an exponent: a number, a symbol, a fraction, a root, a function, or what is in brackets."""
        self.depth += 1
        if self.depth > DEEPEST or self.place >= len(self.tokens):
            raise Unreadable
        token = self.tokens[self.place]
        self.place += 1
        if token[-1:].isdigit():
            terms = self.number(token)
        elif token in ("(", "{"):
            terms = self.sum()
            self.need(BRACKETS[token])
        elif token == "\\frac":
            top = self.group()
            terms = self.times(top, self.power(self.group(), Fraction(-1)))
        elif token == "\\sqrt":
            terms = self.root(self.group())
        elif token[1:] in FUNCTIONS:
            terms = self.function(token)
        elif (token.isalpha() and token.isascii()) or token[1:] in CONSTANTS:
            terms = symbol(token)
        else:
            raise Unreadable
        self.depth -= 1
        return terms

    def function(self, name: str) -> Terms:
        """A function of what is in brackets after it, or of a product of symbols."""
        base = self.group() if self.next("_") else {}
        exponent = self.group() if self.next("^") else number(1)
        argument = self.factor()
        while self.place < len(self.tokens) and self.tokens[self.place].isalpha():
            argument = self.times(argument, self.factor())
        return opaque(name, base, exponent, argument)

    def number(self, token: str) -> Terms:
        """A number, which a fraction after it makes a mixed one."""
        value, rest = Fraction(token), self.tokens[self.place : self.place + 3]
        if token.isdigit() and rest[:1] == ["\\frac"]:
            fraction = self.base()
            if any(fraction):
                return self.times(number(value), fraction)
            return number(value + fraction.get((), Fraction(0)))
        if token.isdigit() and len(rest) == 3 and rest[0].isdigit() and rest[1] == "/" and rest[2].isdigit():
            self.place += 3
            return number(value + Fraction(int(rest[0]), int(rest[2])))
        return number(value)

    def root(self, terms: Terms) -> Terms:
        """The square root of a number, else of what is opaque."""
        if any(terms):
            return opaque("root", terms)
        value = terms.get((), Fraction(0))
        if value <= 0:
            return {} if not value else self.times(self.root(number(-value)), symbol("i"))
        factor, radicand = square_part(value.numerator * value.denominator)
        return times_root(number(Fraction(factor, value.denominator)), radicand)

    def power(self, terms: Terms, exponent: Fraction) -> Terms:
        """A power: of a number or a product worked out, of a sum if the exponent is small."""
        if exponent == Fraction(1, 2):
            return self.root(terms)
        size = max((abs(part).bit_length() for each in terms.values() for part in each.as_integer_ratio()), default=1)
        if exponent.denominator != 1 or abs(exponent) * size > MOST_BITS or (len(terms) > 1 and abs(exponent) > 8):
            return opaque("^", terms, number(exponent))
        if exponent < 0:
            if len(terms) > 1:
                _, leading = min(terms.items(), key=repr)
                inverse = opaque("1 /", {key: factor / leading for key, factor in terms.items()})
                return self.power(self.times(inverse, number(1 / leading)), -exponent)
            ((key, factor),) = terms.items() or [((), Fraction(0))]
            inverse = {tuple((name, -each) for name, each in key): 1 / factor}
            return self.power(self.times(inverse, number(1)), -exponent)
        result = number(1)
        for _ in range(int(exponent) if any(terms) else 0):
            result = self.times(result, terms)
        return result if any(terms) else number(terms.get((), Fraction(0)) ** int(exponent))

    def times(self, one: Terms, other: Terms) -> Terms:
        self.steps += len(one) * len(other)
        if self.steps > MOST_STEPS or max(len(one), len(other)) > MOST_TERMS:
            raise Unreadable
        total = Terms()
        for (key, factor), (other_key, other_factor) in product(one.items(), other.items()):
            for merged, value in product_of(key, other_key).items():
                total[merged] = total.get(merged, Fraction(0)) + factor * other_factor * value
        return {key: factor for key, factor in total.items() if factor}


def number(value: Fraction | int) -> Terms:
    return {(): Fraction(value)} if value else {}


def symbol(name: str) -> Terms:
    return {((name, Fraction(1)),): Fraction(1)}


def opaque(name: str, *parts: Terms) -> Terms:
    """What is not worked out, as one symbol that is the same for the same parts."""
    listed = repr([sorted(part.items(), key=repr) for part in parts])
    return symbol(f"{name} {hashlib.sha256(listed.encode()).hexdigest()}")


def times_root(terms: Terms, radicand: int) -> Terms:
    """A number times the square root of an integer without square factors."""
    return {((f"√{radicand}", Fraction(1)),): factor for factor in terms.values()} if radicand != 1 else terms


def square_part(value: int) -> tuple[int, int]:
    """An integer as a² · b: a and b, by divisors up to a thousand and the root of the whole."""
    if (root := isqrt(value)) ** 2 == value:
        return root, 1
    factor = 1
    for divisor in range(2, 1000):
        while value % (divisor * divisor) == 0:
            value, factor = value // (divisor * divisor), factor * divisor
    return factor, value


def product_of(one: tuple[Atom, ...], other: tuple[Atom, ...]) -> Terms:
    """The product of two products: exponents added, roots joined, and i² = -1."""
    exponents, radicand, factor = dict[str, Fraction](), 1, Fraction(1)
    for name, exponent in (*one, *other):
        if name.startswith("√"):
            radicand, factor = radicand * int(name[1:]), factor / (int(name[1:]) if exponent < 0 else 1)
        else:
            exponents[name] = exponents.get(name, Fraction(0)) + exponent
    turns = exponents.pop("i", Fraction(0)) % 4
    if turns >= 2:
        factor, turns = -factor, turns - 2
    square, radicand = square_part(radicand)
    atoms = [(name, each) for name, each in exponents.items() if each]
    atoms += [("i", Fraction(1))] * int(turns) + [(f"√{radicand}", Fraction(1))] * (radicand != 1)
    return {tuple(sorted(atoms)): factor * square}
