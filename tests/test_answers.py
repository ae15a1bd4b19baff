"""Final answers against every reference answer of GSM8K, judged pairs, and tables of awkward ones."""

import importlib.util
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacuna.answers import final_answer, is_right, is_same_answer, meaning, number_of
from lacuna.apps.rewards import has_one_answer

SCRIPTS = Path(__file__).parents[1] / "scripts"
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
    "part",
    [
        "1",
        "1,",
        "{",
        "#### ",
        "\\boxed{",
        "<answer>",
        " ",
        "1 ",
        "answer ",
        "-",
        "answer is",
        "\\text{",
        "or 1 ",
        "1/",
        ". A",
    ],
)
def test_an_absurdly_long_output_is_read_at_once(part: str) -> None:
    assert not is_same_answer(final_answer(part * 10**6), "5")  # a search that is not linear would not come back


SAME = [
    ("12:30", "The answer is 12:30."), ("(3, 4)", r"\boxed{\left(3,\,4\right)}"),
    ("2024-05-17", "answer: 2024-05-17."), ("May 17, 2024", "The answer is May 17, 2024."),
    ("18", "#### 18 dollars per week"), ("18", "#### 18 km/h"), ("18", "The answer is 18 because 3*6 = 18."),
    ("18", "The answer is 18, which is 3*6."), ("18", "#### $18/day"), ("18", "The answer is 18 (9 * 2)."),
    ("18", "The answer is 18. She sells 16 eggs."), ("18", "the answer is\n18"),
    ("18", "So she makes 9 * 2 = $18 a day."), ("18", r"\boxed{18\text{ dollars}}"), ("18", r"\boxed{\$18.00}"),
    ("18", r"The final answer is: $\boxed{x = 18}$"), ("A", "The answer is (A)."), ("A", "A"),
    ("A", r"\boxed{\text{(A)}}"), ("A", "The answer is A) Paris"), ("A", r"\boxed{\textbf{(A)}\ 42}"),
    ("Paris", "Paris"), ("Route 66", "Answer: Route 66"), ("Paris", "The answer is Paris, the capital."),
    ("east", r"\boxed{\text{East}}"), ("-5", "#### minus 5"), (r"\frac{\pi}{2}", r"\boxed{π/2}"),
    (r"\frac{1}{\sqrt{3}}", r"\boxed{\frac{\sqrt{3}}{3}}"), ("0.5", "#### ½"), (r"\sqrt{12}", r"\boxed{2\sqrt3}"),
    ("(x+1)^2", r"\boxed{x^2+2x+1}"), ("(x-1)(x+2)", r"\boxed{x^2 + x - 2}"), (r"x \in [-2,7]", r"\boxed{[-2,7]}"),
    ("1,-2", r"\boxed{x = -2 \text{ or } x = 1}"), (r"\{1,2\}", r"\boxed{2, 1}"), (r"-\frac{9}{2}", r"\boxed{-4.5}"),
    ("1500", r"\boxed{1.5 \times 10^3}"), ("3/2", r"\boxed{1\frac{1}{2}}"),
    (r"\sqrt{2}+\sqrt{3}", r"\boxed{\sqrt{3}+\sqrt{2}}"), (r"\log_2 3", r"\boxed{\log_{2}(3)}"),
    ("3+4i", r"\boxed{4i + 3}"), (r"\sin^2 x", r"\boxed{\sin^2(x)}"), ("f(x) = 2x", r"\boxed{2x}"),
    (r"0.\overline{3}", r"\boxed{\frac13}"), (r"\frac{1}{x+1}", r"\boxed{\frac{2}{2x+2}}"),
    (r"\frac{1+\sqrt5}{2}", r"\boxed{\frac{\sqrt{5} + 1}{2}}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"), ("1/i", r"\boxed{-i}"),
    ("1,234", r"\boxed{1~234}"), ("1234", "#### 1'234"), (r"15\mbox{ cm}^2", r"\boxed{15}"),
    ("90^\\circ", r"\boxed{90°}"), ("x=3, y=4", r"\boxed{y=4, x=3}"), ("2^{10}", r"\boxed{1024}"),
    ("x^{1000000}", r"\boxed{x^{1000000}}"), ("0", "#### $0"),
]  # fmt: skip
OTHER = [
    ("18", "#### 18 or 20"), ("18", r"\boxed{I think it is 18 or maybe 19}"), ("18", "#### 18, 19, 20"),
    ("20", "It is 18 or 20"), ("72", "The answer is between 72 and 80."), ("75", "The answer is not 75."),
    ("72", "#### 70-75"), ("-5", "#### 70-75"), ("3", r"\boxed{(3,4)}"), ("(3,4)", r"\boxed{(4,3)}"),
    ("(3,4)", r"\boxed{[3,4]}"), ("(3,4)", r"\boxed{3}"), ("12:30", "The answer is 12:31."), ("12:30", "#### 12"),
    ("10^{12}", r"\boxed{10^{11}}"), (r"2\pi", r"\boxed{2}"), ("20", "#### 18+2"), ("72", "#### 8*9"),
    ("18", "#### 180"), ("12", "#### 1,2"), ("123", "#### 1,23"), ("3", "#### 3 1/2"), ("5", r"\boxed{5!}"),
    ("120", r"\boxed{5!}"), ("5", r"\boxed{5x}"), ("5", r"\boxed{5ab}"), ("2", r"\boxed{2xy}"), ("5", r"\boxed{-5}"),
    ("1+i", r"\boxed{1-i}"), (r"2+\sqrt{3}", r"\boxed{2-\sqrt{3}}"), ("x^2", r"\boxed{x^3}"),
    ("x = 5", r"\boxed{y = 5}"), ("2x+3y=6", r"\boxed{6}"), (r"\sqrt{2}", r"\boxed{1.414}"),
    ("1/3", r"\boxed{0.3333}"), (r"\log_2 3", r"\boxed{\log_3 2}"), ("2024-05-17", "#### 2024-05-18"),
    ("May 17, 2024", "#### 2024"), ("yes", "no"), ("1,-2", r"\boxed{1}"), ("[0,1]", r"\boxed{(0,1)}"),
    ("x<3", r"\boxed{x>3}"), ("A", "The answer is A or B."), ("Paris", "Paris or London"), ("B1", r"\boxed{B}"),
    ("x=3, y=4", r"\boxed{x=4, y=3}"), ("0", r"\boxed{}"), ("0", ""), ("1", "#### 1/0"),
    ("9^{9^{9}}", r"\boxed{9^{9^{8}}}"), ("18th", "#### 18"), ("v1.2.3", "The answer is v1.2.4"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "completion"), SAME)
