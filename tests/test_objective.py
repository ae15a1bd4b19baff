"""The objective against TRL's loss, formulas in NumPy, and itself: packed, shared and accumulated."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, grpo_config
from test_model import load

from lacuna import objective, optimizer
from lacuna.config import GrpoConfig
from lacuna.model import embed, forward, head_of
from lacuna.objective import Sample


def samples_of(inputs: dict[str, Any]) -> list[Sample]:
    """The reference's completions as groups of two, each after a prompt of three tokens; the last two are alike."""
    return [
        Sample(
            step=1, place=number // 2, index=number % 2, origin="", prompt_tokens=(1, 2, 3), tokens=(5,) * length,
            text="", log_probabilities=tuple(inputs["reference"][number][:length]),
            sampled_log_probabilities=tuple(inputs["sampled"][number][:length]),
            is_truncated=inputs["is_truncated"][number], rewards={}, reward=float(min(number, 6)),
            advantage=inputs["advantage"][number],
        )
        for number, length in enumerate(inputs["lengths"])
    ]  # fmt: skip


def rows_of(
    inputs: dict[str, Any], config: GrpoConfig
) -> tuple[objective.RolloutBatch, jax.Array, dict[tuple[int, int], tuple[int, int]]]:
    """The reference's inputs in packed rows, with the current log-probabilities, and where each counted token of a
    completion went."""
    groups = objective.group_by_prompt(samples_of(inputs))
    kept, weight_of = objective.kept_samples(groups, config), objective.token_weights(groups, config)
    batch, _ = objective.packed_rows(kept, weight_of, (4, 2, config.sequence_length), is_shared=False)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), batch)
    current, places = np.zeros(flat.token.shape, np.float32), {}
    for number in (2 * sample.place + sample.index for sample in kept):
        length = inputs["lengths"][number]
        sampled = np.float32(inputs["sampled"][number][:length])
        row, end = next(
            (row, at + length)
            for row, at in np.ndindex(*flat.token.shape)
            if np.array_equal(flat.sampled[row, at : at + length], sampled)
        )
        here = row, slice(end - length, end)
        flat.old[here], flat.reference[here] = inputs["old"][number][:length], inputs["reference"][number][:length]
        current[here] = inputs["log_probability"][number][:length]
        places |= {(number, at): (row, end - length + at) for at in range(length)}
    return jax.tree.map(jnp.asarray, flat), jnp.asarray(current), places


CASES = json.loads((REFERENCE / "grpo.json").read_text())
SWITCHES = ("ratio", "loss_normalisation", "kl_weight", "importance_limit")


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: "-".join(str(case[name]) for name in SWITCHES))
def test_loss_and_gradient_are_those_of_trl(case: dict[str, Any]) -> None:
    inputs, switches = CASES["inputs"], {name: case[name] for name in SWITCHES}
    config = grpo_config(updates_per_rollout=2, max_completion_tokens=CASES["longest"], sequence_length=24, **switches)
    batch, current, places = rows_of(inputs, config)
    loss_of = objective.policy_loss(config)
    batch = batch._replace(sequence_ratio=loss_of.sequence_ratio(current, batch))
    (loss, _), gradient = jax.value_and_grad(loss_of.objective, has_aux=True)(current, batch)
    np.testing.assert_allclose(loss, case["loss"], rtol=2e-5, atol=1e-7)
    for (number, at), place in places.items():
        np.testing.assert_allclose(gradient[place], case["gradient"][number][at], rtol=2e-4, atol=1e-7)
    assert np.count_nonzero(gradient) == np.count_nonzero(case["gradient"]) > 15


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_the_objective_has_the_slope_of_its_formula_in_float64(clip: float) -> None:
    inputs = CASES["inputs"]
    config = grpo_config(updates_per_rollout=2, sequence_length=24, kl_weight=0.1, clip_low=clip)
    batch, current, places = rows_of(inputs, config)
    gradient = jax.grad(lambda x: objective.policy_loss(config).objective(x, batch)[0])(current)
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in batch._asdict().items()}

    def formula(log_probability: np.ndarray) -> float:
        ratio = np.exp(log_probability - wide["old"])
        clipped = np.clip(ratio, 1 - clip, 1 + 0.28)
        gain = np.minimum(ratio * wide["advantage"], clipped * wide["advantage"])
        gain = gain * np.minimum(np.exp(wide["old"] - wide["sampled"]), 2.0)
        log_reference = wide["reference"] - log_probability
        return float(np.sum(wide["weight"] * (0.1 * ratio * (np.exp(log_reference) - log_reference - 1) - gain)))

    at = np.asarray(current, np.float64)
    for place in places.values():
        nudge = np.zeros_like(at)
        nudge[place] = 1e-6
        slope = (formula(at + nudge) - formula(at - nudge)) / 2e-6
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-3, atol=1e-6)


