"""What the documentation shows: its pages, their blocks of code and their commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(`{3,})([^\n]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


@attrs.frozen
class Block:
    """A fenced block; `language` is "" for a fence without one, `number` counts within the page."""

    page: str
    number: int
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}-{self.number}"


def pages() -> list[Path]:
    """Every page that a reader meets, the READMEs of rooms and folders of GitHub included."""
    found = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    found += [*ROOT.glob("kvpolicy/*/README.md"), *ROOT.glob(".github/**/*.md")]
    real = {path.resolve() for path in found if "measurements" not in path.parts}
    return sorted(path for path in real if path.is_relative_to(ROOT))


def blocks(language: str | None = None) -> list[Block]:
    """The blocks of all pages, in order; of one language if it is named."""
    found = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        text = page.read_text(encoding="utf-8")
        for number, (_, kind, code) in enumerate(FENCE.findall(text)):
            found.append(Block(name, number, kind.strip(), code))
    return [b for b in found if language is None or b.language == language]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as words; variables that it sets are put in."""
    found, known, kept = [], dict[str, str](), ""
    for line in block.code.replace("\\\n", " ").splitlines():
        for name, value in known.items():
            line = line.replace(f"${name}", value)
        kept += line
        try:
            words = shlex.split(kept, comments=True)
        except ValueError:  # a quoted newline
            kept += "\n"
            continue
        kept = ""
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0], re.DOTALL):
            name, _, value = words.pop(0).partition("=")
            known[name] = value
        if words:
            found.append(words)
    assert not kept, f"{block.name}: a quote is not closed"
    return found
