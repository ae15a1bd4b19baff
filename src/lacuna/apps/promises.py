"""The promises that `check` proves: of each what was compared, the number that came out, and the bound it has to keep.

One side is the house's own functions on the user's model, data and config; the other is a plain formula, the same
documents alone, another number of devices, a run that nothing disturbed, or the text of the rows.
"""

import importlib.util
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from lacuna import checkpoint, optimizer
from lacuna.apps.generator import generation_defaults
from lacuna.apps.plain import plain_attention, plain_cut, plain_logits, plain_rate
from lacuna.apps.replay import replay
from lacuna.apps.rewards import load_rewards
from lacuna.apps.subject import Subject, rows_written, train_on_of
from lacuna.attention import attention
from lacuna.config import GrpoConfig, PretrainConfig, SamplingKeys, SftConfig, TrainingConfig
from lacuna.data import Batch, Dataset, describe, load_dataset
from lacuna.distributed import make_mesh
from lacuna.documents import Example, example_of
from lacuna.grpo import Answered, rewards_of, total_reward
from lacuna.metrics import read_json_lines
from lacuna.model import joined, trained_table
from lacuna.objective import RolloutBatch
from lacuna.optimizer import ADAM_EPSILON
from lacuna.sampler import Completion, Request, Sampler, slots_for
from lacuna.tokenizer import Message, decode, render

# Largest differences by the dtype of compute: of a gradient's tensor, relative to its norm; of a log-probability, in
# nats; of attention's values, relative to the largest. In float32 random weights make 1.4e-6, 1e-6 and 8e-7
GRADIENT = {"float32": 1e-3, "bfloat16": 0.15}
LOG_PROBABILITY = {"float32": 1e-3, "bfloat16": 0.15}
KERNEL = {"float32": 1e-4, "bfloat16": 2e-2}
FEW = 50  # chats whose text is compared
LONG_TEXT = 12  # characters, of which it is no chance to be found in another text
PACKED_ROWS = 2000  # that are looked at
LOGGED = ("step", "loss", "gradient_norm", "learning_rate", "tokens", "target_tokens", "reward")


class Skipped(Exception):
    """There is nothing to compare, and why."""


class Finding(NamedTuple):
    """What was compared, the number that came out, the bound, and whether the number keeps it."""

    compared: str
    number: float
    bound: float
    is_kept: bool
    relation: str = "≤"


def at_most(compared: str, number: float, bound: float = 0.0) -> Finding:
    """A promise that is kept up to a bound; nan keeps none."""
    return Finding(compared, float(number), bound, bool(number <= bound))


