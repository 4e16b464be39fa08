"""Files that are written whole or not at all, JSONL that is read by offset, or goes on growing."""

import contextlib
import errno
import hashlib
import json
import os
import socket
from array import array
from pathlib import Path

from evaluate import UserError, parse_line, read_lines
from support.console import reading, writing


def to_line(record):
    """A record as one line of JSONL; a lone surrogate, which has no UTF-8, is escaped."""
    line = json.dumps(record, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def write_atomic(path, content):
    """Write text, bytes, or an iterable of bytes whole or not at all. Raises OSError naming it."""
    path = Path(path)
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    content = [content] if isinstance(content, bytes) else content
    if path.exists() and not path.is_file():  # a rename would replace /dev/stdout by a file
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_settings(out, settings):
    """Write what the file `out` is made with, to a file beside it. Raises OSError."""
    content = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    write_atomic(f"{out}.settings.json", content)


def read_settings(out, kind):
    """What `write_settings` wrote, of the type `kind`; an empty one where that can't be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return kind(json.loads(Path(f"{out}.settings.json").read_text(encoding="utf-8")))
    return kind()


def follow_umask(folder):
    """Give the files of a folder the umask's permissions, not those of a library."""
    umask = os.umask(0)
    os.umask(umask)
    for file in filter(Path.is_file, Path(folder).rglob("*")):
        file.chmod(0o666 & ~umask)


@contextlib.contextmanager
def locked(path):
    """Refuse a second run that writes to `path`: a lock on the hidden file `.NAME.lock` beside it.

    It ends with the process. Where the file system has no locks, nothing is refused. Raises
    UserError naming the process that holds the lock, or why the folder can't be written.
    """
    path = Path(path)
    with writing(path):
        file = open_lock(path)
    try:
        yield
    finally:
        if file is not None:
            Path(file.name).unlink(missing_ok=True)
            file.close()


def open_lock(path):
    """The locked file, None where there are no locks. Raises UserError if another run has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(path.with_name(f".{path.name}.lock"), "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        text = f"{path}: another run is writing to it ({file.read()}); wait for it, or name "
        raise UserError(f"{text}another --out") from None
    except OSError:  # some network folders have no locks
        return None
    if os.fstat(file.fileno()).st_nlink == 0:  # its holder removed it after we had opened it
        return open_lock(path)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    os.register_at_fork(after_in_child=file.close)  # a worker may outlive the run, not its lock
    return file


def size_and_time(file):
    """What tells that a file, a path or a descriptor, was changed."""
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns


class IndexedLines:
    """Lines of a file, each read from disk when it is asked for.

    Only byte offsets and line numbers stay in memory (16 bytes a line). The file must not be
    changed meanwhile: its size and time tell.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.offsets, self.lines = array("Q"), array("Q")
        self.state = size_and_time(self.path)

    def __len__(self):
        return len(self.offsets)

    def raw(self, index):
        """The bytes of a line. Raises UserError where the file has changed."""
        with reading(self.path, "each machine of a run must see it"), open(self.path, "rb") as file:
            if size_and_time(file.fileno()) != self.state:
                hint = "start again; copies on several machines need the same time (cp -p)"
                raise UserError(f"{self.path}: the file was changed while it was in use; {hint}")
            file.seek(self.offsets[index])
            return file.readline()

    def digest(self):
        """A fingerprint of the file's content."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


class JsonlWriter:
    """A JSONL file that a run appends to, that a stopped run goes on with, and that can be sorted.

    Records that have an index are kept by their offset alone, 8 bytes each. The file is made, and
    a torn last line cut off, when the first record is appended. The caller holds the lock.
    """

    def __init__(self, path, count=0):
        self.path = Path(path)
        self.offsets = array("q", [-1]) * count
        self.end = None  # where writing goes on, if not at the end of the file
        self.file = None

    def __contains__(self, index):
        return self.offsets[index] >= 0

    def read(self, wanted=lambda record: True):
        """Iterate over (line number, offset, record) up to the first record that is not wanted.

        That record and all after it, or a last line that was cut short when a run was killed,
        are dropped when the file is opened for writing. Raises UserError for a line in the middle
        that is no JSON.
        """
        if not self.path.exists():
            return
        for line, offset, raw in read_lines(self.path):
            if not raw.strip():
                continue
            try:
                record = parse_line(self.path, line, raw)
            except UserError:
                if raw.endswith(b"\n"):
                    raise
                record = None
            if record is None or not wanted(record):
                self.end = offset
                return
            yield line, offset, record

    def open(self):
        """Get ready to append. Raises OSError."""
        self.file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        if self.end is not None:
            self.file.truncate(self.end)
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # a whole line without its end, as some editors leave it
                self.file.write(b"\n")

    def append(self, *records, index=None):
        """Append records; `index` is the place of a single one in the order. Raises OSError."""
        if self.file is None:
            self.open()
        lines = "".join(map(to_line, records)).encode()
        if index is not None:
            self.offsets[index] = self.file.seek(0, os.SEEK_END)
        while lines:  # a full disk takes a part; the second attempt says what is wrong
            lines = lines[self.file.write(lines) :]

    def discard(self, index):
        """Leave a record out when the file is put in order."""
        self.offsets[index] = -1

    def lines(self):
        """Iterate over (index, line as bytes) in the order of the indices."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for index, offset in enumerate(self.offsets):
                if offset >= 0:
                    file.seek(offset)
                    yield index, file.readline().removesuffix(b"\n") + b"\n"

    def sort(self):
        """Write the file anew, in the order of the indices. Raises OSError."""
        self.close()

        def in_order():
            end = 0
            for index, line in self.lines():
                self.offsets[index] = end
                end += len(line)
                yield line

        write_atomic(self.path, in_order())
        self.end = None

    def close(self):
        if self.file is not None:
            self.file.close()
            self.file = None
