"""Reading numbers out of text: one reader for references and answers.

Values are exact rationals. A number is read as a whole or not at all: what stands beside its digits (a sign, another
digit group, an operator, a power, a variable, a scale word) either belongs to it or makes it unclear, and an unclear
number is none. Text is never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import NamedTuple

MAX_DIGITS = 30
"""Digits of a whole part, a fraction part or an exponent's reach; longer ones are not read."""

NEGATIONS = "not|never"
ORDINALS = "(?:st|nd|rd|th)"
ANSWER = r"(?:the\s+)?(?:final\s+)?answer"
CURRENCIES = "Rs|USD|EUR|GBP"
"""Words that all readers of answers share, as parts of patterns."""

_CURRENCY = rf"(?:(?:US|AU|CA|HK|NZ)?[$€£¥₹₩¢]|Rs\.|{CURRENCIES})"
_SYMBOLS = {"$": "dollar", "usd": "dollar", "€": "euro", "eur": "euro", "£": "pound", "gbp": "pound", "¢": "cent"}
_UNITS = {
    "%": ("percent", "per cent", "percentage", "pct"),
    "degree": ("degrees", "°", "deg", "circ"),
    "millimetre": ("mm", "millimeter", "millimeters", "millimetres"),
    "centimetre": ("cm", "centimeter", "centimeters", "centimetres"),
    "metre": ("m", "meter", "meters", "metres"),
    "kilometre": ("km", "kilometer", "kilometers", "kilometres"),
    "inch": ("in", "inches"),
    "foot": ("ft", "feet"),
    "yard": ("yd", "yards"),
    "mile": ("mi", "miles"),
    "gram": ("g", "grams"),
    "kilogram": ("kg", "kilograms"),
    "second": ("s", "sec", "seconds"),
    "minute": ("min", "minutes"),
    "hour": ("h", "hr", "hours"),
}
_ALIASES = {spelling: name for name, spellings in _UNITS.items() for spelling in spellings}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Powers of ten by their words."""

_UNIT_LETTERS = "mshgLlCFKNJWVk"

_GROUP = "[,\u2009'\u2019_]"
_INTEGER = rf"[0-9]{{1,3}}(?:{_GROUP}[0-9]{{3}})+|[0-9]{{1,3}}(?: [0-9]{{3}}(?![0-9]))+|[0-9]+"
_PLAIN = rf"(?:(?:{_INTEGER})(?:\.[0-9]+)?|\.[0-9]+)"
_WHOLE_FRACTION = r"(?P<above>[0-9]+) ?[/\u2044] ?(?P<below>[0-9]+)"
_LATEX_FRACTION = (
    r"\\frac ?(?:\{ ?(?P<top>-?[0-9]+(?:\.[0-9]+)?) ?\}|(?P<top1>[0-9])) ?"
    r"(?:\{ ?(?P<bottom>[0-9]+(?:\.[0-9]+)?) ?\}|(?P<bottom1>[0-9]))"
)
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5),
    "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8),
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER = (
    r"(?:[eE](?P<e>[+-]?[0-9]+)| ?(?:[×x*·]|\\times|\\cdot) ?10 ?"
    r"(?:(?:\^|\*\*) ?\{?(?P<ten>[+-]?[0-9]+)\}?|(?P<high>⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)))"
)
_TEN = r"10 ?\^ ?(?:\{ ?(?P<raised>[+-]?[0-9]+) ?\}|(?P<raised1>[+-]?[0-9]+))"
_TOKEN = re.compile(
    rf"(?:(?P<whole>[0-9]+) *(?= *\\frac)|(?P<whole2>[0-9]+) (?=[0-9]+ ?[/\u2044])|(?P<whole3>[0-9]+) ?(?=[½-¾⅓-⅞]))?"
    rf"(?:{_LATEX_FRACTION}|{_WHOLE_FRACTION}|(?P<vulgar>[½¼¾⅓-⅞])|{_TEN}|(?P<plain>{_PLAIN})(?:{_POWER})?)"
)
_MORE_DIGITS = re.compile(rf"(?:{_GROUP}|[.:/\u2044])[0-9]|[0-9]")
_LEFT = re.compile(
    rf"(?:(?P<first>[-+])(?P<gap1> *))?(?P<currency>(?<![A-Za-z]){_CURRENCY} ?)?(?:(?P<second>[-+])(?P<gap2> *))?$"
)

_TEXTUAL = r"text|textrm|textbf|mathrm|mathbf|mathit|mbox|bold|boldsymbol|bm"
_UNWRAP = re.compile(rf"\\(?:{_TEXTUAL}|boxed|fbox) ?\{{([^{{}}]*)\}}")
_OPERATOR_BEFORE = re.compile(
    r"(?:[*/^_×·÷±√≠≤≥~]|\\(?:times|cdot|div|pm|mp|le|ge|leq|geq|ne|neq|sqrt)\b)\s*[{(\[]?\s*$"
)
_COMMAND_BRACE = re.compile(r"(?:\\[A-Za-z]+|\})\s*\{\s*$")
_INEQUALITY_BEFORE = re.compile(r"(?<![=-])[<>]\s*$|!=\s*$")
_MARKUP_TAG = re.compile(r"</?[A-Za-z][^<>]*>$")
_IN_TUPLE_BEFORE = re.compile(r"[(\[{][^()\[\]{}]*[0-9]\s*[,;]\s*$")
NOT_BEFORE = re.compile(
    rf"(?:(?<![,;]\s)\b(?:{NEGATIONS})|n['\u2019]t)(?:\s+be)?(?:\s+equal(?:\s+to)?)?[\s$(\[{{*_`\"]+$", re.IGNORECASE
)
"""In front of a number or a formula that is denied; behind a comma (*1.5, not 3*) it is still the last one."""
_ORDINAL_AFTER = re.compile(rf"{ORDINALS}(?![A-Za-z])", re.IGNORECASE)
_SUM_BEFORE = re.compile(r"[0-9A-Za-z)\]}%]\s*$")
_UNCLEAR_AFTER = re.compile(
    rf"""
      [²³⁴⁵⁶⁷⁸⁹⁰¹ⁿπ√∞_(]                                  # a power, a constant, a factor
    | \s?\^(?!\s?\{{?\s?\\circ)                              # a power that is no degree sign
    | \s*\*\*?\s*[\w(\\] | \s*[×·÷±]                        # a product
    | \s*\+\s*[\w(\\] | \s*-\s*[0-9(\\] | \s+-\s+[A-Za-z]\b # a sum
    | \s?/\s?[0-9(\\]                                       # a quotient
    | \s*[x×]\s*[0-9]                                       # a product, or a format
    | \s*\\(?!(?:text|mathrm|mbox|textrm|textbf|quad|qquad|circ|degree|right|end)\b|[\[\](),;:!%$\ \\])
    | (?![{_UNIT_LETTERS}M])[A-Za-z](?![A-Za-z])             # a variable
    | (?:[MBT]|bn|mn)(?![A-Za-z])                           # millions, or metres?
    """,
    re.VERBOSE,
)
_SCALE_AFTER = re.compile(rf"\s*(?:\\text\{{\s*)?({'|'.join(SCALES)})s?\b\s?\}}?", re.IGNORECASE)
_KILO_AFTER = re.compile(r"[kK](?![A-Za-z])")
_PERCENT_AFTER = re.compile(r"\s?(?:\\?%|(?:percent(?:age)?|per cent|pct)\b)", re.IGNORECASE)
_DASHES = "\u2212\ufe63\uff0d\u2010\u2011\u2012"
_SPACES = "\u00a0\u2007\u2008\u200a\u202f"
_NOTHING = "\u200b\u200c\u200d\u2060\ufeff"
_FULL_WIDTH = {chr(0xFEE0 + ord(narrow)): narrow for narrow in "0123456789.%+$"}
_PLAINER = str.maketrans(
    dict.fromkeys(_DASHES, "-") | dict.fromkeys(_SPACES, "\u2009") | dict.fromkeys(_NOTHING, "") | _FULL_WIDTH
)


class Number(NamedTuple):
    """A number as it stands in a text.

    Attributes:
        value: exact; None where the text leaves open which number is meant.
        unit: ``%``, a currency or what follows the number, in one spelling; empty without one.
        start: where its sign or first digit stands.
        end: behind its last character, a percent sign included.
    """

    value: Fraction | None
    unit: str
    start: int
    end: int


def plain_text(text: str) -> str:
    """``text`` with one spelling of minus signs, digit spaces and LaTeX's small marks."""
    text = text.translate(_PLAINER)
    text = re.sub(r"\u2013(?=\s?[$€£¥₹]?\.?[0-9])", "-", text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\[,;:! ]|~)(?=[0-9])", "\u2009", text)
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"(?<!\\)\$([^$\n]+)(?<!\\)\$(?![0-9])", r" \1 ", text)
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"(?<![\w)*])(\*\*|__|\*|`)(?=[^\s*_`])([^*\n`]*[^\s*_`])\1(?![\w(*])", r"\2", text)
    text = re.sub(r"(?<![\w)}\]*\\])_([-+$€£]?\.?[0-9][^_{}\\^\n]*(?<!\s))_(?![\w({*])", r"\1", text)
    return re.sub(r"(?<![0-9])\u2009|\u2009(?![0-9])", " ", text)


def find_numbers(text: str) -> Iterator[Number]:
    """Every number of ``text`` (made plain by :func:`plain_text`), in order; names such as ``x2`` are none."""
    position = 0
    while match := _TOKEN.search(text, position):
        position = match.end()
        while more := _MORE_DIGITS.match(text, position):  # 1,23 and 1.2.3 and 5:30 are one thing, and unclear
            position = more.end()
        number = _read(text, match, broken=position != match.end())
        if number is not None:
            yield number
            position = max(position, number.end)


def _only_number(text: str) -> Number | None:
    """The number of ``text`` where it holds one and no second one, which ends the search."""
    found = list(islice(find_numbers(text), 2))
    return found[0] if len(found) == 1 else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of ``text`` where it is one number and no more (``-$1,234.50``, ``2 1/3``, ``12%``, ``1e5``)."""
    plain = _unwrapped(plain_text(text).strip())
    plain = plain[1:-1] if re.fullmatch(r"\([^()]*\)", plain) else plain
    number = _only_number(plain)
    if number is None or plain[: number.start].strip() or plain[number.end :].strip() not in ("", "."):
        return None
    return number.value


def read_number(text: str) -> Number | None:
    """The one number of an answer, with the unit that follows: ``x = 5``, ``$72 per day``, ``5\\text{ km}``; else None.

    Anything before it but a currency, an equals sign with one name or the words *answer is* makes it None, and so does
    a second number.
    """
    plain = _unwrapped(_AREAS.sub(lambda m: m[1] + ("²" if m[2] == "2" else "³"), plain_text(text).strip()))
    number = _only_number(plain)
    if number is None or number.value is None or not _LEADS.fullmatch(plain[: number.start]):
        return None
    after = plain[number.end :]
    if _FACTOR.match(after):
        return None
    return number._replace(unit=number.unit or name_unit(after))


_AREAS = re.compile(rf"(\\(?:{_TEXTUAL}) ?\{{[^{{}}]*\}}|\b[mckfiy]?[mtnd]) ?\^ ?\{{?([23])\}}?")
_FACTOR = re.compile(rf"!|\s*or\b|\s*(?![{_UNIT_LETTERS}a])[A-Za-z](?![A-Za-z])")
"""Behind a whole answer: a factorial, *or more*, or one letter that is no unit."""
_LEADS = re.compile(
    rf"[\s$(\[{{*`\"]*(?:{ANSWER}\s*(?:is\s*:?|:|=)|[A-Za-z]\s*=|=|[≈]|:)?[\s$(\[{{*`\"]*",
    re.IGNORECASE,
)


def name_unit(text: str) -> str:
    """One spelling of the unit that ``text`` begins with; empty where there is none."""
    bare = _unwrapped(text.replace("\\circ", "°")).strip(" \t$.,;:!?()[]{}*`\"'\\")
    bare = bare.split("\n")[0].lower().replace("^°", "°").replace("^{°", "°").replace("²", "^2").replace("³", "^3")
    words = bare.split()
    power = ""
    if len(words) > 1 and words[0] in ("square", "sq", "cubic", "cu"):
        power = "2" if words.pop(0).startswith("sq") else "3"
    if not words:
        return ""
    first, mark, behind = words[0].partition("^")
    power = power or (mark and behind.strip("{}"))
    return " ".join([_one_spelling(first) + power, *words[1:]])


def _one_spelling(word: str) -> str:
    plural = word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
    return _SYMBOLS.get(word) or _ALIASES.get(word, plural)


def _units_agree(one: str, other: str) -> bool:
    """Whether one unit says no more than the other (``dollar``, ``dollar per day``), or is left out."""
    return not one or not other or f"{one} ".startswith(f"{other} ") or f"{other} ".startswith(f"{one} ")


def same_number(reference: Number, answer: Number) -> bool:
    """Whether two readings are the same quantity: equal values, and no two different units.

    A unit that one side leaves out is not held against it; a percentage also equals its hundredth.
    """
    if reference.value is None or answer.value is None:
        return False
    if not _units_agree(reference.unit, answer.unit):
        return False
    if reference.value == answer.value:
        return True
    one, other = (Fraction(1, 100) if n.unit == "%" else Fraction(1) for n in (reference, answer))
    return reference.value * one == answer.value * other


def _read(text: str, match: re.Match[str], broken: bool) -> Number | None:
    """The number at ``match``, None where it is part of a name; its value is None where it is unclear."""
    line = text.rfind("\n", 0, match.start()) + 1
    before = text[max(line, match.start() - 60) : match.start()]
    left = _LEFT.search(before)
    assert left is not None
    rest = before[: left.start()]
    sign_at = match.start() - (len(before) - left.start())
    signs = (left["first"] or "") + (left["second"] or "")
    if not left["currency"] and not signs and re.search(r"[A-Za-z_]$", before):
        return None
    if signs and re.search(r"[A-Za-z]$", rest) and not (left["gap1"] or left["gap2"]):
        return None  # COVID-19
    if match["plain"] is not None and _ORDINAL_AFTER.match(text, match.end()):
        return None  # the 42nd
    start = sign_at if signs or left["currency"] else match.start()
    value = None if broken else _value(match)
    if (match["raised"] or match["raised1"]) and re.search(r"[0-9)}]\s*[xX]?\s*$", rest):
        value = None  # a factor stands before the power
    if value is not None and (
        _unclear_before(rest, left, signs, bool(text[:start].strip())) or _in_list(before, text, match)
    ):
        value = None
    return _with_tail(text, match.end(), value, signs, start, left["currency"])


def _with_tail(text: str, end: int, value: Fraction | None, signs: str, start: int, currency: str | None) -> Number:
    """Applies what stands behind the digits: a scale, a percent sign, or something that makes the number unclear."""
    unit = _SYMBOLS.get((currency or "").strip().lower().removeprefix("us").removeprefix("au"), "")
    while scale := _SCALE_AFTER.match(text, end):
        value = None if value is None else value * 10 ** SCALES[scale[1].lower()]
        end = scale.end()
    if kilo := _KILO_AFTER.match(text, end):
        value, end = None if value is None else value * 1000, kilo.end()
    if percent := _PERCENT_AFTER.match(text, end):
        unit, end = "%", percent.end()
    if _UNCLEAR_AFTER.match(text, end):
        value = None
    if value is not None and signs.count("-") == 1:
        value = -value
    return Number(value, unit, start, end)


def _unclear_before(rest: str, left: re.Match[str], signs: str, inside: bool) -> bool:
    """Whether what stands before a number (and its sign) on its line makes it part of something else."""
    if len(signs) > 1:
        return True
    if signs and left["gap2" if left["second"] else "gap1"] and inside and not re.search(r"[=:(\[{<,;$≈]\s*$", rest):
        return True  # "is - 3": a dash, or a sign?
    if signs and _SUM_BEFORE.search(rest) and (signs == "+" or re.search(r"[0-9)\]}]\s*$", rest)):
        return True
    if re.search(r"[-+]$", rest) or re.search(r"(?<!\.\.)\.$", rest):
        return True
    if re.search(r"[0-9)\]]\s*[-+]\s*$|[0-9]:$|[0-9A-Za-z)]\($|[)\]]$", rest):
        return True
    if NOT_BEFORE.search(rest):
        return True
    if _OPERATOR_BEFORE.search(rest) and not re.fullmatch(r"\s*[*~]\s+", rest):
        return True
    if _COMMAND_BRACE.search(rest) and not re.search(rf"\\(?:{_TEXTUAL}|boxed|fbox)\s*\{{\s*$", rest):
        return True
    return bool(_INEQUALITY_BEFORE.search(rest)) and not _MARKUP_TAG.search(rest)


def _in_list(before: str, text: str, match: re.Match[str]) -> bool:
    """Whether the number is the last entry of a bracketed list, such as a point."""
    closes = re.match(r"\s*[)\]}]", text[match.end() : match.end() + 4])
    return bool(closes) and bool(_IN_TUPLE_BEFORE.search(before))


def _value(match: re.Match[str]) -> Fraction | None:
    whole = match["whole"] or match["whole2"] or match["whole3"]
    digits = max(map(len, re.findall(r"[0-9]+", match[0])), default=0)
    if digits > MAX_DIGITS or len(re.sub(r"[^0-9]", "", match["plain"] or "")) > 2 * MAX_DIGITS:
        return None
    if match["plain"] is not None:
        power = int(match["e"] or match["ten"] or (match["high"] or "0").translate(_SUPERSCRIPTS))
        if abs(power) > 10 * MAX_DIGITS:
            return None
        return Fraction(Decimal(re.sub(rf"{_GROUP}| ", "", match["plain"]))) * Fraction(10) ** power
    if match["raised"] or match["raised1"]:
        power = int(match["raised"] or match["raised1"])
        return None if abs(power) > 10 * MAX_DIGITS else Fraction(10) ** power
    if match["vulgar"] is not None:
        above, below = map(Fraction, _VULGAR.get(match["vulgar"], (0, 0)))
    else:
        above = Fraction(match["top"] or match["top1"] or match["above"])
        below = Fraction(match["bottom"] or match["bottom1"] or match["below"])
    if below == 0 or (whole is not None and above < 0):
        return None
    return Fraction(whole or 0) + above / below


def _unwrapped(text: str) -> str:
    """``text`` without LaTeX's text commands and an outer pair of ``\\( \\)``."""
    for _ in range(3):
        text = _UNWRAP.sub(lambda m: m[1] if m.start() == 0 else f" {m[1]}", text)
    text = text.strip()
    for opened, closed in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opened) and text.endswith(closed):
            text = text[2:-2].strip()
    return text