def apart(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest relative difference of tensors, and of which; a thousandth of the largest root mean square is added
    to each, as that of a tensor that all but cancels out is rounding."""
    if ours.keys() != theirs.keys():
        return float("inf"), ", ".join(sorted(ours.keys() ^ theirs.keys())[:3])
    floor = max(np.sqrt(np.mean(np.square(tensor))) for tensor in theirs.values()) / 1000
    found = {
        name: np.linalg.norm(ours[name] - tensor) / (np.linalg.norm(tensor) + floor * np.sqrt(tensor.size))
        for name, tensor in theirs.items()
    }
    worst = max(found, key=lambda name: (np.isnan(found[name]), found[name]))
    return float(found[worst]), worst


def same_step(subject: Subject, compared: str, other: tuple[Any, dict[str, float], PyTree[Array]]) -> Finding:
    """Loss and gradient of another way to take the step on the packed rows."""
    _, facts, gradient = subject.first_step
    difference, worst = apart(subject.file_tensors(gradient), subject.file_tensors(other[2]))
    loss = abs(facts["loss"] - other[1]["loss"]) / max(abs(other[1]["loss"]), 1.0)
    bound = GRADIENT[subject.config.compute_dtype]
    return at_most(f"{compared}; furthest {worst}", max(difference, loss) if loss == loss else loss, bound)


# Equality


def packed_is_alone(subject: Subject) -> Finding:
    rows, documents = int(np.sum(subject.packed.segment[0].max(axis=1) > 0)), subject.documents
    other = subject.step(*subject.in_micro_batches(documents))
    return same_step(subject, f"loss and gradient of {len(documents)} documents in {rows} rows, and one by one", other)


def step_is_plain(subject: Subject) -> Finding:
    (tensors, raw), config = subject.dense, subject.config
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *subject.documents)
    length = int((batch.segment > 0).sum(axis=1).max())
    batch = jax.tree.map(lambda leaf: leaf[:, :length], batch)
    temperature, limit = (config.temperature, config.importance_limit) if isinstance(config, GrpoConfig) else (1.0, 0.0)
    whole = batch.weight.sum()

    def loss(tensors: Mapping[str, Array], batch: Any) -> tuple[Array, Array]:  # as constants, XLA would fold them
        logits = plain_logits(tensors, raw, batch.token) / temperature
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.target[..., None], axis=-1)[..., 0]
        if not isinstance(batch, RolloutBatch):
            value = -jnp.sum(batch.weight * found) / whole
            return value, value
        importance = jnp.exp(jnp.where(batch.weight > 0, jax.lax.stop_gradient(found) - batch.sampled, 0))
        gain = batch.weight * batch.advantage * (jnp.minimum(importance, limit) if limit else 1.0)
        return -jnp.sum(gain * found), -jnp.sum(gain)

    (_, value), of_tensors = jax.jit(jax.value_and_grad(loss, has_aux=True))(tensors, batch)
    expected = expected_gradient(subject, jax.device_get(of_tensors))
    _, facts, gradient = subject.first_step
    difference, worst = apart(subject.file_tensors(gradient), expected)
    off = abs(facts["loss"] - float(value)) / max(abs(float(value)), 1.0)
    compared = f"loss {facts['loss']:.6g} and gradients of {len(expected)} tensors, and the formula's; furthest {worst}"
    return at_most(compared, max(difference, off) if off == off else off, GRADIENT[config.compute_dtype])


def expected_gradient(subject: Subject, of_tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradient of what trains, from that of all weights: of an adapter's factors by the chain rule."""
    model, expected = subject.model, dict(of_tensors)
    if model.lora:
        factors = subject.file_tensors(subject.params)
        for name in factors:
            stem, _, is_rows = name.partition(".token_adapter.")
            if is_rows:
                ids = dict(model.trained_rows)["head" if stem == "lm_head" else "embedding"]
                expected[name] = of_tensors[f"{stem}.weight"][list(ids)]
                continue
            stem = name.partition(".lora_")[0]
            gradient = of_tensors[f"{stem}.weight"] * model.lora.scale
            a, b = (factors[f"{stem}.lora_{letter}.weight"] for letter in "AB")
            expected[name] = b.T @ gradient if ".lora_A." in name else gradient @ a.T
        return {name: expected[name] for name in factors}
    return expected


def one_is_many(subject: Subject) -> Finding:
    rows = jax.tree.map(lambda leaf: leaf[0], subject.packed)
    micro, count = subject.in_micro_batches([type(rows)(*leaves) for leaves in zip(*rows, strict=True)])
    if count == 1:
        raise Skipped("a row for each device is one micro-batch")
    return same_step(subject, f"loss and gradient of 1 and of {count} micro-batches", subject.step(micro, count))


def one_is_all_devices(subject: Subject) -> Finding:
    if (devices := subject.mesh.size) == 1:
        raise Skipped("there is one device")
    other = subject.step(subject.packed, mesh=make_mesh(1, 1, 1, jax.devices()[:1]))
    return same_step(subject, f"loss and gradient on {devices} devices, and on one", other)


def resumed_is_uninterrupted(subject: Subject) -> Finding:
    if jax.default_backend() == "tpu":
        raise Skipped("a TPU is held by this process, so no other can be killed on it; see docs/reliability.md")
    whole = subject.finished
    for attempt in range(3):
        killed = subject.killed(f"killed{attempt}")
        if (step := checkpoint.saved_steps(killed.run_directory)[-1]) < whole.steps:
            break
    again, _ = subject.run(killed.run_name, resume=True)
    records = (read_json_lines(config.run_directory / "metrics.jsonl") for config in (whole, again))
    logs = [[[record.get(key) for key in LOGGED] for record in log] for log in records]
    files = [checkpoint.read_manifest(last_checkpoint(config)).shards for config in (whole, again)]
    unequal = sum(one != other for log in (logs, files) for one, other in zip(*log, strict=False))
    compared = f"{whole.steps} steps in metrics.jsonl and the last state, by SHA-256, of a run killed at step {step}"
    return at_most(compared, unequal + abs(len(logs[0]) - len(logs[1])))


def last_checkpoint(config: Any) -> Path:
    """The directory of a run's newest state."""
    return checkpoint.checkpoint_directory(config.run_directory, checkpoint.saved_steps(config.run_directory)[-1])


def differing(one: PyTree[Any], other: PyTree[Any]) -> int:
    """How many numbers of two trees are not the same, bit for bit."""
    pairs = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other)), strict=True)
    return sum(int(np.sum(np.asarray(a).view(np.uint32) != np.asarray(b).view(np.uint32))) for a, b in pairs)


def saved_is_loaded(subject: Subject) -> Finding:
    config, state = subject.undisturbed
    directory = last_checkpoint(config)
    with jax.set_mesh(subject.mesh):
        loaded = optimizer.saved_state(directory, checkpoint.checked_manifest(directory), subject.opened)
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    return at_most(f"{count:,} numbers of a run's state, weights and moments", differing(state, loaded))


