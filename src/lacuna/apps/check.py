"""The command check: each promise of a run, proven on its own model, data and config."""

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lacuna.apps.configs import CheckKeys
from lacuna.apps.promises import ALL, Finding, Promise, Skipped, promises_of
from lacuna.apps.subject import SHORTEST, Subject
from lacuna.config import LINES, TrainingConfig, UserError, did_you_mean, printable
from lacuna.distributed import writing_to
from lacuna.metrics import versions
from lacuna.model import parameter_counts
from lacuna.trainer import COMMAND_OF


def run_check(config: TrainingConfig) -> None:
    """Check the promises that concern a config, print a line for each, write check.json, and exit with 1 if one of them
    is not kept.

    Raises:
        UserError: the config can't be trained with, or `only` names no promise.
    """
    assert isinstance(config, CheckKeys)
    if unknown := [name for name in config.only if name not in ALL]:
        raise UserError(f"only names {unknown[0]!r}{did_you_mean(unknown[0], ALL)} (the lines: {', '.join(ALL)})")
    if not Path(config.check_file).parent.is_dir():
        raise UserError(f"check_file = {config.check_file}: no such directory; make it, or choose another")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a run of another process needs room as well
    kind = next(kind for kind in COMMAND_OF if isinstance(config, kind))
    given = config.model_fields_set & kind.model_fields.keys()
    plain = kind.model_validate(config.model_dump(include=given))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="check-", dir=config.cache_dir) as scratch:
        show(f"reading {config.model_name} and its data")
        subject = Subject(plain, Path(scratch), config.full)
        has_adapter = bool(subject.config.lora_rank or subject.config.base_name)
        facts = {"command": COMMAND_OF[kind]} | setting(subject)
        print(
            f"{facts['command']} of {facts['model_name']}: {'all' if config.full else 'the first'} {facts['layers']} "
            f"layers, {facts['parameters']:,} parameters, on {facts['devices']} × {facts['device_kind']} in "
            f"{facts['compute_dtype']}; of "
            f"{facts['rows']:,} rows the shortest {SHORTEST} are computed with, as {facts['sequence_length']} tokens"
        )
        lines, promises = [], promises_of(plain, has_adapter)
        if other := [name for name in config.only if name not in promises]:
            raise UserError(f"only names {other[0]!r}, which does not concern this config; leave it out")
        for name, promise in promises.items():
            if not config.only or name in config.only:
                show(name)
                lines.append(reported(name, promise, subject))
                print(printable(sentence(lines[-1]), LINES), flush=True)
    failed = [line["name"] for line in lines if line["verdict"] == "FAIL"]
    facts |= {"seconds": time.perf_counter() - began, "versions": versions(), "failed": failed, "promises": lines}
    with writing_to(Path(config.check_file), "choose another check_file"):
        Path(config.check_file).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    kept = sum(line["verdict"] == "pass" for line in lines)
    print(f"promises kept: {kept}, not kept: {len(failed)}, nothing to compare: {len(lines) - kept - len(failed)}, "
          f"in {facts['seconds']:.0f} s; all of it: {config.check_file}")  # fmt: skip
    if failed:
        raise SystemExit(1)


def show(doing: str) -> None:
    """What is under way, on a terminal only, until the next line takes its place."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K… {doing}\r", end="", flush=True)


def setting(subject: Subject) -> dict[str, Any]:
    """What is looked at."""
    config, model, mesh = subject.config, subject.model, subject.mesh
    return {
        "model_name": subject.original.model_name, "layers": model.layers, "parameters": parameter_counts(model)["all"],
        "devices": mesh.size, "device_kind": mesh.devices.flat[0].device_kind, "compute_dtype": config.compute_dtype,
        "attention": model.attention, "rows": sum(map(len, subject.sampled)), "sequence_length": config.sequence_length,
    }  # fmt: skip


def reported(name: str, promise: Promise, subject: Subject) -> dict[str, Any]:
    """A promise's line in check.json; one that can't be computed is not kept."""
    began, found, verdict = time.perf_counter(), Finding("", math.nan, math.nan, False), ""
    try:
        found = promise(subject)
    except Skipped as nothing:
        verdict, found = "skip", found._replace(compared=str(nothing))
    except Exception as error:  # of whatever is broken, which the line says
        reason = " ".join(str(error).split())[:400]
        found = found._replace(compared=f"can't be computed: {type(error).__name__}: {reason}")
    number, bound = (value if math.isfinite(value) else None for value in (found.number, found.bound))
    return {
        "name": name, "verdict": verdict or ("pass" if found.is_kept else "FAIL"), "compared": found.compared,
        "number": number, "bound": bound, "relation": found.relation, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def sentence(line: dict[str, Any]) -> str:
    """A promise's line as it is printed."""
    bound = f" {line['relation']} {line['bound']:.3g}" if line["bound"] is not None else ""
    number = f": {line['number']:.3g}{bound}" if line["number"] is not None else ""
    return f"{line['verdict']}  {line['name']}: {line['compared']}{number}"
