"""The report of a run: one page of its own, with what the records and the summary hold."""

import math
import re
from pathlib import Path

import pytest
from test_metrics import record, write_steps

from lacuna.apps.report import write_report
from lacuna.metrics import RunLog, write_summary


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