def one_row(**fields: Any) -> objective.RolloutBatch:
    """A row of six tokens with these fields, the others zeros."""
    zero = {
        name: jnp.zeros((1, 6), int if name in objective.INTEGERS else float) for name in objective.RolloutBatch._fields
    }
    return objective.RolloutBatch(**zero | {name: jnp.asarray(value)[None] for name, value in fields.items()})


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_the_expected_slope_of_the_divergence_is_that_of_the_policy_from_its_start(ratio: str, updates: int) -> None:
    config = grpo_config(kl_weight=1.0, importance_limit=0.0, updates_per_rollout=updates, ratio=ratio)
    theta, start, before = 1.5 * np.random.default_rng(0).normal(size=(3, 6))
    before = before if updates > 1 else theta
    policy, of_start, drawn = (np.exp(x) / np.exp(x).sum() for x in (theta, start, before))
    # Each token of the vocabulary once, weighing as likely as it is drawn: the sum is the expectation
    batch = one_row(weight=drawn, old=np.log(drawn), reference=np.log(of_start))
    loss_of = objective.policy_loss(config)

    def loss(theta: jax.Array) -> jax.Array:
        return loss_of.objective(jax.nn.log_softmax(theta)[None], batch)[0]

    found = jax.grad(loss)(jnp.asarray(theta))
    divergence = np.sum(policy * np.log(policy / of_start))
    np.testing.assert_allclose(found, policy * (np.log(policy / of_start) - divergence), atol=1e-6)
    np.testing.assert_allclose(loss(jnp.asarray(theta)), divergence, rtol=1e-5)


def test_a_ratio_at_the_bound_of_its_clip_keeps_its_slope() -> None:
    batch = one_row(weight=np.full(6, 1 / 6), advantage=np.array([1.0, -1, 2, -2, 3, -3]))
    loss_of = objective.policy_loss(grpo_config(clip_low=0.0, clip_high=0.0))
    gradient = jax.grad(lambda x: loss_of.objective(x, batch)[0])(jnp.zeros((1, 6)))
    np.testing.assert_allclose(gradient, -batch.weight * batch.advantage, rtol=1e-6)


def test_the_figures_of_the_objective_are_those_of_its_formulas_in_float64() -> None:
    inputs = CASES["inputs"]
    config = grpo_config(updates_per_rollout=2, sequence_length=24, kl_weight=0.1, clip_low=0.1, clip_high=0.1)
    batch, current, places = rows_of(inputs, config)
    _, (sums, largest) = objective.policy_loss(config).objective(current, batch)
    facts = sums | largest
    rows, slots = np.array([*places.values()]).T
    named = batch._asdict() | {"current": current}
    wide = {name: np.asarray(leaf, np.float64)[rows, slots] for name, leaf in named.items()}
    ratio, mismatch = np.exp(wide["current"] - wide["old"]), wide["old"] - wide["uncut"]
    is_clipped = np.where(wide["advantage"] > 0, ratio > 1.1, (ratio < 0.9) & (wide["advantage"] < 0))
    log_reference = wide["reference"] - wide["current"]
    expected = {
        "count": len(places),
        "clip_fraction": np.sum(is_clipped),
        "importance_mean": np.sum(np.exp(wide["old"] - wide["sampled"])),
        "kl": np.sum(np.exp(log_reference) - log_reference - 1),
        "logprob_difference_mean": np.sum(np.abs(mismatch)),
        "logprob_difference_max": np.max(np.abs(mismatch)),
    }
    assert 0 < expected["clip_fraction"] < len(places)
    assert facts.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(facts[name], value, rtol=1e-5, err_msg=name)


