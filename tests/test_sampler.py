"""The sampler against the full forward pass, transformers' values and formulas written out in NumPy."""

import json
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

from lacuna import checkpoint, model, sampler
from lacuna.apps import constraints
from lacuna.apps.constraints import beam_search
from lacuna.checkpoint import OpenedModel
from lacuna.config import SamplingKeys, UserError
from lacuna.model import PAGE, token_statistics
from lacuna.sampler import Request
from lacuna.tokenizer import TextStream, Tokenizer, decode, encode, load_tokenizer

TINY_CONFIG = model.read_model_config(REFERENCE / "qwen3")
GREEDY = SamplingKeys(temperature=0.0, max_tokens=12)
LENGTHS = np.array([1, 63, 64, 17])


@partial(jax.jit, static_argnames=("config", "pages"))
def after_prompt(
    params: Any, token: jax.Array, length: jax.Array, following: jax.Array, config: model.ModelConfig, pages: int
) -> jax.Array:
    """Logits behind each of `following`, decoded one by one on the cache of prompts of mixed lengths."""
    empty = model.empty_cache(config, token.shape[0], pages, "float32")
    filled = model.prefill(params, token, config)
    cache = jax.tree.map(lambda whole, part: whole.at[:, :, : part.shape[2]].set(part), empty, filled)
    rows = []
    for step in range(following.shape[1]):
        rotations = model.rotation_table(cache, config)
        hidden, cache = model.decode_step(params, cache, following[:, step], length + step, rotations, config)
        rows.append(model.logits_of(hidden, model.head_of(params, config), config.vocabulary_size)[:, 0])
    return jnp.stack(rows, axis=1)


def prompts_of(config: model.ModelConfig, steps: int) -> np.ndarray:
    shape = (len(LENGTHS), LENGTHS.max() + steps)
    return np.random.default_rng(0).integers(config.vocabulary_size, size=shape, dtype=np.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_has_the_logits_of_the_full_forward_pass(family: str) -> None:
    config, params = load(REFERENCE / family)
    steps = 3
    token = prompts_of(config, steps)
    following = np.stack([row[length : length + steps] for row, length in zip(token, LENGTHS, strict=True)])
    decoding = model.decoding_params(params, config, "float32")
    ours = after_prompt(decoding, token[:, : LENGTHS.max()], LENGTHS, following, config, pages=2)
    for row, length in enumerate(LENGTHS):
        whole = token[row : row + 1, : length + steps]
        expected = logits(params, config, whole, positions(whole))[0, length:]
        np.testing.assert_allclose(ours[row], expected, atol=1e-4, rtol=0)


def test_more_pages_change_no_bit() -> None:
    """4 heads × 4 slots × 4 pages: below 4,096 scores XLA on CPU compiles another exponential."""
    config, params = load(REFERENCE / "qwen3")
    decoding = model.decoding_params(params, config, "float32")
    token = prompts_of(config, 1)
    few, many = (
        after_prompt(decoding, token[:, :PAGE], LENGTHS, token[:, PAGE:], config, pages=pages) for pages in (4, 16)
    )
    np.testing.assert_array_equal(few, many)


def test_one_slot_decodes_as_several_do() -> None:
    config, params = load(REFERENCE / "qwen3")
    weights = model.decoding_params(params, config, "float32")
    token = prompts_of(config, 2)
    arguments = token[:, : LENGTHS.max()], LENGTHS, token[:, LENGTHS.max() :]
    alone = after_prompt(weights, *(x[1:2] for x in arguments), config, pages=2)
    np.testing.assert_allclose(alone, after_prompt(weights, *arguments, config, pages=2)[1:2], atol=1e-5, rtol=0)


def test_decoding_on_eight_devices_equals_one() -> None:
    config, params = load(REFERENCE / "qwen3")
    token = prompts_of(config, 2)
    arguments = token[:, : LENGTHS.max()], LENGTHS, token[:, LENGTHS.max() :], config
    alone = after_prompt(model.decoding_params(params, config, "float32"), *arguments, pages=2)
    mesh = mesh_of(2, 2, 2)
    shardings = jax.tree.map(
        lambda row: jax.NamedSharding(mesh, model.partition_spec(row)), model.parameter_table(config)
    )
    with jax.set_mesh(mesh):
        spread = jax.jit(model.decoding_params, static_argnums=(1, 2))(
            jax.device_put(params, shardings), config, "float32"
        )
        together = after_prompt(spread, *arguments, pages=2)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)


# Rules


