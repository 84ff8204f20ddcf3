r"""Takes off what does not change an answer: fonts, colours, sizes, spaces, display marks, other spellings.

`undress` gives one spelling to each notation: `\dfrac` is `\frac`, `\left(` is `(`, "×" is `\times`, every text command
is `\text`. It never drops a letter, a digit or an operator.
"""

import functools
import re
from typing import Final

# Texts cached: the distinct answers of about 12 steps of 2,048 replies; about 10 MB.
CACHE_SIZE: Final = 32_768

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢ", "0123456789+-ni", strict=True))
_FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5),
    "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
    "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "θ": "theta", "λ": "lambda", "μ": "mu",
    "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "Δ": "Delta", "Ω": "Omega",
}  # fmt: skip
_COMMANDS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "∙": "cdot", "÷": "div", "±": "pm", "∓": "mp", "∞": "infty", "≤": "le",
    "⩽": "le", "≥": "ge", "⩾": "ge", "≠": "ne", "≈": "approx", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset",
    "∖": "setminus", "∨": "lor", "∧": "land", "ℝ": "mathbb{R}", "ℤ": "mathbb{Z}", "ℕ": "mathbb{N}", "⌊": "lfloor",
    "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "⟨": "langle", "⟩": "rangle",
}  # fmt: skip
_UNICODE = str.maketrans(
    {
        **{char: rf"\frac{{{top}}}{{{bottom}}}" for char, (top, bottom) in _FRACTIONS.items()},
        **{char: rf"\{name} " for char, name in {**_GREEK, **_COMMANDS}.items()},
        **dict.fromkeys("−–﹣‐‑", "-"),
        **dict.fromkeys("\u00a0\u202f\u2009\u2002\u2003\u3000\u200b\u2060\ufeff", " "),
        "⁄": "/",
        "°": r"^\circ ",
        "℃": r"^\circ\text{C}",
        "℉": r"^\circ\text{F}",
        "€": r"\EUR ",
        "£": r"\GBP ",
        "¥": r"\CNY ",
        "。": ".",
        "、": ", ",
        "或": " or ",
        "和": " and ",
        "与": " and ",
        "′": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        # the full-width forms of ASCII, from Chinese keyboards
        **{chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)},
    }
)
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT_RUN = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_UNICODE_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|\w))")

