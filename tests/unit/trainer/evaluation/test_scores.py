"""Scores of answers: exact match, F1, ROUGE, and accuracy of choices."""

from statistics import fmean

import pytest
from graft_trainer.evaluation.scores import accuracy, matches, normalise, standard_error, task_scores, token_f1


def test_exact_match_ignores_case_and_white_space() -> None:
    assert normalise("  It is\n BLUE. ") == "it is blue."
    assert matches("It is  blue.", "it is blue.") == 1
    assert matches("It is blue", "It is blue.") == 0


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("The cat sat.", "a cat sat", 1.0),  # articles and punctuation do not count
        ("the cat sat on a mat", "cat mat", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("cat cat", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # a repeated word counts each time
        ("dog", "cat", 0.0),
        ("the", "a", 1.0),  # without articles both are empty
        ("", "cat", 0.0),
    ],
)
def test_f1_is_that_of_squad(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)


def test_the_best_score_over_several_expected_answers_counts() -> None:
    answers = ["Paris", "twelve"]
    expected = [["Lyon", "paris"], ["12", "a dozen"]]
    assert fmean(task_scores("exactMatch", answers, expected)) == 0.5
    assert fmean(task_scores("f1", answers, expected)) == 0.5


def test_rouge_is_the_f_measure_of_stemmed_words() -> None:
    answers, expected = ["the cats were sitting here"], [["a cat sits here"]]
    # Shared after stemming: cat, sit, here. Precision is 3/5, recall is 3/4.
    assert fmean(task_scores("rouge1", answers, expected)) == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert fmean(task_scores("rougeL", answers, expected)) == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert fmean(task_scores("rouge2", answers, expected)) == pytest.approx(2 * (1 / 4) * (1 / 3) / (1 / 4 + 1 / 3))


def test_the_likeliest_choice_is_the_answer_and_a_tie_is_wrong() -> None:
    assert accuracy([[-1.0, -2.0], [-3.0, -0.5], [-1.0, -1.0], [float("nan"), -1.0]], [0, 0, 0, 0]) == 0.25


def test_the_standard_error_of_a_mean() -> None:
    assert standard_error([1, 0, 1, 0]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert standard_error([1]) is None
