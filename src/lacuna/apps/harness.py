"""Tasks of EleutherAI's lm-evaluation-harness (the extra `eval`), run on our model."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, PyTree
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from lacuna.config import OWN_TASKS, EvalConfig, SamplingKeys, UserError, did_you_mean
from lacuna.eval import Figures, Key, Predictions, RunHarness, Tasks, complete, log_likelihoods, seed_of
from lacuna.sampler import Completion, Request, before_stop
from lacuna.tokenizer import NO_VARIABLES, decode, encode, end_of_text_id, render_prompt

MAX_TOKENS = 256  # of tasks that do not say, as in the harness's own models
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
IGNORED_KEYS = {"until", "do_sample", "num_beams", "use_cache", *LENGTH_KEYS}


class Model(TemplateLM):
    """Our model as the harness asks it; what was answered before is read from the predictions."""

    def __init__(self, tasks: Tasks, params: PyTree[Array], predictions: Predictions) -> None:
        super().__init__()
        self.tasks, self.params, self.predictions = tasks, params, predictions
        self.opened = tasks.opened
        self.stop_ids = tuple(self.opened.tokenizer.ends)

    @property
    def eot_token_id(self) -> int:
        return end_of_text_id(self.opened.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        bos = self.opened.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tasks.config.model_name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Tokens, with BOS where the tokenizer wants it, but never two."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.opened.tokenizer.special_tokens.get("bos_token") or "\0")
        return encode(self.opened.tokenizer, string, add_special_tokens).tolist()

    def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> str:
        try:
            text = render_prompt(self.opened.tokenizer, chat_history, None, NO_VARIABLES, add_generation_prompt)
        except ValueError as error:
            raise UserError(f"harness_chat: {error}") from error
        last = chat_history[-1]["content"]
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        keys = keys_of("log-likelihood", [(context, continuation) for _, context, continuation in requests])
        missing = self.predictions.missing(keys)
        if long := [place for place in missing if len(requests[place][2]) > self.tasks.capacity]:
            raise UserError(
                f"a continuation has {len(requests[long[0]][2]):,} tokens, and there is room for "
                f"{self.tasks.capacity:,}; raise capacity, or leave this task out"
            )
        pairs = [requests[place][1:] for place in missing]
        for number, *result in log_likelihoods(self.tasks, self.params, pairs):
            prompt, output = requests[missing[number]][0] or ("", "")
            content = {"prompt": prompt, "output": output, "result": result}
            self.predictions.add(keys[missing[number]], content)
        results = [self.predictions.lines[key]["result"] for key in keys]
        return [(log_likelihood, is_greedy) for log_likelihood, is_greedy in results]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, in windows as long as there is room for, each token predicted once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            found = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.tasks.capacity, 1)
            parts = [utils.make_disjoint_window(pair) for pair in found]
            windows += [(("", text), list(context), list(continuation)) for context, continuation in parts]
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        keys = keys_of("generation", [request.args for request in requests])
        missing = self.predictions.missing(keys)
        wanted = [self.request(*requests[place].args, keys[place]) for place in missing]

        def keep(completion: Completion) -> None:
            place, output = missing[completion.request], self.written(wanted[completion.request], completion)
            content = {"prompt": requests[place].args[0], "output": output, "finish_reason": completion.finish_reason}
            self.predictions.add(keys[place], content)

        complete(self.tasks, self.params, wanted, keep)
        return [self.predictions.lines[key]["output"] for key in keys]

    def written(self, request: Request, completion: Completion) -> str:
        """The text of a completion's tokens by themselves, as the harness's own models give it: where a tokenizer
        marks word beginnings, it has no space in front."""
        tokens = completion.tokens
        if tokens[-1] in request.stop_ids:
            tokens = tokens[:-1]
        text = decode(self.opened.tokenizer, tokens, skip_special_tokens=True)
        return "".join(before_stop(text, request.stop)[:2])

    def request(self, context: str, settings: dict[str, Any], key: Key) -> Request:
        """What the sampler is to do for one of the harness's requests."""
        known = IGNORED_KEYS | set(SamplingKeys.model_fields)
        if unknown := [key for key in settings if key not in known]:
            raise UserError(f"the task sets {unknown[0]} = {settings[unknown[0]]!r}, which our sampler does not know")
        if settings.get("num_beams", 1) != 1:
            raise UserError(f"the task sets num_beams = {settings['num_beams']}; evaluation does not search with beams")
        until = settings.get("until") or []
        length = int(next((settings[key] for key in LENGTH_KEYS if settings.get(key)), MAX_TOKENS))
        if length >= self.tasks.capacity:
            raise UserError(
                f"the task wants {length:,} tokens, and there is room for {self.tasks.capacity:,}; raise capacity"
            )
        rules = {key: settings[key] for key in SamplingKeys.model_fields if key in settings}
        is_sampled = settings.get("do_sample", float(settings.get("temperature", 0)) > 0)
        temperature = float(settings.get("temperature", 1)) if is_sampled else 0.0
        token = tuple(self.tok_encode(context)[-(self.tasks.capacity - length) :])
        return Request(
            token,
            SamplingKeys(**rules | {"temperature": temperature, "max_tokens": length}),
            self.stop_ids,
            tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            seed_of(self.tasks.config.seed, key),
        )


def keys_of(kind: str, requests: Sequence[Any]) -> list[Key]:
    """A key for each request: its kind, a hash of it, and how many like it came before."""
    counts, keys = Counter[str](), []
    for request in requests:
        digest = hashlib.sha256(json.dumps(request, default=str).encode()).hexdigest()[:32]
        keys.append((f"harness {kind}", digest, counts[digest]))
        counts[digest] += 1
    return keys


def load_tasks(config: EvalConfig) -> RunHarness:
    """The config's tasks with their data as the harness finds them, as a function that runs them.

    Raises:
        UserError: no such task, or one whose data can't be loaded.
    """
    if config.task_path and not os.path.isdir(config.task_path):
        raise UserError(
            f"task_path = {config.task_path!r} is no directory; name the one that holds the tasks' YAML files"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=config.task_path or None)
    if unknown := [task for task in config.harness_tasks if task not in manager.all_tasks]:
        raise UserError(
            f"tasks: {unknown[0]} is none of {', '.join(OWN_TASKS)}, nor a task of lm-evaluation-harness"
            f"{did_you_mean(unknown[0], manager.all_tasks)}; --task-path takes a directory with tasks of your own"
        )
    try:
        manager.load(list(config.harness_tasks))
    except Exception as error:  # of tasks, which are foreign code, and of the clients that fetch their data
        raise UserError(f"{', '.join(config.harness_tasks)}: {type(error).__name__}: {error}") from error
    return partial(run_harness, manager)


def run_harness(
    manager: TaskManager, tasks: Tasks, params: PyTree[Array], predictions: Predictions
) -> dict[str, Figures]:
    """The harness's figures of its tasks, under its names for them."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its processes for bootstrapping are forked, and JAX has threads
    config = tasks.config
    found = simple_evaluate(
        Model(tasks, params, predictions),
        tasks=list(config.harness_tasks),
        task_manager=manager,
        apply_chat_template=config.harness_chat,
        system_instruction=config.system_prompt or None,
        log_samples=False,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    assert found is not None, "the first process is the only one that the harness knows of"
    return {
        task: {name.removesuffix(",none"): value for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in found["results"].items()
    }
