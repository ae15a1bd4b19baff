"""Final answers against every reference answer of GSM8K and a table of awkward ones."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from lacuna.eval import final_answer, is_same_answer, number_of

AWKWARD = [
    ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
    ("#### 1,234", "1234"),
    ("#### -5", "−5"),
    ("#### $1,234,567.50", "1234567.5"),
    ("#### 12 345", "12345"),
    (r"so \boxed{42}", "42"),
    (r"first \boxed{1}, then \boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{\text{12 apples}}", "12"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{1\,234}", "1234"),
    (r"\boxed{12{,}345{,}678}", "12345678"),
    ("that is 1{,}234 in all", "1234"),
    (r"\boxed{\frac12}", "1/2"),
    (r"\boxed{\$18}", "18"),
    ("#### 1/2 cup", "0.5"),
    ("<answer>1,234,567 km</answer>", "1234567"),
    ("#### 1e9999999", None),
    (r"\boxed{-\dfrac{1}{2}}", "-0.5"),
    (r"\boxed{\{1\}} and so on", "1"),
    ("<answer>72</answer>", "72"),
    ("<answer>\n 0.75 \n</answer> trailing 99", "3/4"),
    ("The answer is 18 dollars.", "18"),
    ("the final answer is: **20%**", "20"),
    ("Answer: 3.50", "3.5"),
    ("I think 5, no, 6.", "6"),
    ("The total is $18.", "18"),
    ("It costs 1 1/2 hours", "3/2"),
    ("That makes 1.5e3 in all", "1500"),
    ("2 + 2 = 4, so 4", "4"),
    ("#### .5", "1/2"),
    ("#### +3", "3"),
    ("#### 007", "7"),
    ("#### 10.", "10"),
    ("Between them: 100,000 and 5", "5"),
    ("<answer>(B)</answer>", "B"),
    ("The answer is Paris.", "paris"),
    ("#### 5 #### 6", "6"),
    ("#### ", None),
    ("no number at all", None),
    ("", None),
    ("#### 1/0", None),
]


@pytest.mark.parametrize(
    ("text", "value"), [(r"\frac{-1}{2}", "-1/2"), (r"\frac{1.5}{2}", "3/4"), (r"-\frac{3}{4}", "-3/4")]
)
def test_a_fraction_may_have_a_sign_and_decimals(text: str, value: str) -> None:
    assert number_of(final_answer(rf"so \boxed{{{text}}}") or "") == Fraction(value)


@pytest.mark.parametrize(("text", "expected"), AWKWARD, ids=[text[:30] for text, _ in AWKWARD])
def test_an_awkward_answer_is_found_and_compared(text: str, expected: str | None) -> None:
    found = final_answer(text)
    if expected is None:
        assert found is None or number_of(found) is None
    else:
        assert is_same_answer(found, expected)
        assert not is_same_answer(found, expected + "1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [("12", "13"), ("-7", "7"), ("1.2", "12"), ("1,23", "123"), ("3/4", "0.7"), ("0.3333", "1/3"), ("Paris", "Rome")],
)
def test_other_answers_differ(given: str, expected: str) -> None:
    assert not is_same_answer(given, expected)


@pytest.mark.reference
def test_every_reference_answer_of_gsm8k_is_read(shelf: Path) -> None:
    files = [(shelf / "gsm8k" / name).read_text() for name in ("train.jsonl", "test.jsonl")]
    rows = [json.loads(line) for text in files for line in text.splitlines()]
    assert len(rows) == 8792
    for row in rows:
        stated = row["answer"].rpartition("####")[2].strip()
        number = Fraction(stated.replace(",", ""))
        found = final_answer(row["answer"])
        assert found is not None and number_of(found) == number, row["answer"]
        assert is_same_answer(rf"\boxed{{{stated}}}", stated)
        assert is_same_answer(final_answer(f"Therefore they end with ${stated} in all."), stated)
        assert not is_same_answer(found, str(number + 1))


@pytest.mark.parametrize(
    "part", ["1", "1,", "{", "#### ", "\\boxed{", "<answer>", " ", "1 ", "answer ", "-", "answer is"]
)
def test_an_absurdly_long_output_is_read_at_once(part: str) -> None:
    assert not is_same_answer(final_answer(part * 10**6), "5")  # a search that is not linear would not come back
