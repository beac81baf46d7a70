"""The command line: `userdiff generate` is `batch_generate.py`; the other commands need no torch."""

import argparse
import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from userdiff.config import UsageError, parse_args
from userdiff.shutdown import Halted, Interrupt, Stopped, refusal
from userdiff.text import natural_number, path

_LISTED = 20  # problems of a kind; --deep on a broken disk may find thousands
_REMEDIES = {  # of what `verify` finds
    "missing": "images and run.json: run the job's command; manifest.csv: that, or `userdiff merge`",
    "changed": "images: remove those that have the size of their row, then run the job's command; manifest.csv: the job's "
    "command writes it anew, and so does `userdiff merge`",
    "unmerged": "`userdiff merge` records it, and so does the job's command",
    "unrecorded": "`userdiff merge` records it, and so does the job's command",
    "foreign": "move it away",
}
_SAY_PATIENCE = 5  # seconds or so, for a store that may be gone

_GENERATE_HELP = "generate a dataset: what batch_generate.py does, from anywhere (see `userdiff generate --help`)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a `userdiff` command and give the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["generate"]:  # has a parser of its own
        return generate(argv[1:], prog="userdiff generate")
    values = vars(_make_parser().parse_args(argv))
    command, name = values.pop("command"), values.pop("name")
    try:
        exit_status = int(command(**values))
        sys.stdout.flush()
    except BrokenPipeError:  # nobody listens any longer, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _say_error(f"userdiff {name}: error: {refusal(error)}", 2)
    except ValueError as error:
        return _say_error(f"userdiff {name}: error: {error}", 2)
    return exit_status


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="userdiff", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="command", required=True, dest="name")
    commands.add_parser("generate", help=_GENERATE_HELP)

    def add(command: Callable[..., int], help_text: str, **options: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(command.__name__, help=help_text, description=command.__doc__)
        sub.add_argument("output_dir", type=Path, help="a dataset's folder", **options)
        sub.set_defaults(command=command)
        return sub

    add(status, "how far a dataset is, user by user, and how its last run ended")
    sub = add(verify, "compare a dataset's rows with its files; exit status 1 if anything is wrong")
    sub.add_argument("--deep", action="store_true", help="read, hash and decode every image, not only its size")
    sub = add(merge, "put an interrupted run's part files into manifest.csv; or join several jobs' datasets", nargs="+")
    sub.add_argument(
        "--into", type=path, metavar="DIR", help="join the datasets in this folder, by hard links where possible"
    )
    sub = add(preview, "make preview.html again, and a picture of the dataset if asked for")
    sub.add_argument(
        "--picture", type=Path, help="also write this picture (.png, .jpg, .webp): one row of images per user"
    )
    sub.add_argument(
        "--columns", type=natural_number, default=10, help="images of each user in the picture (default: %(default)s)"
    )
    sub.add_argument(
        "--scale", type=natural_number, default=2, help="enlargement in the picture (default: %(default)s)"
    )
    sub = add(inspect, "is it the right user, and is it any good: copies, flat and odd images, who is most like whom")
    sub.add_argument("--real", type=Path, help="folder of real images to compare with: a folder per user, as user_07")
    sub.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def generate(argv: Sequence[str] | None = None, prog: str = "batch_generate.py") -> int:
    """Parse, validate, run; every way to end is one line and an exit status.

    0: every image is there. 1: some failed, or the job could not go on. 2: wrong arguments, model or output folder.
    128 + n: stopped by signal n; the same command goes on from there.
    """
    try:
        return _generate(argv, prog)
    except KeyboardInterrupt:  # while torch was loading, or all was done; in between, the job ends in order
        if os.environ.get("RANK", "0") == "0":  # torch, which could agree on who speaks, may be half loaded
            print(f"{prog}: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT


def _generate(argv: Sequence[str] | None, prog: str) -> int:
    try:
        config = parse_args(argv, prog)
    except UsageError as error:
        return _say_error(f"{prog}: error: {error}", error.exit_status)

    # where the launcher is killed, torch would bury our last line under the stacks of every failed send
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    gc.disable()  # a tenth of the time goes into looking for garbage among what is only being made
    from userdiff.job.run import run  # torch takes seconds to load, --help must not

    gc.enable()
    try:
        return run(config)
    except UsageError as error:
        return _say_error(f"{prog}: error: {error}", error.exit_status)
    except Halted as end:
        line = f"{prog}: {end}" if isinstance(end, Stopped) else f"{prog}: error: {end}"
        if end.exit_status != UsageError.exit_status:  # the same command would do no better
            progress = end.progress or f"what is done is kept in {config.output_dir}"
            has_begun = config.overwrite and end.progress  # what was there before is removed
            again = "the same command" + (", without --overwrite," if has_begun else "")
            line += f"; {progress}, {again} goes on from there"
        return _say_error(line, end.exit_status, is_alone=end.is_alone)


def status(output_dir: Path) -> int:
    """Say how far a dataset is and how its last run ended: images done, missing and failed, user by user."""
    from userdiff.tools import audit
    from userdiff.tools.run_summary import count

    found = audit.read_status(output_dir)
    print(f"{output_dir}: {found.state}{f' ({found.detail})' if found.detail else ''}")
    print(f"{'user':>8} {'done':>8} {'missing':>8} {'failed':>8}")
    total = [0, 0, 0]
    for user_id, wanted in found.wanted.items():
        done, failed = found.done.get(user_id, 0), found.failed.get(user_id, 0)
        numbers = [done, wanted - done, failed]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        print(f"{user_id:>8}", *(f"{number:>8}" for number in numbers))
    print(f"{'all':>8}", *(f"{number:>8}" for number in total))
    if found.beyond:
        print(f"and {count(found.beyond, 'image')} beyond the last request")
    if found.unrecorded and found.state != "running":
        print(
            f"{count(found.unrecorded, 'image')} without a row, not counted here: `userdiff merge {output_dir}` records "
            "what is this job's, and so does the job's command"
        )
    return 0


def verify(output_dir: Path, deep: bool = False) -> int:
    """Compare a dataset's rows with its files: what is missing, changed, unrecorded, unmerged or foreign."""
    from userdiff.dataset import run_record as record
    from userdiff.job import progress
    from userdiff.tools import audit

    problems = audit.verify(output_dir, deep=deep, track=progress.show_reading)
    kinds = Counter(problem.kind for problem in problems)
    for kind in kinds:
        listed = [problem for problem in problems if problem.kind == kind]
        for problem in listed[:_LISTED]:
            print(f"{kind:<10}  {problem.name}: {problem.what}")
        if len(listed) > _LISTED:
            print(f"{kind:<10}  and {len(listed) - _LISTED} more")
    what = "every image read" if deep else "sizes compared, contents not read"
    print(
        f"{output_dir}: {len(problems)} problem{'s' * (len(problems) != 1)} ({what})"
        if problems
        else f"{output_dir}: all is well ({what})"
    )
    for kind in kinds:
        print(f"What is {kind}: {_REMEDIES[kind]}")
    if holder := record.lock_holder(output_dir):
        print(f"A job is at work here ({holder}): what is missing may be on its way")
    return 1 if problems else 0


def merge(output_dir: list[Path], into: Path | None = None) -> int:
    """Put an interrupted run's part files into manifest.csv, as the next run would, without making the rest.

    With --into: join the datasets of independent jobs, which may be interrupted, in one folder; they stay as they are.
    """
    from userdiff.dataset import manifest
    from userdiff.job import progress
    from userdiff.tools import audit

    if into is not None:
        return _join(output_dir, into)
    if len(output_dir) > 1:
        raise ValueError(f"{len(output_dir)} folders; --into DIR says in which one to join them")
    rows = audit.merge(output_dir[0], track=progress.show_reading)
    print(f"{output_dir[0] / manifest.MANIFEST_NAME}: {len(rows)} images")
    return 0


def _join(sources: list[Path], into: Path) -> int:
    from userdiff.dataset import images, manifest
    from userdiff.job import progress
    from userdiff.tools import joining

    try:
        with Interrupt().listen() as interrupt:
            joined = joining.join(sources, into, interrupt=interrupt, track=progress.show_reading)
    except Halted as end:
        line = f"userdiff merge: {'' if isinstance(end, Stopped) else 'error: '}{end}"
        progress_made = f"{end.progress}, the same command goes on from there" if end.progress else ""
        return _say_error(
            f"{line}; {progress_made or 'nothing was changed, the same command starts again'}", end.exit_status
        )
    for text in joined.numerics:
        print(f"Warning: {text}; images of one folder may differ from those of another in last bits", file=sys.stderr)
    for folder, items in joined.left_out.items():
        names = ", ".join(images.file_name(*item) for item in items[:_LISTED])
        more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
        print(f"{folder}: {len(items)} images missing, damaged or of another run: {names}{more}")
    added = f"{joined.num_linked} linked and {joined.num_copied} copied now"
    print(f"{into / manifest.MANIFEST_NAME}: {joined.num_images} images, {added}")
    if joined.num_missing:
        print(f"{joined.num_missing} of those asked for are not there: `userdiff status {into}` says whose")
    return 0


def preview(output_dir: Path, picture: Path | None = None, columns: int = 10, scale: int = 2) -> int:
    """Write a folder's `preview.html` from its manifest, and `picture` with the first `columns` images of each user."""
    from userdiff.dataset import images, manifest
    from userdiff.dataset import run_record as record
    from userdiff.tools import preview as gallery

    rows = manifest.listed_images(output_dir)
    if picture is not None:
        _check_picture(picture)
    try:
        run_record = record.RunRecord.read(output_dir)
    except (ValueError, OSError) as error:
        run_record = None
        print(f"Warning: {error}; the page is made without the run's facts", file=sys.stderr)
    images.publish(output_dir / gallery.PREVIEW_NAME, gallery.preview_page(output_dir, rows, run_record))
    print(output_dir / gallery.PREVIEW_NAME)
    if picture is not None:
        gallery.contact_sheet(output_dir, rows, columns, scale).save(picture)
        print(picture)
    return 0


def _check_picture(path: Path) -> None:
    from userdiff.dataset.images import PICTURE_SUFFIXES

    if path.suffix.lower() not in PICTURE_SUFFIXES:
        needed = " or ".join(PICTURE_SUFFIXES)
        raise ValueError(
            f"--picture: {str(path)!r} does not say which kind of picture, needed: a name ending in {needed}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"--picture: {str(path)!r} lies in no folder, needed: one that exists")


def inspect(output_dir: Path, real: Path | None = None, json: Path | None = None) -> int:
    """Read a dataset's images and say, user by user, how they differ, which are copies, and whose they are most like.

    Damaged images are named and passed over.
    """
    from userdiff.dataset import images
    from userdiff.job import progress
    from userdiff.tools import inspect as inspection
    from userdiff.tools import inspect_report as findings

    report = inspection.inspect(output_dir, real, track=progress.show_reading)
    if json is not None:
        images.publish(json, findings.report_json(report))
    for line in findings.report_lines(str(output_dir), report):
        print(line)
    return 0


def _say_error(line: str, status: int, *, is_alone: bool = False) -> int:
    """Print one line, once: the main process does, before any process of the launch leaves. Returns `status`."""
    from userdiff.job.progress import unheard

    def say() -> None:
        with unheard(sys.stderr):
            print(" ".join(line.splitlines()), file=sys.stderr)

    if is_alone or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        say()
        return status
    from userdiff.job.store import connect

    try:
        with connect(patience=_SAY_PATIENCE) as coordinator:
            coordinator.say_once(say)
    except Halted:  # the launcher is gone, and with it whoever could agree on who speaks
        say()
    return status
