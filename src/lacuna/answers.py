"""Final answers: found in what a model or a data set wrote, read as exact numbers, and compared.

Every search is linear in the text and sees no more than its last characters, so no output takes long.
"""

import re
from fractions import Fraction

SEEN = 20_000  # characters at the end of a text in which its answer is looked for
MOST_DIGITS = 60
SIGN = r"####|\\boxed\s{0,4}\{|\\fbox\s{0,4}\{|<answer>"
FORMAL_MARK = re.compile(SIGN, re.IGNORECASE)
MARK = re.compile(rf"{SIGN}|\b(?:final\s{{1,4}})?answer\s{{0,4}}(?:is|:|=)", re.IGNORECASE)
ANSWER_END = re.compile(r"</answer>|<\|", re.IGNORECASE)
NUMBER = re.compile(
    r"""(?<![\w.])(?P<sign>[-−–+]?)[ ]?(?:[$€£¥]|\\\$)?[ ]?(?P<minus>[-−–]?)
    (?:\\[dt]?frac\{(?P<top>[-−–]?\d{1,60}(?:\.\d{1,60})?)\}\{(?P<bottom>[-−–]?\d{1,60}(?:\.\d{1,60})?)\}
    |(?P<whole>\d{1,3}(?:,\d{3}){1,19}(?!\d)|\d{1,3}(?:[ _\u202f\u00a0]\d{3}){1,19}(?![\d,])|\d{1,60}(?!\d)|(?=\.\d))
     (?P<part>\.\d{1,60}(?!\d))?(?P<power>[eE][-+]?\d{1,2}(?!\w))?
     (?:(?P<mixed>[ ]\d{1,20})?[ ]?/[ ]?(?P<under>\d{1,60}))?)
    (?!\d|[eE][-+]?\d)""",
    re.VERBOSE,
)
SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3})")
SHORT_FRACTION = re.compile(r"(\\[dt]?frac)(\d)(\d)")
NOT_CONTENT = re.compile(r"\\(?:text|mathrm|left|right|,|;|!)|[{}$\\*]")


def final_answer(text: str) -> str | None:
    """What follows the last of the marks `####`, `\\boxed{}`, `<answer>` and "answer is", else the last number."""
    if found := marked_answer(text, MARK):
        return found
    numbers = [match[0].strip() for match in NUMBER.finditer(plain_numbers(text[-SEEN:]))]
    return numbers[-1] if numbers else None


def marked_answer(text: str, mark: re.Pattern[str]) -> str | None:
    """What follows the last of the marks behind which there is anything."""
    text = text[-SEEN:]
    for match in reversed(list(mark.finditer(text))):
        behind = text[match.end() :]
        found = inside_braces(behind) if match[0].endswith("{") else ANSWER_END.split(behind, 1)[0]
        if not match[0].startswith(("<", "\\")):
            found = found.strip().split("\n", 1)[0]
        if found := found.strip(" :*\n\t").rstrip(". "):
            return found
    return None


def inside_braces(text: str) -> str:
    """The text up to the brace that closes one opened before it, all of it where none does."""
    depth = 1
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if not depth:
            return text[: match.start()]
    return text


def number_of(answer: str) -> Fraction | None:
    """The number an answer states: behind its last equals sign the first one, units, currency and separators aside."""
    match = NUMBER.search(plain_numbers(answer[-SEEN:].rpartition("=")[2]))
    if match is None:
        return None
    sign = -1 if (match["sign"] or match["minus"]) in ("-", "−", "–") else 1
    if match["top"]:
        top, bottom = (Fraction(re.sub("[−–]", "-", match[part])) for part in ("top", "bottom"))
        return sign * top / bottom if bottom else None
    value = Fraction(re.sub(r"\D", "", match["whole"]) or 0) + Fraction("0" + (match["part"] or ".0"))
    if match["power"]:
        value *= Fraction(10) ** int(match["power"][1:])
    if match["under"]:
        if not int(match["under"]):
            return None
        under = int(match["under"])
        value = value + Fraction(int(match["mixed"]), under) if match["mixed"] else value / under
    return sign * value


def plain_numbers(text: str) -> str:
    """The text with TeX's thousands separators as commas and its fractions with braces."""
    return SHORT_FRACTION.sub(r"\1{\2}{\3}", SEPARATOR.sub(",", text))


def is_same_answer(answer: str | None, expected: str) -> bool:
    """Whether two answers state the same number or, where one of them states none, the same words."""
    if answer is None:
        return False
    wanted, given = number_of(expected), number_of(answer)
    if wanted is not None and given is not None:
        return wanted == given
    return plain_words(answer) == plain_words(expected)


def plain_words(answer: str) -> str:
    """An answer without markup, punctuation at its ends, and case."""
    return " ".join(NOT_CONTENT.sub(" ", answer[-SEEN:]).split()).strip(" .,:;!?\"'()[]").casefold()
