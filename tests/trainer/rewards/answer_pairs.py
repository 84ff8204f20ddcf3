"""Pairs of a gold answer and a stated one, equal or unequal by construction, from a seeded grammar.

    python -m tests.trainer.rewards.answer_pairs 20000

grades that many pairs and prints the unequal ones that are correct and the equal ones that are not.
"""

import random
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple


class Pair(NamedTuple):
    """kind: of the gold answer; is_equal: whether the stated answer is the gold answer."""

    kind: str
    gold: str
    stated: str
    is_equal: bool


Maker = Callable[[random.Random], tuple[str, list[str], list[str]]]
"""Makes a gold answer, stated answers equal to it, and stated answers that are not."""

UNITS = {
    "cm": ["cm", "centimeters", "centimetres"],
    "kg": ["kg", "kilograms"],
    "s": ["s", "seconds", "sec"],
    "m": ["m", "meters", "metres"],
    "h": ["hours", "h", "hr"],
    "USD": ["dollars"],
}


def frac(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def integers(draw: random.Random) -> tuple[str, list[str], list[str]]:
    n = draw.choice([draw.randint(2, 99), draw.randint(100, 10**6), draw.randint(10**9, 10**12)])
    s = draw.choice(["", "-"])
    gold = f"{s}{n}"
    equal = [f"{s}{n}.0", f"{s}{n:,}", f"{s}{n:,}".replace(",", "{,}"), f"{s}{n:,}".replace(",", r"\,"), f"{s}0{n}"]
    equal += [f"x={s}{n}", f"{s}{n}.", rf"{s}\frac{{{3 * n}}}{{3}}", gold.replace("-", "−")]
    other = n + draw.choice([-1, 1, 10, 100])
    unequal = [f"{s}{other}", f"{s}{n}0", f"{'' if s else '-'}{n}", f"{s}{n}.5", f"{s}{n},{n}", f"[{n - 1},{n + 1}]"]
    unequal += [
        rf"{s}{n} \cdot 1",
        f"{s}{n}+0",
        f"{s}{2 * n}/2",
        rf"{s}\sqrt{{{n * n}}}",
        f"{n - 1}<x<{n + 1}",
        f"{s}{n}^1",
    ]
    return gold, equal, unequal


def fractions(draw: random.Random) -> tuple[str, list[str], list[str]]:
    value = Fraction(draw.randint(1, 60), draw.choice([2, 3, 4, 5, 7, 8, 9, 11, 16, 25, 40])) * draw.choice([1, -1])
    while value.denominator == 1:
        value += Fraction(1, 3)
    top, bottom, k = value.numerator, value.denominator, draw.randint(2, 9)
    equal = [frac(value), frac(value).replace("frac", "dfrac"), f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}"]
    equal += [rf"\frac{{{k * top}}}{{{k * bottom}}}", rf"\frac{{{-top}}}{{{-bottom}}}", rf"x = {frac(value)}"]
    if abs(value) > 1:
        whole, rest = divmod(abs(top), bottom)
        equal.append(rf"{'-' if top < 0 else ''}{whole}\frac{{{rest}}}{{{bottom}}}")
    if bottom in (2, 4, 5, 8, 16, 25, 40):
        equal += [str(float(value)), rf"{float(value * 100):.10g}\%"]
    unequal = [frac(1 / value), frac(-value), frac(value + 1), frac(value + Fraction(1, bottom)), f"{top}, {bottom}"]
    unequal += [
        rf"{frac(value)} + 0",
        rf"{frac(value - Fraction(1, 7))} + \frac17",
        f"({top}, {bottom})",
        f"{float(value):.2f}1",
    ]
    return frac(value), equal, unequal


def decimals(draw: random.Random) -> tuple[str, list[str], list[str]]:
    n, places = draw.randint(1, 9999), draw.randint(1, 3)
    value = Fraction(n, 10**places)
    gold = f"{float(value):.{places}f}"
    equal = [gold + "0", str(value) if value.denominator > 1 else str(value.numerator), f"{n}e-{places}"]
    equal += [rf"{n} \times 10^{{-{places}}}", gold.removeprefix("0") if gold.startswith("0.") else gold]
    unequal = [
        f"{float(value) + 0.01:.{places + 2}f}",
        f"-{gold}",
        str(n * 10),
        f"{gold}1",
        rf"{n} \times 10^{{{places}}}",
    ]
    return gold, equal, unequal


def radicals(draw: random.Random) -> tuple[str, list[str], list[str]]:
    a, b, c = draw.randint(2, 12), draw.choice([2, 3, 5, 6, 7, 10, 11, 13]), draw.randint(1, 20)
    form = draw.randrange(3)
    if form == 0:
        gold = rf"{a}\sqrt{{{b}}}"
        equal = [rf"\sqrt{{{a * a * b}}}", rf"{a}\sqrt {b}" if b < 10 else gold, rf"\sqrt{{{b}}} \cdot {a}", f"{a}√{b}"]
        unequal = [
            rf"{a + 1}\sqrt{{{b}}}",
            rf"-{gold}",
            rf"\sqrt{{{a * b}}}",
            rf"{a}{b}",
            rf"{gold}+{gold}",
            rf"(\sqrt{{{b}}}) + {a}",
        ]
        unequal += [rf"\sqrt{{{a * a}}}\sqrt{{{b}}}", f"{a * b**0.5:.3f}"]
    elif form == 1:
        gold = rf"{c}+{a}\sqrt{{{b}}}"
        equal = [rf"{a}\sqrt{{{b}}}+{c}", rf"\sqrt{{{a * a * b}}} + {c}", rf"\frac{{{2 * c}+{2 * a}\sqrt{{{b}}}}}{{2}}"]
        unequal = [
            rf"{c}-{a}\sqrt{{{b}}}",
            rf"{c + 1}+{a}\sqrt{{{b}}}",
            rf"{a}+{c}\sqrt{{{b + 1}}}",
            rf"{c - 1}+{a}\sqrt{{{b}}}+1",
        ]
    else:
        gold = rf"\frac{{\sqrt{{{b}}}}}{{{b}}}"
        equal = [rf"\frac{{1}}{{\sqrt{{{b}}}}}", rf"\frac1{b}\sqrt{{{b}}}" if b < 10 else gold, rf"\sqrt{{{b}}}/{b}"]
        unequal = [rf"\sqrt{{{b}}}", rf"\frac{{1}}{{{b}}}", rf"\frac{{\sqrt{{{b + 1}}}}}{{{b}}}"]
    return gold, equal, unequal


def multiples_of_pi(draw: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = draw.randint(2, 30), draw.choice([3, 7, 11])
    while a % b == 0:
        a += 1
    gold = rf"\frac{{{a}\pi}}{{{b}}}"
    equal = [
        rf"\frac{{{a}}}{{{b}}}\pi",
        rf"{a}\pi/{b}",
        f"{a}π/{b}",
        rf"\frac{{{2 * a}\pi}}{{{2 * b}}}",
        rf"\pi\cdot\frac{{{a}}}{{{b}}}",
    ]
    unequal = [
        rf"\frac{{{a}}}{{{b}}}",
        rf"\frac{{{a + 1}\pi}}{{{b}}}",
        rf"-{gold}",
        rf"{a}\pi",
        f"{a * 3.14159 / b:.4f}",
    ]
    unequal += [rf"\frac{{{a}\pi^2}}{{{b}}}", rf"{gold}+2\pi-2\pi"]
    return gold, equal, unequal


def intervals(draw: random.Random) -> tuple[str, list[str], list[str]]:
    low = draw.randint(-20, 20)
    high = low + draw.randint(1, 30)
    has_low, has_high = draw.random() < 0.5, draw.random() < 0.5
    left, right = "[" if has_low else "(", "]" if has_high else ")"
    below, above = r"\le" if has_low else "<", r"\le" if has_high else "<"
    gold = f"{left}{low},{high}{right}"
    equal = [f"{left}{low}, {high}{right}", rf"\left{left}{low},{high}\right{right}", f"{low} {below} x {above} {high}"]
    equal += [
        rf"x \in {gold}",
        rf"\{{x \mid {low} {below} x {above} {high}\}}",
        rf"{left}\frac{{{2 * low}}}{{2}}, {high}{right}",
    ]
    up, down = (r"\ge" if has_high else ">"), (r"\ge" if has_low else ">")
    equal += [f"{high} {up} x {down} {low}", rf"x {down} {low} \text{{ and }} x {above} {high}"]
    flipped = "(" if has_low else "["
    unequal = [
        f"{flipped}{low},{high}{right}",
        f"{left}{low},{high + 1}{right}",
        f"{left}{low - 1},{high}{right}",
        f"{low}, {high}",
    ]
    unequal += [f"x {down} {low}", f"(x-{low})(x-{high}) {above} 0", rf"\{{{low},{high}\}}", f"{high}"]
    unequal += [f"{low} {'<' if has_low else below + ' 1 +'} x {above} {high}"] if has_low else []
    return gold, equal, unequal


def unions(draw: random.Random) -> tuple[str, list[str], list[str]]:
    low = draw.randint(-20, 10)
    high = low + draw.randint(1, 20)
    gold = rf"(-\infty,{low})\cup({high},\infty)"
    equal = [
        rf"({high}, \infty) \cup (-\infty, {low})",
        rf"x<{low} \text{{ or }} x>{high}",
        f"x<{low}, x>{high}",
        f"x > {high} or x < {low}",
    ]
    equal += [f"(-∞,{low})∪({high},∞)"]
    unequal = [
        rf"(-\infty,{low}]\cup({high},\infty)",
        rf"(-\infty,{low})",
        f"({low},{high})",
        f"x>{high}",
        rf"x \le {low}, x>{high}",
    ]
    unequal += [f"(x-{low})(x-{high})>0".replace("--", "+")]
    return gold, equal, unequal


def half_lines(draw: random.Random) -> tuple[str, list[str], list[str]]:
    n = draw.randint(-30, 30)
    gold = rf"[{n},\infty)"
    equal = [rf"x \ge {n}", rf"x\geq{n}", rf"{n} \le x", rf"[{n}, +\infty)", rf"\{{x : x \ge {n}\}}", f"x≥{n}"]
    unequal = [f"x > {n}", rf"x \ge {n + 1}", rf"x \le {n}", rf"2x \ge {2 * n}", rf"x + 1 \ge {n + 1}", str(n)]
    return gold, equal, unequal


def sets(draw: random.Random) -> tuple[str, list[str], list[str]]:
    members = [str(n) for n in draw.sample(range(-20, 60), draw.randint(2, 5))]
    shuffled = draw.sample(members, len(members))
    gold = rf"\{{{','.join(members)}\}}" if draw.random() < 0.5 else ", ".join(members)
    equal = [", ".join(shuffled), rf"\{{{', '.join(shuffled)}\}}", rf"\left\{{{','.join(shuffled)}\right\}}"]
    equal += [" and ".join(shuffled), "x = " + r" \text{ or } x = ".join(shuffled), "; ".join(shuffled)]
    unequal = [
        ", ".join(members[:-1]),
        ", ".join([*members, "99"]),
        ", ".join([*members[:-1], str(int(members[-1]) + 1)]),
    ]
    unequal += [f"({', '.join(members)})", ", ".join([*members, members[0]]), members[0]]
    return gold, equal, unequal


def tuples(draw: random.Random) -> tuple[str, list[str], list[str]]:
    members = [str(n) for n in draw.sample(range(-20, 60), draw.choice([2, 3]))]
    gold = f"({','.join(members)})"
    names = "xyz"[: len(members)]
    named = [f"{name}={member}" for name, member in zip(names, members, strict=True)]
    equal = [
        f"({', '.join(members)})",
        rf"\left({','.join(members)}\right)",
        ", ".join(named),
        ", ".join(reversed(named)),
    ]
    equal += [f"({','.join(names)})={gold}"]
    unequal = [
        f"({', '.join(reversed(members))})",
        ", ".join(members),
        f"({', '.join(members[:-1])})",
        f"({', '.join([*members, '1'])})",
    ]
    unequal += [
        rf"\{{{', '.join(members)}\}}",
        ", ".join(f"{name}={member}" for name, member in zip(names, reversed(members), strict=True)),
    ]
    return gold, equal, unequal


def units(draw: random.Random) -> tuple[str, list[str], list[str]]:
    n, unit = draw.randint(2, 500), draw.choice(list(UNITS))
    other = draw.choice([name for name in UNITS if name != unit])
    gold = draw.choice([rf"{n}\text{{ {draw.choice(UNITS[unit])}}}", rf"{n}\ \mathrm{{{UNITS[unit][0]}}}"])
    equal = [
        str(n),
        *(rf"{n}\text{{ {name}}}" for name in UNITS[unit]),
        f"{n} {UNITS[unit][-1]}",
        rf"{n}.0 \text{{{UNITS[unit][0]}}}",
    ]
    unequal = [
        rf"{n}\text{{ {UNITS[other][0]}}}",
        rf"{n + 1}\text{{ {UNITS[unit][0]}}}",
        rf"{n}\text{{ {UNITS[unit][0]}}}^2",
    ]
    unequal += [
        rf"{n}\text{{ million}}",
        rf"{n} \text{{ or more}}",
        rf"{n}\text{{ {UNITS[unit][0]} }}5",
        f"{n}x",
        rf"{n}\text{{ dozen}}",
    ]
    return gold, equal, unequal


def percents(draw: random.Random) -> tuple[str, list[str], list[str]]:
    n = draw.randint(2, 99)
    value = Fraction(n, 100)
    gold = rf"{n}\%"
    equal = [f"{n}%", str(float(value)), frac(value), rf"{n}.0\%", str(n), rf"{n}\text{{ percent}}"]
    unequal = [rf"{n + 1}\%", str(n + 1), rf"{float(value)}\%", rf"{n}0\%", rf"\frac{{{n}}}{{10}}", rf"{n}\text{{ cm}}"]
    return gold, equal, unequal


def expressions(draw: random.Random) -> tuple[str, list[str], list[str]]:
    a, b, x = draw.randint(2, 9), draw.randint(2, 30), draw.choice("xyznkt")
    if draw.random() < 0.5:
        gold = f"{a}{x}^2+{b}{x}"
        equal = [
            f"{b}{x}+{a}{x}^2",
            f"{x}({a}{x}+{b})",
            rf"{a}{x}^{{2}} + {b}{x}",
            rf"{a} \cdot {x}^2+{b}{x}",
            f"y={gold}" if x != "y" else gold,
        ]
        unequal = [
            f"{a}{x}^2-{b}{x}",
            f"{a + 1}{x}^2+{b}{x}",
            f"{a}{x}^3+{b}{x}",
            f"{b}{x}",
            gold.replace(x, "w"),
            f"{gold}+1",
        ]
    else:
        gold = rf"\frac{{{x}+{a}}}{{{b}}}"
        equal = [
            rf"\frac{{{x}}}{{{b}}}+\frac{{{a}}}{{{b}}}",
            f"({x}+{a})/{b}",
            rf"\frac{{1}}{{{b}}}({x}+{a})",
            rf"\frac{{{a}+{x}}}{{{b}}}",
        ]
        unequal = [
            rf"\frac{{{x}-{a}}}{{{b}}}",
            rf"\frac{{{x}+{a}}}{{{b + 1}}}",
            rf"{x}+\frac{{{a}}}{{{b}}}",
            rf"\frac{{{a}}}{{{b}}}",
        ]
    return gold, equal, unequal


def transcendental(draw: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = draw.randint(2, 9), draw.choice([2, 3, 5, 7])
    gold = rf"{a}\ln {b}"
    equal = [rf"{a} \ln({b})", rf"\ln({b}) \cdot {a}", rf"\ln {b**a}", rf"{a}\ln\left({b}\right)"]
    unequal = [rf"{a + 1}\ln {b}", rf"{a}\ln {b + 1}", rf"-{gold}", rf"\frac{{\ln {b}}}{{{a}}}", rf"{a}{b}"]
    return gold, equal, unequal


def words(draw: random.Random) -> tuple[str, list[str], list[str]]:
    names = ["Monday", "Tuesday", "even", "odd", "red", "HTH", "BDAC", "north", "Alice", "decreasing", "TTHH", "aab"]
    gold, other = draw.sample(names, 2)
    equal = [rf"\text{{{gold}}}", rf"\textbf{{{gold}}}", gold, rf"\mathrm{{{gold}}}", rf"\text{{ {gold} }}"]
    unequal = [
        rf"\text{{{other}}}",
        other,
        gold[::-1] if gold[::-1].lower() != gold.lower() else other,
        "5",
        f"{gold}, {other}",
    ]
    return gold, equal, unequal


def letters(draw: random.Random) -> tuple[str, list[str], list[str]]:
    gold, other = draw.sample("ABCDE", 2)
    n = draw.randint(2, 99)
    equal = [
        f"({gold})",
        rf"\text{{({gold})}}",
        rf"\textbf{{({gold})}}\ {n}",
        f"{gold}. {n}",
        rf"\text{{Option {gold}}}",
        rf"\text{{{gold}}}",
    ]
    unequal = [other, f"({other})", rf"\textbf{{({other})}}\ {n}", f"{gold}, {other}", f"{gold}{other}", str(n)]
    return gold, equal, unequal


def numerals(draw: random.Random) -> tuple[str, list[str], list[str]]:
    base = draw.randint(3, 9)
    digits = str(draw.randint(1, base - 1)) + "".join(str(draw.randrange(base)) for _ in range(draw.randint(2, 4)))
    gold = f"{digits}_{base}"
    equal = [rf"{digits}_{{{base}}}", rf"({digits})_{{{base}}}", rf"{digits}_{{\text{{{base}}}}}"]
    unequal = [
        f"{digits}_{2 if base > 3 else 9}",
        f"{digits}0_{base}",
        str(int(digits, base)),
        f"{digits[::-1]}1_{base}",
    ]
    return gold, equal, unequal


def times(draw: random.Random) -> tuple[str, list[str], list[str]]:
    hour, minute = draw.randint(1, 11), draw.randint(10, 59)
    gold = rf"{hour}:{minute} \text{{ PM}}"
    equal = [
        rf"{hour}:{minute} \text{{ p.m.}}",
        f"{hour}:{minute} PM",
        f"{hour + 12}:{minute}",
        rf"{hour}:{minute}\text{{pm}}",
    ]
    unequal = [rf"{hour}:{minute} \text{{ AM}}", f"{hour}:{minute - 1} PM", f"{hour}:{minute}", f"{minute}"]
    return gold, equal, unequal


MAKERS: tuple[Maker, ...] = (
    integers, fractions, decimals, radicals, multiples_of_pi, intervals, unions, half_lines, sets, tuples, units,
    percents, expressions, transcendental, words, letters, numerals, times,
)  # fmt: skip
DRESSINGS = (
    "{}", "{}", "{}", "${}$", r"\displaystyle {}", r"{{\color{{blue}}{{{}}}}}", r"\boldsymbol{{{}}}", r"\ {}\,",
    r"\[{}\]",    r"\textcolor{{red}}{{{}}}", r"\mathbf{{{}}}", r"\large {}",
)  # fmt: skip


def answer_pairs(seed: int, count: int) -> Iterator[Pair]:
    """Pairs in equal shares of the kinds, about half of them equal."""
    draw = random.Random(seed)
    for number in range(count):
        make = MAKERS[number % len(MAKERS)]
        gold, equal, unequal = make(draw)
        is_equal = draw.random() < 0.5
        yield Pair(
            make.__name__, gold, draw.choice(DRESSINGS).format(draw.choice(equal if is_equal else unequal)), is_equal
        )


def grade_pairs(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The unequal pairs that the verifier finds correct, and the equal pairs that it does not."""
    from expo.rewards.verifier import Verifier

    with Verifier(workers=2, timeout_s=60.0) as verifier:
        verdicts = verifier.grade(
            [rf"So it is $\boxed{{{pair.stated}}}$." for pair in pairs], [pair.gold for pair in pairs]
        )
    judged = list(zip(pairs, verdicts, strict=True))
    return (
        [pair for pair, verdict in judged if verdict.kind == "correct" and not pair.is_equal],
        [pair for pair, verdict in judged if verdict.kind != "correct" and pair.is_equal],
    )


if __name__ == "__main__":
    found, missed = grade_pairs(list(answer_pairs(seed=1, count=int(sys.argv[1]))))
    print(f"{len(found)} unequal pairs are correct", *found[:40], sep="\n")
    print(f"{len(missed)} equal pairs are not", *missed[:40], sep="\n")
    sys.exit(bool(found))