def rules_from(values: dict[str, Any], count: int) -> sampler.Rules:
    rows = [sampler.rules_of(Request((0,)), 0, capacity=64) for _ in range(count)]
    rules = sampler.empty_slots(TINY_CONFIG, count, 1, "float32").rules
    filled = {name: np.array([row[name] for row in rows]) for name in sampler.Rules._fields}
    return sampler.Rules(
        **{
            name: jnp.asarray(values.get(name, filled[name]), getattr(rules, name).dtype)
            for name in sampler.Rules._fields
        }
    )


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
    count = jnp.zeros(logits.shape, jnp.int32)
    penalised = jax.jit(sampler.penalise)(logits, jnp.asarray(seen > 0), count, rules)
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
    ours = sampler.penalise(jnp.asarray(logits), jnp.ones((3, 50), bool), jnp.asarray(count), rules)
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
    tokenizer: Tokenizer, slots: int = 4, shape: tuple[int, int, int] = (1, 1, 1), padding: int = 0
) -> sampler.Sampler:
    """A sampler of a small random model, its vocabulary padded on request."""
    config = replace(TINY_CONFIG, padded_vocabulary=TINY_CONFIG.vocabulary_size + padding)
    mesh = mesh_of(*shape)
    params = checkpoint.load_params(REFERENCE / "qwen3", config, mesh)
    return sampler.Sampler(
        params, OpenedModel(REFERENCE / "qwen3", config, tokenizer, mesh, ""), slots, capacity=320, dtype="float32"
    )


@pytest.fixture(scope="module")
def small(tokenizer: Tokenizer) -> sampler.Sampler:
    return sampler_of(tokenizer)


def random_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([length, seed]).integers(TINY_CONFIG.vocabulary_size, size=length).tolist())


def greedy_by_full_forward(prompt: tuple[int, ...], count: int) -> list[int]:
    config, params = load(REFERENCE / "qwen3")
    token = np.zeros((1, len(prompt) + count), np.int32)
    token[0, : len(prompt)] = prompt
    for place in range(len(prompt), token.shape[1]):
        token[0, place] = np.argmax(logits(params, config, token, positions(token))[0, place - 1])
    return token[0, len(prompt) :].tolist()


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


def test_greedy_generation_is_the_full_forward_pass_token_for_token(small: sampler.Sampler) -> None:
    prompts = [random_prompt(length) for length in (1, 30, 64, 70)]
    completions = small.generate([Request(prompt, GREEDY) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.tokens) == greedy_by_full_forward(prompt, GREEDY.max_tokens)
        assert completion.finish_reason == "length"


def test_a_request_gets_the_same_alone_and_in_any_company(small: sampler.Sampler) -> None:
    together = small.generate(mixed_requests())
    backwards = small.generate(mixed_requests()[::-1])[::-1]
    for number, request in enumerate(mixed_requests()):
        (alone,) = small.generate([request])
        assert replace(together[number], request=0) == alone
        assert replace(backwards[number], request=0) == alone


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1)])
def test_eight_devices_generate_what_one_does(tokenizer: Tokenizer, shape: tuple[int, int, int]) -> None:
    requests = mixed_requests()[:5]
    alone = sampler_of(tokenizer, slots=8).generate(requests)
    spread = sampler_of(tokenizer, 8, shape, padding=8).generate(requests)
    for ours, expected in zip(spread, alone, strict=True):
        assert ours.tokens == expected.tokens
        np.testing.assert_allclose(ours.log_probabilities, expected.log_probabilities, atol=1e-5)


def test_log_probabilities_are_those_of_training(small: sampler.Sampler) -> None:
    config, params = load(REFERENCE / "qwen3")
    requests = mixed_requests()
    for request, completion in zip(requests, small.generate(requests), strict=True):
        row = np.array([[*request.prompt, *completion.tokens]])
        hidden = model.forward(
            params,
            model.embed(params, jnp.asarray(row[:, :-1])),
            jnp.ones((1, row.shape[1] - 1), int),
            jnp.asarray(positions(row[:, :-1])),
            config,
        )
        head = model.head_of(params, config)
        loss = token_statistics(hidden, head, jnp.asarray(row[:, 1:]), config.vocabulary_size).loss
        expected = -np.asarray(loss)[0, len(request.prompt) - 1 :]
        np.testing.assert_allclose(completion.log_probabilities, expected, atol=1e-5, rtol=0)


