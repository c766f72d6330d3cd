"""Input files as bytes: opened, decompressed frame by frame, read by lines and lengths, and never silently cut short.

A crawl file is a row of compressed frames (gzip members, zstd or LZ4 frames), by convention one per record, so the byte
where a frame begins is where its record can be sought. Compression is told by content, not by name. What cannot be
decompressed is a SourceError in the place where it stands; where the caller says what a frame begins with, reading goes
on at the next sound one.

gzip and zstd run on isal and zstandard, which say where a frame ends and whether it was whole (fastwarc's GzipReader
takes a file that breaks off for one that ends). LZ4 runs on fastwarc, without offsets.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import ShardError, SourceError

PIECE = 1 << 16

GZIP, ZSTD, LZ4 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
DICTIONARY = b"\x5d\x2a\x4d\x18"  # the skippable frame that carries a .warc.zst file's dictionary


class Input(io.RawIOBase):
    """A file opened for reading, local or remote, whose failures are ours.

    A local file that cannot be read stays so: SourceError. A remote one may be there next time: ShardError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with self._translated():
            if "://" in path:
                import fsspec

                self._file: Any = fsspec.open(path, "rb").open()
            else:
                self._file = open(Path(path), "rb")  # noqa: SIM115 - closed by close()
            self._size = int(self._file.seek(0, io.SEEK_END))
            self._file.seek(0)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if "://" in self.path:
                raise ShardError(f"{self.path}: {error}") from error
            raise SourceError("unreadable", error.strerror or str(error)) from error

    def read(self, size: int | None = -1, /) -> bytes:
        with self._translated():
            if size is not None and size > PIECE:  # a damaged length may ask for more than there is memory
                size = max(0, min(size, self._size - self._file.tell()))
            return bytes(self._file.read(size))

    def seek(self, offset: int, whence: int = 0, /) -> int:
        with self._translated():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Block:
    """Decompressed bytes. `offset` is the place in the file of the frame that begins here, None inside a frame."""

    data: bytes
    offset: int | None
    stored: bool = False  # not compressed: every byte of it has its place in the file


def blocks(file: Input, opening: re.Pattern[bytes] | None = None) -> Iterator[Block | SourceError]:
    """The file's content from its beginning. An error stands where bytes are lost.

    Args:
        opening: what the content of a frame begins with. Given, reading goes on after an error at the next frame that
            does; without it, an error is the last thing yielded.
    """
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    if magic.startswith(GZIP):
        yield from _frames(file, _Gzip(), opening)
    elif magic == ZSTD or SKIPPABLE.match(magic):
        yield from _frames(file, _Zstd(), opening)
    elif magic == LZ4:
        yield from _lz4(file)
    else:
        while data := file.read(PIECE):
            yield Block(data, file.tell() - len(data), stored=True)


class _Gzip:
    magic = GZIP
    feed = 1 << 14  # deflate expands 1,032 times at most: 17 MB

    def __init__(self) -> None:
        from isal import igzip_lib, isal_zlib

        self.decoder: Callable[[], Any] = lambda: isal_zlib.decompressobj(wbits=31)
        self.error: type[Exception] = igzip_lib.IsalError  # type: ignore[assignment]


class _Zstd:
    magic = ZSTD
    feed = 1 << 10  # a block of 4 bytes can stand for 128 KB: 33 MB

    def __init__(self) -> None:
        import zstandard

        self._zstandard = zstandard
        self._dictionary: Any = None
        self.error: type[Exception] = zstandard.ZstdError

    def decoder(self) -> Any:
        return self._zstandard.ZstdDecompressor(dict_data=self._dictionary).decompressobj()

    def learn(self, dictionary: bytes) -> None:
        """Use the file's own dictionary, itself perhaps compressed."""
        if dictionary.startswith(ZSTD):
            with self._zstandard.ZstdDecompressor().stream_reader(dictionary) as reader:
                dictionary = reader.read(1 << 27)
        self._dictionary = self._zstandard.ZstdCompressionDict(dictionary)