def exported_is_loaded(subject: Subject) -> Finding:
    directory, keys = subject.finished.run_directory / "model", {"from_scratch": False, "new_tokens": ""}
    keys = {key: value for key, value in keys.items() if key in type(subject.config).model_fields}
    opened = checkpoint.open_model(
        subject.config.model_copy(update=keys | {"model_name": str(directory)}), subject.mesh
    )
    with jax.set_mesh(subject.mesh):
        found = subject.file_tensors(checkpoint.trained_params(opened))
    kept = subject.file_tensors(
        jax.tree.map(np.asarray, checkpoint.saved_params(last_checkpoint(subject.finished), subject.model))
    )
    dtype = jnp.dtype("float32" if subject.model.lora else subject.model.file_dtype)
    kept = {name: tensor.astype(dtype).astype(np.float32) for name, tensor in kept.items()}
    compared = f"{len(kept)} tensors of the last state, in {dtype.name}, and those of model/"
    return at_most(compared, differing(dict(sorted(found.items())), dict(sorted(kept.items()))))


def exported_is_transformers(subject: Subject) -> Finding:
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise Skipped("transformers and torch are not installed")
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    subject.dense_of(subject.params, "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(subject.directory / "exported", dtype=torch.float32)
    rows = alone_rows(subject)
    with torch.no_grad():
        expected = theirs(torch.tensor(rows.token, dtype=torch.long)).logits.log_softmax(-1).numpy()
    found = np.asarray(jax.nn.log_softmax(subject.logits(rows)))
    difference = np.abs(found - expected)[rows.segment > 0].max()
    count = int(np.sum(rows.segment > 0))
    compared = f"log-probabilities of {count} tokens, here and in transformers {transformers.__version__}"
    return at_most(compared, difference, LOG_PROBABILITY[subject.config.compute_dtype])


def alone_rows(subject: Subject) -> Batch:
    """As many documents as a batch has rows, each alone in its row."""
    rows, documents = subject.packed.token.shape[1], subject.documents
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(documents[at % len(documents)] for at in range(rows)))


# Sampling


class Answers(NamedTuple):
    """Completions of several prompts at once, the last one generated alone, and each with its prompt as a row, with
    the place before its first token."""

    rules: SamplingKeys
    together: list[Completion]
    alone: Completion
    rows: list[tuple[Batch, int]]

    def logits(self, subject: Subject, params: PyTree[Array] | None = None) -> list[np.ndarray]:
        """The trainer's logits before each token of each completion."""
        pairs = zip(self.together, self.rows, strict=True)
        return [subject.logits(row, params)[0, at : at + len(found.tokens)] for found, (row, at) in pairs]


def answers(subject: Subject) -> Answers:
    """What the sampler answers at the config's rules, or at those of the model where a config has none."""
    config, length = subject.config, subject.config.sequence_length
    if isinstance(config, GrpoConfig):
        rules, prompts = config.rules, [problem.token for problem in subject.inputs.problems.problems]
    else:
        stated = generation_defaults(subject.tokenizer.directory)
        chosen = {key: getattr(stated, key) for key in ("top_k", "top_p", "min_p")}
        rules = SamplingKeys(temperature=stated.temperature or 1.0, max_tokens=12, **chosen)
        few = zip((5, 9, 14), subject.documents, strict=False)  # of a text so many tokens are a prompt
        prompts = [tuple(row.token[: max(int(np.argmax(row.weight > 0)) + 1, least)].tolist()) for least, row in few]
    prompts = [prompt[rules.max_tokens + 1 - length :] for prompt in prompts[:3]]
    with jax.set_mesh(subject.mesh):
        slots = slots_for(4, subject.mesh)
        sampler = Sampler(subject.whole, subject.opened, slots, length, config.compute_dtype)
        requests = [Request(prompt, rules, seed=number) for number, prompt in enumerate(prompts)]
        together, (alone,) = sampler.generate(requests), sampler.generate(requests[-1:])
    found = []
    for prompt, completion in zip(prompts, together, strict=True):
        ids = [*prompt, *completion.tokens[:-1]]
        row = np.zeros((3, subject.packed.token.shape[1], length), np.int32)
        row[0, 0, : len(ids)], row[1, 0, : len(ids)], row[2, 0, : len(ids)] = ids, 1, np.arange(len(ids))
        found.append((Batch(row[0], row[0], row[0].astype(np.float32), row[1], row[2]), len(prompt) - 1))
    return Answers(rules, together, alone, found)


def decoded_differences(subject: Subject, params: PyTree[Array] | None = None) -> list[float]:
    """How far the log-probability of each token, as it was decoded, is from the trainer's for the whole row."""
    found = subject.once(answers)
    return [
        abs(float(jax.nn.log_softmax(logits)[token]) - value)
        for completion, rows in zip(found.together, found.logits(subject, params), strict=True)
        for token, value, logits in zip(completion.tokens, completion.log_probabilities, rows, strict=True)
    ]


