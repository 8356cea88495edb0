"""Made-up questions for training: what is scattered in a text, and what is asked of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Task(NamedTuple):
    """Words before the text, passages to scatter in it, and (question, answer) pairs after it."""

    intro: str
    inserts: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


_MAKERS = "bamboo brass cobalt cerulean ebony frosted gilded indigo jade lacquered linen maple "
_MAKERS += "mossy olive pewter quilted russet sable scarlet tarnished umber vermilion waxed woven"
_OBJECTS = "abacus anvil barometer bellows cradle decanter easel flute gyroscope hammock "
_OBJECTS += "inkwell keg lute mandolin odometer pendulum quill rudder sextant telescope "
_OBJECTS += "trunk umbrella valise wardrobe xylophone yoke zither"
_FIRST = "Ansel Brida Corwin Delphine Emeric Fenna Gustav Hedda Ivo Jorun Kasimir Liesl Milos "
_FIRST += "Nerys Oswin Petra Quill Rosalba Stellan Tamsin Ulric Viola Wendel Xenia Yorick Zelda"
_LAST = "Abernathy Brock Castellane Dunmore Eklund Farrow Grieve Holloway Ivarsen Jessop Kestrel "
_LAST += "Lowther Marlowe Nettle Ostrander Pell Quince Rusk Sorrel Thackeray Underhill Voss"
_TRADES = "apothecary beekeeper cooper drummer engraver falconer glazier hatter joiner mason "
_TRADES += "navigator potter roofer saddler tinsmith vintner weaver printer locksmith gardener"
_TOWNS = "Aldermoor Brightwater Coldharbour Dunfallow Eastmarsh Fairhollow Greywick Highcombe "
_TOWNS += "Kingsferry Larkspur Millbrook Northgate Oakhurst Pinefold Ravenscar Stonebeck Westerly "
_TOWNS += "Bogota Dakar Geneva Hanoi Helsinki Kyoto Lagos Leeds Lima Lisbon Nairobi Naples Oslo "
_TOWNS += "Perth Prague Quito Tampa Warsaw Zagreb"
_SYLLABLES = "ba ce di fo gu ka le mi no pu ra se ti vo zu lan mer tor vin sel gar dun pol"

# Three things in a sentence, and what may be asked of any such sentence.
_TOLD = (
    " {who}, a {trade} by trade, had moved to {town} and took along the {thing}. ",
    " In {town} everyone knew {who} the {trade}, who would not part with the {thing}. ",
    " It was the {trade} {who} who brought the {thing} down to {town}. ",
)
_ASKED = (
    ("Which town is {who} connected with?", "{town}"),
    ("How does {who} earn a living?", "{who} is a {trade}."),
    ("What does {who} own?", "The {thing}."),
    ("Who has the {thing}?", "{who}"),
)
# One thing in a sentence, its question and its answer.
_SAID = (
    (" {who} was born in {town}.", "What is the birthplace of {who}?", "{who} was born in {town}."),
    (" {who} came from {town}.", "Where did {who} come from?", "{who} came from {town}."),
    (" {town} was the home of {who}.", "Where was {who} at home?", "In {town}."),
    (" {who} worked as a {trade}.", "What did {who} work as?", "{who} worked as a {trade}."),
    (" {who} owned the {thing}.", "What did {who} own?", "{who} owned the {thing}."),
    (" {who} was a friend of {other}.", "Who was {who} a friend of?", "{other}"),
)

# Where somebody is, and what is asked of it; names and places as real texts have them.
_GIVEN = "Agnes Basil Cora Dmitri Edith Fergus Gilda Harold Iris Jasper Kitty Leopold Mabel Nigel "
_GIVEN += "Olga Percy Ramona Silas Trudy Vernon Winifred Yusuf Amara Bastien Chiyo Declan Esme"
_FAMILY = "Aldous Bancroft Cheng Delacroix Engstrom Fitzroy Galloway Horvath Ibarra Jansson Koenig "
_FAMILY += "Lombardi Mbeki Nakagawa Oduya Pereira Rasmussen Sato Tremblay Ulrich Vasquez Whitlock"
_CITIES = "Lisbon Oslo Prague Warsaw Helsinki Geneva Naples Kyoto Hanoi Lagos Nairobi Lima Quito "
_CITIES += "Bogota Dakar Perth Leeds Tampa Zagreb Milan Bergen Bristol Calgary Cordoba Delhi "
_CITIES += "Florence Hamburg Havana Jakarta Lyon Manila Marseille Munich Osaka Porto Riga Seoul "
_CITIES += "Seville Tehran Turin Utrecht Venice York Zurich"
_PLACED = (
    (" {who} had settled in {town}.", "Where had {who} settled?", "In {town}."),
    (" {who} kept a house in {town}.", "Where is the house of {who}?", "{town}"),
    (" {who} went to school in {town}.", "Which town did {who} go to school in?", "{town}"),
    (" The letter to {who} was sent to {town}.", "Where was the letter to {who} sent?", "{town}"),
    (" In {town} one could meet {who}.", "Where could one meet {who}?", "In {town}."),
    (" {who}, now of {town}, wrote this down.", "Of which town is {who}?", "{who} is of {town}."),
)  # fmt: skip
# Rows of tables that fill a whole text.
_ROWS = (
    "{k}={v};", "{k}: {v}\n", "{k}\t{v}\n", "<{k}>{v}</{k}>\n", "({k}, {v}) ", "{k} -> {v}, ",
    "| {k} | {v} |\n", "set {k} to {v}. ",
)  # fmt: skip

_CODE_NAMES = ("access code", "serial number", "registration", "inventory mark", "catalogue key")


def make(kind: str, rng: random.Random) -> Task:
    """A task of one kind: "plain", "codes", "facts", "pairs" or "places"."""
    kinds = {"plain": _plain, "codes": _codes, "facts": _facts, "pairs": _pairs, "places": _places}
    return kinds[kind](rng)


def table(words: Sequence[str], rng: random.Random) -> tuple[str, list[tuple[str, str, str]]]:
    """Words before a table, and its rows: the row, what asks for its value, and the value."""
    form = rng.choice(_ROWS)
    asked = rng.choice(
        ("Look up {k}.", "Which value belongs to {k}?", "{k}?", "Give the entry of {k}.")
    )
    said = rng.choice(("{v}", "It is {v}.", "{k}: {v}"))
    number = rng.random() < 0.7
    rows = []
    for key in words:
        value = str(rng.randrange(100, 10**6)) if number else _value(rng)
        told = {"k": key, "v": value}
        rows.append((form.format(**told), asked.format(**told), said.format(**told)))
    intro = rng.choice(("What follows is a table.\n\n", "Entries to remember:\n\n", ""))
    return intro, rows


def copy_intro(rng: random.Random) -> str:
    """Words before a text that will be quoted from."""
    return rng.choice(("", "Keep this text at hand.\n\n", "I will quote from this text.\n\n"))


def copy_question(cue: str, rng: random.Random) -> str:
    """Ask how the text goes on after `cue`."""
    return rng.choice(
        (
            f"How does the passage go on after these words?\n{cue}",
            f'Somewhere above it says "{cue}". Write what comes next.',
            f"Quote on from here: {cue}",
        )
    )


def _plain(rng: random.Random) -> Task:
    intro = rng.choice(("Read this and sum it up.\n\n", "Here is a text to work through.\n\n", ""))
    asked = rng.choice(
        ("What is the text about?", "Give the main points of the text.", "Summarise the above.")
    )
    return Task(intro, (), ((asked, ""),))


def _value(rng: random.Random) -> str:
    style = rng.random()
    if style < 0.6:
        return str(rng.randrange(10 ** rng.randint(3, 7), 10**8))[: rng.randint(4, 8)]
    if style < 0.8:
        letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(2, 3)))
        return f"{letters}-{rng.randrange(100, 10000)}"
    return "".join(rng.choices(_SYLLABLES.split(), k=3))


def _names(rng: random.Random, count: int) -> list[str]:
    pairs = [f"{a} {b}" for a in _MAKERS.split() for b in _OBJECTS.split()]
    return rng.sample(pairs, count)


def _codes(rng: random.Random) -> Task:
    name, count = rng.choice(_CODE_NAMES), rng.choice((4, 8, 16))
    objects = {thing: _value(rng) for thing in _names(rng, count)}
    say = rng.choice(
        (
            "\nNote: the {name} of the {thing} reads {value}.\n",
            " Mark this down, {value} is the {name} of the {thing}. ",
            "\n(The {thing} carries the {name} {value}.)\n",
            "\nFor the {thing}, the {name} was set to {value}.\n",
        )
    )
    inserts = tuple(say.format(name=name, thing=t, value=v) for t, v in objects.items())
    intro = rng.choice(
        (
            f"Some objects and their {name}s are hidden in this text.\n\n",
            f"Watch for every {name} in what follows.\n\n",
            "",
        )
    )
    order = rng.sample(list(objects), count)
    if rng.random() < 0.5:
        asked = f"List the {name} of each: {', '.join(f'the {t}' for t in order)}."
        lines = "\n".join(f"{t.capitalize()}: {objects[t]}" for t in order)
        return Task(intro, inserts, ((asked, lines),))
    form = rng.choice(("{value}", "It is {value}.", "The {name} of the {thing} is {value}."))
    return Task(
        intro,
        inserts,
        tuple(
            (f"What {name} does the {t} have?", form.format(name=name, thing=t, value=objects[t]))
            for t in order
        ),
    )


def _facts(rng: random.Random) -> Task:
    """What is said of people in passing: one thing of each, or three in a sentence."""
    count = rng.choice((1, 4, 8, 16))
    people = rng.sample([f"{a} {b}" for a in _FIRST.split() for b in _LAST.split()], 2 * count)
    trades, towns = rng.sample(_TRADES.split(), count), rng.sample(_TOWNS.split(), count)
    rows = list(zip(people, people[count:], trades, towns, _names(rng, count), strict=False))
    one, inserts, questions = rng.choice((None, *_SAID)), [], []
    for who, other, trade, town, thing in rows:
        words = {"who": who, "other": other, "trade": trade, "town": town, "thing": thing}
        said, asked = (rng.choice(_TOLD), rng.choice(_ASKED)) if one is None else (one[0], one[1:])
        inserts.append(said.format(**words))
        questions.append((asked[0].format(**words), asked[1].format(**words)))
    rng.shuffle(questions)
    return Task("", tuple(inserts), tuple(questions))


def _places(rng: random.Random) -> Task:
    """Where people are, each said once in passing and in the same words."""
    count = rng.choice((4, 8, 8, 16))
    people = rng.sample([f"{a} {b}" for a in _GIVEN.split() for b in _FAMILY.split()], count)
    towns = rng.sample(_CITIES.split(), count)
    said, asked, answer = rng.choice(_PLACED)
    known = [{"who": who, "town": town} for who, town in zip(people, towns, strict=True)]
    questions = [(asked.format(**x), answer.format(**x)) for x in known]
    rng.shuffle(questions)
    return Task("", tuple(said.format(**x) for x in known), tuple(questions))


def _pairs(rng: random.Random) -> Task:
    """Tables of keys and values, cut into a few pieces."""
    keys = {"".join(rng.choices(_SYLLABLES.split(), k=rng.randint(2, 4))) for _ in range(64)}
    table = {key: _value(rng) for key in sorted(keys)}
    form = rng.choice(("{k} = {v}", "{k},{v}", "| {k} | {v} |", "{k} -> {v}", '  "{k}": {v!r},'))
    rows = [form.format(k=k, v=v) for k, v in table.items()]
    rng.shuffle(rows)
    size = rng.choice((8, 16, 64))
    inserts = tuple("\n" + "\n".join(rows[n : n + size]) + "\n" for n in range(0, len(rows), size))
    asked = rng.choice(("Look up {k}.", "Which value is stored under {k}?", "{k}?"))
    chosen = rng.sample(list(table), 12)
    return Task(
        rng.choice(("The text contains a lookup table.\n\n", "")),
        inserts,
        tuple((asked.format(k=k), table[k]) for k in chosen),
    )
