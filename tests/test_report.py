"""The report of a run: one file of its own, with what the records and the summary hold."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from test_metrics import record, write_steps

from lacuna.apps.report import write_report
from lacuna.metrics import RunLog, write_summary

pytestmark = pytest.mark.curves


@pytest.mark.parametrize("step_count", [0, 1, 3000])
def test_report_is_one_small_page_of_its_own_at_any_length(step_count: int, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model_name = "<script>alert(1)</script>"\nsteps = 5000\n')
    with RunLog(tmp_path, steps=5000, log_every=1000) as log:
        for step in range(1, step_count + 1):
            loss = math.nan if step == 2 else 2.0 + 1 / step
            log.step(record(step, loss=loss, mfu=None, step_seconds=50.0 if step == 1 else 1.0 + step % 7 / 10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 500_000
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r"https?:|//|@import|<link|<img|\ssrc=", page)
    assert set(re.findall(r"url\((.)", page)) <= {"#"} and set(re.findall(r'href="(.)', page)) <= {"#"}
    assert f"{step_count:,} of 5,000 steps" in page
    titles = re.findall(r'aria-label="(.*?) by step"', page)
    assert titles == (["Loss", "Learning rate", "Throughput", "Step time"] if step_count else [])
    assert ("1 without a finite loss" in page) == (step_count > 1)
    assert ("1 above the axis" in page) == (step_count > 1)


def test_report_draws_held_out_points_and_trusts_newer_steps_over_an_old_summary(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 4)
    write_summary(tmp_path, {"command": "sft", "steps": 4, "wall_seconds": 3725.0, "best_eval_loss": 1.25})
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "1 h 02 min" in page and "<dd>1.2500</dd>" in page and "sft · 4 steps" in page
    with RunLog(tmp_path, steps=10, resume_step=4) as log:
        log.step(record(5, eval_loss=0.75, eval_accuracy=0.5, mfu=0.4))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<dd>0.7500</dd>" in page and "sft · 5 steps" in page and "● held-out" in page
    assert {"Held-out accuracy", "MFU"} < set(re.findall(r'aria-label="(.*?) by step"', page))


def drawn(page: str, title: str, colour: str) -> np.ndarray:
    """Points [step and height, point] of a curve in the page, as shares of its axes from their lower left corner."""
    chart = page.partition(f'aria-label="{title} by step"')[2].partition("</svg>")[0]
    path = re.search(rf'<path d="([^"]*)"[^>]*fill: none; stroke: var\(--{colour}\)', chart)
    assert path
    x, y = np.array(re.findall(r"[ML] (\S+) (\S+)", path[1]), float).T
    return np.array([(x / 360 - 0.11) / 0.87, (1 - y / 180 - 0.12) / 0.84])


def test_curves_go_through_the_records_and_figures_are_those_of_the_summary(tmp_path: Path) -> None:
    steps, speed, loss, held_out = np.arange(1, 7), [50.0, 80, 65, 20, 90, 40], [4.0, 2.5, 3, 2, 2.25, 1], [3.5, 3, 2.5]
    with RunLog(tmp_path, steps=6) as log:
        for step in steps:
            evaluated = {"eval_loss": held_out[step // 2 - 1]} if step % 2 == 0 else {}
            values = {"loss": loss[step - 1], "tokens_per_second": speed[step - 1]}
            log.step(record(int(step), **values, **evaluated))
    summary = {
        "steps": 6, "final_loss": 1.0, "best_eval_loss": 2.5, "tokens": 1_234_567, "tokens_per_second": 57.5,
        "mfu": 0.4117, "wall_seconds": 245.0, "final_reward": 0.75, "best_eval_reward": 0.875,
    }  # fmt: skip
    write_summary(tmp_path, summary)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    last = 1.01 * 6
    np.testing.assert_allclose(
        drawn(page, "Throughput", "line"), [steps / last, np.array(speed) / (1.06 * 90)], atol=1e-4
    )
    across, up = drawn(page, "Loss", "line")
    np.testing.assert_allclose(across, steps / last, atol=1e-4)
    scale = (up[0] - up[-1]) / (loss[0] - loss[-1])
    assert scale > 0
    np.testing.assert_allclose(up - up[-1], scale * (np.array(loss) - loss[-1]), atol=1e-4)
    across, points = drawn(page, "Loss", "point")
    np.testing.assert_allclose(across, steps[1::2] / last, atol=1e-4)
    np.testing.assert_allclose(points - up[-1], scale * (np.array(held_out) - loss[-1]), atol=1e-4)
    assert dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)) == {
        "Final reward": "0.750", "Best held-out reward": "0.875", "Final loss": "1.0000",
        "Best held-out loss": "2.5000", "Real tokens": "1.23 M", "Tokens per second": "57.5", "MFU": "41.2%",
        "Wall time": "4 min 05 s",
    }  # fmt: skip