def test_what_says_the_same_is_right(reference: str, completion: str) -> None:
    assert is_right(completion, reference)


@pytest.mark.parametrize(("reference", "completion"), OTHER)
def test_what_says_something_else_or_hedges_is_wrong(reference: str, completion: str) -> None:
    assert not is_right(completion, reference)


@pytest.mark.reference
def test_judged_pairs_are_judged_so_and_hardly_one_wrong_answer_is_taken(shelf: Path) -> None:
    lines = (shelf.parent / "cases" / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    judged = [(is_right(row["output"], row["reference"]), row["right"]) for row in rows]
    assert sum(ours == right for ours, right in judged) >= 0.9 * len(rows) == 207
    assert sum(ours and not right for ours, right in judged) <= 0.01 * len(rows)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 18", 1), (r"so \boxed{18} it is", 1), ("<answer>18 apples</answer>", 1), (r"\boxed{x^2 + 1}", 1),
        (r"\boxed{(3,4)}", 1), (r"\boxed{C}", 1), (r"\boxed{18", 0), ("<answer>18", 0),
        (r"\boxed{18} and \boxed{18}", 0), (r"\boxed{18} #### 18", 0), ("18", 0), ("The answer is 18.", 0),
        ("#### 18, 19, 20", 0), ("#### 18 or 20", 0), (r"\boxed{I think it is 18 or maybe 19}", 0), ("#### ", 0),
        (r"\boxed{}", 0), ("#### none", 0),
    ],
)  # fmt: skip
def test_a_format_has_one_closed_mark_with_one_answer(text: str, value: int) -> None:
    assert has_one_answer(text) == value


PARTS = [
    "1", "23", "x", "i", "\\sqrt", "\\frac", "{", "}", "(", ")", "[", "]", "^", "_", "+", "-", "*", "/", "\\pi",
    "\\sin", "\\ln ", ",", ";", " ", "=", "\\boxed{", "#### ", "\\cup", "\\pm", "&", "\\\\", "\\begin{pmatrix}",
    "\\end{pmatrix}", "1,234", "0.5", ".", "½", "or", "and", "answer is ", "not", "\\text{", "|", "!", "9" * 30,
    "\\overline{3}", "\\{", "\\}", "kg", "the", "\n", "\u2000", "²", "٣", "<answer>", "</answer>",
]  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PARTS), max_size=80), st.lists(st.sampled_from(PARTS), max_size=20))
def test_any_text_is_judged_and_an_answer_is_the_same_as_itself(answer: list[str], reference: list[str]) -> None:
    text, other = "".join(answer), "".join(reference)
    has_one_answer(text)
    assert is_same_answer(text, other) == is_same_answer(text, other)
    assert isinstance(is_right(text, other), bool)
    assert meaning(text) is None or is_same_answer(text, text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 400, "-" * 399 + "1", "x^" * 199 + "2", "\\sqrt" * 79 + "2", "\\sin " * 79 + "x", "1/" * 199 + "1",
        "(a+b+c+d)^{8}" * 30, "((x+1)^8+(y+1)^8)^8", "9^{999}", "2^{4096}", "(a+b)(c+d)" * 40,
        "\\ln(" * 66 + "x" + ")" * 66, "\\begin{pmatrix}" + "1&" * 180 + "\\end{pmatrix}", "1\\frac" * 60,
    ],
)  # fmt: skip
def test_what_would_take_long_to_work_out_is_compared_as_text(text: str) -> None:
    assert is_right(rf"\boxed{{{text}}}", text) or text.count("(") != text.count(")")


def test_a_judge_that_hangs_is_ended_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text(
        "import time\nparse = str.strip\n"
        "def verify(reference, answer):\n    time.sleep(1000 * (answer == 'hangs'))\n    return reference == answer\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spec = importlib.util.spec_from_file_location("judging", SCRIPTS / "math_verify_reward.py")
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    verdicts = []
    for completion, limit in (("18", 60.0), ("19", 60.0), ("hangs", 0.5), ("18", 60.0)):
        module.LIMIT = limit
        verdicts.append(module.agrees("", completion, {"answer": " 18"}))
    module.judge.kill()
    module.judge.communicate()
    assert verdicts == [1, 0, 0, 1]
