"""The destination folder of a conversion: who may write there, what is left to do, what remains after a failure.

A folder in which a conversion has begun holds a journal: a fingerprint of source, options and planned files. A run
with the same fingerprint continues it; a shard counts as done when it has its final name, its planned size and its
planned header, since it only ever gets its name after all its bytes have reached the disk. When all is done a note
with the fingerprint stays: checkpoints of one architecture have equal headers, and these tell nobody whose it is.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .header import read_json
from .plan import Options, Plan
from .reader import CONFIG_NAME, INDEX_NAME, Checkpoint
from .report import readable
from .steps import Job
from .writer import FULL_DISK, is_partial, remove_partials, write_json

JOURNAL_NAME, DONE_NAME = ".conversion.json", ".converted.json"
_MAX_JOURNAL_BYTES = 1 << 20


def check_apart(source: Path, target: Path, role: str = "the source") -> None:
    """Refuse a destination that is the source, lies in it, or contains it.

    Raises:
        CheckpointError: it does.
    """
    a, b = source.resolve(), target.resolve()
    same = a == b or a in b.parents or b in a.parents
    if same or (target.exists() and source.exists() and os.path.samefile(source, target)):
        raise CheckpointError(f"is {role}, lies in it or holds it", file=target, remedy="choose another folder")


def storage_error(error: OSError, folder: Path) -> CheckpointError:
    """What a write that failed means to the user."""
    reason = "the disk is full" if error.errno in FULL_DISK else (error.strerror or str(error))
    remedy = "the source is untouched; once that is mended the same command with --resume continues"
    return CheckpointError(f"writing failed: {reason}", file=folder, remedy=remedy)


def fingerprint(options: Options, plan: Plan, sources: list[Checkpoint]) -> str:
    """A digest of everything that the bytes of the result depend on."""
    digest = hashlib.sha256(repr(options).encode())
    for checkpoint in sources:
        for name in checkpoint.files:
            status = (checkpoint.folder / name).stat()
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for job in plan.jobs:
        digest.update(f"{job.file} {job.nbytes} {hashlib.sha256(job.header).hexdigest()}\n".encode())
    digest.update(json.dumps([plan.index, plan.config], sort_keys=True).encode())
    return digest.hexdigest()


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the folder against a second conversion; the lock goes with the process, however it ends."""
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            problem = "another conversion is writing here"
            raise CheckpointError(problem, file=target, remedy="wait for it, or choose another folder") from None
        yield
    finally:
        os.close(fd)


def is_done(job: Job, target: Path) -> bool:
    """Whether a planned file stands in the folder under its final name with its planned size and header."""
    path = target / job.file
    if path.is_symlink() or not path.is_file() or path.stat().st_size != job.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(job.header)) == job.header


class Target:
    """One conversion's hold on its destination. Create it with `open_target`."""

    def __init__(self, folder: Path, plan: Plan, digest: str, created: bool) -> None:
        self.folder, self.plan, self.digest, self.created = folder, plan, digest, created
        self.todo = [job for job in plan.jobs if not is_done(job, folder)]

    def finish(self) -> None:
        """Turn the journal into the note: the folder is a checkpoint like any other from now on."""
        write_json(self.folder / DONE_NAME, {"fingerprint": self.digest})
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove everything that the conversion wrote: the source is bad, and no second run would do better."""
        remove_partials(self.folder)
        for job in self.plan.jobs:
            (self.folder / job.file).unlink(missing_ok=True)
        for name in (JOURNAL_NAME, DONE_NAME):
            (self.folder / name).unlink(missing_ok=True)
        if self.created and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _contents(folder: Path) -> list[str]:
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise CheckpointError("is no folder", file=folder, remedy="choose another destination")
    return sorted(path.name for path in folder.iterdir() if not is_partial(path.name))


def _check_space(folder: Path, needed: int, freed: int) -> None:
    free = shutil.disk_usage(folder).free + freed
    if needed > free:
        problem = f"the disk has {readable(free)} free, the result takes {readable(needed)}"
        raise CheckpointError(problem, file=folder, remedy="free some space or choose another disk")


def _old_checkpoint(folder: Path) -> list[Path]:
    """The files that --overwrite replaces: a checkpoint's, and nothing else that may lie there."""
    fixed = (INDEX_NAME, CONFIG_NAME, JOURNAL_NAME, DONE_NAME)
    return [p for p in folder.iterdir() if not p.is_dir() and (p.suffix == ".safetensors" or p.name in fixed)]


def _note(folder: Path, name: str, names: list[str], *, broken_is_none: bool) -> dict[str, Any] | None:
    if name not in names:
        return None
    try:
        return read_json(folder / name, _MAX_JOURNAL_BYTES)
    except CheckpointError:
        if broken_is_none:
            return None
        raise


@contextmanager
def open_target(folder: Path, plan: Plan, digest: str, *, resume: bool, overwrite: bool) -> Iterator[Target]:
    """Take hold of the destination, or refuse before anything in it changes.

    Args:
        folder: the destination.
        plan: what will be written.
        digest: the conversion's `fingerprint`.
        resume: continue what is there, even where the journal is gone because everything is done.
        overwrite: replace the checkpoint that is there.

    Raises:
        CheckpointError: the folder is not empty and neither the beginning nor the result of this conversion, another
            conversion holds it, or the disk is too small.
    """
    names = _contents(folder)
    created = not folder.exists()
    journal = _note(folder, JOURNAL_NAME, names, broken_is_none=overwrite)
    done = _note(folder, DONE_NAME, names, broken_is_none=True)
    # The same command given again after a kill continues, whatever it was told to overwrite at first.
    overwrite = overwrite and (journal is None or journal.get("fingerprint") != digest)
    if names and not overwrite:
        if journal is not None and journal.get("fingerprint") != digest:
            problem = "holds the beginning of another conversion, or its source has changed since"
            raise CheckpointError(problem, file=folder, remedy="repeat the first command exactly, or give --overwrite")
        if journal is None and not (resume and done and done.get("fingerprint") == digest):
            what = "the result of another conversion" if done else "no interrupted conversion to resume"
            problem = "is not empty" + (f" and holds {what}" if resume else "")
            raise CheckpointError(problem, file=folder, remedy="choose an empty folder, or give --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
        raise CheckpointError(problem, file=folder, remedy="choose another destination") from error
    with locked(folder):
        remove_partials(folder)
        old = _old_checkpoint(folder) if overwrite else []
        needed = sum(job.nbytes for job in plan.jobs if overwrite or not is_done(job, folder))
        try:
            _check_space(folder, needed, sum(path.lstat().st_size for path in old))
        except CheckpointError:
            if created:
                folder.rmdir()
            raise
        for path in old:
            path.unlink()
        created = bool(journal.get("created")) if journal and not overwrite else created
        try:
            write_json(folder / JOURNAL_NAME, {"fingerprint": digest, "created": created})
        except OSError as error:
            if created and not any(folder.iterdir()):
                folder.rmdir()
            raise storage_error(error, folder) from error
        yield Target(folder, plan, digest, created)
