"""How answers are scored, each in [0, 1], as the benchmarks do."""

from __future__ import annotations

import ast
import difflib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .rouge import rouge_l

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


def rouge_f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 by longest common subsequences of words (LongBench)."""
    return max(rouge_l(answer, x).f1 for x in references)


def rouge_recall(answer: str, references: Sequence[str]) -> float:
    """The best recall by longest common subsequences of words (LooGLE)."""
    return max(rouge_l(answer, x).recall for x in references)


def edit_similarity(answer: str, references: Sequence[str]) -> float:
    """How alike the answer's first line of code and a reference are, by matching blocks.

    Lines with a quoted or commented part are passed over (LongBench).
    """
    lines = [x for x in answer.lstrip("\n").split("\n") if not re.search(r"`|#|//", x)]
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


def first_digits(answer: str, references: Sequence[str]) -> float:
    """Whether the first digits of an answer are a reference (InfiniteBench's passkeys)."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found.group() in references)


def first_number(answer: str, references: Sequence[str]) -> float:
    """Whether the first number of an answer equals a reference (InfiniteBench's Math.Find)."""
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
    """The part of the masks of a reference, a dict as Python writes it, that the answer's has.

    An answer that is no dict alone fills none (LooGLE's exact match).
    """
    wanted, found = _object(references[0]), _object(answer)
    return sum(found.get(k) == v for k, v in wanted.items()) / len(wanted) if wanted else 0.0


def choice(answer: str, references: Sequence[str]) -> float:
    """Whether an answer chooses a reference's letter (InfiniteBench).

    It does by the last single letter of the first line that has one, or by its own first letter.
    """
    line = re.search(r"\b[A-D]\b(?!.*\b[A-D]\b)", answer.strip())
    return float(
        line is not None and line.group() in references or answer.strip()[:1] in references
    )


def stated(answer: str, references: Sequence[str]) -> float:
    """Whether "The correct answer is (A)" is said with a reference's letter (LongBench v2)."""
    bare = answer.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
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
    r"""Whether the last `\boxed{...}` of an answer is a reference (MATH, AIME); none is wrong.

    Compared as written, spaces, `\left`, `\right`, `\text{}`, `\dfrac` and leading zeros apart.
    """
    found = boxed(answer)
    return float(found is not None and _formula(found) in {_formula(x) for x in references})


def ndcg_at_10(answer: str, references: Sequence[str]) -> float:
    """NDCG@10 of a ranking "ID3 > ID1 > ID2" (HELMET); a reference is "id relevance"."""
    relevance = {name: int(of) for name, of in (x.rsplit(" ", 1) for x in references)}
    bare = re.sub(r"[\[\]:]", "", answer).lower().replace("id", "")
    ranked = max((x.group() for x in re.finditer(r"\d+(?:\s*>\s*\d+)*", bare)), key=len, default="")
    found = [relevance.get(x.strip(), 0) for x in dict.fromkeys(re.split(r"\s*>\s*", ranked))]
    best = sorted(relevance.values(), reverse=True)

    def gain(values: Sequence[int]) -> float:
        return sum(x / math.log2(i + 2) for i, x in enumerate(values[:10]))

    return gain(found) / gain(best) if gain(best) else 0.0


def labelled(answer: str, references: Sequence[str]) -> float:
    """Whether the rest of the line after "label:" is a reference (HELMET's classes)."""
    match = re.search(r"(?:label:)(.*)(?:\n|$)", answer, re.IGNORECASE) or re.search(
        r"^(.*)", answer
    )
    return exact(match.group(1) if match else "", references)


def _equal(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)
    except ValueError:
        return text == other


def _object(text: str) -> dict[str, Any]:
    """The dict that a text is, in Python's writing; an empty one if it is none."""
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
