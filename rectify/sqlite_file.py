"""A SQLite file that several threads and processes may use, and that is refused where it is something else's."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from rectify.errors import CacheError, InvalidArgumentError

BUSY_TIMEOUT_S = 30.0
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNFINISHED = {sqlite3.SQLITE_READONLY_ROLLBACK, sqlite3.SQLITE_READONLY_RECOVERY, sqlite3.SQLITE_READONLY_CANTINIT}
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class SqliteFile:
    """The base of caches: what a transaction was given survives the end of the process at any moment.

    Args:
        path: the file; it and its folder are made.

    Raises:
        InvalidArgumentError: the path is a folder.
        CacheError: the file is broken, something else, or cannot be written; it is left as it is.
    """

    application_id: int
    """Tells the kinds of files apart."""
    format_version = 1
    tables: str
    """SQL statements that make them where they are missing."""
    upgrades: Mapping[int, str] = {}
    """What brings a file of an earlier format to the next one, an SQL statement for each."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InvalidArgumentError(f"cache {str(path)!r} is a folder: give a file")
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cache {str(path)!r} cannot be made ({error.strerror or error}): give another") from error
        with self._errors():
            self._connection = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock, self._errors():
            self._connection.close()

    def _open(self) -> sqlite3.Connection:
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                if self.path.exists() and self.path.stat().st_size:
                    # read-only, so that a file that is refused stays as it is
                    self._read("ro")
                connection = self._connect("rwc")
                try:
                    self._make_tables(connection)
                except BaseException:
                    connection.close()
                    raise
                return connection
            except sqlite3.OperationalError as error:
                # several processes that begin at once: SQLite does not wait for its own change to a write-ahead log
                if error.sqlite_errorcode & 0xFF not in _BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _read(self, mode: str) -> None:
        try:
            with closing(self._connect(mode)) as connection:
                self._check(connection)
        except sqlite3.OperationalError as error:
            # a process that was killed has left half a transaction, which only a writer may take back
            if mode != "ro" or error.sqlite_errorcode not in _UNFINISHED:
                raise
            self._read("rw")

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )

    def _check(self, connection: sqlite3.Connection) -> None:
        ours = connection.execute("PRAGMA application_id").fetchone()[0] == self.application_id
        if not ours and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise CacheError(f"cache {str(self.path)!r} is a database of something else: give another file")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > self.format_version:
            raise CacheError(
                f"cache {str(self.path)!r} has format {version}, above {self.format_version}: update rectify"
            )
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise CacheError(self._broken(found))

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # with a write-ahead log enough for all but a power cut
        with self._transaction(connection):
            for statement in self.tables.split(";"):
                connection.execute(statement)
            former = connection.execute("PRAGMA user_version").fetchone()[0]
            for version in range(former, self.format_version):
                connection.execute(self.upgrades.get(version, ""))
            connection.execute(f"PRAGMA application_id = {self.application_id}")
            connection.execute(f"PRAGMA user_version = {self.format_version}")

    @staticmethod
    @contextmanager
    def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _BROKEN:
                raise CacheError(self._broken(str(error))) from error
            if code in _BUSY:
                remedy = f"another process has locked it for {BUSY_TIMEOUT_S:.0f} s, try again when it has ended"
            else:
                remedy = "check its folder, its permissions and the space left, or give another file"
            raise CacheError(f"cache {str(self.path)!r} cannot be used ({error}): {remedy}") from error

    def _broken(self, found: str) -> str:
        return (
            f"cache {str(self.path)!r} is broken or no SQLite file ({' '.join(found.split())}), and was left as it is: "
            "move it away or give another file"
        )
