"""Text files as people bring them: opened, unpacked, decoded and cut into lines, in one place for all readers."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from rectify.errors import RectifyError, TrajectoryError

_UTF8_MARK = codecs.BOM_UTF8
# those of UTF-32 go before those of UTF-16, which they begin with
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE[:2])
_PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00"}
_OTHERS = {b"PK\x03\x04": "a zip archive, as workbooks of Excel are", b"\x28\xb5\x2f\xfd": "packed with zstd"}
_MAGIC = 6  # bytes that tell these apart
_UNPACKING = (OSError, EOFError, zlib.error, lzma.LZMAError)


def decode_line(line: bytes) -> str:
    """Return a line as text.

    Raises:
        ValueError: it is no UTF-8, or holds a NUL; the message says what to do.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot be read as UTF-8 ({error.reason} at byte {error.start}): give a text file, saved as UTF-8 "
            "(iconv -f CP1252 -t UTF-8 makes one of what Windows wrote)"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"a NUL at byte {line.index(0)}: give a text file, saved as UTF-8 (iconv -f UTF-16LE -t UTF-8 makes one of "
            "UTF-16), or take out what a crash left"
        )
    return text


class _NulError(Exception):
    pass


def _plain_lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8, cut as `TextFile` cuts them, but faster."""
    wrapper = io.TextIOWrapper(stream, "utf-8", newline="")
    try:
        for number, line in enumerate(wrapper, start=1):
            if "\0" in line:
                raise _NulError
            yield number, line if number > 1 else line.lstrip("\ufeff")
    finally:
        wrapper.detach()


@dataclass(frozen=True)
class TextFile:
    """A file of text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark; `.gz`, `.bz2` and `.xz` are unpacked.

    Lines end with a line feed, a carriage return, or both, and with none of Unicode's other separators, which texts
    hold. A mark at the beginning is no part of the text.

    Attributes:
        path: where it is; a pipe can be read once.
        name: how messages call it: the argument that it was given as.
        error: what is raised where it cannot be used.
        stream: what is read instead of the path, which is then only its name.
    """

    path: Path
    name: str = "texts"
    error: type[RectifyError] = TrajectoryError
    stream: BinaryIO | None = None

    @property
    def kind(self) -> str:
        """The ending of its name in small letters, as `".csv"`, without that of the packing."""
        suffix = self.path.suffix.lower()
        return self.path.with_suffix("").suffix.lower() if suffix in _PACKED else suffix

    @property
    def is_regular(self) -> bool:
        """Whether it can be read several times."""
        return self.stream is None and self.path.is_file()

    @property
    def before_number(self) -> str:
        """The name of a line in a message, but for its number."""
        return f"{self.name} {str(self.path)!r}, line "

    def place(self, number: int) -> str:
        """The name of a line in a message."""
        return f"{self.before_number}{number}"

    def refusal(self, said: str, number: int | None = None) -> RectifyError:
        """The error that says why the file, or a line of it, cannot be used."""
        where = f"{self.name} {str(self.path)!r}" if number is None else f"{self.place(number)}:"
        return self.error(f"{where} {said}")

    def raw_lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbered lines, with their ends, as bytes of UTF-8 that are not checked.

        Raises:
            RectifyError: the file cannot be read; of the kind `error`.
        """
        try:
            with self._opened() as stream:
                yield from self._cut(stream)
        except _UNPACKING as error:
            raise self._unreadable(error) from error

    def decode(self, line: bytes, number: int) -> str:
        """A line as text.

        Raises:
            RectifyError: it is no UTF-8, or holds a NUL.
        """
        try:
            return decode_line(line)
        except ValueError as error:
            raise self.refusal(str(error), number) from error

    def lines(self) -> Iterator[tuple[int, str]]:
        """Numbered lines with their ends.

        Raises:
            RectifyError: as in `raw_lines` and `decode`.
        """
        done = 0
        try:
            with self._opened() as stream:
                if stream.read(2) not in _WIDE:
                    stream.seek(0)
                    with suppress(UnicodeDecodeError, _NulError):
                        for done, line in _plain_lines(stream):
                            yield done, line
                        return
                stream.seek(0)
                # what is left: UTF-16, or what is to be refused by its line
                for number, raw in islice(self._cut(stream), done, None):
                    yield number, self.decode(raw, number)
        except _UNPACKING as error:
            raise self._unreadable(error) from error

    def texts(self) -> Iterator[tuple[int, str]]:
        """Numbered lines that are not blank, without their ends.

        Raises:
            RectifyError: as in `lines`.
        """
        for number, line in self.lines():
            if line.strip():
                yield number, line.rstrip("\r\n")

    def content(self) -> str:
        """The whole text, its line ends as they are.

        Raises:
            RectifyError: as in `lines`.
        """
        return "".join(line for _, line in self.lines())

    # -----------------------------------------------------------------------------------------------------------------

    def _cut(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Numbered lines."""
        number = 0
        for line in self._in_utf8(stream):
            if b"\r" not in line:
                number += 1
                yield number, line
            else:
                for part in line.splitlines(keepends=True):  # of bytes: at \n, \r and \r\n alone
                    number += 1
                    yield number, part

    def _unreadable(self, error: Exception) -> RectifyError:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return self.refusal(f"cannot be read ({what}): give the path of a text file")

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The bytes, unpacked."""
        if self.stream is not None:
            with self._unpacked(io.BytesIO(self.stream.read())) as stream:
                yield stream
            return
        with open(self.path, "rb") as file:
            content = file if self.is_regular else io.BytesIO(file.read())  # of a pipe, which knows no way back
            with self._unpacked(content) as stream:
                yield stream

    def _unpacked(self, packed: BinaryIO) -> BinaryIO:
        begin = packed.read(_MAGIC)
        packed.seek(0)
        for magic, what in _OTHERS.items():
            if begin.startswith(magic):
                raise self.refusal(f"is {what}: unpack it, and give JSON lines, or a .csv, .tsv or .txt file")
        kind = next((suffix for suffix, magic in _PACKED.items() if begin.startswith(magic)), None)
        named = self.path.suffix.lower()
        if named in _PACKED and kind != named and begin:
            raise self.refusal(f"is not packed as its name says: rename it, or pack it as {named}")
        if kind == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=packed))
        if kind == ".bz2":
            return cast(BinaryIO, bz2.BZ2File(packed))
        return cast(BinaryIO, lzma.LZMAFile(packed)) if kind == ".xz" else packed

    def _in_utf8(self, stream: BinaryIO) -> Iterator[bytes]:
        """Lines that end with a line feed, the mark taken off, in UTF-8 whatever they were."""
        first = stream.readline()
        for mark, encoding in _MARKS.items():
            if first.startswith(mark):
                yield from io.BytesIO(self._converted((first + stream.read())[len(mark) :], encoding))
                return
        while first.startswith(_UTF8_MARK):
            first = first[len(_UTF8_MARK) :]
        if first:
            yield first
        yield from stream

    def _converted(self, content: bytes, encoding: str) -> bytes:
        try:
            return content.decode(encoding).encode("utf-8")
        except UnicodeDecodeError as error:
            before = content[: error.start].decode(encoding, errors="ignore").encode("utf-8", errors="replace")
            raise self.refusal(
                f"{error.reason}: the file begins as {encoding.upper()} does, and is none: save it as UTF-8",
                len((before + b".").splitlines()),
            ) from error
