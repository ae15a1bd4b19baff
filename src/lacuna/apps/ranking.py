"""The command recommend eval: what a model recommends of a catalogue, and what that is worth.

HR@K and NDCG@K are counted as published, and rules of counting stand beside the model.
"""

import hashlib
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lacuna import checkpoint, metrics
from lacuna.apps.configs import RecommendConfig
from lacuna.apps.constraints import Beams, beam_search, forest_of
from lacuna.apps.evaluate import begin_evaluation, progress_bar
from lacuna.apps.recommend import SHARED_WORDS, SPLITS, user_input
from lacuna.checkpoint import OpenedModel
from lacuna.config import GrpoConfig, UserError
from lacuna.distributed import (
    check_same,
    enable_compilation_cache,
    from_first,
    held_directory,
    is_first,
    make_mesh,
    row_shards,
    writing_to,
)
from lacuna.eval import Predictions
from lacuna.metrics import LineFile, write_atomically
from lacuna.model import parameter_counts
from lacuna.sampler import Forest, Sampler
from lacuna.tokenizer import Tokenizer, encode, encode_continuation, end_of_text_id

CUTOFFS = 1, 3, 5, 10, 20, 50
WRITTEN = "eval_predictions.json", "eval_predictions.metrics.json", "run_summary.json"
RankFigures = dict[str, Any]
PastSteps = Sequence[tuple[Sequence[str], str]]  # of each the history and the item after it


def ranking_figures(samples: Sequence[dict[str, Any]], known: Collection[str]) -> RankFigures:
    """HR@K and NDCG@K (Järvelin & Kekäläinen 2002) of samples with their `output` and ranked `predict`, as MiniOneRec's
    calc.py counts them, and how many predictions down to the hit are not in `known`.

    K are the usual ones up to the first sample's number of predictions; other samples may have more or fewer. The first
    prediction that equals the target counts, so copies of others before it take ranks.

    Raises:
        UserError: there is no sample, or one lacks its target or predictions.
    """
    if not samples:
        raise UserError("there are no predictions to measure")
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample.get("predict"), list) or sample.get("output") in (None, []):
            raise UserError(f"sample {number}: no output, or no list of predictions under predict")
    cutoffs = [cutoff for cutoff in CUTOFFS if cutoff <= len(samples[0]["predict"])]
    hits, gains, invalid = dict.fromkeys(cutoffs, 0), dict.fromkeys(cutoffs, 0.0), 0
    for sample in samples:
        target, texts = target_text(sample["output"]), [str(text).strip('"\n').strip() for text in sample["predict"]]
        rank = texts.index(target) if target in texts else len(texts)
        invalid += sum(text not in known for text in texts[: rank + 1])
        for cutoff in cutoffs:
            if rank < min(cutoff, len(texts)):
                hits[cutoff] += 1
                gains[cutoff] += 1 / math.log2(rank + 2)
    return {
        "hr": {str(cutoff): hits[cutoff] / len(samples) for cutoff in cutoffs},
        "ndcg": {str(cutoff): gains[cutoff] / len(samples) for cutoff in cutoffs},
        "topk": cutoffs,
        "n_samples": len(samples),
        "n_beams": len(samples[0]["predict"]),
        "invalid_prediction_count": invalid,
    }


def target_text(output: Any) -> str:
    """What a prediction has to equal; of a list the first element, whose newlines stay."""
    if isinstance(output, list):
        return str(output[0]).strip('"').strip(" ")
    return str(output).strip(' \n"')