def cached_is_full(subject: Subject) -> Finding:
    differences = decoded_differences(subject)
    compared = f"log-probabilities of {len(differences)} tokens as they are decoded, and by the whole row"
    return at_most(compared, max(differences), LOG_PROBABILITY[subject.config.compute_dtype])


def answers_are_alone(subject: Subject) -> Finding:
    found = subject.once(answers)
    both, alone = found.together[-1], found.alone
    same = 0
    while same < min(len(both.tokens), len(alone.tokens)) and both.tokens[same] == alone.tokens[same]:
        same += 1
    pairs = zip(both.log_probabilities[:same], alone.log_probabilities[:same], strict=True)
    difference = max((abs(one - other) for one, other in pairs), default=float("inf"))
    if subject.config.compute_dtype == "float32" and both.tokens != alone.tokens:  # else rounding may choose another
        difference = float("inf")
    compared = f"an answer of {same} tokens in a batch of {len(found.together)}, and alone"
    return at_most(compared, difference, LOG_PROBABILITY[subject.config.compute_dtype])


def sampler_is_trainer(subject: Subject) -> Finding:
    found = subject.once(answers)
    differences = [
        abs(plain_cut(logits, found.rules.model_dump())[token] - value)
        for completion, rows in zip(found.together, found.logits(subject), strict=True)
        for token, value, logits in zip(completion.tokens, completion.sampled_log_probabilities, rows, strict=True)
    ]
    rules = {key: getattr(found.rules, key) for key in ("temperature", "top_k", "top_p", "min_p")}
    compared = f"{len(differences)} tokens at {', '.join(f'{key} {value:g}' for key, value in rules.items())}"
    return at_most(compared, max(differences), LOG_PROBABILITY[subject.config.compute_dtype])


def kernel_is_plain(subject: Subject) -> Finding:
    rows, model, dtype = subject.packed.segment[0], subject.model, subject.config.compute_dtype
    with jax.set_mesh(subject.mesh):
        errors = attention_errors((model.kv_heads, model.group, model.head), rows, model.attention, dtype)
    documents = int(rows.max(axis=1).sum())
    compared = f"{model.attention}'s values and gradients for {documents} documents in {len(rows)} rows, in {dtype}"
    return at_most(compared, max(errors), KERNEL[dtype])


def attention_errors(sizes: tuple[int, int, int], segment: np.ndarray, backend: str, dtype: str) -> list[float]:
    """How far attention is from the plain formula on random heads of these sizes (kv_head, group, head): values and
    gradients of queries, keys and values, relative to the largest; what padding gives does not count."""
    kv_heads, group, head = sizes
    keys, shape = jax.random.split(jax.random.key(0), 4), (*segment.shape, kv_heads)
    shapes = [(*shape, group, head), (*shape, head), (*shape, head), (*shape, group, head)]
    *inputs, gradient = (jax.random.normal(key, each, dtype) for key, each in zip(keys, shapes, strict=True))
    is_real = (segment > 0)[..., None, None, None]

    def results(attend: Callable[..., Array]) -> list[np.ndarray]:
        def run(*inputs: Array) -> tuple[Array, ...]:
            mixed, pull = jax.vjp(lambda *inputs: attend(*inputs, jnp.asarray(segment)) * is_real, *inputs)
            return mixed, *pull(gradient.astype(mixed.dtype))

        return [np.asarray(x, np.float32) for x in jax.jit(run)(*inputs)]

    ours, plain = results(partial(attention, backend=backend)), results(plain_attention)
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, plain, strict=True)]


# What is trained


class Read(NamedTuple):
    """The rows that a run would train on, and each of their documents with which of its tokens are learned, and whether
    the end of its row may have cut it."""

    dataset: Dataset
    documents: list[tuple[np.ndarray, np.ndarray, bool]]


def read_sample(subject: Subject, most: int | None = None) -> Read:
    """The rows of the config itself, of the samples that were looked at."""
    config, sources = subject.original, []
    if isinstance(config, GrpoConfig):
        raise Skipped("grpo learns from what it samples")
    for number, (source, rows) in enumerate(zip(config.data, subject.sampled, strict=True)):
        path = rows_written(subject.directory / f"rows{number}.{most}.jsonl", (row.row for row in rows[:most]))
        sources.append(source.model_copy(update={"path": str(path), "split": "train", "streaming": False}))
    is_stream = isinstance(config, PretrainConfig)
    dataset = load_dataset(sources, subject.tokenizer, config, is_stream=is_stream, is_shuffled=False)
    count = dataset.row_count(1)
    batch, found = dataset.batch(0, min(count, PACKED_ROWS), count), []
    for token, target, weight, segment, _ in zip(*batch, strict=True):
        for number in range(1, segment.max() + 1):
            (at,) = np.nonzero(segment == number)
            ids, is_last = np.append(token[at], target[at[-1]]), number == segment.max()
            found.append((ids, np.append(0, weight[at]) > 0, is_stream and is_last or bool(dataset.facts["split"])))
    return Read(dataset, found)


