"""Publication in one step: a file under its final name is whole."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from userdiff.dataset.files import read_file
from userdiff.dataset.layout import PROBE_NAME, entries, is_temporary, temporary_path, user_folders

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def publish(path: Path, data: bytes | Iterable[bytes], *, sync: bool = False) -> None:
    """Write `data`, or its pieces, to `path`: a reader sees either all of it or what was there before.

    With `sync`, that holds after a power cut too, unless the file system has no fsync. The temporary file is in the same
    folder, so that the rename stays within one file system, and has the permissions of the user's umask.
    """
    temporary = temporary_path(path)
    try:
        with errors_naming(path):
            with open(temporary, "xb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                if sync:
                    file.flush()
                    _sync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # where nothing could be made, there is nothing to remove
            temporary.unlink()
        raise


def publish_to(path: Path, data: bytes) -> None:
    """Publish `data` where a person asked for it: through a link, and into what is no file, such as a pipe or /dev/null."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
    else:
        publish(Path(os.path.realpath(path)), data)


def remove_temporaries(output_dir: Path) -> None:
    """Remove the temporary files of killed jobs. Call it only while holding the folder's lock."""
    for folder in (output_dir, *user_folders(output_dir)):
        # Where a user's folder is a link, it may be another dataset's, with a job of its own.
        for path in entries(folder) if folder == output_dir or not folder.is_symlink() else ():
            if is_temporary(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)


def check_file_system(output_dir: Path) -> None:
    """Raise ValueError where the folder's file system cannot do what publication takes; leaves nothing behind.

    Some mounts of object storage take new files, and no renamed ones. That would come to light after hours.
    """
    probe = output_dir / PROBE_NAME
    try:
        publish(probe, b"1", sync=True)
        publish(probe, b"2", sync=True)  # over one that is there
        if read_file(probe, 1) != b"2":
            raise OSError(errno.EIO, "it gave other bytes", str(probe))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
            raise
        raise ValueError(
            f"the file system of {output_dir} does not let files be written, renamed and read back ({error.strerror}); use a "
            "folder on a local disk and copy it when it is complete, or have it mounted with a cache for writing (rclone: "
            "--vfs-cache-mode full)"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Make an OSError name `path`: a failed write names no file, and a failed open names the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the operating system's
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
