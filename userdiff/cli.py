"""The command line: `userdiff generate` is `batch_generate.py`; the others but `judge` need no torch."""

import argparse
import gc
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from userdiff.conditions import parse_conditions
from userdiff.config import JobConfig, UsageError, errors_of, natural_number, parse_args, path
from userdiff.dataset.atomic import publish, publish_to
from userdiff.dataset.layout import MANIFEST_NAME, PREVIEW_NAME, file_name, is_own
from userdiff.job import launcher
from userdiff.shutdown import Failed, Halted, Shutdown, Stopped
from userdiff.text import count, listed, printable, refusal

JUDGE_HELP = "a classifier: a .pt2 program, TorchScript (.pt) or .onnx giving logits; or file.py:function giving scores"
JUDGE_CLASSES_HELP = 'JSON file of user id to class, {"17": 0} (default: the row of the embedding)'
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAIN_SECONDS = 10.0  # that others leave the main process to print what is wrong with the command, and to end the job


def main(argv: Sequence[str] | None = None) -> int:
    """Run a `userdiff` command and return the exit status."""
    _open_streams()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["generate"]:  # has a parser of its own
        return generate(argv[1:], prog="userdiff generate")
    values = vars(_make_parser().parse_args(argv))
    command, name = values.pop("command"), values.pop("name")
    try:
        exit_status = int(command(**values))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader is gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _print_error(f"userdiff {name}: error: {refusal(error)}", 2)
    except (ValueError, UsageError) as error:
        return _print_error(f"userdiff {name}: error: {error}", 2)
    except RuntimeError as error:
        return _print_error(f"userdiff {name}: error: {_no_thread(error)}", 1)
    return exit_status


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="userdiff", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="command", required=True, dest="name")
    what = "generate a dataset: what batch_generate.py does, from anywhere (see `userdiff generate --help`)"
    commands.add_parser("generate", help=what)

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
    sub.add_argument("--features", metavar="FILE", help="a network as --judge takes it, giving features [batch, d]")
    sub.add_argument("--json", type=Path, help="also write the figures to this file")
    sub = add(
        judge, "what a classifier of your own says of a dataset, and how many images would pass at which thresholds"
    )
    sub.add_argument("--judge", type=str, required=True, metavar="FILE", help=JUDGE_HELP)
    sub.add_argument("--judge_classes", type=path, metavar="JSON", help=JUDGE_CLASSES_HELP)
    sub.add_argument(
        "--accept", nargs="+", default=[], metavar="CONDITION", help="such as confidence>=0.9 (default: margin>0)"
    )
    sub.add_argument(
        "--num_images_per_user",
        type=natural_number,
        metavar="N",
        help="accepted images that are wanted of each user (default: what the dataset was asked for)",
    )
    sub.add_argument("--json", type=Path, help="also write the figures to this file")
    sub.add_argument("--plot", type=Path, help="also write a picture of the scores by user (.png; wants matplotlib)")
    return parser


# Generating ----------------------------------------------------------------------------------------------------------


def generate(argv: Sequence[str] | None = None, prog: str = "batch_generate.py") -> int:
    """Parse, validate, run; however it ends, print one line at most and return the exit status.

    0: every image is there. 1: some failed, or the job could not go on. 2: wrong arguments, model or output folder.
    128 + n: stopped by signal n; the same command goes on from there.
    """
    _open_streams()
    shutdown = Shutdown()
    try:
        config = parse_args(_without_local_rank(sys.argv[1:] if argv is None else argv), prog)
        with shutdown.listen(), shutdown.last_words(partial(_print_end, prog, config)):
            # Where the launcher is killed, torch would bury our last line under the stacks of every failed send.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            _check_temporary_folder()
            gc.disable()  # looking for garbage would take a tenth of the time of this import, and find none
            from userdiff.job.progress import said_if_slow

            with said_if_slow("Loading torch and diffusers ...", launcher.process_index() == 0):
                from userdiff.job.run import run  # torch takes seconds to load, --help must not
            gc.enable()
            shutdown.check()
            return run(config, shutdown)
    except UsageError as error:
        if launcher.process_index() and not isinstance(error, launcher.ForeignLaunchError):
            if shutdown.reason is not None:  # the main process has been told, and prints it
                return error.exit_status
            # It finds the same error, prints it and ends the job; if it does not, this machine alone is the problem.
            time.sleep(MAIN_SECONDS)
        return _print_error(f"{prog}: error: {error}", error.exit_status)
    except Halted as end:
        _print_end(prog, config, end)
        return end.exit_status
    except RuntimeError as error:
        failed = Failed(_no_thread(error))
        _print_end(prog, config, failed)
        return failed.exit_status


def _no_thread(error: RuntimeError) -> str:
    """Return what to say where the system starts no more threads; raises any other error again."""
    if str(error) != "can't start new thread":
        raise error
    return "the system starts no more threads for this user, see `ulimit -u`, or the limit of the container"


