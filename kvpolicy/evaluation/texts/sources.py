"""Real English prose: what CPython carries, and Debian packages where they are installed.

Texts for training and for evaluation never overlap. The novels and the topics are for evaluation;
the Bible, the Jargon File and the manuals are for training.

A package need not be installed: `apt-get download NAME` and `dpkg-deb -x FILE.deb ROOT` put its
files under a folder of yours, which then is the `root` of these functions.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path

from . import archives, prose

_NOVEL_TITLES = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)
# The sources of pydoc's topics, which are evaluation text.
_TOPIC_SOURCES = ("reference/", "library/stdtypes", "library/string", "library/pdb")


def python_topics() -> str:
    """The language reference as `pydoc` carries it, about 0.2 MB of prose; needs no package."""
    from pydoc_data.topics import topics

    return prose.join(
        block
        for name in sorted(topics)
        for block in prose.paragraphs(topics[name], clean=prose.clean_rst)
    )


def novels(root: Path | str = "/") -> dict[str, str]:
    """Jane Austen's six novels by title (Debian package r-cran-janeaustenr).

    Raises:
        FileNotFoundError: the package's files are not under `root`.
    """
    data = _read(root, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", "r-cran-janeaustenr")
    found = {}
    for lines in archives.r_string_vectors(data):
        opening = lines[0].strip() if lines else ""
        title = next((t for t in _NOVEL_TITLES if t.lower() == opening.lower()), None)
        if title is None:
            raise ValueError(f"novels: wanted one of {', '.join(_NOVEL_TITLES)}, got {opening!r}")
        found[title] = prose.join(prose.paragraphs("\n".join(lines), clean=prose.clean_novel))
    return found


def bible(root: Path | str = "/") -> str:
    """The King James Bible, a paragraph per chapter (Debian package bible-kjv-text).

    Raises:
        FileNotFoundError: the package's file is not under `root`.
    """
    data = _read(root, "usr/lib/bible.data", "bible-kjv-text")
    text = b"".join(archives.bible_windows(data)).decode("ascii")
    chapters: dict[str, list[str]] = {}
    for chapter, verse in re.findall(r"^(\w+):\d+ (.+)$", text, flags=re.MULTILINE):
        chapters.setdefault(chapter, []).append(verse)
    return prose.join(" ".join(verses) for verses in chapters.values())


def jargon(root: Path | str = "/") -> str:
    """The Jargon File (Debian package jargon-text).

    Raises:
        FileNotFoundError: the package's file is not under `root`.
    """
    data = _read(root, "usr/share/doc/jargon-text/jargon.txt.gz", "jargon-text")
    text = gzip.decompress(data).decode("utf-8")
    return prose.join(prose.paragraphs(text, clean=prose.clean_jargon, indent="   "))


def perl_manual(root: Path | str = "/") -> str:
    """The Perl manual (Debian package perl-doc).

    Raises:
        FileNotFoundError: the package's files are not under `root`.
    """
    files = _find(root, "usr/share/perl/*/pod/perl*.pod", "perl-doc")
    return prose.join(
        block
        for path in files
        for block in prose.paragraphs(
            path.read_text("utf-8", errors="replace"), clean=prose.clean_pod
        )
    )


def python_manual(root: Path | str = "/") -> str:
    """The Python manual without the pages `python_topics` is made of (package python3.11-doc).

    Raises:
        FileNotFoundError: the package's files are not under `root`.
    """
    sources = "usr/share/doc/python3.11/html/_sources/"
    return prose.join(
        block
        for path in _find(root, sources + "**/*.rst.txt", "python3.11-doc")
        if not path.as_posix().partition("_sources/")[2].startswith(_TOPIC_SOURCES)
        for block in prose.paragraphs(path.read_text("utf-8"), clean=prose.clean_rst)
    )


def training_texts(root: Path | str = "/") -> dict[str, str]:
    """Texts a learned policy may be trained on.

    Raises:
        FileNotFoundError: one of the packages is missing under `root`.
    """
    return {
        "bible": bible(root),
        "jargon": jargon(root),
        "perl manual": perl_manual(root),
        "python manual": python_manual(root),
    }


def _read(root: Path | str, name: str, package: str) -> bytes:
    try:
        return (Path(root) / name).read_bytes()
    except FileNotFoundError:
        raise _missing(root, name, package) from None


def _find(root: Path | str, pattern: str, package: str) -> list[Path]:
    files = sorted(Path(root).glob(pattern))
    if not files:
        raise _missing(root, pattern, package)
    return files


def _missing(root: Path | str, name: str, package: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no {name} under root {str(root)!r}: install the Debian package {package}, or unpack it "
        f"there (apt-get download {package}; dpkg-deb -x {package}_*.deb ROOT)"
    )
