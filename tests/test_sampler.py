"""The sampler against the full forward pass, transformers' values and formulas written out in NumPy."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, TINY, mesh_of
from test_model import FAMILIES, load, logits, positions

from lacuna import sampler
from lacuna.checkpoint import OpenedModel, at
from lacuna.config import SamplingKeys, UserError
from lacuna.metrics import byte_size
from lacuna.model import (
    PAGE,
    ModelConfig,
    decode_step,
    decoding_params,
    embed,
    empty_cache,
    forward,
    head_of,
    parameter_table,
    partition_spec,
    prefill,
    read_model_config,
    rotation_table,
    token_statistics,
)
from lacuna.sampler import Completion, Forest, Request, Rules, Sampler
from lacuna.tokenizer import TextStream, Tokenizer, decode, encode, load_tokenizer
from lacuna.weights import load_params

QWEN3 = read_model_config(REFERENCE / "qwen3")
GREEDY = SamplingKeys(temperature=0.0, max_tokens=12)
LENGTHS = np.array([1, 63, 64, 17])


@partial(jax.jit, static_argnames=("model", "pages"))
def after_prompt(
    params: Any, token: jax.Array, length: jax.Array, following: jax.Array, model: ModelConfig, pages: int
) -> jax.Array:
    """Logits after each of `following`, decoded one by one on the cache of prompts of mixed lengths."""
    empty = empty_cache(model, token.shape[0], pages, "float32")
    _, filled = prefill(params, token, model)
    cache = jax.tree.map(lambda whole, part: whole.at[:, :, : part.shape[2]].set(part), empty, filled)
    rows = []
    for step in range(following.shape[1]):
        given, cache = decode_step(
            params, cache, following[:, step], length + step, rotation_table(cache, model), model
        )
        rows.append(given)
    return jnp.stack(rows, axis=1)


# with biases, with norms of queries and keys, without rotation in some layers, with norms of outputs and all heads
DECODED = ("qwen2", "qwen3", "smollm3", "olmo2")


def prompts_of(model: ModelConfig, steps: int) -> np.ndarray:
    shape = (len(LENGTHS), LENGTHS.max() + steps)
    return np.random.default_rng(0).integers(model.vocabulary_size, size=shape, dtype=np.int32)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in DECODED else pytest.mark.slow) for name in FAMILIES]
)
def test_cached_decoding_has_the_logits_of_the_full_forward_pass(family: str) -> None:
    model, params = load(REFERENCE / family)
    steps = 3
    token = prompts_of(model, steps)
    following = np.stack([row[length : length + steps] for row, length in zip(token, LENGTHS, strict=True)])
    decoding = decoding_params(params, model, "float32")
    ours = after_prompt(decoding, token[:, : LENGTHS.max()], LENGTHS, following, model, pages=2)
    for row, length in enumerate(LENGTHS):
        whole = token[row : row + 1, : length + steps]
        expected = logits(params, model, whole, positions(whole))[0, length:]
        np.testing.assert_allclose(ours[row], expected, atol=1e-4, rtol=0)


def test_more_pages_change_no_bit() -> None:
    """4 heads × 4 slots × 4 pages: below 4,096 scores XLA on CPU compiles another exponential."""
    model, params = load(REFERENCE / "qwen3")
    decoding = decoding_params(params, model, "float32")
    token = prompts_of(model, 1)
    few, many = (
        after_prompt(decoding, token[:, :PAGE], LENGTHS, token[:, PAGE:], model, pages=pages) for pages in (4, 16)
    )
    np.testing.assert_array_equal(few, many)


def test_one_slot_and_eight_devices_decode_as_several_slots_on_one_device() -> None:
    model, params = load(REFERENCE / "qwen3")
    decoding = decoding_params(params, model, "float32")
    token = prompts_of(model, 2)
    arguments = token[:, : LENGTHS.max()], LENGTHS, token[:, LENGTHS.max() :]
    expected = after_prompt(decoding, *arguments, model, pages=2)
    alone = after_prompt(decoding, *(x[1:2] for x in arguments), model, pages=2)
    np.testing.assert_allclose(alone, expected[1:2], atol=1e-5, rtol=0)
    mesh = mesh_of(2, 2, 2)
    shardings = jax.tree.map(lambda row: jax.NamedSharding(mesh, partition_spec(row)), parameter_table(model))
    with jax.set_mesh(mesh):
        spread = jax.jit(decoding_params, static_argnums=(1, 2))(jax.device_put(params, shardings), model, "float32")
        together = after_prompt(spread, *arguments, model, pages=2)
    np.testing.assert_allclose(together, expected, atol=1e-5, rtol=0)


# Rules


def rules_from(values: dict[str, Any], count: int) -> Rules:
    """Neutral rules for that many slots but for `values`."""
    rules = jax.tree.map(jnp.asarray, sampler.stacked([sampler.rules_of(Request((0,)), 0, capacity=64)] * count))
    return rules._replace(**{name: jnp.asarray(x, getattr(rules, name).dtype) for name, x in values.items()})


def slots_that_saw(is_prompted: np.ndarray, count: np.ndarray) -> sampler.Slots:
    """Active slots whose prompts and completions have these tokens."""
    each = jnp.ones(len(count), jnp.int32)
    return sampler.Slots((), each, each, each, -each, each > 0, jnp.asarray(is_prompted), jnp.asarray(count, jnp.int32))


def log_softmax(scores: Any) -> np.ndarray:
    wide = np.asarray(scores, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.sum(np.exp(wide), -1, keepdims=True))


def presence_of(seen: np.ndarray, vocabulary_size: int) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=vocabulary_size) for row in seen])


@pytest.mark.parametrize("name", ["repetition_penalty", "temperature", "top_k", "top_p", "min_p", "together"])
def test_rules_leave_the_distribution_that_transformers_processors_leave(name: str) -> None:
    reference = np.load(REFERENCE / "sampling.npz")
    logits = jnp.asarray(reference["logits"])
    names = [name] if name != "together" else ["repetition_penalty", "temperature", "top_k", "top_p", "min_p"]
    rules = rules_from({each: reference[each] for each in names}, len(logits))
    seen = presence_of(reference["seen"], logits.shape[1])
    penalised = jax.jit(sampler.penalise)(logits, slots_that_saw(seen > 0, np.zeros_like(seen)), rules)
    ours = log_softmax(jax.jit(sampler.restrict)(penalised, rules))
    expected = log_softmax(reference[name if name == "together" else f"only_{name}"])
    assert np.array_equal(ours > -np.inf, expected > -np.inf)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_penalties_follow_openais_formula_over_generated_tokens_only() -> None:
    random = np.random.default_rng(1)
    logits = random.standard_normal((3, 50)).astype(np.float32)
    count = random.integers(0, 4, (3, 50), dtype=np.int32)
    frequency, presence = np.array([0.0, 0.5, -0.25]), np.array([1.5, 0.0, 0.5])
    rules = rules_from({"frequency_penalty": frequency, "presence_penalty": presence}, 3)
    ours = jax.jit(sampler.penalise)(jnp.asarray(logits), slots_that_saw(count >= 0, count), rules)
    expected = logits - count * frequency[:, None] - (count > 0) * presence[:, None]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    """A chi-square statistic of 200 outcomes, 1 % beyond 249; tokens without probability never come."""
    random = np.random.default_rng(2)
    scores = np.where(random.random(300) < 0.33, -np.inf, 2 * random.standard_normal(300)).astype(np.float32)
    tries = 40_000
    rows = jnp.broadcast_to(jnp.asarray(scores), (tries, 300))
    zero = jnp.zeros(tries, jnp.int32)
    token = jax.jit(sampler.draw_token)(rows, zero.astype(jnp.uint32), zero, jnp.arange(tries))
    found = np.bincount(token, minlength=300)
    expected = tries * np.exp(log_softmax(scores[None])[0])
    assert not np.any(found[scores == -np.inf])
    likely = expected > 5
    statistic = np.sum((found - expected)[likely] ** 2 / expected[likely])
    freedom = np.sum(likely)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


# Generation


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY)


def sampler_of(
    tokenizer: Tokenizer, slots: int = 4, shape: tuple[int, int, int] = (1, 1, 1), padding: int = 0,
    constraint: Forest | None = None,
) -> Sampler:  # fmt: skip
    """A sampler of a small random model, its vocabulary padded on request."""
    model = replace(QWEN3, padded_vocabulary=QWEN3.vocabulary_size + padding)
    mesh = mesh_of(*shape)
    opened = OpenedModel(REFERENCE / "qwen3", model, tokenizer, mesh, "", at(REFERENCE / "qwen3"))
    return Sampler(load_params(opened.source, model, mesh), opened, slots, 320, "float32", constraint)


@pytest.fixture(scope="module")
def small(tokenizer: Tokenizer) -> Sampler:
    return sampler_of(tokenizer)


@pytest.fixture(scope="module")
def mixed(small: Sampler) -> list[Completion]:
    return small.generate(mixed_requests())


def random_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([length, seed]).integers(QWEN3.vocabulary_size, size=length).tolist())


def logits_after(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> np.ndarray:
    """Logits of each of these tokens by the full forward pass, in float64; padded, so that it is compiled once."""
    model, params = load(REFERENCE / "qwen3")
    row = np.zeros((1, 320), np.int32)
    row[0, : len(prompt) + len(tokens)] = *prompt, *tokens
    found = logits(params, model, row, positions(row))[0, len(prompt) - 1 :][: len(tokens)]
    return np.asarray(found, np.float64)


def greedy_by_full_forward(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    tokens: tuple[int, ...] = ()
    for _ in range(count):
        tokens += (int(np.argmax(logits_after(prompt, (*tokens, 0))[-1])),)
    return tokens


def kept_by_the_rules(logits: np.ndarray, rules: SamplingKeys, prompt: Any, made: Any) -> np.ndarray:
    """Scores of one row that a token is drawn from, -inf for what the rules leave out: in float64, by sorting."""
    count = np.bincount(made, minlength=len(logits)) if len(made) else np.zeros(len(logits))
    known = (count > 0) | np.isin(np.arange(len(logits)), prompt)
    repeated = np.where(logits < 0, logits * rules.repetition_penalty, logits / rules.repetition_penalty)
    scores = np.where(known, repeated, logits)
    scores = (scores - rules.frequency_penalty * count - rules.presence_penalty * (count > 0)) / rules.temperature
    order = np.argsort(-scores)
    kept = order[: rules.top_k or None]
    probability = np.exp(log_softmax(scores[kept]))
    before = np.cumsum(probability) - probability  # of the likelier ones
    kept = kept[before < rules.top_p] if rules.top_p < 1 else kept
    kept = kept[scores[kept] >= scores[order[0]] + np.log(rules.min_p)] if rules.min_p else kept
    return np.where(np.isin(np.arange(len(scores)), kept), scores, -np.inf)


def mixed_requests() -> list[Request]:
    """Prompts and lengths of all sizes, greedy and sampled by every rule, more than there are slots."""
    rules = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"temperature": 0.7},
        {"top_k": 10, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.1},
    ]
    return [
        Request(
            random_prompt(length),
            SamplingKeys(max_tokens=limit, **rules[number % 4]),
            seed=number,
            stop_ids=(3, 5) if number % 3 else (),
        )
        for number, (length, limit) in enumerate([(1, 40), (63, 5), (64, 33), (65, 90), (17, 64), (200, 100), (5, 1)])
    ]


def test_greedy_generation_is_the_full_forward_pass_token_for_token(small: Sampler) -> None:
    prompts = [random_prompt(length) for length in (1, 30, 64, 70)]
    completions = small.generate([Request(prompt, GREEDY) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.tokens == greedy_by_full_forward(prompt, GREEDY.max_tokens)
        assert completion.finish_reason == "length"


def test_a_request_gets_the_same_alone_and_in_any_company(small: Sampler, mixed: list[Completion]) -> None:
    backwards = small.generate(mixed_requests()[::-1])[::-1]
    for number, request in enumerate(mixed_requests()):
        (alone,) = small.generate([request])
        assert replace(mixed[number], request=0) == alone
        assert replace(backwards[number], request=0) == alone


@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow)])
def test_eight_devices_generate_what_one_does(
    tokenizer: Tokenizer, mixed: list[Completion], shape: tuple[int, int, int]
) -> None:
    spread = sampler_of(tokenizer, 8, shape, padding=8).generate(mixed_requests()[:5])
    for ours, expected in zip(spread, mixed[:5], strict=True):
        assert ours.tokens == expected.tokens
        np.testing.assert_allclose(ours.log_probabilities, expected.log_probabilities, atol=1e-5)


def test_log_probabilities_are_those_of_training(mixed: list[Completion]) -> None:
    model, params = load(REFERENCE / "qwen3")

    @jax.jit
    def losses(row: jax.Array) -> jax.Array:
        token, position = row[:, :-1], jnp.arange(row.shape[1] - 1)[None]
        hidden = forward(params, embed(params, token, "float32"), jnp.ones_like(token), position, model)
        return token_statistics(hidden, head_of(params, model), row[:, 1:], model.vocabulary_size).loss

    for request, completion in zip(mixed_requests(), mixed, strict=True):
        row = np.zeros((1, 321), np.int32)
        end = len(request.prompt) + len(completion.tokens)
        row[0, :end] = *request.prompt, *completion.tokens
        expected = -losses(row)[0, len(request.prompt) - 1 : end - 1]
        np.testing.assert_allclose(completion.log_probabilities, expected, atol=1e-5, rtol=0)


RULES = [
    SamplingKeys(temperature=4.0, top_k=40, max_tokens=12),
    SamplingKeys(temperature=5.0, top_p=0.9, max_tokens=12),
    SamplingKeys(temperature=4.0, min_p=0.02, max_tokens=12),
    SamplingKeys(temperature=4.5, top_k=60, top_p=0.95, min_p=0.002, repetition_penalty=1.2, frequency_penalty=0.3,
                 presence_penalty=0.1, max_tokens=12),
]  # fmt: skip


def test_log_probabilities_of_drawn_tokens_are_those_of_float64(small: Sampler) -> None:
    """The model's own, the same at the temperature, and those under the rules, which every drawn token satisfies."""
    requests = [Request(random_prompt(20), rules, seed=seed) for seed, rules in enumerate(RULES)]
    for request, completion in zip(requests, small.generate(requests), strict=True):
        own, tempered, sampled = [], [], []
        for number, row in enumerate(logits_after(request.prompt, completion.tokens)):
            token = completion.tokens[number]
            own.append(log_softmax(row)[token])
            tempered.append(log_softmax(row / request.rules.temperature)[token])
            kept = kept_by_the_rules(row, request.rules, request.prompt, completion.tokens[:number])
            sampled.append(log_softmax(kept)[token])
        assert min(sampled) < -1, "a draw with hardly any choice shows nothing"
        np.testing.assert_allclose(completion.log_probabilities, own, atol=1e-5)
        np.testing.assert_allclose(completion.tempered_log_probabilities, tempered, atol=1e-5)
        np.testing.assert_allclose(completion.sampled_log_probabilities, sampled, atol=1e-4)


