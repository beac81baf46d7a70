"""Publication in one step: a file under its final name is whole."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from userdiff.dataset.layout import is_temporary, temporary_path


def publish(path: Path, data: bytes | Iterable[bytes], *, sync: bool = False) -> None:
    """Write `data`, or its pieces, to `path`: a reader sees either all of it or what was there before.

    With `sync`, that holds after a power cut too. The temporary file is in the same folder, so that the rename stays within
    one file system, and has the permissions of the user's umask.
    """
    temporary = temporary_path(path)
    try:
        with errors_naming(path):
            with open(temporary, "xb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # where nothing could be made, there is nothing to remove
            temporary.unlink()
        raise


def remove_temporaries(output_dir: Path) -> None:
    """Remove the temporary files of killed jobs. Call it only while holding the folder's lock."""
    for path in [*output_dir.glob(".*.tmp-*"), *output_dir.glob("user_*/.*.tmp-*")]:
        if is_temporary(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Make an OSError name `path`: a failed write names no file, and a failed open names the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the operating system's
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
