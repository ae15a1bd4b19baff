"""The sampling rules that chat and serve share."""

import json
from pathlib import Path

import pytest

from lacuna.apps.generator import generation_defaults, rules_by_origin, rules_in_force
from lacuna.config import SamplingKeys, UserError


def test_what_was_typed_wins_over_the_models_defaults() -> None:
    defaults, typed = SamplingKeys(temperature=0.7, top_k=20), SamplingKeys(top_k=0, max_tokens=9)
    assert rules_in_force(typed, defaults) == SamplingKeys(temperature=0.7, top_k=0, max_tokens=9)
    by_origin = "top_k=0 max_tokens=9 (typed); temperature=0.7 (generation_config.json); top_p=1 min_p=0 "
    assert rules_by_origin(typed, defaults).startswith(by_origin)


def test_generation_config_gives_rules(tmp_path: Path) -> None:
    stated = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [5, 6]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    rules = generation_defaults(tmp_path)
    assert rules == SamplingKeys(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert generation_defaults(tmp_path).temperature == 0
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(UserError, match="generation_config.json: top_p = 7"):
        generation_defaults(tmp_path)
