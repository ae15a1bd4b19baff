"""Constrained outputs and beam search against brute force by the full forward pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, TINY
from test_model import load, logits, positions
from test_sampler import GREEDY, greedy_by_full_forward, log_softmax, logits_after, random_prompt, sampler_of

from lacuna.apps.constraints import beam_search, forest_of, forest_of_rows, search
from lacuna.config import SamplingKeys, UserError
from lacuna.sampler import Request, Sampler
from lacuna.tokenizer import load_tokenizer

LEAVES = [(5, 6, 7), (5, 6, 8), (5, 9), (10,), (11, 12, 13, 14), (11, 12, 13, 15), (11, 5)]
CHOICES = [LEAVES, [(1, 2), (3,)], *([(n + 1,) * (9 - n), (n + 1, 100, *[7] * 5)] for n in range(6))]


@pytest.fixture(scope="module")
def constrained() -> Sampler:
    return sampler_of(load_tokenizer(TINY), constraint=forest_of(CHOICES))


def leaf_scores(prompt: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """Each leaf's log-probability after the prompt by the full forward pass."""
    scores = {}
    for leaf in LEAVES:
        table = log_softmax(logits_after(prompt, leaf))
        scores[leaf] = sum(table[place, token] for place, token in enumerate(leaf))
    return scores


def test_beams_on_a_trie_equal_brute_force_over_its_leaves(constrained: Sampler) -> None:
    prompts = [random_prompt(12), random_prompt(70)]
    found = beam_search(constrained, prompts, beam_count=8, max_tokens=6, root=0)
    assert found == beam_search(constrained, prompts, beam_count=8, max_tokens=6, root=0)
    for prompt, (beams, dropped) in zip(prompts, found, strict=True):
        assert dropped == -np.inf
        expected = sorted(leaf_scores(prompt).items(), key=lambda item: -item[1])
        assert [beam.tokens for beam in beams] == [leaf for leaf, _ in expected]
        assert all(beam.is_finished for beam in beams)
        np.testing.assert_allclose([beam.log_probability for beam in beams], [s for _, s in expected], atol=1e-5)


def test_free_beams_equal_brute_force_and_stop_at_stop_tokens(constrained: Sampler) -> None:
    model, params = load(REFERENCE / "qwen3")
    prompt, size = random_prompt(12), model.vocabulary_size
    ((beams, _),) = beam_search(constrained, [prompt], beam_count=size, max_tokens=2, stop_ids=(7,))
    first = log_softmax(logits_after(prompt, (0,)))[0]
    rows = np.array([[*prompt, token] for token in range(size)])
    second = first[:, None] + log_softmax(logits(params, model, rows, positions(rows))[:, -1])
    scores = {(a, b): second[a, b] for a in range(size) for b in range(size) if a != 7} | {(7,): first[7]}
    expected = sorted(scores, key=lambda tokens: -scores[tokens])[:size]
    assert [beam.tokens for beam in beams] == expected
    np.testing.assert_allclose([b.log_probability for b in beams], [scores[tokens] for tokens in expected], atol=1e-4)
    assert all(beam.is_finished == (beam.tokens[-1] == 7) for beam in beams)


def test_one_beam_is_greedy(constrained: Sampler) -> None:
    prompt = random_prompt(33)
    for root in (-1, 0):
        (((beam,), _),) = beam_search(constrained, [prompt], beam_count=1, max_tokens=GREEDY.max_tokens, root=root)
        (completion,) = constrained.generate([Request(prompt, GREEDY, root=root)])
        assert beam.tokens == completion.tokens
        assert beam.log_probability == pytest.approx(sum(completion.log_probabilities), abs=1e-4)


ITEMS = sorted({tuple(row) for row in np.random.default_rng(5).integers(20, 60, (400, 3)).tolist()} | {(20, 21, 22, 9)})


ENDED: list[tuple[int, ...]] = [(*item, 3, 4) for item in ITEMS]


@pytest.fixture(scope="module")
def catalogue() -> Sampler:
    return sampler_of(load_tokenizer(TINY), constraint=forest_of([[(*item, 3) for item in ITEMS]], end_id=4))


