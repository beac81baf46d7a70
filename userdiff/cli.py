"""The command line: `userdiff generate` is `batch_generate.py`; the other commands need no torch."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from userdiff.config import UsageError, parse_args

_GENERATE_HELP = "generate a dataset: what batch_generate.py does, from anywhere (see `userdiff generate --help`)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a `userdiff` command and give the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["generate"]:  # has a parser of its own
        return generate(argv[1:], prog="userdiff generate")
    parser = argparse.ArgumentParser(prog="userdiff", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="command", required=True)
    commands.add_parser("generate", help=_GENERATE_HELP)
    sub = commands.add_parser("preview", help="make preview.html again, and a picture of the dataset if asked for")
    sub.add_argument("output_dir", type=Path, help="a dataset's folder")
    sub.add_argument("--picture", type=Path, help="also write this PNG: one row of images per user")
    sub.add_argument(
        "--columns", type=int, default=10, help="images of each user in the picture (default: %(default)s)"
    )
    sub.add_argument("--scale", type=int, default=2, help="enlargement in the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    return preview(args.output_dir, args.picture, args.columns, args.scale)


def generate(argv: Sequence[str] | None = None, prog: str = "batch_generate.py") -> int:
    """Parse, validate, run; every way to end is one line and an exit status.

    0: every image is there. 1: some failed, or the job could not go on. 2: wrong arguments, model or output folder.
    128 + n: stopped by signal n; the same command goes on from there.
    """
    try:
        return _generate(argv, prog)
    except KeyboardInterrupt:  # while torch was loading; later a signal is noted and the job ends in order
        return _say_error(f"{prog}: stopped by SIGINT before anything was made", 128 + signal.SIGINT)


def _generate(argv: Sequence[str] | None, prog: str) -> int:
    try:
        config = parse_args(argv, prog)
    except UsageError as error:
        return _say_error(f"{prog}: error: {error}", 2)

    from userdiff.coordination import PeerFailed, Stopped  # torch takes seconds to load, --help must not
    from userdiff.runner import run

    try:
        return run(config)
    except UsageError as error:
        return _say_error(f"{prog}: error: {error}", 2)
    except OSError as error:
        return _say_error(f"{prog}: error: {error}; what is done is kept, the same command goes on from there", 1)
    except PeerFailed as error:
        return _say_error(f"{prog}: error: {error}", error.exit_status)
    except Stopped as stop:
        line = f"{prog}: {stop}; what is done is kept in {config.output_dir}, the same command goes on from there"
        return _say_error(line, 128 + stop.signal_number)


def preview(output_dir: Path, picture: Path | None = None, columns: int = 10, scale: int = 2) -> int:
    """Write a folder's `preview.html` from its manifest, and `picture` with the first `columns` images of each user."""
    from userdiff import gallery, images, manifest  # Pillow and numpy, which --help can do without

    rows = list(manifest.read_rows(output_dir / manifest.MANIFEST_NAME))
    if not rows:
        return _say_error(
            f"userdiff preview: error: {output_dir} holds no {manifest.MANIFEST_NAME} with images in it", 2
        )
    page = gallery.preview_page(output_dir.resolve().name, rows)
    images.publish(output_dir / gallery.PREVIEW_NAME, page.encode())
    print(output_dir / gallery.PREVIEW_NAME)
    if picture is not None:
        gallery.contact_sheet(output_dir, rows, columns, scale).save(picture)
        print(picture)
    return 0


def _say_error(line: str, status: int) -> int:
    """Print one line, once: the main process does, before any process of the launch leaves. Returns `status`."""
    one_line = " ".join(line.splitlines())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        print(one_line, file=sys.stderr)
        return status
    from torch.distributed import DistError

    from userdiff.coordination import connect

    try:
        connect(timeout=timedelta(seconds=5)).say_once(lambda: print(one_line, file=sys.stderr, flush=True))
    except DistError:  # the launcher is gone, and with it whoever could agree on who speaks
        print(one_line, file=sys.stderr, flush=True)
    return status
