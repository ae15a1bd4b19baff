"""Time lacuna on this machine and print one JSON line, every rate also as a share of what the machine can do.

    uv run python scripts/bench.py peak
    uv run python scripts/bench.py train sft @ configs/sft_tiny.toml --steps 20
    uv run python scripts/bench.py train sft --model-name MODEL --from-scratch --data.0.path chat.jsonl --steps 20
    uv run python scripts/bench.py save sft @ configs/sft_tiny.toml --steps 20
    uv run python scripts/bench.py generate MODEL float32
    uv run python scripts/bench.py generate MODEL bfloat16 1 32 256
    uv run python scripts/bench.py grpo @ configs/grpo_tiny.toml --steps 10 --reward scripts/bench.py:distinct:1
    uv run python scripts/bench.py serve --model-name MODEL --compute-dtype float32
    uv run python scripts/bench.py recommend PYTHON --model-name runs/recommend_tiny --prepared prepared/tiny --limit 64

`train` takes any config and option of pretrain or sft and runs the real command in a scratch directory with everything
on: reading, packing, logging, saving. Step times are medians over the steps after the third; the matrix rate is
measured in the same process right after it, and so is the compiled step alone, repeated on one batch. `input_seconds`
is the time to prepare a batch, which happens while the step before runs; `step_cpu_seconds` is the median of what the
processor spent on a step, which hardly depends on what else runs; `input_wait_share` is an upper bound on the
share of time that steps waited for it: all of the preparation if that step had already ended. `optimizer_seconds` is
the update alone, from gradient norm to weights. `step` is `train` without the files written at the end, for models
whose state would fill the disk. `save` runs the same, saves every fifth step, and reports how long each save held up
the loop, and the time to write the whole checkpoint.

`generate` decodes greedily: batches of 1 and 32 prompts of 64 tokens, 128 new tokens each, then 64 requests of 16 to
256 new tokens through 32 slots; or only batches of the sizes given. A directory without weights gets random ones. A
decode step is compared with the time in which the memory could deliver the weights and the tokens in the cache, at the
faster of two rates (copy, matrix times vector) measured before and after.

`grpo` runs the command in a scratch directory without saving, and splits each step into rollout and update.

`serve` takes any config and option of the command, starts it, asks 64 questions one at a time, and then has 64 clients
ask them concurrently for a minute, each sending the next as soon as it has its answer; every answer is compared with
the first.

`recommend` takes any option of recommend eval and times its beam search, and in turn with it, five times, a plain loop
with transformers' beam search under `prefix_allowed_tokens_fn`, which PYTHON, of an environment with transformers,
runs (scripts/peer_recommend.py): the same float32 weights, rows, catalogue, beams and rows at once. Times are after a
first call, and include what the host does; reading, encoding and writing are not timed on either side.
"""

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

from lacuna import cli, optimizer
from lacuna.apps.configs import RecommendConfig, ServeConfig
from lacuna.cli import parse, prepare_process
from lacuna.config import GrpoConfig, ModelKeys, PretrainConfig, RowsConfig, SftConfig

WARM_STEPS = 3
ROUNDS = 5
SAVE_EVERY = 5
PROMPT_TOKENS, NEW_TOKENS = 64, 128
CLIENTS, LOAD_SECONDS = 64, 60.0