class CountingRules:
    """Recommendations without a model, from the steps of a training file: (history, item), each a semantic id.

    What was bought most often; before it, what followed the last item most often; and between the two, the items that
    share the last item's first two words. A model that is not better than the last of these has learned nothing.
    """

    def __init__(self, steps: PastSteps, catalogue: Iterable[str]) -> None:
        first, following = Counter[str](), Counter[str]()
        self.transitions = defaultdict[str, Counter[str]](Counter)
        for history, item in steps:
            following[item] += 1
            self.transitions[history[-1]][item] += 1
            if len(history) == 1:  # the user's first item is no step's target
                first[history[0]] += 1
        bought = following + first
        self.by_popularity = [item for item, _ in bought.most_common()]
        self.alike = defaultdict[str, list[str]](list)
        for item in dict.fromkeys([*self.by_popularity, *catalogue]):
            self.alike[first_words(item)].append(item)

    def recommend(self, history: Sequence[str], count: int) -> dict[str, list[str]]:
        """The first `count` items by each rule, best first."""
        followed = [item for item, _ in self.transitions.get(history[-1], Counter()).most_common()]
        alike = self.alike.get(first_words(history[-1]), [])
        lists = {
            "popularity": [self.by_popularity],
            "transitions": [followed, self.by_popularity],
            "transitions with shared prefix": [followed, alike, self.by_popularity],
        }
        return {rule: list(islice(unique(chain(*parts)), count)) for rule, parts in lists.items()}


def first_words(sid: str) -> str:
    """The words of a semantic id that items alike share."""
    return "".join(re.findall("<[^<>]*>", sid)[:SHARED_WORDS])


def unique(items: Iterable[str]) -> Iterator[str]:
    """Items without those that came before."""
    seen = set[str]()
    for item in items:
        if item not in seen:
            seen.add(item)
            yield item


def counting_figures(
    rules: CountingRules, steps: PastSteps, count: int, known: Collection[str]
) -> dict[str, RankFigures]:
    """The figures of each rule on these steps."""
    found = [rules.recommend(history, count) for history, _ in steps]
    targets = [item for _, item in steps]
    return {
        rule: ranking_figures(
            [{"output": item, "predict": each[rule]} for item, each in zip(targets, found, strict=True)], known
        )
        for rule in (found[0] if found else ())
    }


# The model


class Catalogue(NamedTuple):
    """The semantic ids that a model may answer, by their tokens, and the trie of these."""

    sids: dict[tuple[int, ...], str]
    forest: Forest
    depth: int


class Questions(NamedTuple):
    """Prepared rows: the prompts and answers to measure on, the steps they ask about and those to count, and all
    semantic ids."""

    prompts: list[str]
    answers: list[str]
    steps: PastSteps
    counted: PastSteps
    sids: list[str]
    digest: str


def read_questions(config: RecommendConfig) -> Questions:
    """What recommend prepare wrote. Raises UserError where something of it is missing or damaged."""
    root = Path(config.prepared)
    files = [root / config.split / f"{config.task}.jsonl", root / config.split / "sequences.jsonl"]
    files += [root / SPLITS[0] / "sequences.jsonl", root / "catalogue.txt"]
    try:
        texts = [path.read_text("utf-8") for path in files]
        rows, asked, counted = ([json.loads(line) for line in text.split("\n") if line] for text in texts[:3])
        steps, past = ([(row["history"], row["item"]) for row in part] for part in (asked, counted))
        prompts, answers = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; make it by recommend prepare, or fix prepared") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root}: damaged ({error}); make it again by recommend prepare --overwrite") from error
    if not rows or len(rows) != len(steps):
        raise UserError(f"{files[0]} has {len(rows)} rows and {files[1].name} {len(steps)}; make them again")
    end = config.limit or len(rows)
    sids = list(dict.fromkeys(line.split("\t")[0] for line in texts[3].split("\n") if line))
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    return Questions(prompts[:end], answers[:end], steps[:end], past, sids, digest)


def read_catalogue(sids: Sequence[str], tokenizer: Tokenizer, source: str) -> Catalogue:
    """The trie of all semantic ids, each as it is learned: its words, a newline and the end of a text.

    Raises:
        UserError: a word of a semantic id is no token of the model.
    """
    newline = tuple(encode_continuation(tokenizer, "\n").tolist())
    end, paths = end_of_text_id(tokenizer), dict[tuple[int, ...], str]()
    for sid in sids:
        ids: list[Any] = [tokenizer.backend.token_to_id(word) for word in re.findall("<[^<>]*>", sid)]
        if None in ids:
            raise UserError(
                f"{source}: the words of {sid} are no tokens of this model; train it with new_tokens = "
                '"…/new_tokens.txt" of the same prepared directory'
            )
        paths[*ids, *newline, end] = sid
    return Catalogue(paths, forest_of([paths]), max(map(len, paths)))