def test_sampled_log_probabilities_are_those_of_the_distribution_drawn_from(small: sampler.Sampler) -> None:
    """At every step, the rules on the full logits give the value; greedy tokens are certain."""
    config, params = load(REFERENCE / "qwen3")
    rules = SamplingKeys(
        temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, max_tokens=12
    )
    request = Request(random_prompt(20), rules, seed=4)
    (completion,) = small.generate([request])
    row = np.array([[*request.prompt, *completion.tokens]], np.int32)
    whole = logits(params, config, row, positions(row))[0]
    for number, token in enumerate(completion.tokens):
        count = np.bincount(completion.tokens[:number], minlength=config.vocabulary_size)
        prompted = np.bincount(request.prompt, minlength=config.vocabulary_size) > 0
        vectors = {name: np.array([getattr(rules, name)]) for name in SamplingKeys.model_fields}
        here = rules_from(vectors, 1)
        scores = sampler.penalise(whole[None, 19 + number], jnp.asarray(prompted)[None], jnp.asarray(count)[None], here)
        expected = log_softmax(sampler.restrict(scores, here))[0, token]
        assert completion.sampled_log_probabilities[number] == pytest.approx(expected, abs=1e-4)
    (certain,) = small.generate([Request(random_prompt(20), GREEDY)])
    assert set(certain.sampled_log_probabilities) == {0.0}


def test_completions_of_one_prompt_differ_and_repeat_with_their_seed(small: sampler.Sampler) -> None:
    request = Request(random_prompt(70), SamplingKeys(temperature=5.0, max_tokens=20), seed=7, n=6)
    first, again = (small.generate([request]) for _ in range(2))
    assert first == again
    assert [completion.index for completion in first] == list(range(6))
    assert len({completion.tokens for completion in first}) == 6
    other = small.generate([replace(request, seed=8)])
    assert not {completion.tokens for completion in first} & {completion.tokens for completion in other}


def test_a_prompt_is_prefilled_once_for_all_its_completions(
    small: sampler.Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert len(np.unique(tokens)) > 140 and tokens.max() < TINY_CONFIG.vocabulary_size


def test_top_logprobs_are_the_likeliest_of_the_model(small: sampler.Sampler) -> None:
    config, params = load(REFERENCE / "qwen3")
    prompt = random_prompt(10)
    (completion,) = small.generate([Request(prompt, SamplingKeys(max_tokens=1), top_logprobs=5)])
    row = np.array([prompt])
    expected = log_softmax(logits(params, config, row, positions(row))[0, -1:])[0]
    ids, values = zip(*completion.top_logprobs[0], strict=True)
    assert list(ids) == np.argsort(-expected)[:5].tolist()
    np.testing.assert_allclose(values, expected[list(ids)], atol=1e-5)


def test_stop_tokens_and_limits_end_a_completion(small: sampler.Sampler) -> None:
    (free,) = small.generate([Request(random_prompt(9), GREEDY)])
    stop = free.tokens[6]
    (stopped,) = small.generate([Request(random_prompt(9), GREEDY, stop_ids=(stop,))])
    cut = free.tokens.index(stop) + 1
    assert stopped.tokens == free.tokens[:cut] and stopped.finish_reason == "stop"
    (full,) = small.generate([Request(random_prompt(310), SamplingKeys(max_tokens=500))])
    assert len(full.tokens) == 10 and full.finish_reason == "length"


def test_a_cancelled_request_frees_its_slot_and_is_not_heard_of_again(small: sampler.Sampler) -> None:
    numbers = [small.submit(Request(random_prompt(5, seed), SamplingKeys(max_tokens=100))) for seed in range(6)]
    assert {part.request for part in small.advance(4)} == set(numbers[:4])
    for number in (numbers[1], numbers[5]):
        small.cancel(number)
    heard = set()
    while not small.is_idle:
        heard |= {part.request for part in small.advance()}
    assert heard == {numbers[0], *numbers[2:5]}


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
    ],
)
def test_what_cannot_be_generated_is_refused(small: sampler.Sampler, request_: Request, words: str) -> None:
    with pytest.raises(UserError, match=words):
        small.submit(request_)


def test_a_batch_that_does_not_fit_is_refused_with_its_sizes(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"65536 slots of 2,048 tokens take .*GB.* are free there"):
        sampler.check_memory(TINY_CONFIG, 65536, 2048, "float32", mesh_of(1, 1, 1))
    batch = sampler.empty_slots(TINY_CONFIG, 4, 5, "float32")
    held = jax.tree.leaves(batch.cache) + [batch.count, batch.is_prompted]
    assert sum(leaf.nbytes for leaf in held) == sampler.batch_bytes(TINY_CONFIG, 4, 300, "float32")
    with pytest.raises(UserError, match="slots = 3"):
        sampler_of(tokenizer, 3, (2, 1, 1))