def main() -> None:
    """The subcommands peak, train, step, save, generate, grpo, serve and recommend."""
    started = time.time() - process_age()
    match sys.argv[1:]:
        case ["peak"]:
            prepare_process()
            print(json.dumps({"label": "peak"} | peak()))
        case ["train" | "step" | "save" as label, "pretrain" | "sft" as command, *arguments]:
            prepare_process()
            with tempfile.TemporaryDirectory(dir=".") as scratch:
                every = str(SAVE_EVERY) if label == "save" else "0"
                fixed = ["--output-dir", scratch, "--run-name", "bench", "--save-every", every]
                kind = PretrainConfig if command == "pretrain" else SftConfig
                config = parse(kind, [*arguments, *fixed], f"bench {label} {command}")
                found = save(config) if label == "save" else train(config, started, label == "train")
                print(json.dumps({"label": label} | found))
        case ["generate", model_name, ("float32" | "bfloat16") as dtype, *sizes]:
            prepare_process()
            print(json.dumps({"label": "generate"} | generate(model_name, dtype, [int(size) for size in sizes])))
        case ["grpo", *arguments]:
            prepare_process()
            with tempfile.TemporaryDirectory(dir=".") as scratch:
                fixed = ["--output-dir", scratch, "--run-name", "bench"]
                print(json.dumps({"label": "grpo"} | reinforce(parse(GrpoConfig, [*arguments, *fixed], "bench grpo"))))
        case ["recommend", python, *arguments]:
            prepare_process()
            config = parse(RecommendConfig, [*arguments, "--compute-dtype", "float32"], "bench recommend")
            print(json.dumps({"label": "recommend"} | recommend(config, python)))
        case ["serve", *arguments]:
            print(json.dumps({"label": "serve"} | serve(arguments)))
        case _:
            sys.exit(__doc__)


