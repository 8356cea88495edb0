"""Decoders for the containers that the Debian texts come in: R's .rdb and Unix compress."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_R_STRING_VECTOR = 16
_R_MISSING = -1
_CLEAR = 256  # LZW code that empties the table


def r_string_vectors(data: bytes) -> Iterator[list[str]]:
    """The string vectors of an R lazy-load database, in file order.

    The database is a row of blocks, each a big-endian length and a zlib stream that holds one
    object in R's XDR serialization, version 3.

    Raises:
        ValueError: a block is not a serialized string vector.
    """
    start = 0
    while start < len(data):
        stream = zlib.decompressobj()
        block = stream.decompress(data[start + 4 :]) + stream.flush()
        start = len(data) - len(stream.unused_data)
        yield _r_strings(block)


def _r_strings(block: bytes) -> list[str]:
    if block[:6] != b"X\n\0\0\0\3":
        raise ValueError(f"R serialization: got header {block[:6]!r}, want XDR version 3")
    (encoding_bytes,) = struct.unpack_from(">i", block, 14)
    at = 18 + encoding_bytes
    flags, count = struct.unpack_from(">ii", block, at)
    if flags & 0xFF != _R_STRING_VECTOR:
        raise ValueError(f"R object: got type {flags & 0xFF}, want {_R_STRING_VECTOR} (strings)")
    at += 8
    strings = []
    for _ in range(count):
        (size,) = struct.unpack_from(">i", block, at + 4)
        at += 8
        size = 0 if size == _R_MISSING else size
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
    _, count = struct.unpack_from(">II", data, 84)
    offsets = struct.unpack_from(f">{count + 1}I", data, 92)
    magic = data[offsets[0] - 3 : offsets[0]]
    if magic != b"\x1f\x9d\x90":
        raise ValueError(f"compress header: got {magic!r}, want b'\\x1f\\x9d\\x90'")
    for start, stop in zip(offsets, offsets[1:], strict=False):
        yield unlzw(data[start:stop])


def unlzw(data: bytes) -> bytes:
    """Decompress the body of a Unix `compress` stream (block mode, codes of up to 16 bits)."""
    table = [bytes([i]) for i in range(256)] + [b""]
    out: list[bytes] = []
    width, bit, group = 9, 0, 0  # codes come in groups of 8; a change of width skips the rest
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
        entry = table[code] if code < len(table) else previous + previous[:1]
        out.append(entry)
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