def test_greedy_tokens_are_certain(small: Sampler) -> None:
    (certain,) = small.generate([Request(random_prompt(20), GREEDY)])
    assert certain.sampled_log_probabilities == (0.0,) * GREEDY.max_tokens


def test_top_logprobs_are_the_likeliest_of_the_model_for_those_that_asked(small: Sampler) -> None:
    rules = SamplingKeys(temperature=0.7, top_k=3, max_tokens=6)
    requests = [Request(random_prompt(10), rules, top_logprobs=top) for top in (5, 0)]
    asked, other = small.generate(requests)
    assert other.top_logprobs == ((),) * 6 and len(asked.top_logprobs) == 6
    for row, found in zip(logits_after(requests[0].prompt, asked.tokens), asked.top_logprobs, strict=True):
        expected = log_softmax(row)
        ids, values = zip(*found, strict=True)
        assert list(ids) == np.argsort(-expected)[:5].tolist()
        np.testing.assert_allclose(values, expected[list(ids)], atol=1e-5)


def test_top_logprobs_are_fetched_only_for_a_request_that_asks(small: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree.top_token.shape[-1]) or device_get(tree))
    small.generate([Request((1,), GREEDY)])
    small.generate([Request((1,), GREEDY, top_logprobs=2)])
    assert fetched == [0, sampler.TOP_LOGPROBS]