def brute_force(prompt: tuple[int, ...], paths: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The sum of log-probabilities up to each step of each path after the prompt, by the full forward pass."""
    model, params = load(REFERENCE / "qwen3")
    width = max(map(len, paths))
    rows = np.array([[*prompt, *path, *[0] * (width - len(path))] for path in paths])
    table = log_softmax(np.asarray(logits(params, model, rows, positions(rows)), np.float64)[:, len(prompt) - 1 : -1])
    tokens = np.array([[*path, *[-1] * (width - len(path))] for path in paths])
    steps = np.take_along_axis(table, np.maximum(tokens, 0)[..., None], axis=2)[..., 0]
    return np.cumsum(np.where(tokens < 0, 0, steps), axis=1)


def test_every_item_is_found_where_nothing_is_dropped(catalogue: Sampler) -> None:
    prompt = random_prompt(20)
    scores = dict(zip(ENDED, brute_force(prompt, ENDED)[:, -1].tolist(), strict=True))
    ((beams, dropped),) = beam_search(catalogue, [prompt], beam_count=len(ITEMS), max_tokens=6, root=0)
    assert dropped == -np.inf and {beam.tokens for beam in beams} == scores.keys()
    np.testing.assert_allclose([beam.log_probability for beam in beams], [scores[b.tokens] for b in beams], 1e-6, 1e-5)
    assert [b.log_probability for b in beams] == sorted((b.log_probability for b in beams), reverse=True)


def test_beams_are_those_of_a_search_level_by_level_and_the_best_dropped_is_known(catalogue: Sampler) -> None:
    """As many survive as there are beams, or candidates: the first level has fewer words than beams."""
    prompt = random_prompt(20)
    sums = brute_force(prompt, ENDED)
    for count in (1, 7, 50):
        kept, best_dropped = {()}, -np.inf
        for level in range(6):
            reached = {path[: level + 1]: sums[row, level] for row, path in enumerate(ENDED) if path[:level] in kept}
            ranked = sorted(reached, key=lambda path: -reached[path])
            kept = set(ranked[:count])
            best_dropped = max([best_dropped, *(reached[path] for path in ranked[count : count + 1])])
        (found,) = beam_search(catalogue, [prompt], beam_count=count, max_tokens=6, root=0)
        assert {beam.tokens for beam in found.beams} == kept and len(found.beams) == count
        assert found.dropped == pytest.approx(best_dropped, abs=1e-5)


def test_what_is_certain_agrees_with_brute_force() -> None:
    pairs = sorted({tuple(pair) for pair in np.random.default_rng(6).integers(20, 60, (300, 2)).tolist()})
    sampler = sampler_of(load_tokenizer(TINY), constraint=forest_of([pairs]))
    prompts = [random_prompt(40, seed) for seed in range(6)]
    scores = [dict(zip(pairs, brute_force(prompt, pairs)[:, -1].tolist(), strict=True)) for prompt in prompts]
    certain = list[int]()
    for count in (3, 12, 40):
        for exact, found in zip(scores, beam_search(sampler, prompts, count, 2, root=0), strict=True):
            best, sure = sorted(exact, key=lambda pair: -exact[pair]), found.certain_count
            assert [beam.tokens for beam in found.beams[:sure]] == best[:sure]
            assert sure == sum(exact[beam.tokens] >= found.dropped for beam in found.beams)
            certain.append(sure)
    assert 0 in certain and 40 in certain and any(1 < sure < 12 for sure in certain)


def test_beams_are_the_same_on_several_devices(catalogue: Sampler) -> None:
    prompts = [random_prompt(length) for length in (3, 40, 70)]
    forest = forest_of([[(*item, 3) for item in ITEMS]], end_id=4)
    sharded = sampler_of(load_tokenizer(TINY), shape=(2, 1, 2), constraint=forest)
    one, four = (beam_search(each, prompts, 9, 6, root=0) for each in (catalogue, sharded))
    for alone, together in zip(one, four, strict=True):
        assert [beam.tokens for beam in alone.beams] == [beam.tokens for beam in together.beams]
        expected = [beam.log_probability for beam in alone.beams]
        np.testing.assert_allclose([beam.log_probability for beam in together.beams], expected, 1e-6, 1e-5)
        assert alone.dropped == pytest.approx(together.dropped, abs=1e-5)


def test_a_trie_by_sorting_has_the_paths_of_one_by_lookup() -> None:
    random = np.random.default_rng(0)
    choices = [{tuple(random.integers(9, size=random.integers(1, 5)).tolist()) for _ in range(60)} for _ in range(3)]
    forest = forest_of([list(choice) * 2 for choice in choices], end_id=10)
    first, token = np.asarray(forest.first), np.asarray(forest.token)
    assert forest.root_count == 3 and len(forest.fan) == np.diff(first).max()

    def paths(node: int) -> list[tuple[int, ...]]:
        edges = range(first[node], first[node + 1])
        return [(int(token[edge]), *rest) for edge in edges for rest in paths(edge + 3)] if edges else [()]

    for root, choice in enumerate(choices):
        assert paths(root) == sorted((*path, 10) for path in choice)


def test_a_trie_of_a_million_items_is_small() -> None:
    random = np.random.default_rng(0)
    rows = np.zeros((10**6, 6), np.int32)
    rows[:, 1:4], rows[:, 4:] = random.integers(256, size=(10**6, 3)) + np.array([0, 256, 512]), (900, 901)
    forest = forest_of_rows(rows, 1)
    assert sum(part.nbytes for part in forest) <= 90e6
    assert len(forest.fan) <= 256  # what a step looks at for each hypothesis, whatever the catalogue's size
    items = len(np.unique(rows[:, 1] * 2**16 + (rows[:, 2] - 256) * 2**8 + rows[:, 3] - 512))
    assert len(forest.token) == 256 + 65536 + 3 * items


def test_prompts_of_all_lengths_share_a_few_programs(catalogue: Sampler) -> None:
    compiled: Any = search
    before = compiled._cache_size()
    for length in range(1, 310, 44):
        beam_search(catalogue, [random_prompt(length)], beam_count=3, max_tokens=6, root=0)
    assert compiled._cache_size() - before <= 4


def test_beams_keep_their_prompt_once(catalogue: Sampler) -> None:
    """A search holds the prompt's keys and values once, and of each hypothesis those of its own tokens."""
    beams, tokens = 50, 256

    def temporaries(beam_count: int) -> int:
        prompt = np.zeros((1, tokens), np.int32), np.ones(1, np.int32)
        arguments = (catalogue.params, *prompt, catalogue.constraint, np.int32(0), np.array([-1], np.int32))
        lowered = search.lower(*arguments, catalogue.model, beam_count, 6)
        memory: Any = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes

    model = catalogue.model
    a_token = 2 * model.layers * model.kv_heads * model.head * 4
    copies = (beams - 1) * tokens * a_token
    assert temporaries(beams) - temporaries(1) < copies / 2


def test_beams_without_room_for_all_their_tokens_are_refused(constrained: Sampler) -> None:
    with pytest.raises(UserError, match="311 tokens and max_tokens = 10 are more than the capacity of 320"):
        beam_search(constrained, [random_prompt(5), random_prompt(311)], beam_count=2, max_tokens=10)


def test_constrained_requests_get_the_same_in_any_company(constrained: Sampler) -> None:
    requests = [Request(random_prompt(12 + n), GREEDY, root=2 + n) for n in range(6)]
    alone = [constrained.generate([request])[0].tokens for request in requests]
    assert all(tokens in choice for tokens, choice in zip(alone, CHOICES[2:], strict=True))
    parts: dict[int, tuple[int, ...]] = {}
    waiting = list(requests)
    while waiting or not constrained.is_idle:
        if waiting:
            constrained.submit(waiting.pop(0))
        for part in constrained.advance(steps=3):
            parts[part.request] = parts.get(part.request, ()) + part.tokens
    assert [parts[number] for number in sorted(parts)] == alone


def test_constrained_completions_are_leaves_drawn_by_their_probability(constrained: Sampler) -> None:
    """Greedy takes the likeliest allowed token at each step; draws follow the probabilities of allowed tokens."""
    prompt = random_prompt(12)
    requests = [
        Request(prompt, GREEDY, root=0),
        Request(prompt, GREEDY, root=1),
        Request(prompt, GREEDY),
        Request(prompt, SamplingKeys(), root=0, n=40),
    ]
    greedy, other, free, *drawn = constrained.generate(requests)
    assert greedy.tokens in LEAVES and greedy.finish_reason == "stop"
    assert other.tokens in CHOICES[1]
    assert free.tokens == greedy_by_full_forward(prompt, GREEDY.max_tokens)
    assert {completion.tokens for completion in drawn} <= set(LEAVES)
    assert len({completion.tokens for completion in drawn}) > 1
    scores = leaf_scores(prompt)
    for completion in drawn:
        assert sum(completion.log_probabilities) == pytest.approx(scores[completion.tokens], abs=1e-4)
        allowed = logits_after(prompt, completion.tokens)
        sampled = 0.0
        for place, token in enumerate(completion.tokens):
            next_tokens = {leaf[place] for leaf in LEAVES if leaf[:place] == completion.tokens[:place]}
            sampled += allowed[place, token] - np.logaddexp.reduce(allowed[place, sorted(next_tokens)])
        assert sum(completion.sampled_log_probabilities) == pytest.approx(sampled, abs=1e-4)


def test_an_output_that_begins_another_needs_an_end() -> None:
    with pytest.raises(UserError, match=r"\[1, 2\] begins another"):
        forest_of([LEAVES, [(1, 2), (1, 2, 3)]])
    forest = forest_of([[(1, 2), (1, 2, 3)]], end_id=9)
    assert forest.token.tolist() == [1, 2, 3, 9, 9] and len(forest.fan) == 2
    for choice in ([()], []):
        with pytest.raises(UserError, match="at least one"):
            forest_of([choice])


def test_a_constraint_outside_the_vocabulary_and_a_node_without_tokens_are_refused(constrained: Sampler) -> None:
    with pytest.raises(UserError, match="token 160 is not in the model's vocabulary of 160"):
        sampler_of(load_tokenizer(TINY), constraint=forest_of([[(3, 160)]]))
    leaf = max(constrained.roots) + 1
    for root in (leaf, -2):
        with pytest.raises(UserError, match=f"root = {root} is no node of the sampler's constraint"):
            constrained.submit(Request((1,), root=root))
