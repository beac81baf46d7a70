"""Real jobs, killed at random moments and damaged in between, until their datasets are done and right to the byte.

    python -m tests.chaos --kills 300 --seed 7

A round starts the job as a user would, with 1 to 3 processes, now and then as two machines on loopback, waits for a
random moment after its first new image and kills something of it. Then every process has to go, what lies under a final
name has to be whole and right, and sometimes a file is damaged. The next round runs the same command; the one that comes
to its end has to leave the very bytes of a run that nobody disturbed. Where the second machine is struck, the first one
has to come to its end by itself: a process is killed, told to end, or suspended and woken again, or all of them are. What
is chosen is a function of the seed and the number of the round.

    python -m tests.chaos --losses --kills 100

strikes second machines alone.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random, SystemRandom
from types import MappingProxyType
from unittest.mock import patch

from tqdm import tqdm

from tests.checkpoints import Shape, make_checkpoint, model_flags
from tests.damage import Dataset, Failure, is_whole
from tests.jobs import launch, start, start_machines
from tests.processes import POLL_SECONDS, Job, Stat, describe, our_tracebacks, send, still_alive

SHAPE = Shape(sample_size=16)
JOB_FLAGS = ["--num_images_per_user", "150", "--num_inference_steps", "2", "--batch_size", "4"]
NUM_JOB_SEEDS = 3  # datasets share as many undisturbed runs
KILLS_OF_A_DATASET = 12  # then it may come to its end
TWO_MACHINES_EVERY = 5  # rounds, if nobody says otherwise; they take the longest to start
MAX_FAILURES = 5
ANY = 10**6  # images may be missing
JOB_SECONDS = 240  # no run takes that long
SUSPENDED_SECONDS = 25.0  # longer than a process is missed
SECONDS_TO_GO = 30.0  # after a kill, for every process of the job
IMPATIENT = """
import sys
from userdiff.job import store_client as contact
contact.LOST_AFTER_PULSES = 15  # a lost machine is missed by its silence alone
from userdiff.cli import generate
sys.exit(generate(sys.argv[1:], prog="batch_generate.py"))
"""


@dataclass(frozen=True)
class Choices:
    """What a round is to be."""

    num_processes: int  # of all machines
    num_machines: int
    machine: int  # whose launcher it is, or who goes as a whole
    signal_number: signal.Signals
    target: str
    worker: int
    missing: int  # the kill comes when no more images than these are missing ...
    delay: float  # ... and these seconds later
    is_while_writing: bool  # if images still come, the moment one does
    is_damaging: bool

    @classmethod
    def draw(cls, rng: Random, num_machines: int, *, is_loss: bool = False) -> "Choices":
        """Draw what a round is to be; `is_loss`: of two machines, the second one is struck."""
        num_processes = rng.choices([1, 2, 3], [2, 1, 1])[0]  # launches take longer to start
        missing = rng.choices([ANY, rng.randint(1, 12), 0], [6, 2, 1])[0]
        delay = rng.uniform(0, 0.5 if missing == 0 else 1.5 if missing == ANY else 0.1)
        machine, targets = 0, ["worker", "workers", "launcher", "all"]
        if num_machines > 1:
            num_processes = num_machines * rng.choice([1, 2])
            machine = 1 if is_loss else rng.randrange(num_machines)
            targets = ["worker", "launcher", "machine"]
        signals = [signal.SIGKILL, signal.SIGTERM, *([signal.SIGSTOP] if machine else [])]
        return cls(
            num_processes=num_processes,
            num_machines=num_machines,
            machine=machine,
            signal_number=rng.choice(signals),
            target=rng.choice(targets) if num_processes > 1 else "process",
            worker=rng.randrange(num_processes // num_machines),
            missing=missing,
            delay=delay,
            is_while_writing=rng.random() < 1 / 2,
            is_damaging=rng.random() < 1 / 3,
        )

    @property
    def is_loss(self) -> bool:
        """Whether the job is to do without what is struck."""
        return self.machine > 0

    @property
    def kind(self) -> str:
        """Of the launch."""
        per_machine = self.num_processes // self.num_machines
        return str(self.num_processes) if self.num_machines == 1 else f"{self.num_machines} x {per_machine}"


KINDS = ["1", "2", "3", "2 x 1", "2 x 2"]


class Launches:
    """The launches of one job, one for each machine, as if they were one."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    @property
    def status(self) -> int | None:
        """That of the first machine; 0 if the dataset is complete."""
        return self.jobs[0].process.returncode

    @property
    def has_failed(self) -> bool:
        """Whether any machine's launcher has."""
        return any(job.process.returncode for job in self.jobs)

    @property
    def stderr(self) -> str:
        return "".join(job.stderr for job in self.jobs)

    def is_running(self) -> bool:
        return any(job.is_running() for job in self.jobs)

    def families(self) -> list[dict[int, Stat]]:
        """Of each machine: its launcher, which is the first, and the launcher's workers."""
        return [job.family() for job in self.jobs]

    def wait(self, seconds: float, family: Mapping[int, Stat] = MappingProxyType({})) -> bool:
        deadline = time.monotonic() + seconds
        return all([job.wait(deadline - time.monotonic(), family) for job in self.jobs])  # noqa: C419 - each once

    def end(self, family: dict[int, Stat]) -> None:
        for job in self.jobs:
            job.end(family)


