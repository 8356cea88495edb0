"""Tasks whose answers lie far back in the context, so that what a cache keeps decides.

Every function returns examples of exactly `length` context tokens, the same for the same seed.
What is asked for lies more than `TAIL` tokens from the context's end.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from . import words
from .prompts import Example, Frame, Ids, Question, scatter, sentences
from .task import QUESTIONS, Bound, Task

TAIL = 300
_CUE_TOKENS = 16
_COPY_TOKENS = 24
_MEMORIZE = "Some special magic numbers are hidden in the following text. Memorize them."
_READ = "Read the text and remember the details."


def needles(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    contexts: int,
    count: int = QUESTIONS,
    digits: int = 7,
    seed: int = 0,
) -> list[Example]:
    """Numbers of up to 8 made-up things, scattered in real text; one question for each."""
    frame, rng = Frame(tokenizer), random.Random(seed)

    def example() -> Example:
        statements, questions = [], []
        colours, things = rng.sample(words.COLOURS, count), rng.sample(words.THINGS, count)
        for colour, thing in zip(colours, things, strict=True):
            number = str(rng.randrange(10 ** (digits - 1), 10**digits))
            what = f"special magic number for the {colour} {thing}"
            statements.append(frame.encode(f" The {what} is {number}."))
            questions.append(
                frame.ask(
                    f"What is the {what} mentioned in the text?",
                    lead=f"The {what} mentioned in the text is ",
                    answer=number,
                )
            )
        return _scattered(frame, _MEMORIZE, text, length, statements, questions, rng)

    return [example() for _ in range(contexts)]


def facts(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    contexts: int,
    count: int = QUESTIONS,
    seed: int = 0,
) -> list[Example]:
    """Who lives where, said in passing in real text; one question for each person."""
    frame, rng = Frame(tokenizer), random.Random(seed)

    def example() -> Example:
        people, cities = rng.sample(words.PEOPLE, count), rng.sample(words.CITIES, count)
        homes = list(zip(people, cities, strict=True))
        statements = [frame.encode(f" {person} lives in {city}.") for person, city in homes]
        questions = [
            frame.ask(
                f"In which city does {person} live?", lead=f"{person} lives in", answer=f" {city}"
            )
            for person, city in homes
        ]
        return _scattered(frame, _READ, text, length, statements, questions, rng)

    return [example() for _ in range(contexts)]


def key_values(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    contexts: int,
    questions: int = QUESTIONS,
    seed: int = 0,
) -> list[Example]:
    """A JSON object from words of `text` to numbers of 5 digits; questions give a word."""
    frame, rng = Frame(tokenizer), random.Random(seed)
    vocabulary = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))

    def example() -> Example:
        ids = list(frame.opening("Here is a JSON object.") + frame.encode("{"))
        asked = []
        for word in rng.sample(vocabulary, len(vocabulary)):
            if len(ids) >= length:
                break
            number = str(rng.randrange(10_000, 100_000))
            ids += frame.encode(f'"{word}": "{number}", ')
            if length - len(ids) > TAIL:
                asked.append((word, number))
        if len(ids) < length or len(asked) < questions:
            raise ValueError(
                f"length: {length} tokens hold {len(asked)} keys that can be asked for, want "
                f"{questions}; text has {len(vocabulary)} words"
            )
        return Example(
            context_ids=tuple(ids[:length]),
            questions=tuple(
                frame.ask(
                    f'What is the value of the key "{word}" in the JSON object?',
                    lead=f'The value of the key "{word}" is "',
                    answer=number,
                )
                for word, number in rng.sample(asked, questions)
            ),
        )

    return [example() for _ in range(contexts)]


def copying(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    length: int,
    contexts: int,
    questions: int = QUESTIONS,
    seed: int = 0,
) -> list[Example]:
    """Real text; the reply starts with 16 of its tokens and goes on with the next 24."""
    frame, rng = Frame(tokenizer), random.Random(seed)
    request = frame.ask("Repeat a passage of the text word for word.", lead="", answer="")

    def example() -> Example:
        opening = frame.opening("Here is a text.")
        found = sentences(frame.encode, text, length - len(opening), rng)
        ids = opening + tuple(token for sentence in found for token in sentence)
        cues = _cues(ids, len(opening), questions, rng)
        return Example(
            context_ids=ids,
            questions=tuple(
                Question(
                    request.question_ids + ids[at : at + _CUE_TOKENS],
                    ids[at + _CUE_TOKENS : at + _CUE_TOKENS + _COPY_TOKENS],
                )
                for at in cues
            ),
        )

    return [example() for _ in range(contexts)]


_EXACT = (
    Bound(score="accuracy", part=0.98, most=0.25),
    Bound(score="accuracy", part=0.95, most=0.125),
)
_FACTS = (Bound(score="accuracy", part=0.95, most=0.25),)

#: The tasks that ask, the most telling first. A fact is one token, which a prompt with its question
#: decides.
RECALL = (
    Task(
        name="eight needles", make=needles, core=True, retrieval=True, decoded=True, bounds=_EXACT
    ),
    Task(name="copy", make=copying, core=True, retrieval=True, decoded=True, bounds=_EXACT[:1]),
    Task(name="eight facts", make=facts, core=True, retrieval=True, bounds=_FACTS),
    Task(name="key-value", make=key_values, retrieval=True, decoded=True),
    Task(
        name="one needle",
        make=partial(needles, count=1),
        questions=1,
        default=False,
        retrieval=True,
        decoded=True,
        bounds=_EXACT,
    ),
    Task(
        name="one fact",
        make=partial(facts, count=1),
        questions=1,
        default=False,
        retrieval=True,
        bounds=_FACTS,
    ),
)


def _scattered(
    frame: Frame,
    instruction: str,
    text: str,
    length: int,
    statements: Sequence[Ids],
    questions: Sequence[Question],
    rng: random.Random,
) -> Example:
    opening = frame.opening(instruction)
    room = length - len(opening) - sum(map(len, statements))
    if room <= TAIL:
        raise ValueError(f"length: got {length} tokens, want at least {length - room + TAIL + 1}")
    document = scatter(sentences(frame.encode, text, room, rng), statements, TAIL, rng)
    return Example(context_ids=opening + document, questions=tuple(questions))


def _cues(ids: Ids, first: int, count: int, rng: random.Random) -> list[int]:
    """Starts of cues that occur once, with their continuation before the tail."""
    last = len(ids) - TAIL - _COPY_TOKENS - _CUE_TOKENS
    if last - first < count:
        raise ValueError(f"length: got {len(ids)} tokens, too few for {count} passages")
    seen: dict[Ids, int] = {}
    for at in range(len(ids) - _CUE_TOKENS + 1):
        cue = ids[at : at + _CUE_TOKENS]
        seen[cue] = seen.get(cue, 0) + 1
    unique = [at for at in range(first, last) if seen[ids[at : at + _CUE_TOKENS]] == 1]
    if len(unique) < count:
        raise ValueError(f"text: {len(unique)} passages occur once, want {count}")
    return rng.sample(unique, count)
