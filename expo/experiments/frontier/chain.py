"""The verifier of the frontier plan: a reply is correct if every running total is right.

The last total alone is one of 30 numbers, and a guess of it would pass once in 30 replies.
"""


def has_right_chain(reply: str, answer: str) -> bool:
    """Whether a reply is the whole chain of running totals; a `module:function` of `reward.verifier`.

    Args:
        reply: such as "11,9,\\boxed{16}".
        answer: the right chain, written alike.
    """
    return reply.strip() == answer
