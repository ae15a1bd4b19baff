"""The sampler: one way to generate for chat, server, evaluation and rollouts, with continuous batching.

A batch has a fixed number of slots on the device. A compiled loop decodes some tokens in all of them; then the host
looks at what came, frees the slots that are done and fills them from the queue. What a request gets depends on its
prompt, rules and seed alone: no slot sees another, and randomness is folded from the seed and the token's number.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree
from pydantic import ValidationError

from lacuna import weights
from lacuna.config import GenerationConfig, SamplingKeys, UserError
from lacuna.decoding import (
    BLOCK,
    STOP_IDS,
    TOP_LOGPROBS,
    Emitted,
    Entry,
    cast_params,
    decode_block,
    empty_slots,
    fill_cache,
    insert,
    resized,
)
from lacuna.distributed import enable_compilation_cache, make_mesh, row_shards
from lacuna.metrics import byte_size
from lacuna.model import PAGE, Cache, ModelConfig, check_sequence_length
from lacuna.sampling import Trie, forest_of, power_of_two
from lacuna.tokenizer import Tokenizer, Window, before_stop, read_json, read_on, window_behind

PREFILL_ROWS, PREFILL_PAGES = (64, 16, 4, 1), 128
LEAST_PAGES = 4

FinishReason = Literal["", "stop", "length"]
REASONS: tuple[FinishReason, ...] = ("", "stop", "length")


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and what to make of it; `n` completions share one prefill, and each has a stream of its own."""

    prompt: tuple[int, ...]
    rules: SamplingKeys = SamplingKeys()
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    top_logprobs: int = 0
    trie: Trie | None = None


@dataclass(frozen=True)
class Completion:
    """What was generated, or the next part of it while `finish_reason` is empty.

    `tokens` hold the stop token or those of the stop string, `text` does not. `log_probabilities` are the model's own,
    `sampled_log_probabilities` those under the distribution drawn from (0 where greedy), both in nats.
    """

    request: int
    index: int
    tokens: tuple[int, ...]
    text: str
    log_probabilities: tuple[float, ...]
    sampled_log_probabilities: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason


def joined(parts: Sequence[Completion]) -> Completion:
    """The whole of which these are the parts, in order."""
    return replace(
        parts[-1],
        tokens=tuple(token for part in parts for token in part.tokens),
        text="".join(part.text for part in parts),
        log_probabilities=tuple(value for part in parts for value in part.log_probabilities),
        sampled_log_probabilities=tuple(value for part in parts for value in part.sampled_log_probabilities),
        top_logprobs=tuple(value for part in parts for value in part.top_logprobs),
    )


# The sampler


class Prompts(NamedTuple):
    """Prompts that were prefilled together."""

    cache: Cache
    token: Int[np.ndarray, "row token"]
    length: Int[np.ndarray, " row"]


@dataclass(eq=False)
class Waiting:
    """A request in the queue; its row of the prefilled prompts while some of its completions have no slot yet."""

    number: int
    request: Request
    next_index: int = 0
    prompts: Prompts | None = None
    row: int = 0


@dataclass
class Running:
    """A completion in a slot: where its text stands, and text held back as it may begin a stop string."""

    number: int
    index: int
    request: Request
    window: Window
    length: int
    held: str = ""


Arrivals = dict[Waiting, list[tuple[int, Running]]]