def supervised_share(subject: Subject) -> Finding:
    read = subject.once(read_sample)
    learned = sum(int(mask.sum()) for _, mask, _ in read.documents)
    share = learned / sum(len(ids) - 1 for ids, *_ in read.documents)
    is_chat = not read.dataset.facts["texts"] and train_on_of(subject.original) != "all"
    compared = f"{learned:,} tokens learned of {len(read.documents):,} documents, which should be "
    compared += "some of each chat, not all" if is_chat else "all of them"
    return Finding(compared, share, 1.0, 0 < share < 1 if is_chat else share == 1, "<" if is_chat else "=")


def chats(subject: Subject) -> Iterator[tuple[list[Message], Example]]:
    """The messages of the first chats, and of prompts with their completions."""
    for source, rows in zip(subject.original.data, subject.sampled, strict=True):
        for example in (example_of(row.row, source, subject.tokenizer) for row in rows[:FEW]):
            answer = example.answer
            if answer is not None and not isinstance(answer, dict):
                answer = {"role": "assistant", "content": str(answer)}
            if example.text is None:
                yield [*example.messages, *filter(None, [answer])], example


def supervised_is_answers(subject: Subject) -> Finding:
    config = subject.original
    if not isinstance(config, SftConfig) or config.train_on == "all":
        raise Skipped("all of a text is learned")
    examples = [messages for messages, _ in chats(subject)]
    if not examples:
        raise Skipped("all of a text is learned")
    wrong = matched = 0
    for ids, mask, _ in read_sample(subject, FEW).documents:
        whole = decode(subject.tokenizer, ids)
        parts = [decode(subject.tokenizer, ids[list(run)]) for is_learned, run in stretches(mask) if is_learned]
        for messages in examples:
            said = [each for each in messages if each["role"] == "assistant"]
            contents = [[str(each["content"] or "").split("</think>")[-1].strip() for each in group] for group in
                        (said[-1:] if config.train_on == "last" else [each for each in said if each.get("weight") != 0],
                         [each for each in messages if each["role"] != "assistant"])]  # fmt: skip
            if all(text in whole for text in [*contents[0], *contents[1]]):
                others = [text for text in contents[1] if len(text) >= LONG_TEXT and text not in "\n".join(contents[0])]
                is_right = all(any(text in part for part in parts) for text in contents[0])
                wrong += not is_right or any(text in part for text in others for part in parts)
                matched += 1
                break
    if not matched:
        raise Skipped("no document's text holds its row's as it is")
    return at_most(f"what is learned of {matched} chats, and the texts of their answers and of the others", wrong)


def stretches(mask: np.ndarray) -> Iterator[tuple[bool, range]]:
    """Runs of tokens that are all learned or all not."""
    for is_learned, run in groupby(range(len(mask)), key=lambda at: bool(mask[at])):
        places = list(run)
        yield is_learned, range(places[0], places[-1] + 1)


def answers_end(subject: Subject) -> Finding:
    read, tokenizer = subject.once(read_sample), subject.tokenizer
    ended, count = 0, 0
    for ids, mask, may_be_cut in read.documents:
        for is_learned, run in stretches(mask):
            end = run[-1]
            while end > run[0] and decode(tokenizer, ids[end : end + 1]).isspace():
                end -= 1
            if is_learned and not (may_be_cut and run[-1] == len(ids) - 1 and int(ids[end]) not in tokenizer.ends):
                count, ended = count + 1, ended + (int(ids[end]) in tokenizer.ends)
    names = ", ".join(str(tokenizer.backend.id_to_token(end)) for end in tokenizer.ends)
    if not count:
        raise Skipped("every text is cut by its row")
    return at_most(f"of {count:,} answers or texts, those that do not learn to end in one of {names}", count - ended)


def template_is_stable(subject: Subject) -> Finding:
    tokenizer, count, unstable = subject.tokenizer, 0, 0
    for messages, example in chats(subject):
        show = partial(render, tokenizer, tools=example.tools, variables=example.variables)
        for turn, message in enumerate(messages if example.is_chat and tokenizer.template else ()):
            if message["role"] == "assistant":
                count += 1
                unstable += not show(messages).startswith(show(messages[:turn], add_generation_prompt=True))
    if not count:
        raise Skipped("there are no chats")
    return at_most(f"of {count} answers, those whose chat does not begin with the prompt for them", unstable)


