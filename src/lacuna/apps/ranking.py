"""What a ranked list of items is worth: HR@K and NDCG@K as published, and rules of counting to compare a model with."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from lacuna.config import UserError

CUTOFFS = 1, 3, 5, 10, 20, 50
SHARED_WORDS = 2  # of a semantic id, that make items alike for the counting rule
Figures = dict[str, Any]


def ranking_figures(samples: Sequence[dict[str, Any]], known: Collection[str]) -> Figures:
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

    def __init__(self, steps: Iterable[tuple[Sequence[str], str]], catalogue: Iterable[str]) -> None:
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
    rules: CountingRules, steps: Sequence[tuple[Sequence[str], str]], count: int, known: Collection[str]
) -> dict[str, Figures]:
    """The figures of each rule on these steps."""
    found = [rules.recommend(history, count) for history, _ in steps]
    targets = [item for _, item in steps]
    return {
        rule: ranking_figures(
            [{"output": item, "predict": each[rule]} for item, each in zip(targets, found, strict=True)], known
        )
        for rule in (found[0] if found else ())
    }