@dataclass
class Tally:
    """What came of it."""

    kills: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by signal, target, kind of launch
    damages: Counter[str] = field(default_factory=Counter)
    seconds_to_go: dict[tuple[str, str], float] = field(default_factory=dict)  # the longest, by signal and target
    after_the_last_image: int = 0
    datasets: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'signal':9}{'target':10}" + "".join(f"{kind:>6} proc." for kind in KINDS) + "   longest to go"]
        for name, target in sorted({key[:2] for key in self.kills}):
            cells = "".join(f"{self.kills[name, target, kind] or '-':>12}" for kind in KINDS)
            lines.append(f"{name:9}{target:10}{cells}{self.seconds_to_go.get((name, target), 0):14.1f} s")
        lines.append("damage: " + (", ".join(f"{kind} {n}" for kind, n in sorted(self.damages.items())) or "none"))
        lines.append(
            f"{self.kills.total()} kills, {self.after_the_last_image} of them after the last image; "
            f"{self.datasets} datasets completed; {len(self.failures)} failures"
        )
        return "\n".join(lines)


class Chaos:
    """Rounds, until so many kills have been and the last dataset is done."""

    def __init__(
        self,
        root: Path,
        seed: int,
        num_kills: int,
        two_machines_every: int,
        say: Callable,
        on_kill: Callable,
        *,
        only_losses: bool = False,
    ) -> None:
        self.only_losses = only_losses
        self.root, self.seed, self.say, self.on_kill = root, seed, say, on_kill
        self.num_kills, self.two_machines_every = num_kills, two_machines_every
        self.flags = [*model_flags(make_checkpoint(root / "checkpoint", SHAPE), SHAPE), *JOB_FLAGS]
        self.num_rounds, self.what = 0, ""
        self.tally = Tally()
        self.references: dict[int, Path] = {}

    def run(self) -> None:
        number = 0
        while self.tally.kills.total() < self.num_kills and len(self.tally.failures) < MAX_FAILURES:
            number += 1
            try:
                self.play_dataset(number)
            except Failure as failure:
                self.tally.failures.append(f"in dataset {number}, round {self.num_rounds} ({self.what}):\n{failure}")
                tqdm.write(f"FAILURE {self.tally.failures[-1]}", file=sys.stderr)

    def play_dataset(self, number: int) -> None:
        job_seed = number % NUM_JOB_SEEDS
        if job_seed not in self.references:
            self.references[job_seed] = self.make_reference(job_seed)
        flags = [*self.flags, "--seed", str(job_seed)]
        dataset = Dataset(self.root / f"dataset-{number:03d}", flags, self.references[job_seed])
        last = min(self.num_kills, self.tally.kills.total() + KILLS_OF_A_DATASET)
        while not self.play_round(dataset, may_kill=self.tally.kills.total() < last):
            pass
        dataset.check_done()
        shutil.rmtree(dataset.folder)
        self.tally.datasets += 1
        self.say(f"dataset {number} is done")

    def make_reference(self, job_seed: int) -> Path:
        """Run the job as one plain process that nobody disturbs."""
        folder = self.root / f"reference-{job_seed}"
        job = Job(start_plain([*self.flags, "--seed", str(job_seed), "--output_dir", str(folder)]))
        ended = job.wait(JOB_SECONDS) and job.process.returncode == 0
        if not ended or not all(is_whole(path.read_bytes()) for path in folder.glob("user_*/*")):
            job.end({})
            raise Failure(f"an undisturbed run failed:\n{job.stderr[-2000:]}")
        return folder

    def play_round(self, dataset: Dataset, may_kill: bool) -> bool:
        """Start the job, kill something of it and look at what is left; whether it came to its end all the same."""
        self.num_rounds += 1
        rng = Random(f"{self.seed}/{self.num_rounds}")
        num_machines = 2 if self.only_losses or self.num_rounds % self.two_machines_every == 0 else 1
        choices = Choices.draw(rng, num_machines, is_loss=self.only_losses)
        self.what = f"no kill: {choices.kind} proc."
        job = self.start_job(choices, dataset.flags)
        family: dict[int, Stat] = {}
        try:
            if may_kill and wait_for_moment(dataset, job, choices):
                family = self.strike(dataset, job, choices)
            if not family:
                check_end(job)
            elif choices.is_loss:
                self.see_it_go_on(job, choices)
            else:
                self.see_it_go(job, family, (choices.signal_number.name, choices.target))
            check_stderr(job.stderr)
            dataset.check_images()
        except Failure as failure:
            job.end(family)
            log = self.root / f"round-{self.num_rounds}.stderr"
            log.write_text(job.stderr)
            tail = "\n".join(line for line in job.stderr.splitlines() if not line.startswith("frame #"))[-4000:]
            raise Failure(f"{failure}\nThe end of {log}, without torch's stacks:\n{tail}") from failure
        finally:
            job.end(family)
        if job.status != 0 and choices.is_damaging:
            kind, what = dataset.damage(rng)
            self.tally.damages[kind] += 1
            self.what += f"; {what}"
        self.say(self.what)
        return job.status == 0

    def start_job(self, choices: Choices, flags: Sequence[str]) -> Launches:
        if choices.num_processes == 1:
            return Launches([Job(start_plain(flags))])
        if choices.num_machines == 1:
            return Launches([Job(launch(choices.num_processes, *flags))])
        script = self.root / "batch_generate.py"
        script.write_text(IMPATIENT)
        each = choices.num_processes // choices.num_machines
        return Launches(start_machines(choices.num_machines, each, flags, script))

    def strike(self, dataset: Dataset, job: Launches, choices: Choices) -> dict[int, Stat]:
        """Kill what was chosen; gives every process of the job, or none where the chosen ones had gone already."""
        families = job.families()
        family = {pid: stat for one in families for pid, stat in one.items()}
        launchers = [one.process.pid for one in job.jobs]
        first = launchers[choices.machine]
        workers = [pid for pid, stat in family.items() if stat.parent == first]
        chosen = {
            "process": [first],
            "launcher": [first],
            "machine": list(families[choices.machine]),
            "worker": workers[choices.worker :][:1],
            "workers": workers,
            "all": [first, *workers],
        }[choices.target]
        made, total = dataset.num_made(), len(dataset.expected)
        give_up = time.monotonic() + 1
        while choices.is_while_writing and made < total and time.monotonic() < give_up:  # without a pause
            if dataset.num_made() > made:
                break
        alive = [pid for pid in still_alive(family) if pid in chosen]
        send(alive, choices.signal_number)
        if not alive:
            return {}
        name, target = choices.signal_number.name, choices.target
        self.tally.kills[name, target, choices.kind] += 1
        self.tally.after_the_last_image += made == total
        number = self.tally.kills.total()
        self.what = f"kill {number}: {choices.kind} proc., {name} to {target}, {made} of {total} images"
        self.on_kill()
        return family

    def see_it_go_on(self, job: Launches, choices: Choices) -> None:
        """Wait for the first machine to complete the dataset without the second one, or together with it once it is awake."""
        if choices.signal_number == signal.SIGSTOP:
            job.jobs[0].wait(SUSPENDED_SECONDS)
            send(list(job.families()[1]), signal.SIGCONT)
        if not job.wait(JOB_SECONDS):
            raise Failure(f"no end after {JOB_SECONDS} s without the second machine")
        if job.status:
            raise Failure(f"the first machine ended with status {job.status}")
        is_too_late = "lost contact with the launcher" in job.stderr  # it woke when the first machine's had gone
        if choices.signal_number == signal.SIGSTOP and job.has_failed and not is_too_late:
            raise Failure(f"the second machine ended with status {job.jobs[1].process.returncode}")
        self.what += ", completed"

    def see_it_go(self, job: Launches, family: dict[int, Stat], kind: tuple[str, str]) -> None:
        """Wait for every process of a job that was struck to go by itself."""
        began = time.monotonic()
        has_gone = job.wait(SECONDS_TO_GO, family)
        seconds = time.monotonic() - began
        if not has_gone and len(job.jobs) > 1:
            # a launcher whose workers have ended waits for that of a lost machine, up to five minutes: torch's affair
            has_gone = {one.process.pid for one in job.jobs}.issuperset(still_alive(family))
            if has_gone:
                job.end(family)
        self.tally.seconds_to_go[kind] = max(seconds, self.tally.seconds_to_go.get(kind, 0))
        if not has_gone:
            left = still_alive(family)
            raise Failure("\n".join([f"left behind after {seconds:.0f} s, {len(left)} known:", *map(describe, left)]))
        self.what += f", gone after {seconds:.1f} s with status {job.status}"


