"""A reward by the package math-verify, in a process of its own that is ended when it takes too long.

    uv run --with 'math-verify[antlr4_13_2]' grpo @ FILE.toml --reward scripts/math_verify_reward.py:agrees:1.0

math-verify limits its time by a signal, which works in a main thread only, and not while sympy is in one long step.
Here the main thread is another process's: it answers line by line, and is killed and started anew where it does not.
"""

import json
import select
import subprocess
import sys
from typing import Any

LIMIT = 5.0  # seconds for one completion
judge: subprocess.Popen[str] | None = None


def agrees(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1 where math-verify takes the completion's answer for the reference's, 0 where not, or not within the limit."""
    global judge
    if judge is None or judge.poll() is not None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        judge = subprocess.Popen([sys.executable, __file__], **pipes)
        assert judge.stdout
        if judge.stdout.readline() != "ready\n":
            raise RuntimeError("the judge does not start; is math-verify installed?")
    assert judge.stdin and judge.stdout
    judge.stdin.write(json.dumps([row["answer"], completion]) + "\n")
    judge.stdin.flush()
    if not select.select([judge.stdout], [], [], LIMIT)[0]:
        judge.kill()
        judge.communicate()
        return 0.0
    return float(judge.stdout.readline() or 0)


def answer_lines() -> None:
    """The judge itself: a line with reference and completion in, a line with its verdict out."""
    from math_verify import parse, verify  # ty: ignore[import-not-found]

    print("ready", flush=True)
    for line in sys.stdin:
        reference, completion = (parse(text) for text in json.loads(line))
        print(int(verify(reference, completion)), flush=True)


if __name__ == "__main__":
    answer_lines()
