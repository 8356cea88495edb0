"""Training sequences: plain text, and text with things scattered in it that are asked for later.

A gate trained on plain text alone learns what the next sentence needs; the questions at the end
teach it to keep what a later question may need.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import torch
from torch import Tensor

from . import tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = str
#: Documents: strings, token ids, or rows with a column "text" (a Hugging Face data set).
Texts = Iterable[str | list[int] | Mapping[str, Any]]
MIX: dict[Kind, float] = {"plain": 0.25, "codes": 0.15, "facts": 0.3, "pairs": 0.1, "copy": 0.2}
#: For gates that shall keep who is where, and tables that fill a text.
RECALL_MIX: dict[Kind, float] = {
    "plain": 0.15, "codes": 0.1, "facts": 0.15, "pairs": 0.05, "copy": 0.15, "places": 0.2,
    "tables": 0.2,
}  # fmt: skip
MIXES = {"default": MIX, "recall": RECALL_MIX}


_ASKED = 12  # rows of a table
_WORD = re.compile(r"\b[a-z]{3,10}\b")


class Batch(NamedTuple):
    """`input_ids [B, N]`, no padding, and `answers [B, N]`: tokens that answer a question."""

    input_ids: Tensor
    answers: Tensor


class _Chat(NamedTuple):
    """Token ids around a user's message: before it, after it, and between answer and question."""

    head: list[int]
    tail: list[int]
    turn: list[int]


