"""The command line: `userdiff generate` is `batch_generate.py`; the other commands need no torch."""

import os
import sys
from collections.abc import Sequence

from userdiff.config import UsageError, parse_args

_USAGE = """usage: userdiff <command> ...

commands:
  generate   generate a dataset; the same as batch_generate.py, and `accelerate launch -m userdiff generate` runs it
             on many processes"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a `userdiff` command and give the exit status."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if command == "generate":
        return generate(rest[:-1], prog="userdiff generate")
    print(_USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


def generate(argv: Sequence[str] | None = None, prog: str = "batch_generate.py") -> int:
    """Parse, validate, run; every way to end is one line and an exit status.

    0: every image is there. 1: some failed, or the job could not go on. 2: wrong arguments, model or output folder.
    128 + n: stopped by signal n; the same command goes on from there.
    """
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
        return _say_error(f"{prog}: error: {error}", 1)
    except Stopped as stop:
        line = f"{prog}: {stop}; what is done is kept in {config.output_dir}, the same command goes on from there"
        return _say_error(line, 128 + stop.signal_number)


def _say_error(line: str, status: int) -> int:
    """Print one line, once: the main process does, before any process of the launch leaves. Returns `status`."""
    one_line = " ".join(line.splitlines())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        print(one_line, file=sys.stderr)
        return status
    from userdiff.coordination import connect

    connect().say_once(lambda: print(one_line, file=sys.stderr, flush=True))
    return status
