"""Files that are written whole or not at all, and work directories that one process owns."""
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from puzzle_core.errors import UserError


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path (file or folder) that takes the place of `path` only when the block succeeds.

    Never writes in place: with a linked DVC cache that would corrupt the cache's own copy.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    _remove(part)
    try:
        yield part
        if path.is_dir():
            shutil.rmtree(path)  # a folder cannot be replaced in one step
        os.replace(part, path)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: str | Path) -> object:
    """Parse a JSON file; FileNotFoundError or ValueError that say what to do."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it, or `dvc pull {path}`") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}). Delete it and run its stage again.") from error


@contextlib.contextmanager
def lock(directory: str | Path, name: str, wait: bool = False) -> Iterator[None]:
    """Hold `directory` for the stage `name`; unless told to `wait`, BlockingIOError if another process has it.

    Killing `dvc repro` leaves its child running, and two writers of one library would fight over every file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / f".{name}.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another '{name}' is still writing to {directory}/ (a killed `dvc repro` leaves its stage running). "
                f"Wait for it, or stop it: fuser -k {directory}/.{name}.lock"
            ) from error
        yield


def fingerprint(*parts: object) -> str:
    """Sixteen hex digits that change when any of `parts` (plain JSON values) does; 1 and 1.0 are one value."""
    return hashlib.sha256(json.dumps(_whole_numbers(parts), sort_keys=True).encode()).hexdigest()[:16]


def _whole_numbers(value: object) -> object:
    """`value` with every float that is a whole number as an int, which is how one writes 0 or 1 in YAML as often as not."""
    if isinstance(value, dict):
        return {key: _whole_numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def cache_folder() -> Path:
    """The user's cache, which all runs on this machine share."""
    return Path(os.environ.get("PUZZLE_CACHE", Path.home() / ".cache" / "puzzle"))


_GRAIN_NS = 2_000_000_000  # a file that has just been written can be written again without its times telling


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes, which are read again only if the file has been written since: the user's cache keeps it.

    The change time, which no program can set, is part of what tells.
    """
    file = file.resolve()
    folder, name = cache_folder() / "digests", fingerprint(str(file))
    if found := _kept(folder / f"{name}.json", file):
        return found
    if time.time_ns() - max(_state(file)[3:]) < _GRAIN_NS:
        return _sha256(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache {cache_folder()} cannot be written ({error}); set PUZZLE_CACHE to a folder that can") from error
    with lock(folder, name, wait=True):  # of several stages one reads it
        found = _kept(folder / f"{name}.json", file)
        if found is None:
            state = _state(file)
            found = _sha256(file)
            write_json(folder / f"{name}.json", {"file": str(file), "state": state, "sha256": found})
    return found


def _kept(entry: Path, file: Path) -> str | None:
    try:
        content = json.loads(entry.read_text())
        return content["sha256"] if content["state"] == _state(file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # there is none, or a part of one


def _sha256(file: Path) -> str:
    before = _state(file)
    with open(file, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if _state(file) != before:
        raise UserError(f"{file} was written to while it was read: start again when it is whole")
    return found
