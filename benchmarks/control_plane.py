"""What a job does once for all its images, by their number: plan, scan, freeze, merge, status, verify, the page.

    python -m benchmarks.control_plane --num_images 100000 1000000
    python -m benchmarks.control_plane --num_images 1000000 10000000 --without_files

Each part runs in a process of its own, between bare loops that read the same files with nothing but the standard
library, and datasets of several sizes take turns, so that all feel the machine's mood. Of the rounds the fastest counts.
Memory is what the part's peak has over the process before it.
Images are empty files; without files, what a walk would find is made up, and what needs the walk is left out.
"""

import argparse
import csv
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from userdiff.dataset import layout, scan
from userdiff.dataset.manifest import manifest_sha256, recorded_rows, write_manifest
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import HEADER
from userdiff.dataset.run_record import RunEntry, RunRecord
from userdiff.identity import identity_hash
from userdiff.job.plan import Plan, make_plan
from userdiff.seeds import item_seed
from userdiff.tools.preview import preview_page
from userdiff.tools.status import read_status
from userdiff.tools.verify import verify as find_problems

NUM_USERS = 31
BATCH_SIZE = 64
IDENTITY = {"seed": 42, "num_inference_steps": 20}
RECIPE = Recipe.of(IDENTITY, identity_hash(IDENTITY))
NUM_PARTS = 8


# A dataset of so many images -----------------------------------------------------------------------------------------