def process_age() -> float:
    """Seconds since this process was started, before Python itself (Linux)."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        began = float(stat.read().rsplit(") ", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - began


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call that returns when its work is done, after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak(size: int = 2048, repeats: int = 7) -> dict[str, Any]:
    """Matrix product rates (FLOP/s) and copy bandwidth (bytes/s) that XLA reaches on one device."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        size = 8192
    found: dict[str, Any] = {"device_kind": jax.devices()[0].device_kind}
    for dtype in ("float32", "bfloat16"):
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        multiply = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
        seconds = seconds_of(lambda x=x, multiply=multiply: multiply(x, x).block_until_ready(), repeats)
        found[f"{dtype}_flops"] = 2 * size**3 / seconds
    x = jnp.zeros(2**27, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    found["copy_bytes_per_second"] = 2 * x.nbytes / seconds_of(lambda: add(x).block_until_ready(), repeats)
    return found


def train(config: RowsConfig, started: float, is_saved: bool) -> dict[str, Any]:
    """Figures of a training run of `config`."""
    import jax
    import numpy as np

    from lacuna import metrics, trainer

    before = time.time() - started
    prepare, inputs = trainer.RowSteps.prepare, []

    def watched(rows: trainer.RowSteps, index: int) -> Any:
        began = time.perf_counter()
        prepared = prepare(rows, index)
        running: list[Any] = list(rows.running.values())
        is_late = all(figure.is_ready() for figure in running)
        inputs.append((time.perf_counter() - began, is_late, time.process_time()))
        return prepared

    with patch.object(trainer.RowSteps, "prepare", watched), nullcontext() if is_saved else unsaved():
        ended = cli.run(config)
    assert ended
    rows, state = ended
    run = rows.run
    records = metrics.read_json_lines(config.run_directory / "metrics.jsonl")
    timed = records[min(WARM_STEPS, len(records) - 1) :]
    length, program = max(rows.programs.items())
    batch, record = rows.prepare(0)
    states, divisor = [state], np.float32(record["target_tokens"])

    def alone() -> None:
        states[0], facts = program(states[0], batch, divisor, rows.recipe, frozen=run.frozen)
        jax.block_until_ready(facts)

    step_seconds = statistics.median(record["step_seconds"] for record in timed)
    alone_seconds = seconds_of(alone, max(5, len(timed) // 2)) if batch.token.shape[-1] == length else None
    one = jax.tree.map(lambda leaf: leaf[:1], batch)

    class NoLoss(NamedTuple):
        compute_dtype: str

        def __call__(self, params: Any, *_: Any) -> tuple[Any, tuple[dict[str, Any], dict[str, Any]]]:
            return 0 * sum(leaf.sum() for leaf in jax.tree.leaves(params)), ({}, {})

    def optimizer_alone() -> None:
        model, loss = run.opened.model, NoLoss(config.compute_dtype)
        states[0], facts = optimizer.train_step(states[0], one, divisor, rows.recipe, model, loss, None, run.frozen)
        jax.block_until_ready(facts)

    optimizer_seconds = seconds_of(optimizer_alone, 5)
    rates = peak()
    matrix_rate = rates["float32_flops" if config.compute_dtype == "float32" else "bfloat16_flops"]
    flops = statistics.median(record["flops"] for record in timed)
    return {
        "model": config.model_name,
        "rows": config.batch_size,
        "sequence_length": config.sequence_length,
        "compute_dtype": config.compute_dtype,
        "steps_timed": len(timed),
        "step_seconds": step_seconds,
        "step_seconds_range": [min(r["step_seconds"] for r in timed), max(r["step_seconds"] for r in timed)],
        "step_cpu_seconds": statistics.median(np.diff([clock for *_, clock in inputs])[-len(timed) :]),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in timed),
        "target_tokens_per_second": statistics.median(record["target_tokens_per_second"] for record in timed),
        "tok_s": sum(r["tokens"] for r in timed) / sum(r["step_seconds"] for r in timed),
        "input_seconds": statistics.median(seconds for seconds, *_ in inputs),
        "input_wait_share": sum(seconds for seconds, is_late, _ in inputs[1:] if is_late)
        / sum(record["step_seconds"] for record in records),
        "packing_efficiency": statistics.mean(record["packing_efficiency"] for record in timed),
        "model_flops_per_second": flops / step_seconds,
        "share_of_matrix_rate": flops / step_seconds / matrix_rate,
        "matrix_rate_flops": matrix_rate,
        "mfu": records[-1]["mfu"] and statistics.median(record["mfu"] for record in timed),
        "program_seconds": alone_seconds,
        "share_outside_program": alone_seconds and 1 - alone_seconds / step_seconds,
        "optimizer_seconds": optimizer_seconds,
        "optimizer_share": optimizer_seconds / step_seconds,
        "compile_seconds": run.compile_seconds,
        "first_step_ends_seconds": before + (run.first_step_seconds or 0),
        "memory_bytes": records[-1]["memory_bytes"],
        "device_kind": rates["device_kind"],
        "versions": metrics.versions(),
    }


def unsaved() -> AbstractContextManager[Any]:
    """Training that writes neither checkpoint nor model."""
    from lacuna.trainer import Run

    return patch.multiple(Run, save=lambda *_: None, finish=lambda *_: None)


def save(config: RowsConfig) -> dict[str, Any]:
    """Figures of the saves of a training run of `config`."""
    from lacuna import checkpoint, metrics

    ended = cli.run(config)
    assert ended
    rows, state = ended
    run = rows.run
    held_up = list(run.save_seconds)
    records = metrics.read_json_lines(config.run_directory / "metrics.jsonl")
    timed = records[WARM_STEPS:]
    during = [record["step_seconds"] for record in timed if record["step"] % SAVE_EVERY == 1]
    others = [record["step_seconds"] for record in timed if record["step"] % SAVE_EVERY not in (0, 1)]
    saver = run.saver
    assert saver.newest
    facts = checkpoint.read_manifest(saver.newest).run
    began = time.perf_counter()
    saver.save(state, optimizer.saved_shapes(run.opened.model), facts, is_best=False)
    saver.wait()
    whole = time.perf_counter() - began
    size = sum(path.stat().st_size for path in saver.newest.iterdir())
    return {
        "model": config.model_name,
        "saves": len(held_up),
        "checkpoint_bytes": size,
        "held_up_seconds": statistics.median(held_up),
        "held_up_seconds_range": [min(held_up), max(held_up)],
        "whole_save_seconds": whole,
        "held_up_share_of_save": statistics.median(held_up) / whole,
        "share_of_copy_rate": size / whole / peak()["copy_bytes_per_second"],
        "step_seconds": statistics.median(others),
        "step_seconds_while_writing": statistics.median(during),
    }


def read_rate() -> float:
    """Bytes a second that a matrix-vector product reads."""
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((2**13, 2**13)), jnp.ones(2**13)
    product = jax.jit(jnp.matmul)
    return matrix.nbytes / seconds_of(lambda: product(matrix, vector).block_until_ready(), 15)


def generate(model_name: str, dtype: Literal["float32", "bfloat16"], sizes: list[int]) -> dict[str, Any]:
    """Figures of the sampler for each batch, and of continuous batching."""
    import jax
    import numpy as np

    from lacuna import checkpoint, metrics, sampler
    from lacuna.config import ModelKeys, SamplingKeys
    from lacuna.distributed import make_mesh
    from lacuna.model import initial_params

    mesh = make_mesh(1, 0, 1)
    config = ModelKeys(model_name=model_name, compute_dtype=dtype)
    is_random = Path(model_name).is_dir() and not any(Path(model_name).rglob("*.safetensors"))
    opened = checkpoint.open_model(config, mesh, with_weights=not is_random)
    model = opened.model
    random_params = jax.jit(lambda key: initial_params(key, model))
    params = random_params(jax.random.key(0)) if is_random else checkpoint.opened_params(opened)
    random = np.random.default_rng(0)
    rates = [max(read_rate(), peak()["copy_bytes_per_second"])]

    def requests(limits: list[int]) -> list[sampler.Request]:
        prompts = random.integers(model.vocabulary_size, size=(len(limits), PROMPT_TOKENS)).tolist()
        return [
            sampler.Request(tuple(prompt), SamplingKeys(temperature=0.0, max_tokens=limit))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]

    def batch(slots: int, limits: list[int]) -> dict[str, Any]:
        batch = sampler.Sampler(params, opened, slots, PROMPT_TOKENS + max(limits), dtype)
        waiting = requests(limits)
        seconds = seconds_of(lambda: batch.generate(waiting), 3)
        firsts, steps = [], []
        for _ in range(3):
            for request in waiting[:slots]:
                batch.submit(request)
            began = time.perf_counter()
            batch.advance(1)
            firsts.append(time.perf_counter() - began)
            while not batch.is_idle:
                began = time.perf_counter()
                parts = batch.advance()
                steps.append((time.perf_counter() - began) / max(len(part.tokens) for part in parts))
        weight_bytes = sum(x.nbytes for x in jax.tree.leaves(batch.params))
        held = slots * (PROMPT_TOKENS + max(limits) / 2)
        cache_bytes = held * 2 * model.layers * model.kv_heads * model.head * jax.numpy.dtype(dtype).itemsize
        return {
            "tokens_per_second": sum(limits) / seconds,
            "seconds": seconds,
            "time_to_first_token_seconds": statistics.median(firsts),
            "step_seconds": statistics.median(steps),
            "weight_bytes": weight_bytes,
            "cache_bytes": cache_bytes,
        }

    found = {f"batch_{slots}": batch(slots, [NEW_TOKENS] * slots) for slots in sizes or (1, 32)}
    alone = list(found.values())
    if not sizes:
        mixed = np.linspace(16, 256, 64).round().astype(int)
        found["continuous"] = batch(32, random.permutation(mixed).tolist())
    rates.append(max(read_rate(), peak()["copy_bytes_per_second"]))
    for figures in alone:
        bound = (figures["weight_bytes"] + figures["cache_bytes"]) / max(rates)
        figures["bound_seconds"], figures["share_of_bound"] = bound, bound / figures["step_seconds"]
    return {
        "model": model_name,
        "dtype": dtype,
        "prompt": PROMPT_TOKENS,
        "new": NEW_TOKENS,
        "bytes_per_second": rates,
        **found,
        "device_kind": jax.devices()[0].device_kind,
        "versions": metrics.versions(),
    }


def recommend(config: RecommendConfig, python: str) -> dict[str, Any]:
    """Figures of the beam search of recommend eval beside transformers', round by round."""
    from lacuna import checkpoint, metrics
    from lacuna.apps import ranking
    from lacuna.distributed import make_mesh
    from lacuna.sampler import Sampler
    from lacuna.tokenizer import encode

    questions, opened = ranking.read_questions(config), checkpoint.open_model(config, make_mesh(1, 0, 1))
    catalogue = ranking.read_catalogue(questions.sids, opened.tokenizer, config.model_name)
    prompts = [encode(opened.tokenizer, prompt, add_special_tokens=True).tolist() for prompt in questions.prompts]
    room = opened.model.capacity(config.capacity)
    sampler = Sampler(checkpoint.opened_params(opened), opened, 1, room, "float32", catalogue.forest)
    asked = {"model": str(opened.source), "prompts": prompts, "paths": list(catalogue.sids), "beams": config.beams}
    asked |= {"batch_size": config.batch_size}

    def ours() -> tuple[float, list[list[list[int]]]]:
        began = time.perf_counter()
        found = dict(ranking.recommendations(sampler, catalogue, prompts, config))
        seconds = time.perf_counter() - began
        return seconds, [[list(beam.tokens) for beam in found[row].beams] for row in range(len(prompts))]

    peer = [python, str(Path(__file__).with_name("peer_recommend.py"))]
    with subprocess.Popen(peer, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        to_peer, from_peer = process.stdin, process.stdout
        assert to_peer and from_peer

        def theirs(line: str = "{}") -> Any:
            print(line, file=to_peer, flush=True)
            return json.loads(from_peer.readline() or sys.exit("transformers' loop ended"))

        theirs(json.dumps(asked)), theirs(), ours()
        rounds = [(ours(), theirs()) for _ in range(ROUNDS)]
        to_peer.close()
    ratios = [other[0] / own[0] for own, other in rounds]
    (_, own), (_, other) = rounds[-1]
    pairs = list(zip(own, other, strict=True))
    return {
        "model": config.model_name,
        "users": len(prompts),
        "prompt_tokens": statistics.median(map(len, prompts)),
        "items": len(catalogue.sids),
        "beams": config.beams,
        "users_per_second": len(prompts) / statistics.median(seconds for (seconds, _), _ in rounds),
        "transformers_users_per_second": len(prompts) / statistics.median(seconds for _, (seconds, _) in rounds),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "same_ten_share": statistics.mean(a[:10] == b[:10] for a, b in pairs),
        "load": os.getloadavg()[0],
        "versions": metrics.versions(),
    }


class Answered(NamedTuple):
    """A streamed answer: its text, why it ended, its token count, and the seconds to its first text and to its end."""

    text: str
    reason: str
    tokens: int
    first_seconds: float
    seconds: float


def asked(port: int, model: str, number: int) -> Answered:
    """The answer to one of the questions, which differ in prompt, length and seed."""
    body = {
        "model": model, "prompt": f"Question {number}: Nora has {number} marbles", "max_tokens": 16 + number * 2,
        "temperature": number % 2, "seed": number, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, text, reason, tokens = time.perf_counter(), 0.0, "", "", 0
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read()}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            first = first or time.perf_counter() - began
            tokens = (chunk["usage"] or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                text, reason = text + choice["text"], choice["finish_reason"] or reason
    return Answered(text, reason, tokens, first, time.perf_counter() - began)


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{share}": ordered[len(ordered) * share // 100] for share in (50, 90, 95, 99)} | {"most": ordered[-1]}


def distinct(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """A reward that is rarely 0: the share of distinct characters in a completion."""
    return len(set(completion)) / max(len(completion), 1)


def reinforce(config: GrpoConfig) -> dict[str, Any]:
    """Figures of a grpo run: completion tokens a second of the rollout, of the update, and of the whole step."""
    from lacuna import metrics

    with unsaved():
        cli.run(config)
    records = metrics.read_json_lines(config.run_directory / "metrics.jsonl")
    timed = records[min(WARM_STEPS, len(records) - 1) :]
    sums = {
        key: sum(record[key] for record in timed)
        for key in ("completion_tokens", "tokens", "rollout_seconds", "update_seconds", "step_seconds")
    }
    completions, once = config.prompts_per_step * config.completions_per_prompt, seconds_at_peak(config)
    return {
        "model": config.model_name,
        "completions": completions,
        "max_completion_tokens": config.max_completion_tokens,
        "steps_timed": len(timed),
        "completion_length": sums["completion_tokens"] / len(timed) / completions,
        "rollout_tokens_per_second": sums["completion_tokens"] / sums["rollout_seconds"],
        "update_tokens_per_second": sums["completion_tokens"] / sums["update_seconds"],
        "completion_tok_s": sums["completion_tokens"] / sums["step_seconds"],
        "rollout_share": sums["rollout_seconds"] / sums["step_seconds"],
        "update_share": sums["update_seconds"] / sums["step_seconds"],
        "step_seconds": sums["step_seconds"] / len(timed),
        "rollout_share_of_matrix_rate": once * sums["completion_tokens"] / sums["rollout_seconds"],
        "update_share_of_matrix_rate": 3
        * once
        * sums["tokens"]
        / sums["update_seconds"],  # forward, and backward twice
        "versions": metrics.versions(),
    }


def seconds_at_peak(config: ModelKeys) -> float:
    """The least time to multiply one token with a model's weights, at this machine's matrix product rate."""
    from lacuna.checkpoint import resolve_model
    from lacuna.model import parameter_counts, read_model_config

    flops = 2 * parameter_counts(read_model_config(resolve_model(config.model_name, with_weights=False)))["matmul"]
    rates = peak()
    return flops / rates["float32_flops" if config.compute_dtype == "float32" else "bfloat16_flops"]


def serve(arguments: list[str]) -> dict[str, Any]:
    """Figures of the server under load, and how many answers were wrong or lost."""
    program = [sys.executable, "-c", "from lacuna.cli import main; main()", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = re.match(r"(.+) at http://.+:(\d+),", process.stdout.readline())
        if not found:
            sys.exit("the server did not start")
        model, port = found[1], int(found[2])
        alone = [asked(port, model, number) for number in range(CLIENTS)]
        outcomes: Counter[str] = Counter()
        answers: list[Answered] = []
        end = time.perf_counter() + LOAD_SECONDS

        def client(number: int) -> None:
            while time.perf_counter() < end:
                number = (number + 1) % CLIENTS
                try:
                    answer = asked(port, model, number)
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    outcomes[f"lost: {error}"] += 1
                    continue
                outcomes["right" if answer[:3] == alone[number][:3] else "wrong"] += 1
                answers.append(answer)

        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        seconds = time.perf_counter() - began
        process.terminate()
    rate = sum(answer.tokens for answer in answers) / seconds
    return {
        "model": model,
        "clients": CLIENTS,
        "seconds": seconds,
        "answers": dict(outcomes),
        "answers_per_second": len(answers) / seconds,
        "tokens_per_second": rate,
        "share_of_matrix_rate": rate * seconds_at_peak(parse(ServeConfig, arguments, "bench serve")),
        "first_text_seconds": percentiles([answer.first_seconds for answer in answers]),
        "answer_seconds": percentiles([answer.seconds for answer in answers]),
        "first_text_seconds_alone": statistics.median(answer.first_seconds for answer in alone),
        "answer_seconds_alone": statistics.median(answer.seconds for answer in alone),
    }


if __name__ == "__main__":
    main()
