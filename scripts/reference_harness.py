"""Make tests/reference/harness/expected.json: what lm-evaluation-harness finds with transformers.

In the environment of reference_models.py, with lm-eval==0.4.13 installed there too, from the repository's root:

    ../torch-environment/bin/python scripts/reference_harness.py
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch  # ty: ignore[import-not-found]
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "reference" / "harness"
MODEL = ROOT.parent / "shared" / "data" / "weights" / "stories260k"
TEXT_COUNT, LONG_TEXT = 5, 4


def write_rows() -> None:
    """Questions with choices, each with a text; one text is longer than the model's 512 positions."""
    choices = json.loads((FOLDER.parent / "choices_stories260k.json").read_text())
    lines = (MODEL.parents[1] / "chat" / "rasbt_instruct_1100.jsonl").read_text().splitlines()
    texts = [json.loads(line)["messages"][0]["content"] for line in lines[:80]]
    rows = []
    for number, row in enumerate(choices[:TEXT_COUNT]):
        text = " ".join(texts[20:80]) if number == LONG_TEXT else texts[number]
        rows.append({key: row[key] for key in ("question", "choices", "answer")} | {"text": text})
    (FOLDER / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def results(directory: Path, **settings: Any) -> dict[str, Any]:
    """Figures of each task, and what the model answered to each request."""
    model = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    found = simple_evaluate(
        model,
        tasks=["tiny_choices", "tiny_rolling", "tiny_generate"],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )
    assert found
    return {
        task: {
            "figures": {key: value for key, value in figures.items() if isinstance(value, int | float)},
            "responses": [sample["resps"] for sample in found["samples"][task]],
        }
        for task, figures in found["results"].items()
    }


def main() -> None:
    torch.set_num_threads(1)
    write_rows()
    expected = {"plain": results(MODEL)}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        shutil.copytree(MODEL, directory)
        shutil.copy(ROOT / "configs" / "chat_template.jinja", directory)
        expected["chat"] = results(directory, apply_chat_template=True)
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