def test_completions_of_one_prompt_differ_and_repeat_with_their_seed(small: Sampler) -> None:
    request = Request(random_prompt(70), SamplingKeys(temperature=5.0, max_tokens=20), seed=7, n=6)
    first, again = (small.generate([request]) for _ in range(2))
    assert first == again
    assert [completion.index for completion in first] == list(range(6))
    assert len({completion.tokens for completion in first}) == 6
    other = small.generate([replace(request, seed=8)])
    assert not {completion.tokens for completion in first} & {completion.tokens for completion in other}


def test_a_prompt_is_prefilled_once_for_all_its_completions(small: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    fill_cache = sampler.fill_cache
    monkeypatch.setattr(sampler, "fill_cache", lambda *all: rows.append(len(all[1])) or fill_cache(*all))
    completions = small.generate([Request(random_prompt(70), SamplingKeys(max_tokens=5), n=9)])
    assert len(completions) == 9 and rows == [1]


def test_padded_vocabulary_is_never_sampled(tokenizer: Tokenizer) -> None:
    padded = sampler_of(tokenizer, padding=96)
    rules = SamplingKeys(temperature=50.0, max_tokens=200, presence_penalty=50.0, frequency_penalty=5.0)
    completions = padded.generate([Request((1, 2), rules, n=4, top_logprobs=20)])
    tokens = np.concatenate([completion.tokens for completion in completions])
    assert len(np.unique(tokens)) > 140 and tokens.max() < QWEN3.vocabulary_size


def test_stop_tokens_and_limits_end_a_completion(small: Sampler) -> None:
    (free,) = small.generate([Request(random_prompt(9), GREEDY)])
    stop = free.tokens[6]
    (stopped,) = small.generate([Request(random_prompt(9), GREEDY, stop_ids=(stop,))])
    cut = free.tokens.index(stop) + 1
    assert stopped.tokens == free.tokens[:cut] and stopped.finish_reason == "stop"
    (full,) = small.generate([Request(random_prompt(310), SamplingKeys(max_tokens=500))])
    assert len(full.tokens) == 10 and full.finish_reason == "length"


def test_a_cancelled_request_frees_its_slot_and_returns_no_more_parts(small: Sampler) -> None:
    numbers = [small.submit(Request(random_prompt(5, seed), SamplingKeys(max_tokens=100))) for seed in range(6)]
    assert {part.request for part in small.advance(4)} == set(numbers[:4])
    for number in (numbers[1], numbers[5]):
        small.cancel(number)
    seen_numbers = set()
    while not small.is_idle:
        seen_numbers |= {part.request for part in small.advance()}
    assert seen_numbers == {numbers[0], *numbers[2:5]}


def in_turns(small: Sampler, requests: list[Request], given: tuple[int, ...], delays: list[int]) -> list[Completion]:
    """Completions of held requests, each of which continues once with what is given, that many blocks later."""
    index_of, parts = {small.submit(request): index for index, request in enumerate(requests)}, {}
    due, stops = dict[tuple[int, int], int](), dict[tuple[int, int], int]()
    while not small.is_idle:
        for part in small.advance(7):
            key = part.request, part.index
            parts.setdefault(key, []).append(part)
            if part.finish_reason == "stop":
                stops[key] = stops.get(key, 0) + 1
                due[key] = delays[(index_of[key[0]] + key[1]) % len(delays)]
        for key in list(due):
            due[key] -= 1
            if due[key] < 0:
                small.release(*key) if stops[key] > 1 else small.extend(*key, given)
                del due[key]
    return [replace(sampler.joined_parts(parts[key]), request=index_of[key[0]]) for key in sorted(parts)]


def test_a_held_completion_continues_as_if_what_it_is_given_had_been_prompted(small: Sampler) -> None:
    rules = SamplingKeys(temperature=0.0, repetition_penalty=1.3, max_tokens=90)
    (free,) = small.generate([Request(random_prompt(30), rules)])
    stop, given = free.tokens[4], (free.tokens[4], *random_prompt(44))
    requests = [Request(random_prompt(30), rules, (stop,), is_held=True)]
    company = [Request(random_prompt(50), SamplingKeys(max_tokens=150), seed=1)]
    first, _ = in_turns(small, requests + company, given, [3])
    turn = free.tokens[: free.tokens.index(stop) + 1]
    prompt = *requests[0].prompt, *turn, *given
    left = rules.model_copy(update={"max_tokens": 90 - len(turn) - len(given)})
    (fresh,) = small.generate([Request(prompt, left, (stop,))])
    assert first.tokens == (*turn, *given, *fresh.tokens) and len(given) > sampler.BLOCK
    own = first.log_probabilities[-len(fresh.tokens) :]
    np.testing.assert_allclose(own, fresh.log_probabilities, atol=1e-5)
    by_full_forward = [log_softmax(row)[token] for row, token in zip(
        logits_after(requests[0].prompt, first.tokens), first.tokens, strict=True)]  # fmt: skip
    np.testing.assert_allclose(first.log_probabilities, by_full_forward, atol=1e-5)
    assert not any(first.sampled_log_probabilities)


def test_what_a_held_completion_becomes_does_not_depend_on_how_long_it_waits(small: Sampler) -> None:
    rules, given = SamplingKeys(temperature=3.0, max_tokens=60), random_prompt(5)
    requests = [
        Request(random_prompt(20, seed), rules, (5, 6, 7, 8), seed=seed, n=3, is_held=True) for seed in range(3)
    ]
    quick, slow = (in_turns(small, requests, given, delays) for delays in ([0], [0, 9, 3, 1]))
    assert quick == slow
    continued = [each for each in quick if any(tuple(each.tokens[at : at + 5]) == given for at in range(55))]
    assert len(continued) > 3 and len({each.tokens for each in quick}) == 9
    later = [replace(requests[0], first=1, n=2)]
    assert [each.tokens for each in in_turns(small, later, given, [0])] == [each.tokens for each in quick[1:3]]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(tuple(range(100)) * 4), "the prompt has 400 tokens.*room for 320"),
        (Request(()), "the prompt has no token"),
        (Request((1, 160)), "token 160 is not in the model's vocabulary of 160"),
        (Request((1,), stop=("",)), "empty string"),
        (Request((1,), stop_ids=tuple(range(9))), "stop_ids has 9 tokens"),
        (Request((1,), n=0), "n = 0"),
        (Request((1,), top_logprobs=21), "top_logprobs = 21"),
        (Request((1,), root=0), "root = 0 is no node of the sampler's constraint"),
        (Request((1,), stop=("a",), is_held=True), "a request that is held has no stop strings"),
    ],
)
def test_what_cannot_be_generated_is_refused(small: Sampler, request_: Request, words: str) -> None:
    with pytest.raises(UserError, match=words):
        small.submit(request_)


