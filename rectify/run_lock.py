"""One run at a time on an output: a lock that the system frees with the process, however that ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from rectify.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

LOCK_ENDING = ".rectify.lock"
UNFINISHED_ENDING = ".rectify.tmp"
"""Of files that are not whole yet; what a killed run has left of them goes when its output is locked anew."""
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_MOST_SWEPT = 100_000
_FAR = 1 << 30  # the byte that Windows locks, beyond what stands in the file, so that others can read who holds it


@dataclass
class _Held:
    thread: int
    descriptor: int
    count: int = 1
    made: list[Path] = field(default_factory=list)
    file: int | None = None

    def close_file(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


_held: dict[Path, _Held] = {}
_guard = threading.RLock()
_said: set[str] = set()


class RunLock:
    """The right to write an output, until it is released, deleted, or the process ends, be it by `kill -9`.

    All ways to an output (relative, through symbolic links) are one. The thread that holds a lock may take it again.
    The lock is a file beside the output, or in a folder that is one, with who holds it; it is removed on release. Where
    the file system knows no locks, that is said once and nothing is locked.

    Args:
        output: the file or folder; the folders that lead to it are made, and removed on release if nothing is in them.
        folder: whether it is a folder.

    Raises:
        OutputError: another run, of this process or of another, writes it; or it cannot be written.
    """

    def __init__(self, output: str | Path, *, folder: bool = False) -> None:
        place = _place(Path(output), folder)
        _take(place, Path(output), folder)
        self._place, self._output = place, Path(output)
        self._release = weakref.finalize(self, _give_back, place, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()

    def own_file(self) -> None:
        """Lock the file itself too, made where it is missing, as it may have other names.

        Raises:
            OutputError: another run writes it, or it cannot be written.
        """
        with _guard:
            held = _held[self._place]
            try:
                if held.file is None or not self._is_there(held.file):
                    self._open_file(held)
            except OSError as error:
                raise error if isinstance(error, OutputError) else cannot_write(self._output, error) from error

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._output))
        except FileNotFoundError:
            return False

    def _open_file(self, held: _Held) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(self._output, flags, 0o666)
        if sys.platform != "win32" and not _locked(descriptor, str(self._output)):  # Windows would let nobody read it
            os.close(descriptor)
            raise _refusal(self._output, "under another name")
        held.close_file()
        held.file = descriptor

    def release(self) -> None:
        """Give the right back; a second time does nothing."""
        self._release()


def cannot_write(output: str | Path, error: OSError) -> OutputError:
    """The refusal of an output that the system does not let be written."""
    remedies = {
        errno.ENOSPC: "make room, or give another place",
        errno.EDQUOT: "make room in the quota, or give another place",
        errno.EFBIG: "raise the limit on the size of files, or give another place",
        errno.ENAMETOOLONG: "give a shorter name",
    }
    remedy = remedies.get(error.errno or 0, "check its folder and its permissions, or give another place")
    return OutputError(f"output {str(output)!r} cannot be written ({error.strerror or error}): {remedy}")


def _place(output: Path, folder: bool) -> Path:
    """The lock file of an output."""
    try:
        real = output.resolve()
        if folder:
            if real.exists() and not real.is_dir():
                raise OutputError(f"output {str(output)!r} cannot be made (a file is there): give another folder")
            return real / LOCK_ENDING
        if real.is_dir():
            raise OutputError(f"output {str(output)!r} is a folder: give a file")
        if real.exists() and not real.is_file():
            raise OutputError(f"output {str(output)!r} is a device or a pipe: give a file")
        return real.with_name(f".{real.name}{LOCK_ENDING}")
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(output, error) from error
    except (RuntimeError, ValueError) as error:  # links in a circle, a name that is none
        raise OutputError(f"output {str(output)!r} can be no path ({error}): give another") from error


def _take(place: Path, output: Path, folder: bool) -> None:
    with _guard:
        known = _held.get(place)
        if known is not None and known.thread != threading.get_ident():
            raise _refusal(output, f"in process {os.getpid()}, this one")
        if known is not None:
            known.count += 1
            return
        folders = (output.parent, *output.parent.parents, place.parent, *place.parent.parents)
        made = [each for each in folders if not each.exists()]
        descriptor = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)  # through which `..` may lead
            descriptor = _opened(place, output)
            if not folder and output.exists():
                output.open("ab").close()
        except OSError as error:
            if descriptor is not None:
                _remove(place, descriptor)
            for each in made:
                _remove_empty(each)
            raise error if isinstance(error, OutputError) else cannot_write(output, error) from error
        _held[place] = _Held(threading.get_ident(), descriptor, made=made)
        _sweep(place, folder)


def _sweep(place: Path, folder: bool) -> None:
    """Remove the unfinished files of killed runs on this output; of a folder with very much in it, not all of them."""
    beginning = "" if folder else f"{place.name.removesuffix(LOCK_ENDING)[1:]}."
    seen = 0
    for parent, folders, files in os.walk(place.parent):
        for name in files:
            if name.endswith(UNFINISHED_ENDING) and name.startswith(beginning):
                with suppress(OSError):
                    os.unlink(os.path.join(parent, name))
        seen += len(files) + len(folders)
        if not folder or seen > _MOST_SWEPT:
            return


def _opened(place: Path, output: Path) -> int:
    """The lock file, open and locked, and with this process's name in it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(place, flags, 0o666)
        except PermissionError:  # of another user's run, which may have been killed
            descriptor = os.open(place, os.O_RDONLY)
        try:
            if not _locked(descriptor, str(place)):
                raise _refusal(output, _holder(descriptor))
            try:
                current = os.stat(place)
            except FileNotFoundError:
                current = None
            # one that ended just now has removed the file that was opened
            if current is None or not os.path.samestat(current, os.fstat(descriptor)):
                os.close(descriptor)
                continue
            _say_who(place, descriptor)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _say_who(place: Path, descriptor: int) -> None:
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, (json.dumps(who) + "\n").encode())
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # else it is opened for reading alone
            place.unlink(missing_ok=True)
            raise  # a full disk: told now, before hours of work


def _locked(descriptor: int, shown: str) -> bool:
    """Whether the lock is had; also where there are no locks, which is said."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        folder = str(Path(shown).parent)
        if folder not in _said:
            _said.add(folder)
            logger.warning(
                "%s: its file system has no locks (%s): do not start two runs on one output", folder, error.strerror
            )
    return True


def _holder(descriptor: int) -> str:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        who = json.loads(os.read(descriptor, 4096))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "it has not said its name"


def _refusal(output: Path, who: str) -> OutputError:
    return OutputError(
        f"output {str(output)!r} is being written by another run ({who}): wait until that has ended, or give another "
        "output"
    )


def _give_back(place: Path, process: int) -> None:
    with _guard:
        held = _held.get(place)
        if held is None or process != os.getpid():
            return
        held.count -= 1
        if not held.count:
            del _held[place]
            held.close_file()
            _remove(place, held.descriptor)
            for each in held.made:
                _remove_empty(each)


def _remove(place: Path, descriptor: int) -> None:
    """Unlock; the file goes first, so that nobody locks one that is to go."""
    with suppress(OSError):  # Windows removes no open file: it stays, and is free
        place.unlink(missing_ok=True)
    os.close(descriptor)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _forget() -> None:
    """In a process that was forked: the locks are its parent's, and end with that."""
    global _guard
    _guard = threading.RLock()
    for held in _held.values():
        os.close(held.descriptor)
        held.close_file()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
