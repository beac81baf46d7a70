"""One process's way through a job: load, plan (the main process), compute and write batches, merge. Orchestration."""

import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from typing import Any

import diffusers
import numpy as np
import PIL
import torch
from accelerate import PartialState
from accelerate.utils import parse_choice_from_env, parse_flag_from_env
from numpy.typing import NDArray
from torch.distributed import DistError

from userdiff import console, coordination, gallery, images, manifest, record, sampling
from userdiff.config import DEFAULT_BATCH_SIZE, JobConfig, UsageError, errors_of, format_ids
from userdiff.coordination import Coordinator, Halted, Stopped
from userdiff.loading import JobModel, load_model
from userdiff.planning import PADDING, Plan, item_seed, make_plan

WRITER_THREADS = 4
PENDING_BATCHES = 2  # waiting to be encoded and written while the next computes; more would only hold memory
_BRIEF = 12  # characters of a value in a message

Item = tuple[int, int]  # (user_id, image_index)


def run(config: JobConfig) -> int:
    """Run a job as the process that the launcher started, or as the only one; returns the exit status.

    Raises UsageError for a wrong model or output folder, Halted when a signal or another process ended the job.
    """
    with coordination.pending_signal() as pending:
        device = join_processes(config.device)
        coordinator = coordination.connect(pending)
        try:
            set_kernels(config.allow_tf32)
            precision = config.mixed_precision or parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
            model = load_model(config, device, precision)
            return run_process(config, model, coordinator)
        except Halted:
            raise
        except Exception as error:
            status = 2 if isinstance(error, UsageError) else 1
            coordinator.halt(f"process {coordinator.process_index}: {error}", exit_status=status)
            raise
        finally:
            PartialState().destroy_process_group()


def join_processes(requested_device: str) -> torch.device:
    """Join the launcher's process group, where there is one, and give the device of this process.

    The device is resolved first: accelerate's launcher does not tell its processes to stay on the CPU. The group is
    gloo on GPUs too; no collective is ever called, but accelerate hands out the GPUs by it.
    """
    has_cuda = torch.cuda.is_available()
    if requested_device == "cuda" and not has_cuda:
        raise UsageError("--device: no CUDA device is available here, use --device cpu")
    use_cpu = not has_cuda or (requested_device != "cuda" and parse_flag_from_env("ACCELERATE_USE_CPU"))
    backend = {"backend": "gloo"} if torch.distributed.is_torchelastic_launched() else {}
    return PartialState(cpu=use_cpu or requested_device == "cpu", **backend).device


def set_kernels(allow_tf32: bool) -> None:
    """Fix what may choose between kernels: nothing is chosen by timing, and TF32 only where it was asked for."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32


def run_process(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    """Run one process of a job; what it needs to know of the others is in `coordinator`. Returns the exit status."""
    if coordinator.is_main_process:
        return _run_main(config, model, coordinator)
    run_hash, plan = coordinator.receive_plan()
    if run_hash != model.run:
        raise UsageError(
            f"--vae_path, --unet_path, --condition_encoder_path: process {coordinator.process_index} loaded other "
            "models than the main process; every machine needs the same files"
        )
    make_images(config, model, Plan.from_bytes(plan), coordinator, on_step=coordinator.check)
    coordinator.finish()
    return 0


def _run_main(config: JobConfig, model: JobModel, coordinator: Coordinator) -> int:
    recipe = _recipe(config, model)
    with _open_folder(config) as old_record:
        run_record, numerics = _new_record(config, model, old_record)
        rows = manifest.finished_rows(config.output_dir, recipe)
        plan = make_plan(
            config.user_ids or model.user_index,
            config.num_images_per_user,
            numerics["batch_size"],
            done=((row.user_id, row.image_index) for row in rows),
        )
        console.announce(config, model, plan, coordinator.num_processes)
        images.remove_temporaries(config.output_dir)
        manifest.write_manifest(config.output_dir, rows)  # takes the place of an interrupted run's parts
        for user_id in plan.user_ids:
            (config.output_dir / images.file_name(user_id, 0)).parent.mkdir(exist_ok=True)
        with _history_entry(config, run_record, numerics, plan, coordinator) as entry:
            coordinator.publish_plan(model.run, plan.to_bytes())
            with console.show_progress(plan, coordinator) as refresh:
                make_images(config, model, plan, coordinator, on_step=refresh)
                coordinator.finish()
                coordinator.wait_for_all(refresh)
            rows = manifest.finished_rows(config.output_dir, recipe)
            manifest.write_manifest(config.output_dir, rows)
            page = gallery.preview_page(config.output_dir.resolve().name, rows)
            images.publish(config.output_dir / gallery.PREVIEW_NAME, page.encode())
            made = {(row.user_id, row.image_index) for row in rows}
            entry["failed"] = [item for item in map(plan.item, range(plan.num_items)) if item not in made]
    console.conclude(config, model, plan, entry, not_finite=coordinator.failed())
    return 1 if entry["failed"] else 0


# Computing and writing -----------------------------------------------------------------------------------------------


def make_images(
    config: JobConfig,
    model: JobModel,
    plan: Plan,
    coordinator: Coordinator,
    *,
    on_step: Callable[[], None],
) -> None:
    """Claim batches until none is left; compute each, and leave encoding and writing to a bounded pool.

    However this ends, what was computed is written and noted first. `on_step` is asked before every UNet pass; what
    it raises ends the loop.
    """
    recipe = _recipe(config, model)
    part = manifest.PartWriter(manifest.part_path(config.output_dir, coordinator.process_index))
    with part, images.WriterPool(WRITER_THREADS, PENDING_BATCHES * plan.batch_size) as writers:

        def save(item: Item, pixels: NDArray[np.uint8]) -> None:
            png = images.encode_png(pixels, recipe.text_chunks(*item))
            images.publish(config.output_dir / images.file_name(*item), png)
            part.append(recipe.row(*item, size=(pixels.shape[1], pixels.shape[0]), png=png))
            coordinator.count_published()

        while (number := coordinator.next_batch()) < len(plan.batches):
            items = [None if row == PADDING else plan.item(row) for row in plan.batches[number]]
            decoded = compute(config, model, items, on_step)
            if number == 0 and sampling.contradicts_range(decoded, config.vae_output_range):
                console.warn_of_range(config.vae_output_range)
            finite = sampling.finite_images(decoded).cpu().numpy()
            pixels = sampling.to_uint8(decoded).cpu().numpy()
            for row, item in enumerate(items):
                if item is not None and finite[row]:
                    writers.submit(partial(save, item, pixels[row]))
                elif item is not None:
                    coordinator.report_failed(*item)


@torch.inference_mode()
def compute(
    config: JobConfig, model: JobModel, items: list[Item | None], on_step: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Compute a batch of images, None for padding: [batch, channels, height, width] float32, decoded, not clamped.

    Padding is computed like the rest, from seed 0 and the first row of the embedding: a pass always has its shape.
    """
    generators = sampling.item_generators([item_seed(config.seed, *item) if item else 0 for item in items])
    user_index = torch.tensor([model.user_index[item[0]] if item else 0 for item in items], device=model.device)
    latents = sampling.denoise(
        model.unet,
        model.scheduler,
        sampling.initial_latents(generators, sampling.latents_shape(model.unet)).to(model.device),
        model.condition_encoder(user_index).unsqueeze(1),
        num_inference_steps=config.num_inference_steps,
        eta=config.eta,
        generators=generators,
        on_step=on_step,
    )
    return sampling.decode(model.vae, latents, output_range=config.vae_output_range)


