"""The one error that bad checkpoints, folders and options raise."""

from os import PathLike, fspath

_LONGEST_NAME = 200


def _printable(text: str) -> str:
    """`text` on one line: names come out of files that nobody vouches for."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "..."


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is. The message is one line: file, tensor, what is wrong, remedy.

    Args:
        problem: what is wrong.
        file: the file or folder it is wrong in.
        tensor: the tensor it is wrong with.
        remedy: what to do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | PathLike[str] | None = None,
        tensor: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem, self.tensor, self.remedy = problem, tensor, remedy
        self.file = None if file is None else fspath(file)
        parts = [_short(self.file)] if self.file else []
        if tensor is not None:
            parts.append(f"tensor {_short(tensor)}")
        text = ": ".join([*parts, problem])
        super().__init__(_printable(f"{text}; {remedy}" if remedy else text))

    def __reduce__(self):
        # Keyword arguments do not survive the default pickling, and workers report through a pipe.
        return _rebuild, (self.problem, self.file, self.tensor, self.remedy)


def _rebuild(problem: str, file: str | None, tensor: str | None, remedy: str | None) -> CheckpointError:
    return CheckpointError(problem, file=file, tensor=tensor, remedy=remedy)
