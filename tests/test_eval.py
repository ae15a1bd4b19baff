"""The evaluation against transformers' loss on the same tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE

from lacuna import cli
from lacuna.config import DataSource, EvalConfig, UserError


@pytest.mark.reference
@pytest.mark.parametrize("packing", [True, False])
def test_held_out_loss_equals_transformers_on_each_text_alone(shelf: Path, tmp_path: Path, packing: bool) -> None:
    expected = json.loads((REFERENCE / "eval_stories260k.json").read_text())
    lines = (shelf / "chat" / "rasbt_instruct_1100.jsonl").read_text().splitlines()[:20]
    texts = [json.loads(line)["messages"][0]["content"] for line in lines]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = EvalConfig(
        model_name=str(shelf / "weights" / "stories260k"),
        data=(DataSource(path=str(data)),),
        sequence_length=256,
        batch_size=1,
        packing=packing,
        compute_dtype="float32",
        output_dir=str(tmp_path / "runs"),
    )
    cli.run(config)
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert summary["target_tokens"] == expected["target_tokens"]
    assert summary["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert summary["perplexity"] == pytest.approx(np.exp(expected["eval_loss"]), rel=1e-4)
    with pytest.raises(UserError, match="--overwrite"):
        cli.run(config)