def test_the_figures_of_several_updates_are_means_over_their_tokens() -> None:
    """A token counts the same in whichever update it was; the loss and the difference are those before any update."""
    sums = {"clip_fraction": 3, "importance_mean": 29.5, "logprob_difference_mean": 0.5, "kl": 0.75, "entropy": 61.0}
    facts = {"loss": 0.5, "gradient_norm": 2.0, "learning_rate": 1e-3, "logprob_difference_max": 0.25, "skipped": 0}
    first = facts | sums | {"count": 10}
    second = {name: 3 * value for name, value in (facts | sums).items()} | {"count": 40, "skipped": 1}
    found = objective.update_facts([first, second])
    assert found == {name: pytest.approx(4 * value / 50) for name, value in sums.items()} | {
        "loss": 0.5, "gradient_norm": 6.0, "learning_rate": pytest.approx(3e-3), "logprob_difference_max": 0.25,
        "skipped": 1, "skipped_updates": 1, "target_tokens": 50,
    }  # fmt: skip


def test_advantages_are_zero_without_variance_and_centred_else() -> None:
    rewards = np.array([[1.0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [3.0, 2, 1, 0]])
    plain = objective.advantages(rewards, scale_by_std=False)
    np.testing.assert_allclose(plain, [[0.5, -0.5, -0.5, 0.5], [0] * 4, [1.5, 0.5, -0.5, -1.5]])
    scaled = objective.advantages(rewards, scale_by_std=True)
    np.testing.assert_allclose(scaled[0], plain[0] / (np.sqrt(1 / 3) + 1e-4))
    assert not scaled[1].any()


def random_samples(vocabulary: int) -> list[Sample]:
    """Twelve completions of four prompts, of many lengths; one prompt is a single token."""
    random = np.random.default_rng(1)
    prompts = [tuple(random.integers(1, vocabulary, length).tolist()) for length in (3, 4, 1, 6)]
    samples = []
    for number in range(12):
        length = int(random.integers(2, 9))
        samples.append(
            Sample(
                step=1, place=number // 3, index=number % 3, origin="", prompt_tokens=prompts[number // 3],
                tokens=tuple(random.integers(1, vocabulary, length).tolist()), text="",
                log_probabilities=(-1.0,) * length,
                sampled_log_probabilities=tuple((-3 * random.random(length)).tolist()),
                is_truncated=False, rewards={}, reward=float(number), advantage=float(random.normal()),
            )
        )  # fmt: skip
    return samples


def packed(samples: list[Sample], config: GrpoConfig, shape: tuple[int, int, int], is_shared: bool) -> Any:
    """All of these samples in rows, and how many micro-batches hold any."""
    return objective.packed_rows(samples, objective.token_weights([samples], config), shape, is_shared)


def gradient_of(
    samples: list[Sample], config: GrpoConfig, rows_at_once: int, is_shared: bool = False
) -> tuple[Any, float]:
    """Gradient and loss of samples in micro-batches, read off the step of the update."""
    model, params = load(REFERENCE / "qwen3")
    shape = 12, rows_at_once, config.sequence_length
    batch, count = packed(samples, config, shape, is_shared)
    recipe = optimizer.recipe_of(config.model_copy(update={"clip_norm": 1e30}), 50)
    state = optimizer.fresh_state(jax.tree.map(jnp.copy, params))
    loss, batch = objective.policy_loss(config), jax.tree.map(jnp.asarray, batch)
    state, facts = optimizer.train_step(state, batch, np.float32(1), recipe, model, loss, np.int32(count))
    moments: Any = state.moments
    return jax.tree.map(lambda leaf: leaf / (1 - optimizer.ADAM_BETA1), moments.mu), float(facts["loss"])


@pytest.mark.parametrize(("is_shared", "expected"), [
    (False, {"token": [1, 2, 3, 4, 7, 8, 1, 2, 3, 4, 5], "position": [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4],
             "segment": [1] * 6 + [2] * 5, "prompt_offset": [0] * 11}),
    (True, {"token": [1, 2, 3, 4, 7, 8, 4, 5], "position": [0, 1, 2, 3, 4, 5, 3, 4],
            "segment": [1, 1, 1, 2, 2, 2, 3, 3], "prompt_offset": [0, 0, 0, 1, 1, 1, 2, 2]}),
])  # fmt: skip
def test_rows_have_each_completion_at_its_positions(is_shared: bool, expected: dict[str, list[int]]) -> None:
    two = [
        replace(
            sample,
            prompt_tokens=(1, 2, 3, 4),
            tokens=tokens,
            log_probabilities=(-1.0,) * len(tokens),
            sampled_log_probabilities=(-1.0,) * len(tokens),
        )  # fmt: skip
        for sample, tokens in zip(random_samples(150), ((5, 6), (7, 8, 9)), strict=False)
    ]
    rows, count = packed(two, grpo_config(), (2, 1, 16), is_shared)
    assert count == 1 and not rows.segment[1].any()
    for name, values in expected.items():
        assert getattr(rows, name)[0, 0].tolist() == values + [0] * (16 - len(values)), name
    assert rows.target[rows.weight > 0].tolist() == [7, 8, 9, 5, 6]


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(("length", "rows_at_once"), [(64, 4), pytest.param(16, 3, marks=pytest.mark.slow), (16, 1)])
def test_packing_and_micro_batches_and_shared_prompts_change_nothing(
    length: int, rows_at_once: int, is_shared: bool
) -> None:
    samples = random_samples(150)
    config = grpo_config(sequence_length=64, loss_normalisation="sequence", temperature=0.8)
    expected, loss = gradient_of(samples, config, 1)
    config = config.model_copy(update={"sequence_length": length})
    found, same = gradient_of(samples, config, rows_at_once, is_shared)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


def test_the_gradient_is_that_of_the_whole_logits() -> None:
    samples, config = random_samples(150), grpo_config(temperature=0.8, importance_limit=2.0)
    model, params = load(REFERENCE / "qwen3")
    rows, _ = packed(samples, config, (1, 4, config.sequence_length), is_shared=False)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), rows)

    def table_of(params: Any) -> jax.Array:
        hidden = forward(params, embed(params, batch.token, "float32"), batch.segment, batch.position, model)
        logits = hidden @ head_of(params, model).T / config.temperature
        return jax.nn.log_softmax(logits[..., : model.vocabulary_size])

    def plain(params: Any) -> jax.Array:
        table = table_of(params)
        of_targets = jnp.take_along_axis(table, batch.target[..., None], axis=-1)[..., 0]
        return objective.policy_loss(config).objective(of_targets, batch)[0]

    loss, expected = jax.jit(jax.value_and_grad(plain))(params)
    found, same = gradient_of(samples, config, 4)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