# Commands that only change how the following text or group looks; the group stays, without the command.
_FONTS = (
    "boxed", "fbox", "bm", "boldsymbol", "pmb", "mathbf", "mathsf", "mathit", "mathtt", "underline", "emph", "mathop",
    "ensuremath", "displaystyle", "textstyle", "scriptstyle", "tiny", "small", "normalsize", "large", "Large",
    "LARGE", "huge", "Huge", "bf", "it", "rm", "sf", "tt", "bfseries", "itshape", "limits", "nolimits", "left",
    "right", "middle", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "mathstrut",
    "strut", "noindent", "centering",
)  # fmt: skip
_FONT = re.compile(rf"\\(?:{'|'.join(sorted(_FONTS, key=len, reverse=True))})(?![A-Za-z])\s*")
_COLOUR = re.compile(r"\\(?:textcolor|color|colorbox)\s*(?:\[[^\[\]{}]*\]\s*)?\{[^{}]*\}\s*")
_TEXT = re.compile(r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|textup|text|mbox|hbox|mathrm)\s*(?=\{)")
_UPRIGHT_CONSTANT = re.compile(r"\\text\{\s*([ie])\s*\}")
_SPELLINGS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge",
    "neq": "ne", "lt": "<", "gt": ">", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "varnothing": "emptyset",
    "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "colon": ":",
    "ast": "*", "degree": "^\\circ", "dbinom": "binom", "tbinom": "binom", "wedge": "land", "vee": "lor",
    "ldots": "dots", "cdots": "dots", "varphi": "phi", "varepsilon": "epsilon", "imath": "i", "dollar": "USD",
    "euro": "EUR", "pounds": "GBP", "yen": "CNY", "infin": "infty", "backslash": "setminus",
    "smallsetminus": "setminus", "bigcup": "cup", "iff": "Leftrightarrow",
}  # fmt: skip
_SYMBOLS = re.compile(r"<>|[<>|*:\[\]()i]|\^\\circ")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_SPACE = re.compile(r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|thinspace|medspace|enspace|hspace\{[^{}]*\}|hfill)(?![A-Za-z]))|~")
_LAST_EXPONENT = re.compile(r"\^\{(-?\d)\}(?=\s*\})")
_GROUP_MARK = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ )(?=\d{3}(?!\d))")
_LINE_BREAK = re.compile(r"\\\\(?:\[[^\]]*\])?\s*\Z")
_FINAL_STOP = re.compile(r"(?<!\\)[.,;\s]+\Z")
# "{1, 2}", as some data sets write it; the braces that a colour or font command leaves behind are no set
_BARE_SET = re.compile(r"[\s$]*\{[^{\\]")
_PLAIN_GROUP = re.compile(r"(?<![A-Za-z}\]^_\\])\{\s*([+-]?[\w.]*)\s*\}")
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_REPEATING = re.compile(r"(?<![\d.])(\d+)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_ASCII_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)")
_ASCII_NAMES = (
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|\*|x|X)\s*10\s*(?=\^)"), r"\\times 10"),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"(?<=[\w)}])\*\*(?=[\d({-])"), "^"),
)


@functools.lru_cache(maxsize=CACHE_SIZE)
def undress(text: str) -> str:
    """The answer in one spelling, without dressing; "" if nothing is left."""
    if text.isascii() and text.isdigit():
        return text.lstrip("0") or "0"
    is_bare_set = _BARE_SET.match(text) is not None
    if not text.isascii():
        text = _without_unicode(text)
    text = text.replace(r"\$", r"\USD ").replace("$", "")
    text = _GROUP_MARK.sub("", text).replace(r"\!", "").replace("{:}", ":")
    text = _LAST_EXPONENT.sub(r"^\1", text)
    text = _COLOUR.sub("", text)
    text = _FONT.sub("", text)
    text = _TEXT.sub(r"\\text", text)
    text = _UPRIGHT_CONSTANT.sub(r"{\1}", text)
    text = _COMMAND.sub(_one_spelling, text)
    text = _SPACE.sub(" ", text)
    for pattern, spelling in _ASCII_NAMES:
        text = pattern.sub(spelling, text)
    text = _ASCII_ROOT.sub(r"\\sqrt{\1}", text)
    text = _REPEATING.sub(_repeating_to_fraction, text)
    text = _without_ends(text)
    if "{" in text:
        for _ in range(9):
            shorter = _PLAIN_GROUP.sub(r"\1", text)
            if shorter == text:
                break
            text = shorter
        text = _without_outer_group(text, is_bare_set)
    return re.sub(r"\s+", " ", _without_ends(text))


def _without_unicode(text: str) -> str:
    text = _UNICODE_ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    text = _SUPERSCRIPT_RUN.sub(lambda run: f"^{{{''.join(_SUPERSCRIPTS[char] for char in run[0])}}}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: f"_{{{''.join(_SUBSCRIPTS[char] for char in run[0])}}}", text)
    return text.translate(_UNICODE)


def _one_spelling(match: re.Match[str]) -> str:
    spelling = _SPELLINGS.get(match[1])
    if spelling is None:
        return match[0]
    if spelling in "{}":
        return rf"\{spelling}"
    return spelling + " " if _SYMBOLS.fullmatch(spelling) else rf"\{spelling}"


def _without_ends(text: str) -> str:
    text = _FINAL_STOP.sub("", _LINE_BREAK.sub("", text)).strip()
    for opening, closing in _WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
            text = _FINAL_STOP.sub("", text[len(opening) : -len(closing)]).strip()
    return text.replace(r"\(", "").replace(r"\)", "") if r"\(" in text else text


def _without_outer_group(text: str, is_bare_set: bool) -> str:
    """The text without the braces around the whole of it; a list that is written in bare braces becomes a set."""
    while text.startswith("{") and text.endswith("}") and not text.endswith("\\}"):
        depth = 0
        for index, char in enumerate(text):
            is_escaped = index > 0 and text[index - 1] == "\\"
            depth += 0 if is_escaped else (char == "{") - (char == "}")
            if not depth:
                break
        if index < len(text) - 1:
            return text
        inner = text[1:-1].strip()
        if is_bare_set and "," in inner:
            return rf"\{{{inner}\}}"
        text = inner
    return text


def _repeating_to_fraction(match: re.Match[str]) -> str:
    whole, fixed, *repeats = match.groups()
    repeated = repeats[0] or repeats[1]
    # 0.1(6) = (16 - 1) / 90
    if len(fixed) + len(repeated) > 50:
        return match[0]
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"
