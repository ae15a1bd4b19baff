"""The command recommend eval: what it writes, that it resumes, and that searches agree with scoring everything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import chat_run, grpo_config, make_small, records

from lacuna import cli
from lacuna.apps import ranking
from lacuna.apps.configs import PrepareConfig, RecommendConfig
from lacuna.apps.constraints import Beams, beam_search
from lacuna.apps.ranking import ranking_figures
from lacuna.config import UserError
from lacuna.metrics import read_json_lines


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory of 60 items and 30 users, and a model that knows its words."""
    root = tmp_path_factory.mktemp("shop")
    draw = np.random.default_rng(3)
    np.save(root / "vectors.npy", draw.normal(size=(60, 4)))
    (root / "items.csv").write_text("item\n" + "".join(f"i{n}\n" for n in range(60)))
    events = [(f"u{user}", f"i{item}", t) for user in range(30) for t, item in enumerate(draw.geometric(0.25, 6) % 60)]
    (root / "shop.csv").write_text("user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in events))
    files = {"data": "shop.csv", "items": "items.csv", "vectors": "vectors.npy", "out": "prepared"}
    cli.run(PrepareConfig(codebook=4, **{key: str(root / name) for key, name in files.items()}))
    source = {
        "path": str(root / "prepared" / "train" / "sid_next_item_as_tested.jsonl"), "prompt_format": "text",
        "encode_apart": True,
    }  # fmt: skip
    config = chat_run(
        make_small(root / "small"), data=(source,), eval_data=(), steps=40, batch_size=8, sequence_length=512,
        new_tokens=str(root / "prepared" / "new_tokens.txt"), learning_rate=1e-2, compilation_cache=False,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        cli.run(config)
    return root


def settings(shop: Path, tmp_path: Path, **changes: Any) -> RecommendConfig:
    values: dict[str, Any] = {
        "model_name": str(shop / "runs" / "run"), "prepared": str(shop / "prepared"), "output_dir": str(tmp_path),
        "run_name": "found", "beams": 20, "batch_size": 1, "limit": 20, "compute_dtype": "float32",
    }  # fmt: skip
    return RecommendConfig(**values | changes)


def written(config: RecommendConfig) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    predictions, figures, summary = (json.loads((config.run_directory / name).read_text()) for name in ranking.WRITTEN)
    return predictions, figures, summary


def test_an_evaluation_writes_predictions_figures_and_the_counting_rule(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(shop, tmp_path)
    cli.run(config)
    predictions, figures, summary = written(config)
    rows = (shop / "prepared" / "test" / "sid_next_item.jsonl").read_text().splitlines()[:20]
    assert [each["output"] for each in predictions] == [json.loads(row)["completion"] for row in rows]
    for each, row in zip(predictions, rows, strict=True):
        assert f"### User Input: \n{each['input']}\n\n### Response" in json.loads(row)["prompt"]
    sids = {line.split("\t")[0] for line in (shop / "prepared" / "catalogue.txt").read_text().splitlines()}
    assert all(len(each["predict"]) == len({*each["predict"]} & sids) == 20 for each in predictions)
    assert figures == ranking_figures(predictions, sids) == summary["eval"]
    assert figures["invalid_prediction_count"] == 0 and figures["topk"] == [1, 3, 5, 10, 20]
    assert summary["counting"].keys() == {"popularity", "transitions", "transitions with shared prefix"}
    printed = capsys.readouterr().out
    assert f"{summary['counting']['popularity']['hr']['10']:.4f}" in printed
    assert f"{figures['ndcg']['5']:.4f}" in printed and "certainly the same" in printed
    with pytest.raises(UserError, match="holds an evaluation already"):
        cli.run(config)


def test_a_search_agrees_with_scoring_every_item_where_it_says_so(shop: Path, tmp_path: Path) -> None:
    exact, searched = settings(shop, tmp_path, exact=True), settings(shop, tmp_path, run_name="few", beams=16)
    for config in (exact, searched):
        cli.run(config)
    lines = [
        [json.loads(line) for line in (config.run_directory / "predictions.jsonl").read_text().splitlines()]
        for config in (exact, searched)
    ]
    every, few = ({line["row"]: line for line in part} for part in lines)
    assert all(line["certain"] == 20 for line in every.values())
    for row, line in few.items():
        assert line["predict"][: line["certain"]] == every[row]["predict"][: line["certain"]]
    certified = written(searched)[2]["certified"]
    certain = [line["certain"] for line in few.values()]
    assert certified == {str(k): sum(each >= k for each in certain) / 20 for k in (1, 3, 5, 10)}
    assert certified["1"] > 0 and certified["10"] < 1


def test_an_evaluation_resumes_where_it_was_killed(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halved = settings(shop, tmp_path, run_name="whole"), settings(shop, tmp_path, run_name="halved")
    cli.run(whole)
    searches = 0

    def killed(*arguments: Any, **named: Any) -> list[Beams]:
        nonlocal searches
        searches += 1
        if searches == 2:
            raise KeyboardInterrupt
        return beam_search(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ranking, "beam_search", killed)
        with pytest.raises(KeyboardInterrupt, match="8 rows are kept"):
            cli.run(halved)
        assert not (halved.run_directory / "run_summary.json").exists()
        with pytest.raises(UserError, match="another evaluation: beams was 20 and is 5"):
            cli.run(halved.model_copy(update={"beams": 5}))
        searches = 100
        cli.run(halved)
        assert searches == 102  # two batches of eight devices are left
    assert written(halved)[:2] == written(whole)[:2]


def test_devices_share_the_rows_or_the_model(shop: Path, tmp_path: Path) -> None:
    ways = settings(shop, tmp_path), settings(shop, tmp_path, run_name="rows", data_parallel=8, fsdp=1)
    for config in ways:
        cli.run(config)
    one, other = (written(config)[0] for config in ways)
    assert [each["predict"][:5] for each in one] == [each["predict"][:5] for each in other]


def test_reinforcement_draws_items_of_the_catalogue_alone(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn from the model's distribution over allowed tokens, and the model's own log-probabilities beside them."""
    config = grpo_config(
        model_name=str(shop / "runs" / "run"), output_dir=str(tmp_path), sequence_length=512, steps=2,
        data=({"path": str(shop / "prepared" / "train" / "sid_next_item_as_tested.jsonl"), "prompt_format": "text"},),
        constrain=str(shop / "prepared" / "catalogue.txt"), reward=("rule:1.0", "rank:1.0"), learning_rate=1e-3,
        compilation_cache=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="max_completion_tokens = 3 is less than the 6 of an item"):
        cli.run(config.model_copy(update={"max_completion_tokens": 3}))
    cli.run(config)
    sids = {line.split("\t")[0] for line in (shop / "prepared" / "catalogue.txt").read_text().splitlines()}
    lines = read_json_lines(config.run_directory / "rollouts.jsonl")
    assert len(lines) == 32 and {line["text"].removesuffix("\n") for line in lines} <= sids
    assert not any(line["is_truncated"] for line in lines)
    own, drawn = (
        np.concatenate([line[key] for line in lines]) for key in ("log_probabilities", "sampled_log_probabilities")
    )
    assert np.all(own <= drawn + 1e-5) and np.any(drawn > own + 1e-3) and np.any(drawn < -0.1)
    for group in (lines[at : at + 4] for at in range(0, 32, 4)):
        assert len({tuple(line["prompt_tokens"]) for line in group}) == 1
        values = [line["rewards"]["rank"] for line in group]
        right = [line["rewards"]["rule"] for line in group]
        discount = 1 / np.log2(np.arange(4) + 2)
        expected = np.where(np.array(right) > 0, 0, -discount / discount.sum()) * any(right)
        np.testing.assert_allclose(values, expected)
    capsys.readouterr()
    cli.start("grpo", ["--replay", str(config.run_directory), "--step", "2"])
    again, last = json.loads(capsys.readouterr().out), records(config)[-1]
    assert all(again[key] == last[key] for key in ("loss", "gradient_norm", "reward"))


def test_a_model_without_the_words_and_a_directory_without_files_are_refused(shop: Path, tmp_path: Path) -> None:
    plain = make_small(tmp_path / "plain")
    (plain / "model.safetensors").write_bytes((shop / "runs" / "run" / "model" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="are no tokens of this model; train it with new_tokens"):
        cli.run(settings(shop, tmp_path, model_name=str(plain)))
    with pytest.raises(UserError, match="make it by recommend prepare"):
        cli.run(settings(shop, tmp_path, prepared=str(tmp_path)))
    with pytest.raises(UserError, match="capacity = 6 has no room"):
        cli.run(settings(shop, tmp_path, capacity=6))
