"""Whether two versions make the same bytes of the same commands, in one environment; what one begins, the other completes.

    python -m tests.compare_versions 548d3c2

The other version is a commit of this repository. Each command is run by both, from their own folders: the images, the
manifest, the identity hash and the exit status have to be equal. Then jobs of the other version are killed half way and
completed by this one. No part of the suite: what it compares takes minutes, and it is asked when code moves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoints import Shape, make_checkpoint, model_flags
from tests.jobs import ROOT, tree

V_PREDICTION = Shape(scheduler={"prediction_type": "v_prediction"})
GREY, RGBA = Shape(image_channels=1), Shape(image_channels=4, vae_blocks=3)


@dataclass(frozen=True)
class Command:
    """A job's command line, or several on the same folder."""

    flags: Sequence[str]
    shape: Shape | None = Shape()
    """Of its checkpoint; None for the bundled one."""
    num_processes: int = 1


COMMANDS = {
    "the bundled checkpoint": Command(["--num_images_per_user 3"], None),
    "plain": Command(["--num_images_per_user 7"]),
    "two processes": Command(["--num_images_per_user 7"], num_processes=2),
    "three processes": Command(["--num_images_per_user 5 --batch_size 3 --eta 0.3"], num_processes=3),
    "eta": Command(["--eta 0.7 --batch_size 5 --num_images_per_user 4"]),
    "eta 1, another seed": Command(["--eta 1 --seed 9223372036854775807 --num_images_per_user 2"]),
    "signed": Command(["--vae_output_range signed --num_inference_steps 7"]),
    "bf16": Command(["--mixed_precision bf16 --num_inference_steps 5"]),
    "fp16": Command(["--mixed_precision fp16 --num_inference_steps 3"]),
    "v_prediction": Command(["--batch_size 3 --num_inference_steps 9"], V_PREDICTION),
    "grey": Command(["--num_inference_steps 3"], GREY),
    "with alpha": Command(["--num_inference_steps 3"], RGBA),
    "a batch of one": Command(["--batch_size 1 --num_images_per_user 2"]),
    "a batch too large": Command(["--batch_size 64 --num_images_per_user 2"]),
    "some users": Command(["--user_ids 2 4-5 --num_images_per_user 3"]),
    "users by rank": Command(["--train_user_ids 3 17 20 21 40 --user_ids 17 40"]),
    "random weights": Command(["--on_incompatible_weights random --num_users 6 --user_ids 6"]),
    "grown": Command(["--num_images_per_user 2 --user_ids 1", "--num_images_per_user 3", "--num_images_per_user 5"]),
    "started again": Command(["--num_images_per_user 3", "--num_images_per_user 2 --seed 1 --overwrite"]),
    "another job, refused": Command(["--num_images_per_user 2", "--num_images_per_user 2 --seed 1"]),
    "no such user": Command(["--user_ids 77"]),
}
STOPPED = Command(["--num_images_per_user 12 --num_inference_steps 20 --batch_size 2"])


class Versions:
    """Two checkouts, and a folder for what they make."""

    def __init__(self, folder: Path, checkouts: dict[str, Path]) -> None:
        self.folder, self.checkouts = folder, checkouts

    def command(self, version: str, name: str, command: Command, flags: str) -> list[str]:
        """Return a command line, to be run in the version's checkout."""
        checkpoint = self.folder / f"checkpoint-{hash(str(command.shape))}"
        if command.shape and not checkpoint.exists():
            make_checkpoint(checkpoint, command.shape)
        model = model_flags(checkpoint, command.shape) if command.shape else []
        python = [sys.executable]
        if command.num_processes > 1:
            python += ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
            python += ["--num_processes", str(command.num_processes), "--num_cpu_threads_per_process", "1"]
        output = ["--output_dir", str(self.folder / version / name.replace(" ", "_"))]
        return [*python, "batch_generate.py", "--device", "cpu", *model, *flags.split(), *output]

    def start(self, version: str, line: list[str]) -> subprocess.Popen[bytes]:
        """Start one, with its own package and one thread."""
        checkout = self.checkouts[version]
        environment = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        quiet = subprocess.DEVNULL
        return subprocess.Popen(line, cwd=checkout, env=environment, stdout=quiet, stderr=quiet)

    def result(self, version: str, name: str) -> tuple[dict[str, str], str]:
        """Return what lies in a job's folder, and its identity hash."""
        folder = self.folder / version / name.replace(" ", "_")
        if not (folder / "run.json").exists():
            return {}, ""
        return tree(folder), json.loads((folder / "run.json").read_text())["run"]

    def compare(self) -> Iterator[tuple[str, int, bool]]:
        """Run every command with both: its name, the number of files, whether all is equal."""
        for name, command in COMMANDS.items():
            found = []
            for version in self.checkouts:
                lines = [self.command(version, name, command, flags) for flags in command.flags]
                statuses = [self.start(version, line).wait() for line in lines]
                found.append((statuses, *self.result(version, name)))
            yield name, len(found[0][1]), found[0] == found[1]

    def complete(self) -> Iterator[tuple[str, int, bool]]:
        """Kill jobs of the other version half way, and complete them with this one."""
        (flags,) = STOPPED.flags
        this, other = self.checkouts
        self.start(other, self.command(other, "whole", STOPPED, flags)).wait()
        expected = self.result(other, "whole")
        for share in (0.1, 0.5, 0.9):
            name = f"killed at {share:.0%}"
            line = self.command(this, name, STOPPED, flags)
            process = self.start(other, line)
            folder = self.folder / this / name.replace(" ", "_")
            while process.poll() is None and len(list(folder.glob("user_*/*.png"))) < share * len(expected[0]):
                time.sleep(0.005)
            process.kill()
            process.wait()
            num_made = len(list(folder.glob("user_*/*.png")))
            status = self.start(this, line).wait()
            yield f"{name}, {num_made} images", len(expected[0]), status == 0 and self.result(this, name) == expected


def main() -> int:
    """Compare, and print a line a command; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    commit = parser.parse_args().commit
    num_different = 0
    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(other), commit], cwd=ROOT, check=True)
        try:
            versions = Versions(Path(temporary), {"this": ROOT, "other": other})
            for part in (versions.compare(), versions.complete()):
                for name, number, is_same in part:
                    print(f"{'same' if is_same else 'DIFFERENT':<10} {number:>3} files  {name}", flush=True)
                    num_different += not is_same
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    print(f"{num_different} of {len(COMMANDS) + 3} differ")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