def test_a_batch_that_does_not_fit_is_refused_with_its_sizes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"65536 slots of 2,048 tokens take .*GB.* are free there"):
        sampler.check_memory(QWEN3, 65536, 2048, "float32", mesh_of(1, 1, 1))
    batch = sampler.empty_slots(QWEN3, 4, 5, "float32")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    for free in (held * 3 // 2, held * 3 // 2 - 1):
        monkeypatch.setattr(sampler, "free_memory_bytes", lambda free=free: free)
        with nullcontext() if 2 * free >= 3 * held else pytest.raises(UserError, match=re.escape(byte_size(held))):
            sampler.check_memory(QWEN3, 4, 300, "float32", mesh_of(1, 1, 1))
    with pytest.raises(UserError, match="slots = 3"):
        sampler_of(tokenizer, 3, (2, 1, 1))


# Text


@pytest.mark.reference
def test_stories260k_repeats_the_greedy_text_of_its_fixtures(shelf: Path) -> None:
    directory = shelf / "weights" / "stories260k"
    model, mesh = read_model_config(directory), mesh_of(1, 1, 1)
    opened = OpenedModel(directory, model, load_tokenizer(directory), mesh, "", at(directory))
    stories = Sampler(load_params(directory, model, mesh), opened, slots=2, capacity=512, dtype="float32")
    cases = json.loads((directory / "fixtures.json").read_text())["cases"]
    rules = SamplingKeys(temperature=0.0, max_tokens=120)
    completions = stories.generate([Request(tuple(case["input_ids"]), rules) for case in cases])
    for case, completion in zip(cases, completions, strict=True):
        assert list(completion.tokens) == case["greedy_new_ids"]
        assert case["text"] + completion.text == case["greedy_text"]


@pytest.mark.parametrize("stop", ["world", "o w", "rl", "d🦜", "🦜", "é", "lo wor", "zzz"])
def test_text_ends_before_a_stop_string_wherever_tokens_part(tokenizer: Tokenizer, stop: str) -> None:
    text = "Hello world🦜 café\nlast"
    token = encode(tokenizer, text, add_special_tokens=False).tolist()
    running = sampler.Running(0, 0, Request((1,), stop=(stop, "never")), TextStream(tokenizer, [1]), 0)
    whole, reason, used = "", "", 0
    for start in range(0, len(token), 2):
        chunk = token[start : start + 2]
        piece, count, reason = running.read(chunk, "length" if start + 2 >= len(token) else "")
        whole, used = whole + piece, used + count
        assert text.partition(stop)[0].startswith(whole)
        if reason:
            break
    assert whole == text.partition(stop)[0]
    assert reason == ("stop" if stop in text else "length")
    assert stop not in text or stop in decode(tokenizer, token[:used])