def _check_temporary_folder() -> None:
    """Raise UsageError where no folder for temporary files can be written to; torch does not load without one."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UsageError(f"TMPDIR: {error.strerror}, needed: one that can be written to") from error


def _without_local_rank(argv: Sequence[str]) -> Sequence[str]:
    """Leave out what torch.distributed.launch adds to the arguments; it says the same in the environment."""
    if not launcher.is_launched():
        return argv
    return [argument for argument in argv if not re.fullmatch(r"--local[-_]rank=\d+", argument)]


def _print_end(prog: str, config: JobConfig, end: Halted) -> None:
    """Print why a job ended early, how far it got, and how to go on.

    The main process speaks for all of them; where a machine leaves it, or can no longer reach it, its first process does.
    """
    is_apart = end.is_alone or end.others_go_on
    if launcher.process_index() and not (is_apart and launcher.local_process_index() == 0):
        return
    line = f"{prog}: {end}" if isinstance(end, Stopped) else f"{prog}: error: {end}"
    if end.others_go_on:
        line = f"{line}; what is done is kept in {config.output_dir}, the rest is left to the other machines"
    elif end.exit_status != UsageError.exit_status:  # else the same command would do no better
        progress = end.progress or f"what is done is kept in {config.output_dir}"
        # What was there before is removed: for sure, or as far as this process can tell.
        may_have_begun = end.progress or launcher.process_index() or launcher.restart_count()
        has_begun = config.overwrite and may_have_begun
        again = "the same command" + (", without --overwrite," if has_begun else "")
        line = f"{line}; {progress}, {again} goes on from there"
    _print_error(line, end.exit_status)


def _print_error(line: str, status: int) -> int:
    """Print the one line that a command ends with, and return its exit status."""
    from userdiff.job.progress import unheard

    with unheard(sys.stderr):
        _say(" ".join(line.splitlines()), file=sys.stderr)
    return status


def _say(line: object, file: TextIO | None = None) -> None:
    """Print a line, of which names of files may be a part."""
    print(printable(str(line)), file=file or sys.stdout)


def _open_streams() -> None:
    """Have all standard streams open, and able to write any text.

    Where one is closed, the next file that is opened would take its place, and what is printed would go into that.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the whole process
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure:  # a notebook's or a test's stream has none
            reconfigure(errors="backslashreplace")


# The other commands --------------------------------------------------------------------------------------------------


def status(output_dir: Path) -> int:
    """Say how far a dataset is and how its last run ended: images done, missing and failed, user by user."""
    from userdiff.tools.status import status_lines

    for line in status_lines(output_dir):
        _say(line)
    return 0


def verify(output_dir: Path, deep: bool = False) -> int:
    """Compare a dataset's rows with its files: what is missing, changed, unrecorded, unmerged or foreign."""
    from userdiff.job.progress import show_reading
    from userdiff.tools import verify as tool

    problems = tool.verify(output_dir, deep=deep, track=show_reading)
    for line in tool.problem_lines(output_dir, problems, deep=deep):
        _say(line)
    return 1 if problems else 0


def merge(output_dir: list[Path], into: Path | None = None) -> int:
    """Put an interrupted run's part files into manifest.csv, as the next run would, without making the rest.

    With --into: join the datasets of independent jobs, which may be interrupted, in one folder; they stay as they are.
    """
    from userdiff.job.progress import show_reading
    from userdiff.tools import merge as tool

    if into is not None:
        return _merge_into(output_dir, into)
    if len(output_dir) > 1:
        raise ValueError(f"{len(output_dir)} folders; --into DIR says in which one to join them")
    rows = tool.merge(output_dir[0], show_reading, _say_kept)
    _say(f"{output_dir[0] / MANIFEST_NAME}: {count(len(rows), 'image')}")
    return 0


def _say_kept(manifest: Path) -> None:
    _say(f"Somebody had added to {MANIFEST_NAME}; that is kept as {manifest}")


def _merge_into(sources: list[Path], into: Path) -> int:
    from userdiff.job.progress import show_reading
    from userdiff.tools import merge as tool

    def print_end(end: Halted) -> None:
        line = f"userdiff merge: {'' if isinstance(end, Stopped) else 'error: '}{end}"
        progress = f"{end.progress}, the same command goes on from there" if end.progress else ""
        _print_error(f"{line}; {progress or 'nothing was changed, the same command starts again'}", end.exit_status)

    shutdown = Shutdown()
    try:
        with shutdown.listen(), shutdown.last_words(print_end):
            joined = tool.merge_into(sources, into, shutdown=shutdown, track=show_reading, on_edited=_say_kept)
    except Halted as end:
        print_end(end)
        return end.exit_status
    for text in joined.numerics:
        _say(f"Warning: {text}; images of one folder may differ from those of another in last bits", file=sys.stderr)
    for folder, items in joined.left_out.items():
        names = listed([file_name(*item) for item in items])
        _say(f"{folder}: {len(items)} images missing, damaged or of another run: {names}")
    added = f"{joined.num_linked} linked and {joined.num_copied} copied now"
    _say(f"{into / MANIFEST_NAME}: {joined.num_images} images, {added}")
    if joined.num_missing:
        why = f"; {joined.shards}" if joined.shards else ""
        _say(f"{joined.num_missing} of those asked for are not there: `userdiff status {into}` says whose{why}")
    return 0