def catalogue_forest(config: GrpoConfig, opened: OpenedModel) -> Forest:
    """The trie of the first column of the file that `constrain` names.

    Raises:
        UserError: no such file, a word in it is no token, or no room for its longest line.
    """
    path = Path(config.constrain)
    if not path.is_file():
        raise UserError(f"constrain = {path}: no such file; recommend prepare writes catalogue.txt")
    sids = dict.fromkeys(line.split("\t")[0] for line in path.read_text("utf-8").split("\n") if line)
    catalogue = read_catalogue(list(sids), opened.tokenizer, config.model_name)
    if catalogue.depth > config.max_completion_tokens:
        raise UserError(
            f"max_completion_tokens = {config.max_completion_tokens} is less than the {catalogue.depth} of an item; "
            "raise it"
        )
    return catalogue.forest


def recommendations(
    sampler: Sampler, catalogue: Catalogue, prompts: Sequence[Sequence[int]], config: RecommendConfig
) -> Iterator[tuple[int, Beams]]:
    """The beams of each prompt with its place, those of similar length together, always in batches of one size."""
    size = config.batch_size * row_shards(sampler.mesh)
    count = len(catalogue.sids) if config.exact else min(config.beams, len(catalogue.sids))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        full = [prompts[place] for place in (*places, *places[-1:] * (size - len(places)))]
        yield from zip(places, beam_search(sampler, full, count, catalogue.depth, root=0), strict=False)


def run_recommend(config: RecommendConfig) -> None:
    """The command recommend eval: recommendations for each row into eval_predictions.json, their figures beside those
    of the counting rules into eval_predictions.metrics.json and run_summary.json.

    Raises:
        UserError: whatever about config, model, data or devices can't be evaluated.
    """
    started, config = time.perf_counter(), checkpoint.settled(config)
    directory = config.run_directory
    with held_directory(directory):
        if is_first() and (directory / WRITTEN[-1]).exists() and not config.overwrite:
            raise UserError(
                f"{directory} holds an evaluation already; add --overwrite to replace it, or another --run-name"
            )
        questions, mesh = read_questions(config), make_mesh(config.data_parallel, config.fsdp, config.tensor)
        opened = checkpoint.open_model(config, mesh)
        catalogue = read_catalogue(questions.sids, opened.tokenizer, config.model_name)
        room = opened.model.capacity(config.capacity)
        if room <= catalogue.depth:
            raise UserError(f"capacity = {room} has no room for a prompt and an item of {catalogue.depth}; raise it")
        enable_compilation_cache(config)
        print(
            f"model: {config.model_name} ({opened.model.family}), {parameter_counts(opened.model)['all']:,} parameters"
        )
        print(f"compute in {config.compute_dtype}; {opened.attention_line}")
        print(f"catalogue: {len(catalogue.sids):,} semantic ids, of at most {catalogue.depth} tokens with their end")
        print(f"{len(questions.prompts):,} rows, the first asked as {questions.prompts[0]!r}")
        if is_first():
            begin_evaluation(config, opened, [questions.digest])
        from_first("evaluation begun", "")
        with (
            closing(LineFile(directory / "predictions.jsonl")) as kept,
            progress_bar() as report,
            jax.set_mesh(mesh),
        ):
            predictions = Predictions(kept, report)
            keys = [("recommend", row, 0) for row in range(len(questions.prompts))]
            rows = predictions.missing(keys)
            check_same("earlier predictions", repr(rows))
            if len(rows) < len(keys):
                print(f"resuming with {len(keys) - len(rows):,} rows of {kept.path}")
            try:
                if rows:
                    tokens = [encode(opened.tokenizer, questions.prompts[row], add_special_tokens=True) for row in rows]
                    prompts = [token[-(room - catalogue.depth) :].tolist() for token in tokens]
                    cut = sum(len(token) > len(prompt) for token, prompt in zip(tokens, prompts, strict=True))
                    print(f"prompts cut from the left to {room - catalogue.depth} tokens: {cut}") if cut else None
                    params = checkpoint.opened_params(opened)
                    slots = row_shards(mesh)
                    sampler = Sampler(params, opened, slots, room, config.compute_dtype, catalogue.forest)
                    for place, found in recommendations(sampler, catalogue, prompts, config):
                        predictions.add(keys[rows[place]], line_of_beams(found, catalogue, config.beams))
            except KeyboardInterrupt:
                again = "without --overwrite" if config.overwrite else "again"
                raise KeyboardInterrupt(
                    f"; {len(predictions.lines):,} rows are kept in {directory}, and the same command {again} resumes"
                ) from None
            lines = [predictions.lines[key] for key in keys]
        if is_first():
            write_figures(config, questions, lines, opened, time.perf_counter() - started)
        from_first("evaluation ended", "")  # the others wait here for what the first process writes


