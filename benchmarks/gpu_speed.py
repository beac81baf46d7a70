"""How fast a GPU is: against what else a user would run, against the bare passes, and where its time goes."""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.distributed import HashStore
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import checkpoint
from benchmarks.gpu_checks import COMPILATION, Rows, Setting
from benchmarks.throughput import COMPILED, Bench
from userdiff.config import DEFAULT_BATCH_SIZE, parse_args
from userdiff.diffusion.acceleration import token_vectors, use_single_token
from userdiff.diffusion.model import load_model
from userdiff.job import run as runner
from userdiff.job.plan import make_plan
from userdiff.job.store import Coordinator

MATRIX = 8192
PROBE_SECONDS = 4.0  # to find the pipeline's best batch size
KINDS = {  # of kernels, by parts of their names; the first that fits
    "attention": ("sdpa", "fmha", "flash", "flex", "triton_tem"),
    "convolutions": ("fprop", "conv", "cudnn"),
    "matrix products": ("nvjet", "gemm", "cutlass"),
    "norms and sums, compiled": ("triton_red", "triton_per"),
    "elementwise, compiled": ("triton",),
    "copies": ("copy", "Memcpy"),
}


def _matrix_rate(setting: Setting) -> float:
    """Measure the card's rate in bf16, of random matrices: operations a second."""
    side = MATRIX if setting.device == "cuda" else 256
    left, right = (torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(23):
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
    """Measure everybody in turn, at the size in use."""
    yield from _side_by_side(setting, "in use", [1, 2] if setting.smoke else [64, 128, 256])


def large(setting: Setting) -> Rows:
    """Do the same at the size of Stable Diffusion."""
    yield from _side_by_side(setting, "Stable Diffusion", [1] if setting.smoke else [64])


def _side_by_side(setting: Setting, size: str, pipeline_sizes: list[int]) -> Rows:
    """Measure contenders one after the other, each drained before the next begins; images count when published."""
    steps, precision, batch_size = (2, "no", 2) if setting.smoke else (20, "bf16", DEFAULT_BATCH_SIZE["cuda"])
    folder = setting.checkpoint(size)
    matrix_rate = _matrix_rate(setting)
    yield setting.say(f"bf16 product of {MATRIX} x {MATRIX} matrices", f"{matrix_rate / 1e12:.0f} T/s")
    bench = Bench(setting.folder, precision, steps, batch_size, 1, setting.device, folder)
    started = time.monotonic()
    with ExitStack() as stack:
        original = stack.enter_context(bench.contender("original"))
        pipelines = {
            number: stack.enter_context(bench.contender("pipeline", batch_size=number)) for number in pipeline_sizes
        }
        eager = stack.enter_context(bench.contender("job"))
        compiled = stack.enter_context(bench.contender("job", env=COMPILED))
        everyone = [original, *pipelines.values(), eager, compiled]
        for one in everyone:  # load, compile and make a first batch side by side
            one.begin()
        for one in everyone:
            one.end()
        yield setting.say(f"{size}: all loaded, compiled and warm", f"{time.monotonic() - started:.0f} s")
        probe = min(PROBE_SECONDS, setting.seconds)
        probed = {number: one.compute("unsaved", seconds=probe)[0] for number, one in pipelines.items()}
        text = ", ".join(f"{rate:.1f} in batches of {number}" for number, rate in probed.items())
        yield setting.say(f"{size}: pipeline, not saving, {probe:.0f} s each", f"{text} images/s")
        best = max(probed, key=lambda number: probed[number])
        rates: dict[str, float] = {}
        for name, one, command in (
            ("job, compiled", compiled, "work"),
            ("original loop, float32", original, "work"),
            ("its bare passes, compiled", compiled, "floor"),
            (f"pipeline, not saving, batches of {best}", pipelines[best], "unsaved"),
            ("job, eager", eager, "work"),
            ("its bare passes, eager", eager, "floor"),
            (f"pipeline, saving, batches of {best}", pipelines[best], "work"),
        ):
            rates[name], peak = one.compute(command, seconds=setting.seconds)
            yield setting.say(f"{size}: {name}", f"{rates[name]:.2f} images/s, {peak:.0f} MiB")
    job, alone, floor, pipeline, eager_rate, eager_floor, _ = rates.values()
    for what, ratio, target in (
        ("job, compiled : pipeline not saving, at its best", job / pipeline, 2.0),
        ("job, compiled : original loop", job / alone, 15.0),
        ("job, compiled : its bare passes", job / floor, 0.97),
        ("job, eager : its bare passes", eager_rate / eager_floor, 0.97),
        ("job, eager : pipeline not saving, at its best", eager_rate / pipeline, 0.0),
    ):
        is_met = None if setting.smoke or not target else ratio >= target
        yield setting.say(f"{size}: {what}", f"{ratio:.3f}", f"{target}" if target else "", is_met=is_met)
    operations = _operations(folder, steps)
    share = job * operations / matrix_rate
    yield setting.say(
        f"{size}: job, compiled, of the matrix rate",
        f"{operations / 1e12:.3f} T an image, {job * operations / 1e12:.0f} T/s: {share:.1%}",
        "40%",
        is_met=None if setting.smoke else share >= 0.4,
    )


# Where the time goes -------------------------------------------------------------------------------------------------


def trace(setting: Setting) -> Rows:
    """Trace a job, eager and compiled: how long the GPU has nothing to do, and what it does."""
    size, steps, num_batches = (2, 2, 2) if setting.smoke else (DEFAULT_BATCH_SIZE["cuda"], 20, 6)
    runner.set_kernels(allow_tf32=False)
    for way, compilation in ({"eager": None} if setting.smoke else {"eager": None, "compiled": COMPILATION}).items():
        output = Path(tempfile.mkdtemp(dir=setting.folder))
        (output / "user_01").mkdir()
        model_flags = checkpoint.model_flags(setting.checkpoint("in use"))
        flags = [*model_flags, "--output_dir", str(output), "--batch_size", str(size)]
        config = parse_args([*flags, "--num_inference_steps", str(steps)])
        precision = "no" if setting.smoke else "bf16"
        model = load_model(config, torch.device(setting.device), precision, compilation)
        kind = ProfilerActivity.CPU if setting.smoke else ProfilerActivity.CUDA
        traced = profile(activities=[kind])
        for number, context in ((2, nullcontext()), (num_batches, traced)):  # first, all is compiled and recorded
            plan = make_plan((1,), size * number, size)
            with Coordinator(HashStore, 0, 1) as coordinator, context:
                runner.make_images(config, model, plan, coordinator, compress_level=6, on_step=coordinator.check)
                _synchronize()
        yield from _of_trace(setting, way, traced, num_batches)


def _of_trace(setting: Setting, way: str, traced: profile, num_batches: int) -> Rows:
    device = torch.autograd.DeviceType.CUDA
    kernels = [event for event in traced.events() or [] if event.device_type == device]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    if not spans:
        yield setting.say(f"{way}: GPU idle", "no GPU's activity to be seen")
        return
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    idle = 1 - busy / whole
    text = f"{idle:.2%} of {whole / 1e6:.2f} s, {len(kernels) / num_batches:.0f} kernels a batch"
    yield setting.say(f"{way}: GPU idle", text, "2%", is_met=idle < 0.02)
    times: dict[str, float] = {}
    for event in kernels:
        name = next(
            (kind for kind, parts in KINDS.items() if any(part in event.name for part in parts)),
            "elementwise and others",
        )
        times[name] = times.get(name, 0.0) + event.time_range.elapsed_us()
    shares = sorted(times.items(), key=lambda item: -item[1])
    yield setting.say(f"{way}: of the busy time", ", ".join(f"{name} {time / busy:.1%}" for name, time in shares))


PARTS: dict[str, Callable[[Setting], Rows]] = {"speed": speed, "profile": trace, "large": large}
