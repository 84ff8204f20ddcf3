r"""What may follow a number: units, currencies, counted things, and words that change the number's value.

`read_tail` reads it. A unit that the gold answer or the reply leaves out is forgiven; two different units differ, and
there is no conversion, because the question asked for one of them. A counted thing ("12 apples") is no unit.
"""

import re
from typing import Final, NamedTuple

# canonical name: spellings
_SPELLINGS = {
    "mm": "mm millimeter millimeters millimetre millimetres 毫米",
    "cm": "cm centimeter centimeters centimetre centimetres cms 厘米 公分",
    "dm": "dm decimeter decimeters 分米",
    "m": "m meter meters metre metres 米",
    "km": "km kilometer kilometers kilometre kilometres kms 千米 公里",
    "in": "in inch inches 英寸",
    "ft": "ft foot feet 英尺",
    "yd": "yd yard yards",
    "mi": "mi mile miles 英里",
    "nm": "nm nanometer nanometers",
    "mg": "mg milligram milligrams 毫克",
    "g": "g gram grams gm 克",
    "kg": "kg kilogram kilograms kgs 千克 公斤",
    "t": "t ton tons tonne tonnes 吨",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "ms": "ms millisecond milliseconds 毫秒",
    "s": "s sec secs second seconds 秒",
    "min": "min mins minute minutes 分钟",
    "h": "h hr hrs hour hours 小时 时",
    "d": "d day days 天 日",
    "week": "week weeks wk wks 周 星期",
    "month": "month months 月 个月",
    "year": "year years yr yrs 年",
    "l": "l L liter liters litre litres 升",
    "ml": "ml mL milliliter milliliters millilitre millilitres 毫升",
    "gal": "gal gallon gallons",
    "qt": "quart quarts qt",
    "pint": "pint pints",
    "cup": "cup cups",
    "mph": "mph",
    "kph": "kph kmh",
    "Hz": "Hz hz hertz",
    "kHz": "kHz",
    "N": "N newton newtons 牛",
    "J": "J joule joules 焦",
    "kJ": "kJ kilojoule kilojoules",
    "W": "W watt watts 瓦",
    "kW": "kW kilowatt kilowatts",
    "V": "V volt volts 伏",
    "A": "A ampere amperes amp amps 安",
    "ohm": "ohm ohms Ω",
    "Pa": "Pa pascal pascals",
    "K": "K kelvin kelvins",
    "mol": "mol mole moles 摩尔",
    "eV": "eV",
    "rad": "rad radian radians 弧度",
    "degree": "degree degrees deg 度",
    "degree C": "degC celsius",
    "degree F": "degF fahrenheit",
    "USD": "USD usd dollar dollars bucks 美元",
    "cent": "cent cents ¢",
    "EUR": "EUR eur euro euros 欧元",
    "GBP": "GBP gbp",
    "CNY": "CNY cny yuan rmb RMB 元 块",
    "INR": "INR rupee rupees Rs",
    "unit": "unit units 单位",
    "ha": "ha hectare hectares 公顷",
    "acre": "acre acres",
    "bit": "bit bits",
    "byte": "byte bytes",
    "%": "percent pct",
}  # fmt: skip
UNITS: Final = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()}
MULTIPLIERS: Final = {
    "dozen": 12, "hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "百": 100, "千": 1_000, "万": 10**4, "百万": 10**6, "亿": 10**8, "打": 12,
}  # fmt: skip
# A number with one of these words is another number, a bound or a guess: such an answer is compared as text.
_CHANGING_WORDS = (
    "or and more less fewer least most than about approximately roughly around nearly almost not no non except "
    "but below above under over negative minus plus times time half halves third thirds quarter quarters "
    "fourth fourths fifth fifths tenth tenths hundredth hundredths thousandth thousandths double triple twice "
    "thrice pair pairs couple couples score scores gross hundreds thousands millions billions dozens factorial "
    "to through thru between from until till before after am pm bc ad bce ce mod modulo base squared cubed "
    "root roots power greater larger smaller bigger up down increase decrease loss debt ago late early short "
    "remaining remainder north south east west zero one two three four five six seven eight nine ten eleven "
    "twelve twenty thirty forty fifty sixty seventy eighty ninety first last if when where is are was 倍 以上 以下 "
    "左右 多 半 上午 下午 至 到 或 负"
)
_CHANGING = frozenset(_CHANGING_WORDS.split())
_FILLERS_WORDS = (
    "of the a in total different distinct possible whole full each all 个 只 人 名 位 条 种 张 次 本 件 辆 棵 颗 块"
)
_FILLERS = frozenset(_FILLERS_WORDS.split())
_POWERS: Final = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_MARKS: Final = {"/": -1, "per": -1, "an": -1}

