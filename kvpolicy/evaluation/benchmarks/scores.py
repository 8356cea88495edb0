"""How answers are scored, each in [0, 1], as the benchmarks do."""

from __future__ import annotations

import ast
import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def all_found(answer: str, references: Sequence[str]) -> float:
    """The part of the references that the answer contains, whatever their case (RULER)."""
    found = answer.lower()
    return sum(x.lower() in found for x in references) / len(references)


def any_found(answer: str, references: Sequence[str]) -> float:
    """Whether the answer contains a reference, whatever its case (RULER's questions)."""
    found = answer.lower()
    return float(any(x.lower() in found for x in references))


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and spare spaces (SQuAD's normalization)."""
    bare = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(bare.split())


def exact(answer: str, references: Sequence[str]) -> float:
    """Whether the answer is a reference after normalization."""
    return float(normalized(answer) in {normalized(x) for x in references})


def contains(answer: str, references: Sequence[str]) -> float:
    """Whether a reference is part of the answer, both normalized (HELMET's substring match)."""
    found = normalized(answer)
    return float(any(normalized(x) in found for x in references))


def word_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 of the words of the answer and of a reference, normalized (LongBench)."""
    return max(_f1(normalized(answer).split(), normalized(x).split()) for x in references)


def character_f1(answer: str, references: Sequence[str]) -> float:
    """As `word_f1` on single characters, for texts that put no spaces between words."""

    def parts(text: str) -> list[str]:
        return [c for c in text.lower() if c.isalnum()]

    return max(_f1(parts(answer), parts(x)) for x in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The best F1 by the longest common subsequence of words (ROUGE-L)."""
    return max(_rouge(answer.split(), x.split()) for x in references)


def edit_similarity(answer: str, references: Sequence[str]) -> float:
    """How alike the answer's first line of code and a reference are, by matching blocks."""
    lines = [x for x in answer.lstrip("\n").split("\n") if not re.match(r"\s*(`|#|//)", x)]
    line = lines[0] if lines else ""
    return max(difflib.SequenceMatcher(None, line, x, autojunk=False).ratio() for x in references)


def of_class(answer: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """Whether the answer names the right class, shared among the classes that it names.

    Classes whose name lies inside the right one's do not count against it.
    """
    named = [x for x in classes if x in answer]
    found = 0.0
    for right in references:
        others = [x for x in named if not (x in right and x != right)]
        found = max(found, 1 / len(others) if right in others else 0.0)
    return found


def of_numbers(answer: str, references: Sequence[str]) -> float:
    """The part of the numbers in an answer that are the first number of a reference."""
    wanted = {re.findall(r"\d+", x)[0] for x in references if re.search(r"\d", x)}
    found = re.findall(r"\d+", answer)
    return sum(x in wanted for x in found) / len(found) if found else 0.0


def first_number(answer: str, references: Sequence[str]) -> float:
    """Whether the first number of an answer is a reference (InfiniteBench)."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    return float(found is not None and any(_equal(found.group(), x) for x in references))


def last_number(answer: str, references: Sequence[str]) -> float:
    """Whether the answer's last word is a reference as a number (InfiniteBench's Code.Run)."""
    words = re.sub(r"[\n.`'\":]", " ", answer).split()
    return float(bool(words) and any(_equal(words[-1], x) for x in references))


def leading_numbers(answer: str, references: Sequence[str]) -> float:
    """The part of the references that the answer's numbers begin with, in order (Math.Calc)."""
    same = 0
    for found, wanted in zip(re.findall(r"\d+", answer), references, strict=False):
        if not _equal(found, wanted):
            break
        same += 1
    return same / len(references)


def word_found(answer: str, references: Sequence[str]) -> float:
    """Whether a reference is a word of the answer (InfiniteBench's Retrieve.KV)."""
    words = re.sub(r"[\n:\"'.,?!{}]", " ", answer).split()
    return float(any(x in words for x in references))


def masks_filled(answer: str, references: Sequence[str]) -> float:
    """The part of the masks of a JSON object that the answer's object fills alike (LooGLE)."""
    wanted, found = _object(references[0]), _object(answer)
    return sum(found.get(k) == v for k, v in wanted.items()) / len(wanted) if wanted else 0.0


def letter(answer: str, references: Sequence[str]) -> float:
    """Whether the answer chooses a reference's letter of A to D (LongBench v2)."""
    bare = answer.replace("*", "")
    for pattern in (r"answer is \(?([A-D])\b", r"^\s*\(?([A-D])\b", r"\b([A-D])\b"):
        if match := re.search(pattern, bare):
            return float(match.group(1) in references)
    return 0.0


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` of a text holds, None without one."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len(r"\boxed{")
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth < 0:
            return text[begin:at]
    return None


def mathematical(answer: str, references: Sequence[str]) -> float:
    r"""Whether the last `\boxed{...}`, or else the last number, is a reference (MATH, AIME).

    Compared as written, spaces, `\left`, `\right`, `\text{}`, `\dfrac` and leading zeros apart.
    """
    found = boxed(answer)
    if found is None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer)
        found = numbers[-1] if numbers else ""
    return float(_formula(found) in {_formula(x) for x in references})


def _equal(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)
    except ValueError:
        return text == other


def _object(text: str) -> dict[str, Any]:
    """The first object of a text, in JSON's or Python's writing; an empty one without any."""
    match = re.search(r"\{.*?\}", text, re.DOTALL)
    if match is None:
        return {}
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(match.group())
        except (ValueError, SyntaxError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _formula(text: str) -> str:
    bare = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    bare = re.sub(r"\\(?:left|right|!|,|;)|[$\s]|\\%|%", "", bare)
    bare = bare.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").rstrip(".")
    if re.fullmatch(r"-?[\d,]+(?:\.\d+)?", bare):
        number = float(bare.replace(",", ""))
        return str(int(number)) if number.is_integer() else str(number)
    return bare


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _rouge(found: Sequence[str], wanted: Sequence[str]) -> float:
    row = [0] * (len(wanted) + 1)
    for word in found:
        before = 0
        for i, other in enumerate(wanted, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    same = row[-1]
    return 2 * same / (len(found) + len(wanted)) if same else 0.0
