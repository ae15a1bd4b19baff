"""The sampling rules that chat and serve share."""

from lacuna.apps.generator import rules_by_origin, rules_in_force
from lacuna.config import SamplingKeys


def test_what_was_typed_wins_over_the_models_defaults() -> None:
    defaults, typed = SamplingKeys(temperature=0.7, top_k=20), SamplingKeys(top_k=0, max_tokens=9)
    assert rules_in_force(typed, defaults) == SamplingKeys(temperature=0.7, top_k=0, max_tokens=9)
    by_origin = "top_k=0 max_tokens=9 (typed); temperature=0.7 (generation_config.json); top_p=1 min_p=0 "
    assert rules_by_origin(typed, defaults).startswith(by_origin)
