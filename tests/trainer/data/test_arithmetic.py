from expo.data import load_questions
from expo.rewards.answers import extract_answer


def test_questions_are_right_distinct_and_held_out_or_trained_on():
    train, held_out = (load_questions(f"arithmetic:{name}").questions for name in ("train", "held_out"))
    texts = [question.text for question in (*train, *held_out)]
    assert len(set(texts)) == len(texts) == 99 + 55  # sums but the example's, differences that are not negative
    assert 0.2 < len(held_out) / len(texts) < 0.35
    for question in (*train, *held_out):
        term = question.text.rsplit("What is ", 1)[1].removesuffix("?\n")
        assert int(question.answer) == eval(term)
        assert question.level == ("sums" if "+" in term else "differences")


def test_the_example_shows_an_answer_that_the_verifier_finds():
    text = load_questions("arithmetic:train").questions[0].text
    assert extract_answer(text) == "3 + 4 = 7"
