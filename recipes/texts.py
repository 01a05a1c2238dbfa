"""Rows and texts of files, one after another; of what is no text, why it is none.

A run of days must not end at one bad row, nor end there again each time it goes on. So a row without a text is left
out, always the same, and said. A file that is no text at all is refused when it is opened.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import logging
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

logger = logging.getLogger(__name__)

_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_BEGINNING = 1 << 20  # bytes whose encoding is looked at before all else
_PEEK = 1 << 16
_CHUNK = 10 << 20  # characters that paragraphs are looked for in


class Unreadable(str):
    """Stands for a row that cannot be read: why it cannot."""


def open_text(path: str, option: str) -> TextIO:
    """The file, unpacked if it is packed. Bytes that are not UTF-8 become lone surrogates, which no text has.

    Raises:
        ValueError: In one line, if it does not begin as text in UTF-8 does.
    """
    with open(path, "rb") as file:
        magic = file.read(6)
    opened = next((opener for mark, opener in _PACKED.items() if magic.startswith(mark)), open)
    try:
        with opened(path, "rb") as file:
            beginning = file.read(_BEGINNING)
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
        if b"\0" in beginning:
            raise ValueError("it holds zeros, as UTF-16 and binary files do")
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{option} must be files in UTF-8, got {path}: {error}") from error
    return io.TextIOWrapper(opened(path, "rb"), encoding="utf-8-sig", errors="surrogateescape")


def json_rows(path: str, option: str) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """The mappings of a file of JSON lines, or of one JSON list, with their numbers."""
    with open_text(path, option) as file:
        is_list = file.read(_PEEK).lstrip()[:1] == "["
        file.seek(0)
        if is_list:
            with contextlib.suppress(ValueError, RecursionError):
                for number, row in enumerate(json.load(file), 1):
                    yield number, row if isinstance(row, dict) else Unreadable("no JSON object")
                return
            file.seek(0)
        for number, line in _until_broken(file):
            if line.strip():
                yield number, line if isinstance(line, Unreadable) else _mapping(line)


def _mapping(line: str) -> dict[str, Any] | Unreadable:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"no JSON: {error}")
    if not isinstance(row, dict):
        return Unreadable("no JSON object")
    if not _is_utf8(json.dumps(row, ensure_ascii=False) if "\\ud" in line.lower() else line):
        return Unreadable("what is not UTF-8")
    return row


def _until_broken(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Numbered rows, up to where their file breaks off. There it does so for ever; errors of a disk do not stay."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = " ".join(str(error).split())
        yield number + 1, Unreadable(f"nothing that can be read, nor does any behind it: {reason}")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _paragraphs(file: TextIO) -> Iterator[str]:
    rest = ""
    while chunk := file.read(_CHUNK):
        *whole, rest = (rest + chunk + file.readline()).split("\n\n")
        yield from filter(None, whole)
    yield from filter(None, [rest])


def _values(path: str, kind: str, column: str) -> Iterator[tuple[int, Any]]:
    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.column(0).to_pylist() for batch in file.iter_batches(1000, columns=[column]))
            yield from _until_broken(itertools.chain.from_iterable(batches))
    elif kind == "json":
        for number, row in json_rows(path, "text"):
            yield number, row.get(column) if isinstance(row, dict) else row
    else:
        with open_text(path, "text") as file:
            yield from _until_broken(_paragraphs(file) if kind == "paragraphs" else file)


def columns_of(path: str, kind: str) -> list[str]:
    """The columns of a file; of JSON lines those of the first hundred.

    Raises:
        ValueError: In one line, if it is not of that kind.
    """
    if kind not in ("parquet", "json"):
        return ["text"]
    if kind == "parquet":
        try:
            return pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"text must be parquet, got {path}: {str(error).splitlines()[0]}") from error
    first = [row for _, row in itertools.islice(json_rows(path, "text"), 100) if isinstance(row, dict)]
    return list(dict.fromkeys(name for row in first for name in row))


def why_no_text(value: Any) -> str | None:
    """What the value is in place of a text; None if it is one."""
    if isinstance(value, Unreadable):
        return value
    if not isinstance(value, str):
        return "null" if value is None else f"no text but {type(value).__name__}"
    if not value.strip():
        return "nothing"
    return None if _is_utf8(value) else "what is not UTF-8"


def texts(files: list[str], kind: str, column: str, stamp: Any = None) -> Iterator[dict[str, str | None]]:
    """Each row's text, or None and why.

    Args:
        files: All of one kind.
        kind: `parquet`, `json`, `paragraphs`, or `text` for lines, of which empty ones are a part of the text.
        column: Of rows.
        stamp: Of the files, for caches.
    """
    for path in files:
        for number, value in _values(path, kind, column):
            why = why_no_text(value)
            if kind == "text" and why == "nothing":
                why = None
            where = None if why is None else f"row {number} of {Path(path).name} holds {why}"
            yield {"text": value if why is None else None, "why": where}


class LeftOut:
    """Whether a row is taken; counts those that are left out, and says so.

    Args:
        source: Of the rows.
        every: Whether each tenth, hundredth and so on is said at once, where no end comes.
    """

    _said: set[str] = set()  # by all of them: a stream is read several times

    def __init__(self, source: str, *, every: bool = False) -> None:
        self.source, self.every, self.count, self.first = source, every, 0, ""

    def takes(self, why: str | None) -> bool:
        """Whether nothing is said against a row."""
        if why is None:
            return True
        self.count += 1
        self.first = self.first or why
        if self.every and str(self.count).strip("0") == "1":
            self._say(f"{why}: left out, as all rows of {self.source} without a text; {self.count:,} so far")
        return False

    def takes_text(self, value: Any) -> bool:
        """Whether a value is a text."""
        why = why_no_text(value)
        return self.takes(why and f"a row holds {why}")

    def say(self) -> None:
        """Say how many rows were left out, if any."""
        if self.count:
            self._say(f"rows of {self.source} that are left out: {self.count:,}; {self.first}")

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            logger.warning(words)