def line_of_beams(found: Beams, catalogue: Catalogue, count: int) -> dict[str, Any]:
    """What predictions.jsonl says of a row: the items, their log-probabilities, and how many are certain."""
    best = found.beams[:count]
    return {
        "predict": [catalogue.sids[beam.tokens] for beam in best],
        "log_probabilities": [beam.log_probability for beam in best],
        "certain": min(found.certain_count, len(best)),
    }


def write_figures(
    config: RecommendConfig,
    questions: Questions,
    lines: Sequence[dict[str, Any]],
    opened: OpenedModel,
    seconds: float,
) -> None:
    """Write the predictions in the published form, their figures and the summary, and print them beside counting."""
    directory, known = config.run_directory, set(questions.sids)
    samples = [
        {"input": user_input(prompt), "output": answer, "predict": line["predict"]}
        for prompt, answer, line in zip(questions.prompts, questions.answers, lines, strict=True)
    ]
    figures = ranking_figures(samples, known)
    counting = counting_figures(CountingRules(questions.counted, questions.sids), questions.steps, config.beams, known)
    certain = np.array([line["certain"] for line in lines])
    shares = {str(cutoff): float(np.mean(certain >= cutoff)) for cutoff in figures["topk"]}
    summary = {
        "command": "recommend eval",
        "config": json.loads(config.model_dump_json()),
        "eval": figures,
        "certified": shares,
        "counting": counting,
        "parameters": parameter_counts(opened.model)["all"],
        "wall_seconds": seconds,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "versions": metrics.versions(),
    }
    with writing_to(directory):
        for name, content in zip(WRITTEN, (samples, figures, summary), strict=True):
            write_atomically(directory / name, json.dumps(content, indent=4, ensure_ascii=False) + "\n")
    print_figures({config.model_name: figures} | counting, shares)
    print(f"summary: {directory / WRITTEN[-1]}")


def print_figures(figures: dict[str, RankFigures], certified: dict[str, float]) -> None:
    """Print the figures of all, one a line, and which of the model's are certain."""
    width = max(map(len, figures))
    cutoffs = list(certified)
    for key, name in (("hr", "HR"), ("ndcg", "NDCG")):
        print("  ".join([" " * width, *(f"{name}@{cutoff}".rjust(7) for cutoff in cutoffs)]))
        for rule, found in figures.items():
            values = (f"{found[key][cutoff]:7.4f}" if cutoff in found[key] else "      –" for cutoff in cutoffs)
            print("  ".join([rule.ljust(width), *values]))
    model, *rules = figures.values()
    print(f"{model['n_samples']:,} rows, {model['invalid_prediction_count']} invalid predictions")
    shares = (f"top {cutoff} in {share:.1%}" for cutoff, share in certified.items())
    print(f"certainly the same as scoring every item: {', '.join(shares)} of the rows")
    last = cutoffs[-1] if "10" not in cutoffs else "10"
    best = max(rules, key=lambda rule: rule["hr"].get(last, 0.0))
    if model["hr"][last] <= best["hr"].get(last, 0.0):
        print(f"by HR@{last} this model is no better than counting: it has not learned what counting knows")