def start_plain(flags: Sequence[str]) -> subprocess.Popen:
    return start([sys.executable, "batch_generate.py", "--device", "cpu", *flags])


def wait_for_moment(dataset: Dataset, job: Launches, choices: Choices) -> bool:
    """Wait until it is time to kill: after a new image or, where none is missing, the record of a new run."""
    begun_with, record_time, total = dataset.num_made(), dataset.record_time(), len(dataset.expected)
    if begun_with == total and choices.missing == ANY:  # not always, or a dataset would hardly come to its end
        return False
    give_up = time.monotonic() + JOB_SECONDS
    while job.is_running():
        made = dataset.num_made()
        has_begun = made > begun_with or (made == total and dataset.record_time() != record_time)
        if has_begun and total - made <= choices.missing:
            time.sleep(choices.delay)
            return job.is_running()
        if time.monotonic() > give_up:
            raise Failure(f"no end after {JOB_SECONDS} s, {made} of {total} images")
        time.sleep(POLL_SECONDS)
    return False


def check_end(job: Launches) -> None:
    """Wait for a job that nobody disturbs."""
    if not job.wait(JOB_SECONDS):
        raise Failure(f"no end after {JOB_SECONDS} s")
    if job.has_failed:
        raise Failure(f"ended by itself with status {[one.process.returncode for one in job.jobs]}")


