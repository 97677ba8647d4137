"""Score answers (PURE). Each score is from 0 to 1. If several answers are right, the best score counts."""

import functools
import logging
import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
Score = Callable[[str, str], float]


def normalise(answer: str) -> str:
    """Return the answer in lower case, with one space between words."""
    return " ".join(answer.lower().split())


def matches(answer: str, expected: str) -> float:
    """Return 1 if both are equal except for case and white space, else 0."""
    return float(normalise(answer) == normalise(expected))


def squad_tokens(text: str) -> list[str]:
    """Return the words as SQuAD's script counts them: lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split()


def token_f1(answer: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall over words, as in SQuAD's evaluate-v2.0.py (Rajpurkar et al.
    2018)."""
    given, wanted = squad_tokens(answer), squad_tokens(expected)
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def rouge(kind: str) -> Score:
    """Return the score ROUGE-1, -2 or -L (Lin 2004): the F-measure of the package rouge-score, with stemmed words."""
    scorer = _rouge_scorer(kind)
    return lambda answer, expected: float(scorer.score(expected, answer)[kind].fmeasure)


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    logging.getLogger("absl").setLevel(logging.WARNING)  # each scorer would log its tokenizer

    return RougeScorer([kind], use_stemmer=True)


SCORES: dict[str, Callable[[], Score]] = {
    "exactMatch": lambda: matches,
    "f1": lambda: token_f1,
    "rouge1": lambda: rouge("rouge1"),
    "rouge2": lambda: rouge("rouge2"),
    "rougeL": lambda: rouge("rougeL"),
}


def task_scores(metric: str, answers: Sequence[str], expected: Sequence[Sequence[str]]) -> list[float]:
    """Return the metric of each answer: its best score over the right answers."""
    score = SCORES[metric]()
    return [max(score(answer, right) for right in rights) for answer, rights in zip(answers, expected, strict=True)]


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of some values, None for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def accuracy(likelihoods: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """Return the share of the questions whose right choice has the greatest log-likelihood per token. A tie counts as
    wrong."""
    hits = sum(
        all(values[label] > value for index, value in enumerate(values) if index != label)
        for values, label in zip(likelihoods, right, strict=True)
    )
    return hits / len(right)