def _frames(file: Input, codec: _Gzip | _Zstd, opening: re.Pattern[bytes] | None) -> Iterator[Block | SourceError]:
    rest, at = b"", 0  # bytes read but not decoded, and where they begin in the file
    while True:
        if len(rest) < 8:
            rest += file.read(PIECE)
        if not rest:
            return
        if isinstance(codec, _Zstd) and SKIPPABLE.match(rest):
            size = int.from_bytes(rest[4:8], "little")
            if rest.startswith(DICTIONARY):
                file.seek(at + 8)
                codec.learn(file.read(size))
            at += 8 + size
            file.seek(at)
            rest = b""
            continue
        begins = at
        try:
            if not rest.startswith(codec.magic):
                raise SourceError("broken_compression", f"no frame begins at byte {at}")
            decoder = codec.decoder()
            first: int | None = at
            while not decoder.eof:
                if not rest and not (rest := file.read(PIECE)):
                    raise SourceError("truncated", f"the file ends inside the frame that begins at byte {begins}")
                piece = rest[: codec.feed]
                data = decoder.decompress(piece)
                taken = len(piece) - len(decoder.unused_data)
                rest, at = rest[taken:], at + taken
                if data:
                    yield Block(data, first)
                    first = None
        except (SourceError, codec.error) as error:
            broken = error
            if not isinstance(broken, SourceError):
                broken = SourceError("broken_compression", f"frame at byte {begins}: {error}")
        else:
            continue
        following, padding = _next_frame(file, codec, begins, opening)
        if not padding:
            yield broken
        if following is None:
            return
        at, rest = following, b""
        file.seek(at)


def _next_frame(
    file: Input, codec: _Gzip | _Zstd, broken: int, opening: re.Pattern[bytes] | None
) -> tuple[int | None, bool]:
    """Where the next sound frame after the one at `broken` begins, and whether all up to there is zero bytes."""
    at, zeros, tail = broken, True, b""
    file.seek(at)
    while piece := file.read(PIECE):
        window = tail + piece
        start = at - len(tail)
        zeros = zeros and not window.strip(b"\0")
        if not zeros and opening is None:
            return None, False
        found = -1
        while opening and (found := window.find(codec.magic, found + 1)) >= 0:
            candidate = start + found
            if candidate == broken:
                continue
            file.seek(candidate)
            try:
                opens = opening.match(codec.decoder().decompress(file.read(codec.feed)))
            except codec.error:
                opens = None
            if opens:
                return candidate, False
        at += len(piece)
        tail = window[-(len(codec.magic) - 1) :]
        file.seek(at)
    return None, zeros


def _lz4(file: Input) -> Iterator[Block | SourceError]:
    from fastwarc.stream_io import Lz4Reader

    reader = Lz4Reader(file)
    while True:
        try:
            data = reader.read(PIECE)
        except OSError as error:
            yield SourceError("broken_compression", str(error))
            return
        if not data:
            return
        yield Block(data, None)


class Cursor:
    """Lines and lengths over blocks; knows where in the file the next byte stands, if it can be sought there.

    Every method raises the SourceError that stands in its way; the next call goes on behind it.
    """

    def __init__(self, file: Input, opening: re.Pattern[bytes] | None = None) -> None:
        self._blocks = blocks(file, opening)
        self._opening = opening
        self._block = Block(b"", None)
        self._at = 0

    def _more(self) -> bool:
        """Whether a byte is left."""
        while self._at >= len(self._block.data):
            block = next(self._blocks, None)
            if block is None:
                return False
            if isinstance(block, SourceError):
                self._block, self._at = Block(b"", None), 0
                raise block
            self._block, self._at = block, 0
        return True

    @property
    def offset(self) -> int | None:
        """The place in the file of the next byte, or of the frame that it begins; None at the end or inside a frame."""
        if not self._more() or self._block.offset is None:
            return None
        if self._block.stored:
            return self._block.offset + self._at
        return self._block.offset if self._at == 0 else None

    @property
    def opens(self) -> bool:
        """Whether the next byte begins a compressed frame with what the caller's frames begin with."""
        begins = self._at == 0 and not self._block.stored and self._block.offset is not None
        return bool(begins and self._opening and self._opening.match(self._block.data))

    def peek(self) -> bytes:
        """The next bytes, as many as are at hand; empty at the end."""
        return self._block.data[self._at :] if self._more() else b""

    def line(self, limit: int) -> bytes:
        """Up to and with the next line feed, at most `limit` bytes; empty at the end."""
        parts, missing = [], limit
        while missing and self._more():
            data, start = self._block.data, self._at
            end = data.find(b"\n", start, start + missing) + 1
            self._at = end or min(len(data), start + missing)
            parts.append(data[start : self._at])
            missing -= self._at - start
            if end:
                break
        return b"".join(parts)

    def pieces(self, size: int) -> Iterator[bytes]:
        """`size` bytes piece by piece; fewer where the content ends, or where a frame opens another record."""
        inside = False
        while size and self._more() and not (inside and self.opens):
            piece = self._block.data[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            inside = True
            yield piece