def per_user(num_images: int) -> int:
    """How many images of each user."""
    return -(-num_images // NUM_USERS)


def lines(num_images: int) -> Iterator[str]:
    """Return the rows of a dataset, in order."""
    for user_id in range(1, NUM_USERS + 1):
        for index in range(per_user(num_images)):
            name = layout.file_name(user_id, index)
            digest = hashlib.sha256(name.encode()).hexdigest()
            yield f"{name},{user_id},{index},{item_seed(42, user_id, index)},20,trained,128,128,0,{digest}\n"


def make_dataset(folder: Path, num_images: int, *, with_files: bool) -> None:
    """Write a finished dataset; beside it, in `parts`, the rows as eight processes leave them."""
    parts = folder / "parts"
    parts.mkdir(parents=True)
    with open(folder / layout.MANIFEST_NAME, "w") as whole:
        files = [open(layout.part_path(parts, number), "w") for number in range(NUM_PARTS)]  # noqa: SIM115
        for file in (whole, *files):
            file.write(HEADER)
        for number, line in enumerate(lines(num_images)):
            whole.write(line)
            files[number // BATCH_SIZE % NUM_PARTS].write(line)
        for file in files:
            file.close()
    numerics = {"batch_size": BATCH_SIZE}
    entry = RunEntry(
        started="2026-01-01T00:00:00+00:00",
        state="ended",
        num_processes=NUM_PARTS,
        user_ids=f"1-{NUM_USERS}",
        num_images_per_user=per_user(num_images),
        numerics=numerics,
    )
    run_record = RunRecord(identity=IDENTITY, numerics=numerics, history=[entry])
    run_record.manifest_sha256 = manifest_sha256(folder)
    run_record.publish(folder)
    for user_id in range(1, NUM_USERS + 1) if with_files else ():
        (folder / f"user_{user_id:02d}").mkdir()
        for index in range(per_user(num_images)):
            os.close(os.open(folder / layout.file_name(user_id, index), os.O_CREAT | os.O_WRONLY))


def made_up_folders(num_images: int) -> Iterator[scan.UserFolder]:
    """Return what a walk would find."""
    for user_id in range(1, NUM_USERS + 1):
        indices = np.arange(per_user(num_images), dtype=np.uint32)
        yield scan.UserFolder(f"user_{user_id:02d}", user_id, indices, np.full_like(indices, 0), [])


# What is measured ----------------------------------------------------------------------------------------------------


def bare_walk(folder: Path, num_images: int) -> None:
    """Look at every file's size."""
    for user in os.scandir(folder):
        if user.name.startswith("user_"):
            for file in os.scandir(user.path):
                file.stat()


def bare_csv(folder: Path, num_images: int) -> None:
    """Read the manifest."""
    with open(folder / layout.MANIFEST_NAME, newline="") as file:
        for _ in csv.reader(file):
            pass


def bare_sort(folder: Path, num_images: int) -> None:
    """Read the parts, sort their rows, write a manifest."""
    rows: list[list[str]] = []
    for path in layout.part_paths(folder / "parts"):
        with open(path, newline="") as file:
            rows += list(csv.reader(file))[1:]
    rows.sort(key=lambda row: (int(row[1]), int(row[2])))
    with open(folder / "parts" / "bare.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER.strip().split(","), *rows])


def resume(folder: Path, num_images: int) -> None:
    """Find what is done, plan what is left, freeze it."""
    run_record = RunRecord.read(folder)
    found = scan.find_finished(folder, RECIPE, run_record.manifest_sha256)
    plan = make_plan(range(1, NUM_USERS + 1), per_user(num_images), BATCH_SIZE, found.rows.image_indices())
    if plan.num_pending:
        sys.exit(f"{plan.num_pending} images were not found")
    plan.to_bytes()


def begin(folder: Path, num_images: int) -> None:
    """Plan a dataset of which nothing is there, hand the plan over, and have a worker unpack it."""
    plan = make_plan(range(1, NUM_USERS + 1), per_user(num_images), BATCH_SIZE)
    if not len(Plan.from_bytes(plan.to_bytes()).batches):
        sys.exit("nothing was planned")


def merge(folder: Path, num_images: int) -> None:
    """Read the parts, sort their rows, write a manifest."""
    rows = recorded_rows(folder / "parts", trusted_parts=layout.part_paths(folder / "parts"))
    target = folder / "merged"
    target.mkdir(exist_ok=True)
    digest = write_manifest(target, rows.keep_best())
    if digest != manifest_sha256(folder):
        sys.exit("the merged manifest is another one")


def status(folder: Path, num_images: int) -> None:
    """Say how far it is."""
    if read_status(folder).state != "complete":
        sys.exit("the dataset is not complete")


def verify(folder: Path, num_images: int) -> None:
    """Compare rows and files."""
    problems = [problem for problem in find_problems(folder) if problem.name not in {"parts", "merged"}]
    if problems:
        sys.exit(str(problems[:3]))


def preview(folder: Path, num_images: int) -> None:
    """Make the page."""
    preview_page(folder, scan.listed_rows(folder))


PARTS: dict[str, Callable[[Path, int], None]] = {
    "bare walk, a stat each": bare_walk,
    "bare csv read": bare_csv,
    "bare read-sort-write": bare_sort,
    "plan and freeze, nothing done": begin,
    "scan, plan and freeze, all done": resume,
    "merge": merge,
    "status": status,
    "verify": verify,
    "preview": preview,
}
NEEDS_FILES = {"bare walk, a stat each", "preview"}
TARGETS = [  # (of, against, at most)
    ("scan, plan and freeze, all done", ("bare walk, a stat each", "bare csv read"), 1.5),
    ("merge", ("bare read-sort-write",), 2.0),
]


def measure(name: str, folder: Path, num_images: int, *, with_files: bool) -> None:
    """Run a part in this process; prints its seconds, and the bytes of its peak over what was there before."""
    if not with_files:
        for module in ("userdiff.dataset.scan", "userdiff.tools.status", "userdiff.tools.verify"):
            vars(sys.modules[module])["user_folders"] = lambda output_dir: made_up_folders(num_images)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    PARTS[name](folder, num_images)
    seconds = time.perf_counter() - started
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


class Sample(NamedTuple):
    """What a part took: the fastest and the smallest of the rounds."""

    seconds: float
    num_bytes: float


def sample(name: str, folder: Path, num_images: int, *, with_files: bool) -> Sample:
    """Measure a part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.control_plane", "--part", name, "--folder", str(folder)]
    command += ["--num_images", str(num_images), *["--without_files"] * (not with_files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr}")
    return Sample(*map(float, done.stdout.split()))


def measure_all(
    scratch: Path, sizes: Sequence[int], names: Sequence[str], *, with_files: bool, rounds: int
) -> dict[int, dict[str, Sample]]:
    """Measure the parts of datasets of all sizes, which take turns: size -> part -> its best."""
    folders = {num_images: scratch / f"dataset-{num_images}" for num_images in sizes}
    for num_images, folder in folders.items():
        started = time.perf_counter()
        make_dataset(folder, num_images, with_files=with_files)
        print(f"{num_images} images, made in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    best: dict[int, dict[str, Sample]] = {num_images: {} for num_images in sizes}
    for number in range(rounds):
        for name, (num_images, folder) in product(names, folders.items()):
            found = sample(name, folder, num_images, with_files=with_files)
            best[num_images][name] = Sample(*map(min, found, best[num_images].get(name, found)))
        print(f"round {number + 1} of {rounds} is done", file=sys.stderr, flush=True)
    return best


def print_table(num_images: int, samples: dict[str, Sample], *, with_files: bool) -> None:
    """Print what each part took, and the targets."""
    without = "" if with_files else ", no files"
    print(f"\n| {num_images} images{without} | seconds | microseconds an image | bytes an image |\n|---|---|---|---|")
    for name, (seconds, num_bytes) in samples.items():
        print(f"| {name} | {seconds:.2f} | {1e6 * seconds / num_images:.2f} | {num_bytes / num_images:.0f} |")
    for name, bare, at_most in TARGETS:
        if samples.keys() >= {name, *bare}:
            ratio = samples[name].seconds / sum(samples[part].seconds for part in bare)
            is_met = "met" if ratio <= at_most else "MISSED"
            print(f"\n{name} : {' + '.join(bare)} = {ratio:.2f}, target {at_most}: {is_met}")


def print_growth(best: dict[int, dict[str, Sample]]) -> None:
    """Print how much longer each part takes for the most images than for the fewest."""
    fewest, most = min(best), max(best)
    if fewest == most:
        return
    times = most / fewest
    print(f"\n| {most} images against {fewest}, {times:g} times as many | times as long |\n|---|---|")
    for name, few in best[fewest].items():
        print(f"| {name} | {best[most][name].seconds / few.seconds:.2f} |")
    print(f"\nLinear within a fifth: at most {1.2 * times:g}")


def main() -> None:
    """Measure; or, for one part, be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--without_files", action="store_true", help="make up what a walk of the folder finds")
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=[*PARTS], metavar="PART", help="by its name in the table"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to make the datasets (default: a temporary folder)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with_files = not args.without_files
    if args.part:
        measure(args.part, args.folder, args.num_images[0], with_files=with_files)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        names = [name for name in args.only if with_files or name not in NEEDS_FILES]
        best = measure_all(Path(scratch), args.num_images, names, with_files=with_files, rounds=args.rounds)
    for num_images, samples in best.items():
        print_table(num_images, samples, with_files=with_files)
    print_growth(best)


if __name__ == "__main__":
    main()