def test_the_gradient_of_a_sequences_ratio_is_that_of_the_product_of_its_tokens() -> None:
    normalised = {"ratio": "sequence", "loss_normalisation": "sequence", "clip_low": 0.01, "clip_high": 0.02}
    config = grpo_config(updates_per_rollout=2, importance_limit=0.0, temperature=0.8, **normalised)
    samples, (model, params) = random_samples(150), load(REFERENCE / "qwen3")
    rows, _ = packed(samples, config, (1, 4, config.sequence_length), is_shared=True)
    batch, loss_of = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), rows), objective.policy_loss(config)
    arguments = jax.tree.map(lambda leaf: leaf[None], batch), np.int32(1), model, loss_of
    noise = np.random.default_rng(3).normal(size=batch.token.shape)
    batch = batch._replace(old=objective.log_probabilities(params, *arguments)[0] + 0.1 * noise)

    def plain(params: Any) -> jax.Array:
        offset = batch.prompt_offset
        hidden = forward(
            params, embed(params, batch.token, "float32"), batch.segment, batch.position, model, prompt_offset=offset
        )
        logits = (hidden @ head_of(params, model).T / config.temperature)[..., : model.vocabulary_size]
        table = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.target[..., None], axis=-1)[..., 0]
        loss = jnp.zeros(())
        for row, segment in completions(batch):
            here = (batch.segment[row] == segment) & (batch.weight[row] > 0)
            ratio = jnp.exp(jnp.sum(jnp.where(here, table[row] - batch.old[row], 0)) / jnp.sum(here))
            better = jnp.sum(jnp.where(here, batch.advantage[row], 0)) / jnp.sum(here)
            loss -= jnp.minimum(ratio * better, jnp.clip(ratio, 0.99, 1.02) * better) / len(samples)
        return loss

    (loss, (sums, _)), found = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=(2, 3))(
        params, batch, model, None
    )
    wanted, expected = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert 0 < sums["clip_fraction"] < sums["count"]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)