def check_stderr(stderr: str) -> None:
    if blocks := our_tracebacks(stderr):
        raise Failure("\n".join(["a traceback of the job's own:", *blocks]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of all choices (default: a random one, printed)")
    parser.add_argument(
        "--two_machines_every", type=int, default=TWO_MACHINES_EVERY, help="so many rounds (default: %(default)s)"
    )
    parser.add_argument("--losses", action="store_true", help="of two machines, strike the second one alone")
    parser.add_argument("--verbose", action="store_true", help="a line for every kill, as in a log, instead of a bar")
    args = parser.parse_args(argv)
    is_verbose = args.verbose or not sys.stderr.isatty()
    seed = SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    root = Path(tempfile.mkdtemp(prefix="userdiff-chaos-"))
    environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(root)}  # launchers that are killed leave folders behind
    say = partial(print, flush=True) if is_verbose else lambda line: None
    bar = tqdm(total=args.kills, unit=" kills", dynamic_ncols=True, disable=is_verbose)
    with patch.dict(os.environ, environment), bar:
        chaos = Chaos(root, seed, args.kills, args.two_machines_every, say, bar.update, only_losses=args.losses)
        with suppress(KeyboardInterrupt):  # what there was until then is worth a tally
            chaos.run()
    print(f"seed {seed}", chaos.tally, sep="\n")
    if chaos.tally.failures:
        print(*(f"FAILURE {text}" for text in chaos.tally.failures), f"What they left is in {root}", sep="\n")
        return 1
    shutil.rmtree(root)
    return 0 if chaos.tally.kills.total() >= args.kills else 130


if __name__ == "__main__":
    sys.exit(main())