def no_document_sees_another(subject: Subject) -> Finding:
    if isinstance(subject.packed, RolloutBatch):
        raise Skipped("completions of one prompt share it")
    rows = jax.tree.map(lambda leaf: leaf[0], subject.packed)
    others = rows.segment > 1
    if not others.any():
        raise Skipped("no row holds two documents")
    changed = rows._replace(
        token=np.where(rows.segment == 1, (rows.token + 1) % subject.model.vocabulary_size, rows.token)
    )
    before, after = (subject.logits(each)[others] for each in (rows, changed))
    moved = int(np.sum(np.any(before != after, axis=-1)))
    return at_most(f"of {int(others.sum())} tokens, those whose logits change with the document before theirs", moved)


def rows_are_used(subject: Subject) -> Finding:
    if isinstance(subject.original, GrpoConfig):
        count, bad = sum(map(len, subject.sampled)), len(subject.bad)
        return at_most(f"share of {count + bad:,} rows that are bad", bad / (count + bad), 0.5)
    facts = subject.once(read_sample).dataset.facts
    lost = facts["without_targets"] + facts["answer_too_long"] + len(subject.bad)
    counted = Counter(facts) + Counter({"bad": len(subject.bad)})
    compared = f"share of rows that are bad or dropped: {describe(counted)}"
    return at_most(compared, lost / (facts["documents"] + len(subject.bad)), 0.5)


def bos_is_once(subject: Subject) -> Finding:
    bos = subject.tokenizer.bos_id
    if bos is None:
        raise Skipped("the tokenizer has no BOS")
    if isinstance(subject.config, GrpoConfig):
        found = [np.array(problem.token) for problem in subject.inputs.problems.problems]
    else:
        found = [ids for ids, *_ in subject.once(read_sample).documents]
    first = sum(ids[0] == bos for ids in found)
    twice = sum(bool(np.any((ids[1:] == bos) & (ids[:-1] == bos))) for ids in found)
    return at_most(f"of {len(found):,} documents, {first:,} of which begin with BOS, those with two in a row", twice)


def left_out(subject: Subject) -> Finding:
    facts = subject.once(read_sample).dataset.facts
    unused = [key.removeprefix("unused ") for key in facts if key.startswith("unused ")]
    compared = f"columns not used: {', '.join(unused) or 'none'}; "
    compared += "thoughts, and texts beside calls, that the chat template leaves out"
    return Finding(compared, float(facts["thoughts"]), float("nan"), True)


# Learning