class Sampler:
    """Continuous batching over `slots` sequences of up to `capacity` tokens, prompt and completion together.

    `submit` and `cancel` may be called from any thread, the rest from one thread at a time.
    """

    def __init__(
        self,
        params: PyTree[Array],
        config: ModelConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        slots: int,
        capacity: int,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        """Raises UserError where slots or capacity do not suit the model and devices, or the cache does not fit."""
        check_sequence_length(config, capacity)
        if slots < 1 or slots % row_shards(mesh):
            raise UserError(
                f"slots = {slots} do not divide over data × fsdp = {row_shards(mesh)} devices; set a multiple of that"
            )
        check_memory(config, slots, capacity, dtype, mesh)
        self.config, self.tokenizer, self.mesh, self.capacity, self.dtype = config, tokenizer, mesh, capacity, dtype
        self.numbers = itertools.count()
        self.waiting: deque[Waiting] = deque()
        self.cancellations: deque[int] = deque()
        self.running: list[Running | None] = [None] * slots
        self.tries: list[Trie] = []
        self.forest, self.roots = forest_of([])
        self.load(params)
        with jax.set_mesh(mesh):
            self.pages = page_bucket(1, capacity)
            self.slots = empty_slots(config, slots, self.pages, dtype)

    def load(self, params: PyTree[Array]) -> None:
        """Generate from these weights from now on."""
        with jax.set_mesh(self.mesh):
            self.params = cast_params(params, self.config, self.dtype)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.waiting and not any(self.running)

    def submit(self, request: Request) -> int:
        """Queue a request; its completions carry the number returned. Raises UserError where it can't be met."""
        check_request(request, self.config, self.capacity)
        number = next(self.numbers)
        self.waiting.append(Waiting(number, request))
        return number

    def cancel(self, number: int) -> None:
        """Give up a request: at the next `advance` its slots come free, and nothing more of it is told."""
        self.cancellations.append(number)

    def advance(self, steps: int = BLOCK) -> list[Completion]:
        """Admit what waits, decode up to `steps` tokens in every slot, and return the next part of each completion."""
        with jax.set_mesh(self.mesh):
            self._drop_cancelled()
            arrivals = self._assign_slots()
            self._resize(steps)
            self._insert(arrivals)
            if not any(self.running):
                return []
            patience = max(1, len(self.running) // 8) if self.waiting else len(self.running)
            is_wanted = np.array([running is not None for running in self.running])
            self.slots, emitted = decode_block(
                self.params, self.slots, self.forest, is_wanted, np.int32(min(steps, BLOCK)), np.int32(patience),
                self.config,
            )  # fmt: skip
            emitted = jax.device_get(emitted)
        return [self._part(slot, running, emitted) for slot, running in enumerate(self.running) if running]

    def generate(
        self, requests: Sequence[Request], progress: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """All completions of all requests, in order, `request` being the place in `requests`; `progress` sees each as
        it ends. What may become longest starts first, so that nothing long is left to run alone."""
        assert self.is_idle, "another thread's requests would be lost"
        order = sorted(range(len(requests)), key=lambda place: -requests[place].rules.max_tokens)
        place_of = {self.submit(requests[place]): place for place in order}
        parts: dict[tuple[int, int], list[Completion]] = defaultdict(list)
        while not self.is_idle:
            for part in self.advance():
                key = place_of[part.request], part.index
                parts[key].append(replace(part, request=key[0]))
                if part.finish_reason and progress:
                    progress(joined(parts[key]))
        return [joined(parts[key]) for key in sorted(parts)]

    def _drop_cancelled(self) -> None:
        while self.cancellations:
            number = self.cancellations.popleft()
            self.running = [None if running and running.number == number else running for running in self.running]
            for waiting in [waiting for waiting in list(self.waiting) if waiting.number == number]:
                self.waiting.remove(waiting)

    def _assign_slots(self) -> Arrivals:
        """The slots given to what waits, in the order of the queue."""
        arrivals: Arrivals = defaultdict(list)
        for slot, running in enumerate(self.running):
            if running is None and self.waiting:
                waiting = self.waiting[0]
                request = waiting.request
                window = window_behind(self.tokenizer, request.prompt)
                running = Running(waiting.number, waiting.next_index, request, window, len(request.prompt) - 1)
                self.running[slot] = running
                arrivals[waiting].append((slot, running))
                waiting.next_index += 1
                if waiting.next_index == request.n:
                    self.waiting.popleft()
        return arrivals

    def _resize(self, steps: int) -> None:
        """Grow the cache to what the next steps need; shrink it when that is less than a quarter."""
        needed = page_bucket(
            max((running.length for running in self.running if running), default=0) + steps, self.capacity
        )
        if needed > self.pages or 4 * needed <= self.pages:
            self.pages = needed
            self.slots = self.slots._replace(cache=resized(self.slots.cache, needed))

    def _insert(self, arrivals: Arrivals) -> None:
        """Prefill new prompts, those of like length together, and put every arrival into its slot."""
        self._plant([waiting.request.trie for waiting in arrivals if waiting.request.trie])
        groups: dict[int, list[Waiting]] = defaultdict(list)
        for waiting in arrivals:
            if waiting.prompts:
                self._place(waiting.prompts, [waiting], arrivals)
            else:
                groups[prompt_pages(len(waiting.request.prompt), self.capacity)].append(waiting)
        for pages, group in groups.items():
            while group:
                most = max(min(len(group), PREFILL_PAGES // pages), 1)
                size = next(size for size in PREFILL_ROWS if size <= most)
                self._prefill(group[:size], pages, arrivals)
                group = group[size:]

    def _prefill(self, group: list[Waiting], pages: int, arrivals: Arrivals) -> None:
        shards = row_shards(self.mesh)
        token = np.zeros((-(-len(group) // shards) * shards, pages * PAGE), np.int32)
        length = np.ones(len(token), np.int32)
        for row, waiting in enumerate(group):
            length[row] = len(waiting.request.prompt)
            token[row, : length[row]] = waiting.request.prompt
        prompts = Prompts(fill_cache(self.params, token, self.config), token, length)
        for row, waiting in enumerate(group):
            waiting.prompts, waiting.row = prompts, row
        self._place(prompts, group, arrivals)

    def _plant(self, tries: list[Trie]) -> None:
        """Have these tries in the forest; when new ones come, those that nobody walks in go, and the others move."""
        if all(trie in self.tries for trie in tries):
            return
        walked = [running.request.trie for running in self.running if running and running.request.trie]
        before = dict(zip(self.tries, self.roots, strict=True))
        self.tries = list(dict.fromkeys(walked))  # the new ones among them
        self.forest, self.roots = forest_of(self.tries)
        moved = np.zeros(len(self.running), np.int32)
        for slot, running in enumerate(self.running):
            if running and running.request.trie in before:
                trie = running.request.trie
                moved[slot] = self.roots[self.tries.index(trie)] - before[trie]
        node = self.slots.node
        self.slots = self.slots._replace(node=jnp.where(node < 0, node, node + moved))

    def _place(self, prompts: Prompts, group: list[Waiting], arrivals: Arrivals) -> None:
        """Put the arrivals of prompts that were prefilled together into their slots."""
        count = len(self.running)
        entry = Entry(np.full(count, count, np.int32), np.zeros(count, np.int32), np.full(count, -1, np.int32))
        rules = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.slots.rules)
        placed = [(slot, running, waiting.row) for waiting in group for slot, running in arrivals[waiting]]
        for number, (slot, running, row) in enumerate(placed):
            trie = running.request.trie
            entry.slot[number], entry.row[number] = slot, row
            entry.node[number] = self.roots[self.tries.index(trie)] if trie else -1
            for name, value in rules_of(running.request, running.index, self.capacity).items():
                getattr(rules, name)[number] = value
        self.slots = insert(self.slots, *prompts, entry, rules, np.int32(len(placed)))

    def _part(self, slot: int, running: Running, emitted: Emitted) -> Completion:
        """What a block brought for one slot, which is free again where that was the end."""
        ended = emitted.ended[:, slot]
        count = int(np.sum(ended >= 0))
        tokens = emitted.token[:count, slot].tolist()
        running.length += count
        text, count, reason = self._read(running, tokens, REASONS[ended[count - 1]])
        if reason:
            self.running[slot] = None
        top = running.request.top_logprobs
        tops = zip(emitted.top_token[:count, slot, :top], emitted.top_log_probability[:count, slot, :top], strict=True)
        return Completion(
            request=running.number,
            index=running.index,
            tokens=tuple(tokens[:count]),
            text=text,
            log_probabilities=tuple(emitted.log_probability[:count, slot].tolist()),
            sampled_log_probabilities=tuple(emitted.sampled_log_probability[:count, slot].tolist()),
            top_logprobs=tuple(tuple(zip(ids.tolist(), values.tolist(), strict=True)) for ids, values in tops),
            finish_reason=reason,
        )

    def _read(self, running: Running, tokens: list[int], reason: FinishReason) -> tuple[str, int, FinishReason]:
        """The text of new tokens, how many of them there are up to a stop string, and why they end."""
        stop = running.request.stop
        shown = tokens[:-1] if reason == "stop" and tokens[-1] in running.request.stop_ids else tokens
        stride = 1 if stop else max(len(shown), 1)
        told = ""
        for start in range(0, len(shown), stride):
            running.window, piece = read_on(self.tokenizer, running.window, shown[start : start + stride])
            text, running.held, is_stopped = before_stop(running.held + piece, stop)
            told += text
            if is_stopped:
                return told, start + stride, "stop"
        if reason:
            _, piece = read_on(self.tokenizer, running.window, (), is_last=True)
            told += "".join(before_stop(running.held + piece, stop)[:2])
        return told, len(tokens), reason


def prompt_pages(length: int, capacity: int) -> int:
    """Pages of the prefill for a prompt: a power of two, or all there are."""
    return min(power_of_two(-(-length // PAGE)), -(-capacity // PAGE))


def page_bucket(length: int, capacity: int) -> int:
    """Pages of a cache for sequences of up to `length` tokens, from few sizes."""
    return max(prompt_pages(length, capacity), min(LEAST_PAGES, -(-capacity // PAGE)))


def rules_of(request: Request, index: int, capacity: int) -> dict[str, Any]:
    """One slot's row of `Rules`."""
    return request.rules.model_dump() | {
        "max_tokens": min(request.rules.max_tokens, capacity - len(request.prompt)),
        "seed": request.seed % 2**32,
        "index": index,
        "top_logprobs": request.top_logprobs,
        "stop_ids": [*request.stop_ids, *[-1] * (STOP_IDS - len(request.stop_ids))],
    }


def check_request(request: Request, config: ModelConfig, capacity: int) -> None:
    """Refuse what can't be generated."""
    length = len(request.prompt)
    if length >= capacity:
        raise UserError(
            f"the prompt has {length:,} tokens, and prompt and completion together have room for {capacity:,}; "
            f"shorten the prompt to {capacity - 1:,} tokens or less"
        )
    if not length:
        raise UserError("the prompt has no token; begin with the tokenizer's BOS or with some text")
    ids = [*request.prompt, *request.stop_ids, *(request.trie.token.tolist() if request.trie else ())]
    if unknown := [token for token in ids if not 0 <= token < config.vocabulary_size]:
        raise UserError(f"token {unknown[0]} is not in the model's vocabulary of {config.vocabulary_size:,}")
    if len(request.stop_ids) > STOP_IDS:
        raise UserError(f"stop_ids has {len(request.stop_ids)} tokens; at most {STOP_IDS} can stop a completion")
    if not all(request.stop):
        raise UserError("stop holds an empty string, which would stop everything; leave it out")
    if request.n < 1 or not 0 <= request.top_logprobs <= TOP_LOGPROBS:
        raise UserError(
            f"n = {request.n} should be 1 or more, top_logprobs = {request.top_logprobs} 0 to {TOP_LOGPROBS}"
        )


def batch_bytes(config: ModelConfig, slots: int, capacity: int, dtype: str) -> int:
    """Size of a batch with all of its cache, over all devices."""
    tokens = -(-capacity // PAGE) * PAGE
    cache = 2 * config.layers * config.kv_heads * config.head * tokens * jnp.dtype(dtype).itemsize
    return slots * (cache + config.padded_vocabulary * 5)


def free_bytes() -> int | None:
    """Memory left on the fullest device, or for each of this machine's where devices do not tell; None if unknown."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in each for each in stats):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    memory = Path("/proc/meminfo")
    if not memory.is_file():
        return None
    lines = (line.split() for line in memory.read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == "MemAvailable:") * 1024 // len(stats)


def check_memory(config: ModelConfig, slots: int, capacity: int, dtype: str, mesh: Mesh) -> None:
    """Refuse a batch that does not fit; growing to its last size it is there one and a half times."""
    total, free = batch_bytes(config, slots, capacity, dtype), free_bytes()
    share = total * 3 // (2 * mesh.size)
    if free is not None and share > free:
        raise UserError(
            f"{slots} slots of {capacity:,} tokens take {byte_size(total)} in {dtype}, {byte_size(share)} on each "
            f"of {mesh.size} devices while growing, and {byte_size(free)} are free there; lower slots or capacity"
        )


def generation_defaults(directory: Path, tokenizer: Tokenizer) -> tuple[SamplingKeys, tuple[int, ...]]:
    """The sampling rules and stop tokens that a model asks for in generation_config.json.

    Raises:
        UserError: a value there that no rule can have.
    """
    path = directory / "generation_config.json"
    raw = read_json(path)
    values = {
        name: raw[name] for name in SamplingKeys.model_fields if raw.get(name) is not None and name != "max_tokens"
    }
    if raw.get("do_sample") is False:
        values["temperature"] = 0.0
    stated = raw.get("eos_token_id")
    stops = [*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_id]
    try:
        return SamplingKeys(**values), tuple(dict.fromkeys(token for token in stops if token is not None))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{path}: {problem['loc'][0]} = {problem['input']!r}: {problem['msg']}; mend the file"
        ) from error


def rules_by_origin(page: SamplingKeys, defaults: SamplingKeys) -> str:
    """The rules in force in words: those that were typed, those of generation_config.json, and all else."""
    rules = rules_in_force(page, defaults)
    by_origin: dict[str, list[str]] = {"typed": [], "generation_config.json": [], "default": []}
    for name in SamplingKeys.model_fields:
        stated = "generation_config.json" if name in defaults.model_fields_set else "default"
        by_origin["typed" if name in page.model_fields_set else stated].append(f"{name}={getattr(rules, name):g}")
    return "; ".join(f"{' '.join(values)} ({origin})" for origin, values in by_origin.items() if values)


def rules_in_force(page: SamplingKeys, defaults: SamplingKeys) -> SamplingKeys:
    """What the user set on a page, the model's defaults for all else."""
    chosen = {name: getattr(page, name) for name in page.model_fields_set if name in SamplingKeys.model_fields}
    return defaults.model_copy(update=chosen)


class Generator(NamedTuple):
    """A model ready to generate: its sampler, the directory it came from, and what a request gets unless it says
    otherwise, from what was typed and else from the model's generation_config.json."""

    sampler: Sampler
    source: Path
    rules: SamplingKeys
    stop_ids: tuple[int, ...]


def load_generator(page: GenerationConfig, slots: int) -> Generator:
    """The model of a page with a sampler of that many slots over all devices.

    Raises:
        UserError: whatever about model, devices or memory can't be used.
    """
    mesh = make_mesh(page.data_parallel, page.fsdp, page.tensor)
    page = page.model_copy(update={"model_name": page.model_name or str(weights.newest_run(page.output_dir))})
    source, config, tokenizer = weights.open_model(page, mesh, page.chat_template, page.template_date)
    defaults, stop_ids = generation_defaults(source, tokenizer)
    enable_compilation_cache(page)
    capacity = min(page.capacity, config.max_positions, config.sliding_window or page.capacity)
    params = weights.load_params(source, config, mesh)
    sampler = Sampler(params, config, tokenizer, mesh, slots, capacity, page.compute_dtype)
    return Generator(sampler, source, rules_in_force(page, defaults), stop_ids)
