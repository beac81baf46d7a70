"""How fast a GPU is: against what else a user would run, against the passes alone, and where its time goes."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.distributed import HashStore
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import checkpoint, writer
from benchmarks.gpu_checks import WAYS, Rows, Setting
from benchmarks.throughput import COMPILED, Bench, Contender
from userdiff import images, runner
from userdiff.acceleration import token_vectors, use_single_token
from userdiff.config import parse_args
from userdiff.coordination import Coordinator
from userdiff.loading import load_model
from userdiff.planning import make_plan

ROUNDS = 3
ENVIRONMENTS = {  # of the launcher, for each of WAYS
    "eager": {},
    "compiled": COMPILED,
    "CUDA graphs": {**COMPILED, "ACCELERATE_DYNAMO_MODE": "reduce-overhead"},
}
MATRIX = 8192
LARGE = (320, 640, 1280, 1280)


def _matrix_rate(setting: Setting) -> float:
    """Measure the card's rate in bf16, of random matrices: operations a second."""
    side = MATRIX if setting.device == "cuda" else 256
    left, right = (torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        _synchronize()
        started = time.perf_counter()
        left @ right
        _synchronize()
        times.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(times[3:])


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _operations(folder: Path, num_inference_steps: int) -> float:
    """Count the floating-point operations of an image as the job computes it; nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        use_single_token(unet)
        latents = torch.randn(1, 4, checkpoint.LATENTS, checkpoint.LATENTS)
        vectors = token_vectors(unet, torch.randn(1, 1, checkpoint.EMBED_DIM))
        counts = []
        for step in (lambda: unet(latents, torch.tensor(1), vectors), lambda: vae.decode(latents)):
            with FlopCounterMode(display=False) as counter:
                step()
            counts.append(counter.get_total_flops())
    return num_inference_steps * counts[0] + counts[1]


# Side by side --------------------------------------------------------------------------------------------------------


def speed(setting: Setting) -> Rows:
    """Let all take turns, at several batch sizes."""
    yield from _side_by_side(setting, setting.checkpoint, [1, 2] if setting.smoke else [16, 64, 256])


def large(setting: Setting) -> Rows:
    """Do the same at the size of Stable Diffusion."""
    yield from _side_by_side(
        setting, setting.make_checkpoint("checkpoint-large", LARGE), [1] if setting.smoke else [64]
    )


def _side_by_side(setting: Setting, folder: Path, batch_sizes: list[int]) -> Rows:
    steps, precision = (2, "no") if setting.smoke else (20, "bf16")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.folder / "inductor")
    name = folder.name
    bench = Bench(setting.folder, precision, steps, 1, 1, setting.device, folder)
    with ExitStack() as stack:
        original = stack.enter_context(bench.contender("original"))
        contenders: dict[tuple[str, int], Contender] = {
            ("pipeline", size): stack.enter_context(bench.contender("pipeline", batch_size=size))
            for size in batch_sizes
        }
        for size in batch_sizes:
            for way, environment in ENVIRONMENTS.items():
                if way == "eager" or not setting.smoke:
                    job = bench.contender("job", env=environment, batch_size=size)
                    contenders[f"job, {way}", size] = stack.enter_context(job)
        everyone = [original, *contenders.values()]
        for one in everyone:  # load and compile at once
            one.begin()
        for one in everyone:
            one.end()
        rates, peaks = _take_turns(original, contenders, num_images=2 if setting.smoke else 512)
    alone = statistics.median(rates["original", 1])
    yield setting.say(f"{name}: original loop, float32", f"{alone:.2f} images/s")
    best = {key: statistics.median(of) for key, of in rates.items()}
    for (who, size), rate in best.items():
        if who != "original":
            memory = f", {peaks[who, size]:.0f} MiB" if (who, size) in peaks else ""
            yield setting.say(f"{name}: {who}, batches of {size}", f"{rate:.1f} images/s{memory}")
    yield from _verdicts(setting, folder, best, alone, steps)


def _take_turns(
    original: Contender, contenders: dict[tuple[str, int], Contender], num_images: int
) -> tuple[dict[tuple[str, int], list[float]], dict[tuple[str, int], float]]:
    """Give images per second, one number a round, and peak MiB; the floor is that of the job's own models."""
    rates: dict[tuple[str, int], list[float]] = {}
    peaks: dict[tuple[str, int], float] = {}
    for _ in range(ROUNDS):
        rates.setdefault(("original", 1), []).append(original.compute(num_batches=2)[0])
        for (who, size), one in contenders.items():
            number = max(2, num_images // size)
            rate, peaks[who, size] = one.compute(num_batches=number)
            rates.setdefault((who, size), []).append(rate)
            if who.startswith("job"):
                rates.setdefault((f"its passes alone, {who}", size), []).append(one.compute("floor", None, number)[0])
    return rates, peaks


def _verdicts(
    setting: Setting, folder: Path, rates: dict[tuple[str, int], float], original: float, steps: int
) -> Iterator[list[str]]:
    pipeline = max(rate for (who, _), rate in rates.items() if who == "pipeline")
    (who, size), rate = max(
        ((key, rate) for key, rate in rates.items() if key[0].startswith("job")), key=lambda pair: pair[1]
    )
    name = f"{folder.name}: {who}, batches of {size}"
    for what, against, target in (
        ("the pipeline at its best", pipeline, 2.0),
        ("the original loop", original, 15.0),
        ("its passes alone", rates[f"its passes alone, {who}", size], 0.97),
    ):
        is_met = None if setting.smoke else rate / against >= target
        yield setting.say(f"{name} : {what}", f"{rate / against:.3f}", f"{target}", is_met=is_met)
    operations, matrix_rate = _operations(folder, steps), _matrix_rate(setting)
    yield setting.say(
        f"{name}: floating-point operations",
        f"{operations / 1e12:.3f} T an image, {rate * operations / 1e12:.1f} T/s, {rate * operations / matrix_rate:.1%} of "
        f"the measured {matrix_rate / 1e12:.0f} T/s of a matrix product of {MATRIX}",
    )


# Where the time goes -------------------------------------------------------------------------------------------------


def trace(setting: Setting) -> Rows:
    """Trace a compiled job: how long the GPU has nothing to do, and what it does."""
    size, steps, num_batches = (2, 2, 2) if setting.smoke else (64, 20, 6)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(setting.folder / "inductor")
    runner.set_kernels(allow_tf32=False)
    for way, compilation in WAYS.items():
        if setting.smoke and way != "eager":
            continue
        output = Path(tempfile.mkdtemp(dir=setting.folder))
        (output / "user_01").mkdir()
        flags = [*checkpoint.model_flags(setting.checkpoint), "--output_dir", str(output), "--batch_size", str(size)]
        config = parse_args([*flags, "--num_inference_steps", str(steps)])
        torch.compiler.reset()
        precision = "no" if setting.smoke else "bf16"
        model = load_model(config, torch.device(setting.device), precision, compilation)
        kind = ProfilerActivity.CPU if setting.smoke else ProfilerActivity.CUDA
        for number, context in (
            (2, nullcontext()),
            (num_batches, profile(activities=[kind])),
        ):  # first, all is compiled
            plan = make_plan((1,), size * number, size)
            with Coordinator(HashStore, 0, 1) as coordinator, context as profiled:
                runner.make_images(config, model, plan, coordinator, on_step=coordinator.check)
                _synchronize()
        yield from _of_trace(setting, way, profiled)


def _of_trace(setting: Setting, way: str, profiled: profile) -> Rows:
    device = torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in profiled.events() if event.device_type == device
    )
    if not spans:
        yield setting.say(f"trace, {way}", "no GPU's activity to be seen")
        return
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    idle = 1 - busy / whole
    yield setting.say(f"trace, {way}: GPU idle", f"{idle:.2%} of {whole / 1e6:.2f} s", "2%", is_met=idle < 0.02)
    averages = sorted(profiled.key_averages(), key=lambda kernel: kernel.self_device_time_total, reverse=True)
    for kernel in averages[:8]:
        share = kernel.self_device_time_total / (busy or 1)
        name = kernel.key.replace("|", "/")[:90]
        yield setting.say(f"trace, {way}: `{name}`", f"{share:.1%} of the busy time, {kernel.count} times")


def writers(setting: Setting) -> Rows:
    """See what the writers alone sustain at 128 pixels."""
    number = 50 if setting.smoke else 4000
    with tempfile.TemporaryDirectory() as folder:
        pixels = writer.spectrogram(128)
        found = writer.rate(Path(folder), pixels, images.COMPRESS_LEVEL, runner.WRITER_THREADS, number)
    yield setting.say("the writers of one process alone, 128 pixels", f"{found:.0f} images/s", "above the job's rate")


PARTS: dict[str, Callable[[Setting], Rows]] = {
    "writer": writers,
    "speed": speed,
    "profile": trace,
    "large": large,
}
