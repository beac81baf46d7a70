"""Whether a GPU's images are right: against the plain loop, by neighbours, way and process, after kills, out of memory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import checkpoint
from benchmarks.throughput import ROOT
from userdiff.config import BUNDLED_CHECKPOINT, parse_args
from userdiff.dataset.layout import file_name
from userdiff.diffusion import generate
from userdiff.diffusion.acceleration import Compilation, GraphedUNet
from userdiff.diffusion.model import DTYPES, JobModel, load_model
from userdiff.job import run as runner
from userdiff.seeds import Item

Rows = Iterator[list[str]]
"""What, found, target, verdict."""
KEPT = ROOT / ".gpu"
COMPILATION = Compilation(options={"backend": "inductor", "dynamic": False})
PARITY_SHARE = 0.999
SIZES = {  # widths of the UNet and of the VAE
    "in use": ((128, 256, 512, 512), (128, 256, 512)),
    "Stable Diffusion": ((320, 640, 1280, 1280), (128, 256, 512)),
    "two levels": ((128, 256), (128, 256)),  # as wide where it counts, and compiled in a third of the time
}
JOB_SECONDS = 200
ALLOWED_BYTES = 2 * 2**30  # of the card's memory, to a job that is to run out of it


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is."""

    folder: Path
    device: str
    smoke: bool
    seconds: float
    """Of each measurement of a rate."""

    def checkpoint(self, size: str) -> Path:
        """Return a checkpoint, made once for all calls; a fourth as wide where nothing is measured."""
        unet_widths, vae_widths = ([width // (4 if self.smoke else 1) for width in widths] for widths in SIZES[size])
        folder = KEPT / f"checkpoint-{size.replace(' ', '-')}{'-smoke' * self.smoke}"
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}-{os.getpid()}")
            checkpoint.make_checkpoint(unfinished, unet_widths, vae_widths)
            with suppress(OSError):  # another part has made it meanwhile
                unfinished.rename(folder)
        return folder

    def say(self, what: str, found: str, target: str = "", *, is_met: bool | None = None) -> list[str]:
        """Make a row of the table."""
        return [what, found, target, "" if is_met is None else "met" if is_met else "MISSED"]


def checks(setting: Setting) -> Rows:
    """Run all checks, one after the other."""
    for name, part in PARTS.items():
        if name != "checks":
            yield from part(setting)


# Against the plain loop ----------------------------------------------------------------------------------------------


def parity(setting: Setting) -> Rows:
    """Compare the bundled checkpoint's images in float32 with those of the tests' oracle, made on the CPU."""
    sys.path.insert(0, str(ROOT))
    from tests.oracle import oracle_image

    torch.set_num_threads(1)  # the oracle's passes are small
    steps = 2 if setting.smoke else 20
    items = [(user_id, image_index) for user_id in range(1, 11) for image_index in range(2)]
    flags = ["--num_images_per_user", "2", "--batch_size", "8", "--num_inference_steps", str(steps)]
    jobs = {"graphed": []} if setting.smoke else {"graphed": [], "compiled": ["--dynamo_backend", "inductor"]}
    started = {}
    for way, launcher_flags in jobs.items():
        output = setting.folder / f"parity-{way}"
        started[way] = start_job(setting, output, [*flags, "--mixed_precision", "no"], 2, launcher_flags)
    expected = [oracle_image(BUNDLED_CHECKPOINT, *item, steps=steps).squeeze().astype(int) for item in items]
    for way, process in started.items():
        _finish(process)
        paths = [setting.folder / f"parity-{way}" / file_name(*item) for item in items]
        found = np.stack([abs(np.asarray(Image.open(path)) - one) for path, one in zip(paths, expected, strict=True)])
        share = (found == 0).mean()
        yield setting.say(
            f"float32, {way}, against the plain loop on the CPU",
            f"{share:.4%} of the values equal, the largest difference {found.max()}",
            f"{PARITY_SHARE:.1%}, 1",
            is_met=bool(share >= PARITY_SHARE and found.max() <= 1),
        )


# Neighbours, slots and ways ------------------------------------------------------------------------------------------


def _neighbours(setting: Setting, precision: str) -> Rows:
    """Compare an item's bytes among other items, in other slots, and kernel by kernel with recorded."""
    size, steps = (4, 2) if setting.smoke else (16, 8)
    flags = [*checkpoint.model_flags(setting.checkpoint("two levels")), "--output_dir", str(setting.folder / "none")]
    config = parse_args([*flags, "--num_inference_steps", str(steps), "--batch_size", str(size)])
    runner.set_kernels(allow_tf32=False)
    batch: list[Item | None] = [(1 + slot % 3, slot) for slot in range(size)]

    def compute(model: JobModel, items: Sequence[Item | None]) -> list[NDArray[np.uint8] | None]:
        batch = generate.start(config, model, items)
        batch.wait()
        return [None if pixels is None else pixels.copy() for _, pixels in batch.images()]

    for way, compilation in (
        {"graphed": None} if setting.smoke else {"graphed": None, "compiled": COMPILATION}
    ).items():
        model = load_model(config, torch.device(setting.device), precision, compilation)
        name = f"{precision.replace('no', 'float32')}, {way}"
        whole = compute(model, batch)
        if isinstance(model.unet, GraphedUNet):
            eager = compute(replace(model, unet=model.unet.unet), batch)
            same = sum(_equal(*pair) for pair in zip(eager, whole, strict=True))
            yield setting.say(
                f"recorded pass, {name}",
                f"{same} of {size} items the same as launched kernel by kernel",
                is_met=same == size,
            )
        same = 0
        for slot in range(size):
            alone: list[Item | None] = [None] * size
            alone[slot] = batch[slot]
            others: list[Item | None] = [(7, 1000 + other) for other in range(size)]
            others[slot] = batch[slot]
            same += _equal(compute(model, alone)[0], whole[slot]) and _equal(compute(model, others)[slot], whole[slot])
        yield setting.say(
            f"neighbours, {name}", f"{same} of {size} items the same among others", "all", is_met=same == size
        )
        in_slots = compute(model, [batch[0]] * size)
        if any(pixels is None for pixels in in_slots):
            yield setting.say(f"slots, {name}", "not finite")
            continue
        stack = np.stack([pixels for pixels in in_slots if pixels is not None]).astype(int)
        differences = abs(stack - stack[0])
        num_same = sum(not difference.any() for difference in differences)
        share = f"{(differences > 0).mean():.3%} of the values differ, by at most {differences.max()}"
        yield setting.say(f"slots, {name}", f"{num_same} of {size} give the same bytes; {share}")


def _equal(one: NDArray[np.uint8] | None, other: NDArray[np.uint8] | None) -> bool:
    """Whether both are the same finite image, or both none."""
    return one is other if one is None or other is None else bool((one == other).all())


# Processes and kills -------------------------------------------------------------------------------------------------


def processes(setting: Setting) -> Rows:
    """Compare the bytes of one process, of three that share the GPU, and of a job that is killed and goes on."""
    number, steps = ("4", "2") if setting.smoke else ("96", "20")
    flags = [
        *checkpoint.model_flags(setting.checkpoint("in use")),
        "--user_ids",
        "1-3",
        "--num_images_per_user",
        number,
    ]
    flags += ["--batch_size", "2" if setting.smoke else "16", "--num_inference_steps", steps]
    outputs = {number: setting.folder / f"processes-{number}" for number in (1, 3)}
    jobs = [start_job(setting, output, flags, number) for number, output in outputs.items()]
    for job in jobs:
        _finish(job)
    one, three = (tree(output) for output in outputs.values())
    text = f"{sum(three.get(name) == digest for name, digest in one.items())} of {len(one)} files the same"
    yield setting.say("one process, and three on one GPU", text, "all", is_met=one == three)

    output, total = setting.folder / "killed", len(one) - 1
    killed_at = []
    for share in (0.01, 0.5):
        process = start_job(setting, output, flags, 2)
        deadline = time.monotonic() + JOB_SECONDS
        while (made := len(list(output.glob("user_*/*.png")))) < share * total and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            killed_at.append(made)
        end_group(process)
    _finish(start_job(setting, output, flags, 1))
    text = f"killed at {' and '.join(map(str, killed_at))} of {total} images, then completed: "
    is_same = tree(output) == one
    yield setting.say(
        "SIGKILL and resume", text + ("the same bytes" if is_same else "other bytes"), "same", is_met=is_same
    )


# Memory --------------------------------------------------------------------------------------------------------------


def memory(setting: Setting) -> Rows:
    """Run a job that may take only so much of the card's memory, and again with the batch size that it names."""
    if setting.device == "cpu":
        return
    limit = setting.folder / "limit"
    limit.mkdir()
    total = torch.cuda.get_device_properties(0).total_memory
    (limit / "sitecustomize.py").write_text(
        f"import torch\ntorch.cuda.set_per_process_memory_fraction({ALLOWED_BYTES / total})\n"
    )
    output = setting.folder / "memory"
    flags = [*checkpoint.model_flags(setting.checkpoint("in use")), "--num_inference_steps", "2", "--user_ids", "1-8"]
    flags += ["--mixed_precision", "no"]
    process = start_job(setting, output, [*flags, "--batch_size", "512"], PYTHONPATH=str(limit))
    status = process.wait(JOB_SECONDS)
    log = output.with_suffix(".log").read_text()
    line = next((line for line in log.splitlines() if "error: --batch_size" in line), log[-300:])
    said = line.partition("error: ")[2].partition(";")[0]
    size = said.partition(", --batch_size ")[2].partition(" ")[0]
    yield setting.say("out of memory", said, "a line, status 1", is_met=bool(size) and status == 1)
    if size:
        process = start_job(setting, output, [*flags, "--batch_size", size], PYTHONPATH=str(limit))
        status = process.wait(JOB_SECONDS)
        yield setting.say(f"the same with --batch_size {size}", f"status {status}", "status 0", is_met=status == 0)


# Jobs ----------------------------------------------------------------------------------------------------------------


def start_job(
    setting: Setting,
    output: Path,
    flags: Sequence[str],
    num_processes: int = 1,
    launcher_flags: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen[bytes]:
    """Start a job as a user would; its log lies beside its folder."""
    config = "cpu.yaml" if setting.device == "cpu" else "multi_gpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}"]
    command += ["--num_processes", str(num_processes), "--num_cpu_threads_per_process", "1", *launcher_flags]
    command += ["batch_generate.py", "--device", setting.device]
    with open(output.with_suffix(".log"), "ab") as log:
        if "PYTHONPATH" in os.environ and "PYTHONPATH" in environment:
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        return subprocess.Popen(
            [*command, *flags, "--output_dir", str(output)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _finish(process: subprocess.Popen[bytes]) -> None:
    try:
        status = process.wait(JOB_SECONDS)
    finally:
        end_group(process)
    if status:
        log = Path(list(process.args)[-1]).with_suffix(".log")
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


def _of_precision(precision: str) -> Callable[[Setting], Rows]:
    return lambda setting: _neighbours(setting, precision)


PARTS: dict[str, Callable[[Setting], Rows]] = {
    "checks": checks,
    "parity": parity,
    "processes": processes,
    **{f"neighbours-{precision}": _of_precision(precision) for precision in DTYPES},
    "memory": memory,
}
