"""Decoders for the containers that the Debian texts come in: R's .rdb and Unix compress."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

MOST = 1 << 24  # bytes that a block or a window may inflate to; the texts take less than a tenth
_R_HEADER = b"X\n\0\0\0\3"
_R_STRING_VECTOR = 16
_R_MISSING = -1
_CLEAR = 256  # LZW code that empties the table


def r_string_vectors(data: bytes) -> Iterator[list[str]]:
    """The string vectors of an R lazy-load database, in file order.

    The database is a row of blocks, each a big-endian length and a zlib stream that holds one
    object in R's XDR serialization, version 3.

    Raises:
        ValueError: a block is not a serialized string vector, is cut short or is larger than
            `MOST` bytes.
    """
    start = 0
    while start < len(data):
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(data[start + 4 :], len(_R_HEADER))
            if block != _R_HEADER:
                raise ValueError(f"R serialization: got header {block!r}, want XDR version 3")
            block += stream.decompress(stream.unconsumed_tail, MOST)
        except zlib.error as error:
            raise ValueError(
                f"R database: wanted a zlib stream at byte {start + 4}: {error}"
            ) from None
        if not stream.eof:
            raise ValueError(
                f"R database: the block at byte {start} is cut short or above {MOST:,} bytes"
            )
        start = len(data) - len(stream.unused_data)
        yield _r_strings(block)


def _r_strings(block: bytes) -> list[str]:
    def word(at: int, least: int = 0) -> int:
        """The big-endian word at a byte."""
        found = int.from_bytes(block[at : at + 4], "big", signed=True)
        if at + 4 > len(block) or found < least:
            raise ValueError(
                f"R serialization: wanted a size at byte {at}, got {block[at : at + 4]!r}"
            )
        return found

    at = 18 + word(14)  # behind the encoding's name
    kind, count = word(at, -(1 << 31)) & 0xFF, word(at + 4)
    if kind != _R_STRING_VECTOR:
        raise ValueError(f"R object: got type {kind}, want {_R_STRING_VECTOR} (strings)")
    at += 8
    strings = []
    for _ in range(count):
        size = max(word(at + 4, _R_MISSING), 0)
        at += 8
        if at + size > len(block):
            raise ValueError(f"R serialization: a string at byte {at} is cut short")
        strings.append(block[at : at + size].decode("utf-8"))
        at += size
    return strings


def bible_windows(data: bytes) -> Iterator[bytes]:
    """The decompressed windows of bible-kjv's data file.

    A 84-byte header, the window size, the window count, one offset per window and an end offset
    (big-endian words), then LZW streams that share one 3-byte `compress` header.

    Raises:
        ValueError: not such a file.
    """
    if data[:4] != b"EC02":
        raise ValueError(f"compressed data file: got header {data[:4]!r}, want b'EC02'")
    count = int.from_bytes(data[88:92], "big")
    if len(data) < 96 + 4 * count:
        raise ValueError(
            f"compressed data file: got {len(data)} bytes, too few for {count} windows"
        )
    offsets = struct.unpack_from(f">{count + 1}I", data, 92)
    if list(offsets) != sorted(offsets) or offsets[-1] > len(data):
        raise ValueError(f"compressed data file: wanted ascending offsets up to {len(data)}")
    magic = data[offsets[0] - 3 : offsets[0]]
    if magic != b"\x1f\x9d\x90":
        raise ValueError(f"compress header: got {magic!r}, want b'\\x1f\\x9d\\x90'")
    for start, stop in zip(offsets, offsets[1:], strict=False):
        yield unlzw(data[start:stop])


def unlzw(data: bytes) -> bytes:
    """Decompress the body of a Unix `compress` stream (block mode, codes of up to 16 bits).

    Raises:
        ValueError: a code is not in the table, or more than `MOST` bytes come out.
    """
    table = [bytes([i]) for i in range(256)] + [b""]
    out: list[bytes] = []
    size, width, bit, group = (
        0,
        9,
        0,
        0,
    )  # codes come in groups of 8; a change of width skips the rest
    previous = b""
    while bit + width <= 8 * len(data):
        chunk = int.from_bytes(data[bit >> 3 : (bit >> 3) + 4], "little")
        code = chunk >> (bit & 7) & ((1 << width) - 1)
        bit += width
        if code == _CLEAR:
            bit = _next_group(bit, group, width)
            del table[257:]
            width, group, previous = 9, bit, b""
            continue
        if code > len(table) or (code == len(table) and not previous):
            raise ValueError(f"compress stream: got code {code}, want one of {len(table)}")
        entry = table[code] if code < len(table) else previous + previous[:1]
        out.append(entry)
        size += len(entry)
        if size > MOST:
            raise ValueError(f"compress stream: more than {MOST:,} bytes come out of {len(data):,}")
        if previous and len(table) < 1 << 16:
            table.append(previous + entry[:1])
        previous = entry
        # The decoder's table is one entry behind the encoder's.
        if len(table) >= 1 << width and width < 16:
            bit = _next_group(bit, group, width)
            width, group = width + 1, bit
    return b"".join(out)


def _next_group(bit: int, group: int, width: int) -> int:
    size = 8 * width
    return group + -(-(bit - group) // size) * size
