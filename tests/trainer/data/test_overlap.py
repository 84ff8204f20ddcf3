"""Overlap: copies with other formatting or small edits are found; questions that share a common phrase are not."""

import pytest

from expo.data import QuestionSet, find_overlap
from expo.errors import ConfigError
from expo.types import Question

LONG = (
    "A rectangular garden has a fence of $60$ metres. The gardener plants tulips along its shorter side, one every "
    r"$\frac{1}{2}$ metre, and pays $3$ coins for each. Find the number of coins if the longer side is $18$ metres."
)
PHRASE = "The answer can be written as m over n where m and n are relatively prime positive integers. Find m + n."


def set_of(*texts):
    return QuestionSet("some", tuple(Question(str(index), text, "1") for index, text in enumerate(texts)))


def found(training, evaluation):
    overlap = find_overlap(set_of(*training), {"few": set_of(*evaluation)})
    return [(match.training.id, match.evaluation.id, match.kind) for match in overlap.matches]


def test_case_spacing_and_latex_formatting_do_not_hide_a_copy():
    written = r"Find $\left(\frac{1}{2}\right)^{3}$,  if   $x = 4$."
    assert found([r"find (\frac12)^3, if x=4.", written], [r"Find \( \left( \frac{1}{2} \right)^3 \), if $x=4$."]) == []
    assert found([r"find $(\frac{1}{2})^3$, if x=4."], [written]) == [("0", "0", "exact")]


def test_questions_with_other_signs_or_numbers_are_different():
    assert found(["3+8-2=", "3+8+2=", "38-2="], ["3-8+2="]) == []


def test_a_copy_with_changed_words_is_a_near_match():
    edited = LONG.replace("tulips", "roses").replace("coins if", "coins when")
    assert found(["Another question.", edited], [LONG]) == [("1", "0", "near")]


def test_another_question_on_the_same_topic_is_no_match():
    assert (
        found(["A rectangular garden has a fence of $60$ metres. What is the largest area it can have?"], [LONG]) == []
    )


def test_a_phrase_that_many_questions_share_is_no_match():
    def with_phrase(number, side):
        own = " ".join(f"{side}{number}word{index}" for index in range(6))
        return f"{own} {PHRASE}"

    training = [with_phrase(number, "a") for number in range(20)]
    assert found(training, [with_phrase(0, "b")]) == []
    assert found([*training, LONG + PHRASE], [LONG + PHRASE.upper()]) == [("20", "0", "exact")]


def test_drop_overlap_chooses_which_matches_are_dropped():
    train = set_of(LONG, LONG.replace("tulips", "roses"), "Something else altogether.")
    overlap = find_overlap(train, {"few": set_of(LONG)})
    kept = {what: [q.id for q in overlap.drop_from(train, what).questions] for what in ("none", "exact", "near")}
    assert kept == {"none": ["0", "1", "2"], "exact": ["1", "2"], "near": ["2"]}
    assert overlap.drop_from(train, "near").num_overlapping == 2
    (line,) = overlap.lines()
    assert "1 questions of few are training questions too" in line
    only = set_of(LONG)
    with pytest.raises(ConfigError, match="leaves no question"):
        find_overlap(only, {"few": only}).drop_from(only, "exact")