def completions(batch: objective.RolloutBatch) -> list[tuple[int, int]]:
    """Row and segment of each completion."""
    rows, slots = np.nonzero(batch.weight)
    return sorted({*zip(rows.tolist(), np.asarray(batch.segment)[rows, slots].tolist(), strict=True)})


def test_the_entropy_is_that_of_the_distributions() -> None:
    samples, config = random_samples(150), grpo_config(temperature=0.8)
    model, params = load(REFERENCE / "qwen3")
    rows, _ = packed(samples, config, (1, 4, config.sequence_length), is_shared=False)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), rows)

    @jax.jit
    def figures(params: Any, batch: Any) -> Any:
        _, (facts, _) = objective.policy_loss(config)(params, batch, model, None)
        hidden = forward(params, embed(params, batch.token, "float32"), batch.segment, batch.position, model)
        return facts, hidden @ head_of(params, model).T / 0.8

    facts, table = figures(params, batch)
    logits = np.asarray(table, np.float64)[np.asarray(batch.weight) > 0]
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    assert len(logits) == int(facts["count"]) == sum(len(sample.tokens) for sample in samples)
    np.testing.assert_allclose(facts["entropy"], -np.sum(probability * np.log(probability)), rtol=1e-5)


def test_truncated_samples_and_groups_without_variance_do_not_count() -> None:
    samples = random_samples(150)
    samples[0] = replace(samples[0], is_truncated=True)
    groups = objective.group_by_prompt(samples)
    groups[1] = [replace(sample, reward=1.0) for sample in groups[1]]
    kept = objective.kept_samples(groups, grpo_config())
    expected = [(0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert [(sample.place, sample.index) for sample in kept] == expected
    assert len(objective.kept_samples(groups, grpo_config(mask_truncated=False))) == 9
    assert len(objective.kept_samples(groups, grpo_config(kl_weight=0.1))) == 11


@pytest.mark.parametrize("loss_normalisation", ["token", "sequence", "constant"])
def test_no_denominator_depends_on_a_reward(loss_normalisation: str) -> None:
    config = grpo_config(loss_normalisation=loss_normalisation)
    groups = objective.group_by_prompt(replace(sample, rewards={"one": 1.0}) for sample in random_samples(150))
    alike = [[replace(sample, reward=1.0, rewards={"one": None}) for sample in group] for group in groups[:2]]
    cut = [[replace(groups[2][0], is_truncated=True), *groups[2][1:]], groups[3]]
    sample, slots = groups[3][0], 12 * config.max_completion_tokens
    tokens = sum(len(each.tokens) for group in [*alike, *cut] for each in group if not each.is_truncated)
    expected = {"token": 1 / tokens, "sequence": 1 / (12 * len(sample.tokens)), "constant": 1 / slots}
    for part in ([*groups[:2], *cut], [*alike, *cut]):
        assert objective.token_weights(part, config)(sample) == expected[loss_normalisation]


def test_a_step_trains_on_as_many_groups_whatever_their_rewards_are() -> None:
    groups = objective.group_by_prompt(random_samples(150))
    alike = [[replace(sample, reward=1.0) for sample in group] for group in groups[:2]]
    asked = [*alike, *groups[2:]]
    for wanted, places in ((1, [2]), (2, [2, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        chosen = objective.chosen_groups(asked, grpo_config(prompts_per_step=wanted, refill=4))
        assert [group[0].place for group in chosen] == places