@attrs.frozen(kw_only=True)
class TrainingMix:
    """A reproducible stream of batches: batch n of a rank depends on nothing but the seed.

    Args:
        texts: documents, as strings or as token ids.
        tokenizer: a tokenizer with or without a chat template.
        length: tokens of a sequence.
        kinds: share of each kind of sequence; names of RECALL_MIX.
        seed: of every random choice.

    Raises:
        ValueError: no text is long enough for a sequence, or a kind is unknown.

    Example:
        >>> mix = TrainingMix(texts=[text], tokenizer=tokenizer, length=4096)  # doctest: +SKIP
        >>> mix.batch(0, 2).input_ids.shape  # doctest: +SKIP
        torch.Size([2, 4096])
    """

    texts: Sequence[str | list[int]] = attrs.field(repr=False)
    tokenizer: PreTrainedTokenizerBase = attrs.field(repr=False)
    length: int
    kinds: dict[Kind, float] = attrs.field(factory=lambda: dict(MIX))
    seed: int = 0
    _tokens: list[list[int]] = attrs.field(init=False, repr=False)
    _chat: _Chat = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        unknown = set(self.kinds) - set(RECALL_MIX)
        if unknown or not any(self.kinds.values()):
            known = ", ".join(sorted(RECALL_MIX))
            raise ValueError(f"kinds: wanted shares of {known}, got {self.kinds}")
        tokens = [self._encode(t) if isinstance(t, str) else t for t in self.texts]
        tokens = [ids for ids in tokens if len(ids) > self.length]
        if not tokens:
            raise ValueError(f"texts: wanted one of more than {self.length} tokens, got none")
        object.__setattr__(self, "_tokens", tokens)
        object.__setattr__(self, "_chat", _chat_parts(self.tokenizer))

    def batch(self, index: int, size: int, *, rank: int = 0) -> Batch:
        """Batch `index` of `size` sequences, on the CPU."""
        rng = random.Random(f"{self.seed}/{rank}/{index}")
        names, weights = zip(*self.kinds.items(), strict=True)
        rows = [self.sequence(rng.choices(names, weights)[0], rng) for _ in range(size)]
        return Batch(
            torch.tensor([ids for ids, _ in rows]), torch.tensor([mask for _, mask in rows])
        )

    def sequence(self, kind: Kind, rng: random.Random) -> tuple[list[int], list[bool]]:
        """Token ids and answer mask of one sequence, both `length` long."""
        if kind == "plain" and rng.random() < 0.5:
            return self._text(self.length, rng), [False] * self.length
        if kind == "copy":
            return self._copy(rng)
        if kind == "tables":
            return self._table(rng)
        task = tasks.make(kind, rng)
        return self._assemble(task.intro, [self._encode(s) for s in task.inserts], task, rng)

    def _copy(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """Ask how passages of the text go on."""
        count, size = rng.choice((1, 2, 4, 8)), rng.randint(24, 64)
        text, decode = self._text(self.length, rng), self._decode
        # The text's end gives way to the questions, each a passage and some words of ours.
        room = max(self.length - count * (size + 48) - 64, self.length // 3)
        questions = []
        for begin in (rng.randint(0, max(room - size, 0)) for _ in range(count)):
            cut = begin + rng.randint(8, 20)
            asked = tasks.copy_question(decode(text[begin:cut]), rng)
            questions.append((asked, decode(text[cut : begin + size])))
        intro = tasks.copy_intro(rng)
        return self._asked_of(text, room, intro, questions, rng)

    def _table(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """A table that is the whole text, with words of a document as keys."""
        words = set(_WORD.findall(self._decode(self._text(self.length, rng))))
        keys = sorted({*words, *(f"{w}{n}" for w in words for n in range(2, 6))})
        intro, rows = tasks.table(rng.sample(keys, len(keys)), rng)
        room = max(self.length - _ASKED * 48 - 64, self.length // 3)
        text: list[int] = []
        near = []  # rows before what gives way to the questions
        for row, *question in rows:
            text += self._encode(row)
            if len(text) <= room:
                near.append((question[0], question[1]))
            if len(text) >= self.length:
                break
        else:  # few words, short rows
            text += self._text(self.length - len(text), rng)
        asked = rng.sample(near, min(_ASKED, len(near)))
        return self._asked_of(text, room, intro, asked, rng)

    def _asked_of(
        self,
        text: list[int],
        room: int,
        intro: str,
        questions: list[tuple[str, str]],
        rng: random.Random,
    ) -> tuple[list[int], list[bool]]:
        """Questions about the first `room` tokens of `text`, as many as leave these in."""
        taken = len(self._chat.head) + len(self._encode(intro))
        for n, question in enumerate(questions):
            taken += sum(map(len, self._turn(n, *question)))
            if taken > self.length - room:
                questions = questions[:n]
                break
        return self._assemble(intro, [], tasks.Task(intro, (), tuple(questions)), rng, text)

    def _assemble(
        self,
        intro: str,
        inserts: list[list[int]],
        task: tasks.Task,
        rng: random.Random,
        text: list[int] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """A user's message of `text`, or of any, with `inserts`, and the task's questions."""
        chat = self._chat
        start = chat.head + self._encode(intro)
        end: list[int] = []
        answered: list[bool] = []
        for n, (question, answer) in enumerate(task.questions):
            asked, reply = self._turn(n, question, answer)
            # Most of a sequence is text; only a first question may take more room.
            if len(end) + len(asked) + len(reply) > self.length // (3 if answered else 2):
                break
            end += asked + reply
            answered += [False] * len(asked) + [True] * len(reply)
        room = self.length - len(start) - len(end)
        while sum(map(len, inserts)) > room:
            inserts = inserts[:-1]
        room -= sum(map(len, inserts))
        text = self._text(room, rng) if text is None else text[:room]
        cuts = sorted(rng.randint(0, room) for _ in inserts)
        body: list[int] = []
        for begin, cut, insert in zip([0, *cuts], [*cuts, room], [*inserts, []], strict=True):
            body += text[begin:cut] + insert
        ids = start + body + end
        return ids, [False] * (len(ids) - len(answered)) + answered

    def _turn(self, number: int, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a question, in its frame, and of its answer."""
        asked = self._encode(("\n\n" if number == 0 else "") + question)
        return (self._chat.turn if number else []) + asked + self._chat.tail, self._encode(answer)

    def _text(self, size: int, rng: random.Random) -> list[int]:
        ids = rng.choices(self._tokens, [len(t) for t in self._tokens])[0]
        begin = rng.randrange(len(ids) - size + 1)
        return ids[begin : begin + size]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=8)
def _chat_parts(tokenizer: PreTrainedTokenizerBase) -> _Chat:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if not tokenizer.chat_template:
        return _Chat([], encode("\nAnswer: "), encode("\n"))
    user, reply = "\x01USER\x01", "\x01REPLY\x01"
    messages = [{"role": "user", "content": user}]
    once: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": user}]
    twice: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    head, tail = once.split(user)
    turn = twice.split(reply)[1].split(user)[0]
    return _Chat(encode(head), encode(tail), encode(turn))


def documents(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    sequences: int | None = None,
    column: str = "text",
) -> list[list[int]]:
    """Token ids of the documents that are longer than `length` tokens.

    Args:
        texts: strings, token ids, or rows that hold a text under `column`; any iterable, a
            streamed Hugging Face data set among them.
        tokenizer: of the strings.
        length: tokens of a training sequence.
        sequences: stop when the documents make so many sequences; lists are read to the end.
        column: of rows.

    Raises:
        TypeError: something else than a document came.
    """
    found: list[list[int]] = []
    left = None if sequences is None or isinstance(texts, list | tuple) else sequences
    for text in texts:
        if isinstance(text, Mapping):
            if column not in text:
                raise ValueError(f"texts: wanted rows with a column {column!r}, got {sorted(text)}")
            text = text[column]
        if isinstance(text, str):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        elif isinstance(text, Sequence):
            ids = list(text)
        else:
            raise TypeError(f"texts: wanted strings, ids or rows, got {type(text).__name__}")
        if len(ids) <= length:
            continue
        found.append(ids)
        if left is not None:
            left -= len(ids) // length
            if left <= 0:
                break
    return found


def as_mix(
    texts: Texts | TrainingMix,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    seed: int,
    *,
    sequences: int,
    kinds: dict[Kind, float] | None = None,
) -> TrainingMix:
    """The stream of batches of documents; a ready one stays as it is."""
    if isinstance(texts, TrainingMix):
        return texts
    if tokenizer is None:
        raise ValueError("tokenizer: wanted one to cut documents into batches, got None")
    return TrainingMix(
        texts=documents(texts, tokenizer, length=length, sequences=sequences),
        tokenizer=tokenizer,
        length=length,
        seed=seed,
        kinds=dict(MIX) if kinds is None else kinds,
    )