def preview(output_dir: Path, picture: Path | None = None, columns: int = 10, scale: int = 2) -> int:
    """Write a folder's `preview.html` from its manifest, and `picture` with the first `columns` images of each user."""
    from userdiff.dataset.run_record import RunRecord
    from userdiff.dataset.scan import check_own_files, listed_rows
    from userdiff.tools.preview import contact_sheet, picture_bytes, preview_page

    rows = listed_rows(output_dir)
    check_own_files(output_dir)
    if picture is not None:
        _check_picture(picture)
        _check_target("--picture", picture, output_dir)
        content = picture_bytes(contact_sheet(output_dir, rows, columns, scale), picture.suffix)
    try:
        run_record = RunRecord.read(output_dir)
    except (ValueError, OSError) as failure:
        error = refusal(failure) if isinstance(failure, OSError) else failure
        run_record = None
        _say(f"Warning: {error}; the page is made without the run's facts", file=sys.stderr)
    publish(output_dir / PREVIEW_NAME, preview_page(output_dir, rows, run_record))
    _say(output_dir / PREVIEW_NAME)
    if picture is not None:
        publish_to(picture, content)
        _say(picture)
    return 0


def _check_picture(picture: Path) -> None:
    if picture.suffix.lower() not in PICTURE_SUFFIXES:
        needed = " or ".join(PICTURE_SUFFIXES)
        raise ValueError(
            f"--picture: {str(picture)!r} does not say which kind of picture, needed: a name ending in {needed}"
        )
    if not picture.parent.is_dir():
        raise ValueError(f"--picture: {str(picture)!r} lies in no folder, needed: one that exists")


def _check_target(flag: str, path: Path, output_dir: Path) -> None:
    """Raise ValueError where a file that was asked for would replace one of the dataset, or be taken for one of it.

    So too where it cannot be made: that is not to come out after hours.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{flag}: {str(path)!r} lies in no folder, needed: one that exists")
    target, folder = (Path(os.path.realpath(one)) for one in (path, output_dir))
    if target.is_relative_to(folder) and is_own(target.relative_to(folder).as_posix()):
        raise ValueError(
            f"{flag}: {str(path)!r} would be taken for a part of the dataset, needed: one beside its folder"
        )


def inspect(output_dir: Path, real: Path | None = None, json: Path | None = None, features: str | None = None) -> int:
    """Read a dataset's images and say, user by user, how they differ, which are copies, and whose they are most like.

    Damaged images are named and passed over. With --features, in the features of a network of your own too: variety, and how
    near real images (--real) they come.
    """
    from userdiff.job.progress import said_if_slow, show_reading
    from userdiff.tools import inspect as tool
    from userdiff.tools.inspect_report import report_json, report_lines

    if json is not None:
        _check_target("--json", json, output_dir)
    in_features = None
    if features is not None:  # first: what is wrong with the file shows before an hour of comparing
        with said_if_slow("Loading torch ...", is_main_process=True):
            from userdiff.judge.features import feature_lines, look_at_features
        real_files = tool.real_files(real) if real else []
        in_features = look_at_features(output_dir, features, real_files, track=show_reading)
    report = tool.inspect(output_dir, real, track=show_reading)
    if json is not None:
        publish_to(json, report_json(report, in_features))
    for line in report_lines(str(output_dir), report):
        _say(line)
    if features is not None and in_features is not None:
        for line in feature_lines(features, in_features):
            _say(line)
    return 0


def judge(
    output_dir: Path,
    judge: str,
    judge_classes: Path | None = None,
    accept: Sequence[str] = (),
    num_images_per_user: int | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Have a classifier of your own look at a dataset's images: scores by user, and who is taken for whom.

    For thresholds, how many images of each user would pass, and how many have to be made for as many as are wanted.
    """
    from userdiff.job.progress import said_if_slow, show_reading

    for flag, target in (("--json", json), ("--plot", plot)):
        if target is not None:
            _check_target(flag, target, output_dir)
    with errors_of("--accept"):
        conditions = parse_conditions(accept)
    with said_if_slow("Loading torch ...", is_main_process=True):
        from userdiff.judge import report as tool
        from userdiff.judge.ratings import rate_with
    if plot is not None:
        tool.check_plot()
    ratings, classes, wanted = rate_with(output_dir, judge, judge_classes, conditions, show_reading)
    figures = tool.report(ratings, classes, num_images_per_user or wanted)
    if json is not None:
        publish_to(json, tool.report_json(figures))
    if plot is not None:
        tool.plot(plot, ratings)
    for line in tool.report_lines(str(output_dir), judge, figures):
        _say(line)
    return 0