def rate_is_plain(subject: Subject) -> Finding:
    config, short = subject.original, subject.finished
    steps = config.steps or config.warmup_steps + 100
    recipe, found = optimizer.recipe_of(config, steps), {}
    for step in sorted(
        {0, config.warmup_steps // 2, config.warmup_steps, (config.warmup_steps + steps) // 2, steps - 1}
    ):
        rate = float(optimizer.learning_rate(jnp.int32(step), recipe))
        found[step] = rate, plain_rate(step, config.learning_rate, config.warmup_steps, steps)
    updates, warmup_steps = short.updates_per_rollout if isinstance(short, GrpoConfig) else 1, short.warmup_steps
    logged = [
        (
            rate,
            plain_rate(
                record["step"] * updates - 1, short.learning_rate, warmup_steps * updates, short.steps * updates
            ),
        )
        for record in read_json_lines(short.run_directory / "metrics.jsonl")
        if (rate := record.get("learning_rate"))
    ]
    difference = max(abs(one / other - 1) for one, other in [*found.values(), *logged])
    listed = ", ".join(f"{rate:.3g} at {step + 1}" for step, (rate, _) in found.items())
    return at_most(f"{listed}, and {len(logged)} that a run logged", difference, 1e-5)


def update_is_adamw(subject: Subject) -> Finding:
    rate, decay = subject.config.learning_rate, max(subject.config.weight_decay, 0.1)
    state, facts, gradient = subject.step(subject.packed, warmup_steps=0, learning_rate=rate, weight_decay=decay)
    before, after, slope = (subject.file_tensors(each) for each in (subject.params, state.params, gradient))
    worst, decayed = 0.0, 0
    for name, weight in before.items():
        is_decayed = not ("norm" in name.split(".")[-2] or name.endswith(".bias"))
        decayed += is_decayed
        direction = slope[name] / (np.abs(slope[name]) + ADAM_EPSILON) + decay * weight * is_decayed
        off = np.abs(after[name] - (weight - rate * direction)) / (1e-3 * rate + 2.0**-22 * np.abs(weight))
        worst = max(worst, float(off.max())) if off.max() == off.max() else float("nan")
    compared = (
        f"first update at {facts['learning_rate']:.3g} of {decayed} tensors with and {len(before) - decayed} without "
    )
    return at_most(compared + "decay, over what rounding explains", worst, 1.0)


def gradient_is_everywhere(subject: Subject) -> Finding:
    gradient = subject.file_tensors(subject.first_step[2])
    names = {
        name.removeprefix("base_model.model.")
        for file in (subject.finished.run_directory / "model").glob("*.safetensors")
        for name in load_names(file)
    }
    none = [name for name, leaf in gradient.items() if not np.isfinite(leaf).all() or not leaf.any()]
    compared = f"of {len(gradient)} tensors that train, those without a gradient or that the export lacks"
    missing = sorted(names ^ gradient.keys())
    return at_most(f"{compared} {', '.join([*none, *missing][:3])}".strip(), len(none) + len(missing))


def load_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file, by its header alone."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return [name for name in json.loads(stream.read(size)) if name != "__metadata__"]


def step_lowers_loss(subject: Subject) -> Finding:
    if isinstance(subject.config, GrpoConfig):
        raise Skipped("see the advantage's sign")
    _, facts, gradient = subject.first_step
    slope = sum(float(np.abs(leaf).sum()) for leaf in subject.file_tensors(gradient).values())
    rate = float(np.clip(subject.config.learning_rate, 0.01 * facts["loss"] / slope, 0.05 * facts["loss"] / slope))
    state, *_ = subject.step(subject.packed, warmup_steps=0, learning_rate=rate)
    after = subject.step(subject.packed, params=state.params)[1]["loss"]
    compared = f"loss {facts['loss']:.6g} of a batch after one step on it at {rate:.3g}"
    return Finding(compared, after, facts["loss"], after < facts["loss"], "<")


# Adapters


def off(subject: Subject) -> PyTree[Array]:
    """Factors of adapters without effect."""
    rows = jax.tree.leaves(trained_table(subject.model))
    leaves, shape = jax.tree.flatten(subject.params)
    return jax.tree.unflatten(shape, [leaf * (row.role != "adapter_b") for row, leaf in zip(rows, leaves, strict=True)])


def furthest(subject: Subject, ours: np.ndarray, theirs: Any) -> float:
    """The largest difference of log-probabilities for documents alone in their rows."""
    is_real = alone_rows(subject).segment > 0
    return float(np.abs(np.asarray(jax.nn.log_softmax(ours)) - np.asarray(jax.nn.log_softmax(theirs)))[is_real].max())


def adapter_is_on(subject: Subject) -> Finding:
    rows, model = alone_rows(subject), subject.model
    on, without = subject.logits(rows), subject.logits(rows, joined(subject.frozen, off(subject), model))
    moved, bound = furthest(subject, on, without), LOG_PROBABILITY[subject.config.compute_dtype]
    return Finding("largest change of a log-probability by the adapter", moved, bound, moved > bound, ">")


def adapter_off_is_base(subject: Subject) -> Finding:
    rows, model = alone_rows(subject), subject.model
    without = subject.logits(rows, joined(subject.frozen, off(subject), model))
    expected = plain_rows(subject, off(subject), "off")
    bits = f", of {model.bits} bits and dequantised" if model.bits else ""
    compared = f"log-probabilities with adapters that have no effect, and of the base alone{bits}"
    return at_most(compared, furthest(subject, without, expected), LOG_PROBABILITY[subject.config.compute_dtype])


def merged_is_on(subject: Subject) -> Finding:
    ours, expected = subject.logits(alone_rows(subject)), plain_rows(subject, subject.params, "dense")
    compared = "log-probabilities with the adapter on, and of the model that convert merges it into"
    return at_most(compared, furthest(subject, ours, expected), LOG_PROBABILITY[subject.config.compute_dtype])


def plain_rows(subject: Subject, params: PyTree[Array], name: str) -> np.ndarray:
    """The formula's logits of documents alone in their rows, with these weights merged and exported."""
    tensors, raw = subject.dense if name == "dense" else subject.dense_of(params, name)
    return np.asarray(
        jax.jit(lambda tensors, token: plain_logits(tensors, raw, token))(tensors, alone_rows(subject).token)
    )


def sampler_has_adapter(subject: Subject) -> Finding:
    on = max(decoded_differences(subject))
    without = max(decoded_differences(subject, joined(subject.frozen, off(subject), subject.model)))
    bound = min(LOG_PROBABILITY[subject.config.compute_dtype], without / 2)
    return at_most(
        f"sampler's log-probabilities and the trainer's; with the adapter off they are {without:.2g} apart", on, bound
    )


# Reinforcement


def rewards_are_right(subject: Subject) -> Finding:
    config, inputs = subject.original, subject.inputs
    assert isinstance(config, GrpoConfig)
    rewards, asked = load_rewards(config.reward), [problem for problem in inputs.problems.problems if problem.answer]
    if not asked:
        raise Skipped("the rows have no reference answers")
    references = [problem.answer if isinstance(problem.answer, str) else problem.answer[0] for problem in asked]
    both = [
        Answered(problem, text)
        for texts in (references, [""] * len(asked))
        for problem, text in zip(asked, texts, strict=True)
    ]
    values, _, _ = rewards_of(rewards, both, "check", 1, config, lambda: None)
    total = total_reward(rewards, values).reshape(2, -1)
    is_right = total[0] > total[1]
    for reward in rewards:
        if reward.needs_answer:
            given = np.array(values[reward.name], float).reshape(2, -1)
            is_right &= (given[0] == 1) & (given[1] == 0)
    first = next((f", as {problem.origin}" for problem, right in zip(asked, is_right, strict=True) if not right), "")
    means = ", ".join(f"{name} {np.mean(np.array(each, float)[: len(asked)]):.3g}" for name, each in values.items())
    return at_most(
        f"of {len(asked)} reference answers ({means}), those not worth more than none{first}", int(np.sum(~is_right))
    )


def advantage_has_its_sign(subject: Subject) -> Finding:
    samples = subject.kept
    means = {
        place: np.mean([each.reward for each in samples if each.place == place])
        for place in {each.place for each in samples}
    }
    wrong = sum((each.reward - means[each.place]) * each.advantage < 0 for each in samples)
    _, _, gradient = subject.first_step
    size = sum(abs(each.advantage) for each in samples) / len(samples)
    slope = sum(float(np.abs(leaf).sum()) for leaf in subject.file_tensors(gradient).values())
    if not slope:
        raise Skipped("every completion was worth the same")
    rate = float(np.clip(subject.config.learning_rate, 0.01 * size / slope, 0.05 * size / slope))
    state, *_ = subject.step(subject.packed, warmup_steps=0, learning_rate=rate)
    before, after = (subject.log_probabilities(params) for params in (subject.params, state.params))
    gained = float(np.sum(subject.packed.weight * subject.packed.advantage * (after - before)))
    compared = f"gain of advantage × log-probability by an update on {len(samples)} samples, {wrong} of whose "
    compared += "advantages are against their reward"
    return Finding(compared, gained, 0.0, gained > 0 and not wrong, ">")


def replay_is_logged(subject: Subject) -> Finding:
    config, printed = subject.finished, io.StringIO()
    assert isinstance(config, GrpoConfig)
    step = min(2, config.steps)
    with redirect_stdout(printed):
        replay(config.model_copy(update={"replay": str(config.run_directory), "step": step}), config)
    again = json.loads(printed.getvalue())
    logged = next(each for each in read_json_lines(config.run_directory / "metrics.jsonl") if each["step"] == step)
    shared = [key for key, value in again.items() if isinstance(value, int | float) and key in logged]
    difference = max(abs(again[key] - logged[key]) / max(abs(logged[key]), 1e-3) for key in shared)
    return at_most(
        f"{len(shared)} figures of step {step}, logged and computed again from rollouts.jsonl", difference, 1e-6
    )


Promise = Callable[[Subject], Finding]
Promises = dict[str, Promise]

EQUAL: Promises = {
    "packed = alone": packed_is_alone,
    "loss and gradient = plain formula": step_is_plain,
    "1 = n micro-batches": one_is_many,
    "1 = all devices": one_is_all_devices,
    "attention = plain formula": kernel_is_plain,
    "no document sees another": no_document_sees_another,
    "cached decoding = full forward": cached_is_full,
    "answers = answers alone": answers_are_alone,
    "sampler = trainer": sampler_is_trainer,
    "resumed = uninterrupted": resumed_is_uninterrupted,
    "saved = loaded": saved_is_loaded,
    "exported = loaded again": exported_is_loaded,
    "exported = transformers": exported_is_transformers,
}
READ: Promises = {
    "rows are used": rows_are_used,
    "BOS once": bos_is_once,
    "template is prefix-stable": template_is_stable,
}
LEARNED: Promises = {
    "supervised share": supervised_share,
    "supervised = the answers": supervised_is_answers,
    "every answer ends": answers_end,
    "left out by the template": left_out,
}
LEARNING: Promises = {
    "learning rate": rate_is_plain,
    "first update = AdamW": update_is_adamw,
    "gradient wherever it trains": gradient_is_everywhere,
    "a step lowers its loss": step_lowers_loss,
}
ADAPTED: Promises = {
    "adapter on ≠ off": adapter_is_on,
    "adapter off = base": adapter_off_is_base,
    "adapter merged = on": merged_is_on,
    "sampler has the adapter": sampler_has_adapter,
}
REINFORCED: Promises = {
    "rewards are right": rewards_are_right,
    "advantage's sign": advantage_has_its_sign,
    "replay = logged": replay_is_logged,
}
ALL: Promises = READ | LEARNED | EQUAL | LEARNING | ADAPTED | REINFORCED


def promises_of(config: TrainingConfig, has_adapter: bool) -> Promises:
    """The promises that concern a config."""
    is_grpo = isinstance(config, GrpoConfig)
    chosen = READ | ({} if is_grpo else LEARNED) | EQUAL | LEARNING | (ADAPTED if has_adapter else {})
    return chosen | (REINFORCED if is_grpo else {})
