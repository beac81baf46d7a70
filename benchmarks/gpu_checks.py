"""Whether a GPU's images are right: against the plain loop, by neighbours, by process, by seat, and after a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import checkpoint
from benchmarks.throughput import ROOT
from userdiff import computing, images, runner
from userdiff.acceleration import Compilation
from userdiff.config import BUNDLED_CHECKPOINT, parse_args
from userdiff.loading import load_model
from userdiff.table import Item

Rows = Iterator[list[str]]
"""What, found, target, verdict."""
WAYS = {  # to run the models
    "eager": None,
    "compiled": Compilation(options={"backend": "inductor", "dynamic": False}),
    "CUDA graphs": Compilation(options={"backend": "inductor", "mode": "reduce-overhead", "dynamic": False}),
}
PARITY_SHARE = 0.999
SIZE_IN_USE = (128, 256, 512, 512)
JOB_SECONDS = 200


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is."""

    folder: Path
    device: str
    smoke: bool

    @property
    def checkpoint(self) -> Path:
        """Of the size in use, or a small one."""
        return self.folder / "checkpoint"

    def make_checkpoint(self, name: str = "checkpoint", unet_widths: Sequence[int] = SIZE_IN_USE) -> Path:
        """Make one; a fourth as wide where nothing is measured."""
        vae_widths = (32, 64, 128) if self.smoke else (128, 256, 512)
        unet_widths = [width // 128 * 32 for width in unet_widths] if self.smoke else unet_widths
        checkpoint.make_checkpoint(self.folder / name, unet_widths, vae_widths)
        return self.folder / name

    def say(self, what: str, found: str, target: str = "", *, is_met: bool | None = None) -> list[str]:
        """Make a row of the table."""
        return [what, found, target, "" if is_met is None else "met" if is_met else "MISSED"]


# Against the plain loop ----------------------------------------------------------------------------------------------


def parity(setting: Setting) -> Rows:
    """Compare the bundled checkpoint's images in float32 with those of the tests' oracle, made on the CPU."""
    sys.path.insert(0, str(ROOT))
    from tests.oracle import oracle_image

    steps = 2 if setting.smoke else 20
    output = setting.folder / "parity"
    flags = ["--num_images_per_user", "2", "--batch_size", "8", "--num_inference_steps", str(steps)]
    _finish(start_job(setting, output, flags))
    differences = []
    for user_id in range(1, 11):
        for image_index in range(2):
            expected = oracle_image(BUNDLED_CHECKPOINT, user_id, image_index, steps=steps).squeeze().astype(int)
            differences.append(abs(np.asarray(Image.open(output / images.file_name(user_id, image_index))) - expected))
    found = np.stack(differences)
    share = (found == 0).mean()
    text = f"{share:.4%} of the values equal, the largest difference {found.max()}"
    yield setting.say(
        "float32 against the plain loop on the CPU",
        text,
        f"{PARITY_SHARE:.1%}, 1",
        is_met=bool(share >= PARITY_SHARE and found.max() <= 1),
    )


# Neighbours and seats ------------------------------------------------------------------------------------------------


def neighbours(setting: Setting) -> Rows:
    """Compare an item's bytes among other items, and at other seats, in every precision and way."""
    precisions = ["no", "bf16", "fp16"]
    for precision in precisions[:2] if setting.smoke else precisions:
        for way, compilation in WAYS.items():
            if setting.smoke and way != "eager":
                continue
            yield from _neighbours(setting, precision, way, compilation)


def _neighbours(setting: Setting, precision: str, way: str, compilation: Compilation | None) -> Rows:
    size, steps = (4, 2) if setting.smoke else (16, 8)
    flags = [*checkpoint.model_flags(setting.checkpoint), "--output_dir", str(setting.folder / "none")]
    config = parse_args([*flags, "--num_inference_steps", str(steps), "--batch_size", str(size)])
    runner.set_kernels(allow_tf32=False)
    torch.compiler.reset()
    model = load_model(config, torch.device(setting.device), precision, compilation)

    def compute(items: Sequence[Item | None]) -> list[NDArray[np.uint8] | None]:
        batch = computing.start(config, model, items)
        batch.wait()
        return [None if pixels is None else pixels.copy() for _, pixels in batch.images()]

    batch: list[Item | None] = [(1 + seat % 3, seat) for seat in range(size)]
    whole = compute(batch)
    same = 0
    for seat in range(size):
        alone: list[Item | None] = [None] * size
        alone[seat] = batch[seat]
        others: list[Item | None] = [(7, 1000 + other) for other in range(size)]
        others[seat] = batch[seat]
        same += _equal(compute(alone)[0], whole[seat]) and _equal(compute(others)[seat], whole[seat])
    name = f"{precision.replace('no', 'float32')}, {way}"
    found = f"{same} of {size} items the same among other neighbours"
    yield setting.say(f"neighbours, {name}", found, "all", is_met=same == size)
    at_seats = compute([batch[0]] * size)
    if any(pixels is None for pixels in at_seats):
        yield setting.say(f"seats, {name}", "not finite")
        return
    stack = np.stack([pixels for pixels in at_seats if pixels is not None]).astype(int)
    differences = abs(stack - stack[0])
    num_same = sum(not difference.any() for difference in differences)
    found = f"{num_same} of {size} seats give the same bytes; {(differences > 0).mean():.3%} of the values differ, by at most"
    yield setting.say(f"seats, {name}", f"{found} {differences.max()}")


def _equal(one: NDArray[np.uint8] | None, other: NDArray[np.uint8] | None) -> bool:
    """Whether both are the same finite image, or both none."""
    return one is other if one is None or other is None else bool((one == other).all())


# Processes and kills -------------------------------------------------------------------------------------------------


def processes(setting: Setting) -> Rows:
    """Compare the bytes of one process, of three that share the GPU, and of a job that is killed and goes on."""
    number, steps = ("4", "2") if setting.smoke else ("64", "20")
    flags = [*checkpoint.model_flags(setting.checkpoint), "--user_ids", "1-3", "--num_images_per_user", number]
    flags += ["--batch_size", "2" if setting.smoke else "16", "--num_inference_steps", steps]
    if not setting.smoke:
        flags += ["--mixed_precision", "bf16"]
    trees = []
    for num_processes in (1, 3):
        output = setting.folder / f"processes-{num_processes}"
        _finish(start_job(setting, output, flags, num_processes))
        trees.append(tree(output))
    text = f"{sum(trees[1].get(name) == digest for name, digest in trees[0].items())} of {len(trees[0])} files the same"
    yield setting.say("one process, and three on one GPU", text, "all", is_met=trees[0] == trees[1])

    output, total = setting.folder / "killed", len(trees[0]) - 1
    killed_at = []
    for share in (0.01, 0.5):
        process = start_job(setting, output, flags, 2)
        until = time.monotonic() + JOB_SECONDS
        while (made := len(list(output.glob("user_*/*.png")))) < share * total and time.monotonic() < until:
            time.sleep(0.02)
        if process.poll() is None:
            killed_at.append(made)
        end_group(process)
    _finish(start_job(setting, output, flags, 1))
    text = f"killed at {' and '.join(map(str, killed_at))} of {total} images, then completed: "
    is_same = tree(output) == trees[0]
    yield setting.say(
        "SIGKILL and resume", text + ("the same bytes" if is_same else "other bytes"), "same", is_met=is_same
    )


def start_job(setting: Setting, output: Path, flags: Sequence[str], num_processes: int = 1) -> subprocess.Popen[bytes]:
    """Start a job as a user would; its log lies beside its folder."""
    config = "cpu.yaml" if setting.device == "cpu" else "multi_gpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}"]
    command += ["--num_processes", str(num_processes), "batch_generate.py", "--device", setting.device]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, *flags, "--output_dir", str(output)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )


def _finish(process: subprocess.Popen[bytes]) -> None:
    try:
        status = process.wait(JOB_SECONDS)
    finally:
        end_group(process)
    if status:
        log = Path(process.args[-1]).with_suffix(".log")  # type: ignore[arg-type,index]
        sys.exit(f"a job ended with status {status}: {log.read_text(errors='replace')[-2000:]}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all it started, those in sessions of their own too."""
    for pid in [process.pid, *_descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    with suppress(OSError):
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [*children, *(one for child in children for one in _descendants(child))]
    return []


def tree(output: Path) -> dict[str, str]:
    """Hash what must not depend on how a job was run."""
    paths = [*output.glob("user_*/*"), output / "manifest.csv"]
    return {str(path.relative_to(output)): sha256(path.read_bytes()).hexdigest() for path in paths}


PARTS: dict[str, Callable[[Setting], Rows]] = {"parity": parity, "neighbours": neighbours, "processes": processes}
