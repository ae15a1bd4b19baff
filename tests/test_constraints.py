"""Constrained outputs and beam search against brute force by the full forward pass."""

import numpy as np
import pytest
from conftest import REFERENCE, TINY
from test_model import load, logits, positions
from test_sampler import GREEDY, greedy_by_full_forward, log_softmax, logits_after, random_prompt, sampler_of

from lacuna.apps.constraints import beam_search, forest_of
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
    for prompt, beams in zip(prompts, found, strict=True):
        expected = sorted(leaf_scores(prompt).items(), key=lambda item: -item[1])
        assert [beam.tokens for beam in beams] == [leaf for leaf, _ in expected]
        assert all(beam.is_finished for beam in beams)
        np.testing.assert_allclose([beam.log_probability for beam in beams], [s for _, s in expected], atol=1e-4)


def test_free_beams_equal_brute_force_and_stop_at_stop_tokens(constrained: Sampler) -> None:
    model, params = load(REFERENCE / "qwen3")
    prompt, size = random_prompt(12), model.vocabulary_size
    (beams,) = beam_search(constrained, [prompt], beam_count=size, max_tokens=2, stop_ids=(7,))
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
        ((beam,),) = beam_search(constrained, [prompt], beam_count=1, max_tokens=GREEDY.max_tokens, root=root)
        (completion,) = constrained.generate([Request(prompt, GREEDY, root=root)])
        assert beam.tokens == completion.tokens
        assert beam.log_probability == pytest.approx(sum(completion.log_probabilities), abs=1e-4)


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