def _recipe(config: JobConfig, model: JobModel) -> manifest.Recipe:
    return manifest.Recipe(
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        conditioning=model.conditioning,
        run=model.run,
    )


# The folder (main process) -------------------------------------------------------------------------------------------


@contextmanager
def _open_folder(config: JobConfig) -> Iterator[record.RunRecord | None]:
    """Make the folder if needed, hold its lock, and give the record it has, if any."""
    with ExitStack() as held:
        with errors_of("--output_dir"):
            config.output_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(record.folder_lock(config.output_dir))
            old_record = record.RunRecord.read(config.output_dir)
            if old_record is None and any(images.image_files(config.output_dir)):
                raise ValueError(
                    f"{config.output_dir} holds images but no {record.RECORD_NAME}, so nobody knows what made them; "
                    "choose another folder"
                )
        yield old_record


def _new_record(
    config: JobConfig, model: JobModel, old: record.RunRecord | None
) -> tuple[record.RunRecord, dict[str, Any]]:
    """Make this run's record and its numerics, refusing to mix the images of two identities in one folder.

    The record keeps the numerics that the folder began with; those of every run stand in its history.
    """
    changed = list(record.differences(old.identity, model.identity)) if old else []
    if changed:
        fields = "; ".join(f"{name} was {_brief(before)}, is {_brief(after)}" for name, before, after in changed)
        raise UsageError(
            f"--output_dir: {config.output_dir} holds images made otherwise ({fields}); use another folder"
        )
    begun_with = old.numerics["batch_size"] if old else DEFAULT_BATCH_SIZE
    numerics = {
        "batch_size": config.batch_size or begun_with,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "threads_per_process": torch.get_num_threads(),
        "allow_tf32": config.allow_tf32,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "pillow": PIL.__version__,
    }
    for name, before, after in record.differences(old.numerics if old else numerics, numerics):
        console.warn_of_numerics(name, before, after)
    begun = old or record.RunRecord(identity=model.identity, numerics=numerics)
    return record.RunRecord(identity=model.identity, numerics=begun.numerics, history=begun.history), numerics


def _brief(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."  # of a hash, enough to tell it from another


@contextmanager
def _history_entry(
    config: JobConfig, run_record: record.RunRecord, numerics: dict[str, Any], plan: Plan, coordinator: Coordinator
) -> Iterator[dict[str, Any]]:
    """Keep `run.json` true while a run goes on: it says `running`, then how the run ended."""

    def now() -> str:
        return datetime.now(timezone.utc).isoformat(timespec="seconds")

    def publish() -> None:
        images.publish(config.output_dir / record.RECORD_NAME, run_record.to_bytes())

    entry: dict[str, Any] = {
        "started": now(),
        "ended": None,
        "state": "running",
        "num_processes": coordinator.num_processes,
        "user_ids": format_ids(plan.user_ids),
        "num_images_per_user": plan.num_images_per_user,
        "numerics": numerics,
        "published": 0,
        "failed": [],
    }
    run_record.history.append(entry)
    publish()
    try:
        yield entry
        entry["state"] = "ended"
    except Stopped as stop:
        entry["state"] = f"stopped by signal {stop.signal_number}"
        raise
    except DistError:  # the launcher was killed and took its store along: the workers are to go too
        entry["state"] = f"stopped by signal {signal.SIGTERM.value}"
        raise
    except BaseException:
        entry["state"] = "failed"
        raise
    finally:
        entry["ended"] = now()
        with suppress(DistError):  # a launcher that was killed took its store along
            entry["published"] = coordinator.count_published(0)
        publish()
