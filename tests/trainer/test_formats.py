"""Reward functions for the format of a reply."""

from expo.formats import boxed, think_then_answer


def test_formats_that_are_kept_and_broken():
    replies = [r"so \boxed{4}", r"\boxed{", r"\boxed{}", "4"]
    assert boxed(replies, [""] * 4, [""] * 4) == [1.0, 0.0, 0.0, 0.0]
    kept = ["<think>a</think>4", " <think>\na\n</think>\n\n4\n", "in the prompt</think> 4"]
    broken = ["4", "<think>a</think> ", "<think>a</think>b</think>4", "<think><think>a</think>4", "a<think>b</think>4"]
    broken += ["<think>a</think>4<think>", ""]
    found = think_then_answer(kept + broken, [], [])
    assert found == [1.0] * len(kept) + [0.0] * len(broken)