_CJK = "\u4e00-\u9fff"
_TOKEN = re.compile(rf"[A-Za-zΩ¢]+(?:-[A-Za-z]+)*\.?|[{_CJK}]+|\^\{{?\s*(-?\d)\s*\}}?|/|[()\s]+|\\cdot|-")
_CJK_POWER = re.compile(r"(平方|立方)(?=\S)")
_TEXT_GROUP = re.compile(r"\\text\{([^{}]*)\}")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\text\{\s*([CF])\s*\}|([CF])\b)?\s*\Z")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_PERCENT = re.compile(r"\s*\\%\s*\Z")
_CURRENCY = re.compile(r"\A([+-]?)\s*\\(USD|EUR|GBP|CNY)\s*([^\\].*|\\frac.*)\Z", re.DOTALL)
_CURRENCY_AFTER = re.compile(r"\A(.*\S)\s*\\(USD|EUR|GBP|CNY)\s*\Z", re.DOTALL)
_TEXT_TAIL = re.compile(r"\A([^\\]*(?:\\(?!text\{).[^\\]*)*?)\s*(\\text\{.*)\Z", re.DOTALL)
_CJK_TAIL = re.compile(rf"\A(.*[\d)}}])\s*([{_CJK}]+)\Z", re.DOTALL)
# bare words: known units of two letters or more, or nouns of four letters or more after a space
_WORD_TAIL = re.compile(
    r"\A(.*[\d)}%])(\s*)"
    r"((?:[A-Za-z]{2,}\.?|(?<=\s)(?:m/s|km/h)\b)(?:[ /-]+[A-Za-z]+\.?)*(?:\^\{?\d\}?)?)\s*\Z",
    re.DOTALL,
)
_MIN_NOUN = 4
_NOT_NOUNS_WORDS = "sqrt sinh cosh tanh frac cdot times infty arcsin arccos arctan"
_NOT_NOUNS = frozenset(_NOT_NOUNS_WORDS.split())


class Tail(NamedTuple):
    """A number without what follows it.

    head: the number's text; unit: its canonical unit, "" if there is none; factor: what the words multiply it by.
    """

    head: str
    unit: str
    factor: int


def split_unit(text: str) -> Tail | None:
    """Splits an undressed answer into number and unit; None if it has words that are no unit."""
    currency = _CURRENCY.match(text)
    if currency:
        rest = split_unit(currency[1] + currency[3])
        return rest._replace(unit=currency[2]) if rest and rest.unit in ("", currency[2]) else None
    currency = _CURRENCY_AFTER.match(text)
    if currency:
        return Tail(currency[1], currency[2], 1)
    percent = _PERCENT.search(text)
    if percent:
        return Tail(text[: percent.start()], "%", 1)
    degree = _DEGREE.search(text)
    if degree and degree.start() and not _TRIGONOMETRIC.search(text):
        scale = degree[1] or degree[2]
        return Tail(text[: degree.start()], f"degree {scale}" if scale else "degree", 1)
    tail = _TEXT_TAIL.match(text) or _CJK_TAIL.match(text)
    if tail:
        return read_tail(tail[1].strip(), tail[2]) if tail[1].strip() else None
    bare = _WORD_TAIL.match(text)
    if bare and _is_bare_unit(bare[3], after_space=bool(bare[2])):
        return read_tail(bare[1], bare[3])
    return Tail(text, "", 1)


def _is_bare_unit(words: str, *, after_space: bool) -> bool:
    names = [name.rstrip(".") for name in re.findall(r"[A-Za-z]+\.?", words)]
    first = names[0]
    if first in UNITS or first.lower() in MULTIPLIERS or first.lower() in _POWERS:
        return True
    return after_space and len(first) >= _MIN_NOUN and first not in _NOT_NOUNS


def read_tail(head: str, tail: str) -> Tail | None:
    """The unit and the multiplier that the words after a number state; None if they are neither."""
    words = _CJK_POWER.sub(r" \1 ", _TEXT_GROUP.sub(r" \1 ", tail))
    factor, unit, exponent, sign = 1, dict[str, int](), 1, 1
    at, last = 0, ""
    while at < len(words):
        token = _TOKEN.match(words, at)
        if token is None:
            return None
        at, word = token.end(), token[0].rstrip(".")
        name = UNITS.get(word) or UNITS.get(word.lower()) if word else None
        low = word.lower()
        if token[1] is not None:
            if not last or unit.get(last) is None:
                return None
            unit[last] *= int(token[1])
        elif low in MULTIPLIERS and not unit:
            factor *= MULTIPLIERS[low]
        elif low in ("squared", "cubed") and last:
            unit[last] *= 2 if low == "squared" else 3
        elif low in _POWERS:
            exponent = _POWERS[low]
        elif low in _MARKS:
            sign = _MARKS[low]
        elif name is not None:
            last = name
            unit[name] = unit.get(name, 0) + sign * exponent
            exponent = 1
        elif low in _CHANGING or any(part in _CHANGING for part in low.split("-")):
            return None
        elif word.strip() and low not in _FILLERS and word != r"\cdot" and word.strip("()- "):
            if len(word) < 3 and word.isascii():
                return None  # "5 \text{x}": a letter that is no unit
            last = ""
    canonical = " ".join(f"{name}^{power}" if power != 1 else name for name, power in sorted(unit.items()) if power)
    canonical = "" if set(unit) == {"unit"} else canonical  # "6 square units" names none
    return Tail(head, canonical, factor)