# Constraints and beam search

LEAVES = [(5, 6, 7), (5, 6, 8), (5, 9), (10,), (11, 12, 13, 14), (11, 12, 13, 15), (11, 5)]


def leaf_scores(prompt: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Each leaf's log-probability behind the prompt by the full forward pass."""
    config, params = load(REFERENCE / "qwen3")
    scores = {}
    for leaf in LEAVES:
        row = np.array([[*prompt, *leaf]])
        table = log_softmax(logits(params, config, row, positions(row))[0])
        scores[leaf] = sum(table[len(prompt) + place - 1, token] for place, token in enumerate(leaf))
    return scores


def test_beams_on_a_trie_equal_brute_force_over_its_leaves(small: sampler.Sampler) -> None:
    prompts = [random_prompt(12), random_prompt(70)]
    found = beam_search(small, prompts, beam_count=8, max_tokens=6, trie=constraints.token_trie(LEAVES))
    assert found == beam_search(small, prompts, beam_count=8, max_tokens=6, trie=constraints.token_trie(LEAVES))
    for prompt, beams in zip(prompts, found, strict=True):
        expected = sorted(leaf_scores(prompt).items(), key=lambda item: -item[1])
        assert [beam.tokens for beam in beams] == [leaf for leaf, _ in expected]
        assert all(beam.is_finished for beam in beams)
        np.testing.assert_allclose([beam.log_probability for beam in beams], [s for _, s in expected], atol=1e-4)


def test_free_beams_equal_brute_force_and_stop_at_stop_tokens(small: sampler.Sampler) -> None:
    config, params = load(REFERENCE / "qwen3")
    prompt, size = random_prompt(12), config.vocabulary_size
    (beams,) = beam_search(small, [prompt], beam_count=size, max_tokens=2, stop_ids=(7,))
    row = np.array([prompt])
    first = log_softmax(logits(params, config, row, positions(row))[0, -1:])[0]
    rows = np.array([[*prompt, token] for token in range(size)])
    second = first[:, None] + log_softmax(logits(params, config, rows, positions(rows))[:, -1])
    scores = {(a, b): second[a, b] for a in range(size) for b in range(size) if a != 7} | {(7,): first[7]}
    expected = sorted(scores, key=lambda tokens: -scores[tokens])[:size]
    assert [beam.tokens for beam in beams] == expected
    np.testing.assert_allclose([b.log_probability for b in beams], [scores[tokens] for tokens in expected], atol=1e-4)
    assert all(beam.is_finished == (beam.tokens[-1] == 7) for beam in beams)


def test_one_beam_is_greedy(small: sampler.Sampler) -> None:
    prompt = random_prompt(33)
    ((beam,),) = beam_search(small, [prompt], beam_count=1, max_tokens=GREEDY.max_tokens)
    (completion,) = small.generate([Request(prompt, GREEDY)])
    assert beam.tokens == completion.tokens
    assert beam.log_probability == pytest.approx(sum(completion.log_probabilities), abs=1e-4)


def test_beams_without_room_for_all_their_tokens_are_refused(small: sampler.Sampler) -> None:
    with pytest.raises(UserError, match="311 tokens and max_tokens = 10 are more than the capacity of 320"):
        beam_search(small, [random_prompt(5), random_prompt(311)], beam_count=2, max_tokens=10)


def test_tries_come_and_go_while_others_are_walked_in(small: sampler.Sampler) -> None:
    prompts = [random_prompt(12 + number) for number in range(6)]
    tries = [constraints.token_trie([(n + 1,) * (9 - n), (n + 1, 100, *[7] * 5)]) for n in range(6)]
    requests = [Request(prompt, GREEDY, trie=trie) for prompt, trie in zip(prompts, tries, strict=True)]
    alone = [small.generate([request])[0].tokens for request in requests]
    parts: dict[int, tuple[int, ...]] = {}
    waiting = list(requests)
    while waiting or not small.is_idle:
        if waiting:
            small.submit(waiting.pop(0))
        for part in small.advance(steps=3):
            parts[part.request] = parts.get(part.request, ()) + part.tokens
        assert len(small.tries) <= len(small.running) + 1
    assert [parts[number] for number in sorted(parts)] == alone


def test_constrained_completions_are_leaves_drawn_by_their_probability(small: sampler.Sampler) -> None:
    """Greedy takes the likeliest allowed token at each step; draws follow the probabilities of allowed tokens."""
    trie, prompt = constraints.token_trie(LEAVES), random_prompt(12)
    others = constraints.token_trie([(1, 2), (3,)])
    requests = [
        Request(prompt, GREEDY, trie=trie),
        Request(prompt, GREEDY, trie=others),
        Request(prompt, GREEDY),
        Request(prompt, SamplingKeys(), trie=trie, n=40),
    ]
    greedy, other, free, *drawn = small.generate(requests)
    assert greedy.tokens in LEAVES and greedy.finish_reason == "stop"
    assert other.tokens in [(1, 2), (3,)]
    assert list(free.tokens) == greedy_by_full_forward(prompt, GREEDY.max_tokens)
    assert {completion.tokens for completion in drawn} <= set(LEAVES)
    assert len({completion.tokens for completion in drawn}) > 1
    for completion in drawn:
        assert sum(completion.log_probabilities) == pytest.approx(leaf_scores(prompt)[completion.tokens], abs=1e-4)
        assert sum(completion.sampled_log_probabilities) > sum(completion.log_probabilities)


def test_a_trie_with_an_output_that_begins_another_needs_an_end() -> None:
    with pytest.raises(UserError, match=r"\[1, 2\] begins another"):
        constraints.token_trie([(1, 2), (1, 2, 3)])
    trie = constraints.token_trie([(1, 2), (1, 2, 3)], end_id=9)
    assert len(trie.token) == 5 and trie.width == 2
    with pytest.raises(UserError, match="at least one"):
        constraints.token_trie([()])


# Text


@pytest.mark.reference
def test_stories260k_repeats_the_greedy_text_of_its_fixtures(shelf: Path) -> None:
    directory = shelf / "weights" / "stories260k"
    config, mesh = model.read_model_config(directory), mesh_of(1, 1, 1)
    params, tokenizer = checkpoint.load_params(directory, config, mesh), load_tokenizer(directory)
    stories = sampler.Sampler(
        params, OpenedModel(directory, config, tokenizer, mesh, ""), slots=2, capacity=512, dtype="float32"
    )
    cases = json.loads((directory / "fixtures.json").read_text())["cases"]
    rules = SamplingKeys(temperature=0.0, max_tokens=120)
    for case, completion in zip(
        cases, stories.generate([Request(tuple(case["input_ids"]), rules) for case in cases]), strict=True
    ):
        assert list(completion.tokens) == case["greedy_new_ids"]
        assert case["text"] + completion.text == case["greedy_text"]


@pytest.mark.parametrize("stop", ["world", "o w", "rl", "d🦜", "🦜", "é", "lo wor", "zzz"])
def test_text_ends_before_a_stop_string_wherever_tokens_part(
    small: sampler.Sampler, tokenizer: Tokenizer, stop: str
) -> None:
    text = "Hello world🦜 café\nlast"
    token = encode(tokenizer, text, add_special_tokens=False).tolist()
    running = sampler.Running(0, 0, Request((1,), stop=(stop, "never")), TextStream(tokenizer, [1]), 0)
    told, reason, used = "", "", 0
    for start in range(0, len(token), 2):
        chunk = token[start : start + 2]
        piece, count, reason = small._read(running, chunk, "length" if start + 2 >= len(token) else "")
        told, used = told + piece, used + count
        assert text.partition(stop)[0].startswith(told)
        if reason:
            break
    assert told == text.partition(stop)[0]
    assert reason == ("stop" if stop in text else "length")
    assert stop not in text or stop in decode(tokenizer, token[:used])


# Defaults


def test_generation_config_gives_the_defaults_and_the_user_wins(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stated = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [5, 6]}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    rules, stop_ids = sampler.generation_defaults(tmp_path, tokenizer)
    assert rules == SamplingKeys(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert stop_ids == tuple(dict.fromkeys([5, 6, tokenizer.eos_id]))
    chosen = sampler.rules_in_force(SamplingKeys(top_k=0, max_tokens=9), rules)
    assert chosen == rules.model_copy(update={"top_k": 0, "max_tokens": 9})
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert sampler.generation_defaults(tmp_path, tokenizer)[0].temperature == 0
    (tmp_path / "generation_config.json").write_text('{"top_p": 7}')
    with pytest.raises(UserError, match="generation_config.json: top_p = 7"):
        sampler.generation_defaults(tmp_path, tokenizer)
