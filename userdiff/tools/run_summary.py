"""What `preview.html` says about a dataset's runs: how the images were made, and what went wrong."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

from userdiff.dataset.rows import Rows
from userdiff.dataset.run_record import RunEntry, RunRecord, changed_numerics
from userdiff.seeds import Item
from userdiff.text import count, format_ids

_FAILED_LISTED = 100
_CHARS = 300  # of a value; a mapping of many users has more
_HASH_CHARS = 12  # enough to tell it from another
_LIBRARIES = ("torch", "cuda", "hip", "cudnn", "triton", "diffusers", "pillow")


def notices(rows: Rows, run_record: RunRecord | None, ended: datetime | None = None) -> Iterator[str]:
    """Yield one sentence for everything that went wrong; `ended` as for `run_summary`."""
    if rows.array["is_random"].any():
        yield "The condition encoder's weights were RANDOM: images do not show the users they are filed under."
    if run_record is None or run_record.last is None:
        return
    entry = run_record.last
    if entry.state == "running" and ended is None:
        yield "The last run is under way, or was killed."
    elif entry.state not in ("running", "ended"):
        yield f"The last run did not come to its end: {_cut(entry.state)}."
    if entry.lost:
        yield f"The others made what was left in the last run by {_cut('; '.join(entry.lost))}."
    if failed := [item for item in sorted(set(entry.failed)) if not rows.of_image(*item)]:
        yield f"{count(len(failed), 'image')} failed in the last run: {_items(failed)}"


def run_summary(run_record: RunRecord, ended: datetime | None = None) -> Iterator[tuple[str, str]]:
    """Yield how a dataset was made, as (name, value).

    ended: when the last run ended, where that is now and its entry does not say so yet.
    """
    entry = run_record.last
    numerics = entry.numerics if entry else run_record.numerics
    identity = run_record.identity
    weights = {"VAE": identity["vae"]["weights"], "UNet": identity["unet"]["weights"]}
    weights["condition encoder"] = identity["condition_encoder"]
    schedule = identity["noise_schedule"]  # what differs from the scheduler's defaults
    values = {
        "Checkpoint": ", ".join(f"{name} {content_hash[:_HASH_CHARS]}" for name, content_hash in weights.items()),
        "Noise schedule": ", ".join(f"{name} {value}" for name, value in schedule.items()) or "DDIM's defaults",
        "Row of the embedding, by user": _user_rows(identity["user_index"]),
        "Steps": f"{identity['num_inference_steps']} of DDIM",
        "Seed": str(identity["seed"]),
        "Eta": str(identity.get("eta", "")),
        "Guidance": _guidance(identity),
        "Precision": str(identity.get("mixed_precision", "float32")),
        "VAE output range": str(identity.get("vae_output_range", "")),
        "Batch size": str(numerics["batch_size"]),
        "Device": _device(numerics),
        "Versions": ", ".join(f"{name} {numerics[name]}" for name in _LIBRARIES if name in numerics),
        "Changed since the first run": ", ".join(
            f"{name} was {before}" for name, before, _ in changed_numerics(run_record.numerics, numerics)
        ),
    }
    if entry:
        of_shard = f", of which shard {entry.shard}" if entry.shard else ""
        values["Asked for last"] = f"users {entry.user_ids}, {count(entry.num_images_per_user, 'image')} each{of_shard}"
        values["Last run"] = _course(entry, ended)
    values |= {"Runs": str(len(run_record.history)), "Identity": run_record.run[:_HASH_CHARS]}
    yield from ((name, _cut(value)) for name, value in values.items() if value)


def _guidance(identity: Mapping[str, Any]) -> str:
    """Return how far images were guided, away from what, and at which of the steps; empty where they were not."""
    if "guidance_scale" not in identity:
        return ""
    start, stop = identity.get("guidance_start", 0), identity.get("guidance_stop", 1)
    interval = f", from {start:g} to {stop:g} of the steps" if (start, stop) != (0, 1) else ""
    return f"{identity['guidance_scale']:g} away from {identity.get('null_condition')}{interval}"


def _items(items: Sequence[Item]) -> str:
    """Return images, sorted by user, as text: `user 3: 0 2-4; user 5: 1`."""
    users = groupby(items[:_FAILED_LISTED], lambda item: item[0])
    texts = [_cut(f"user {user_id}: {format_ids(index for _, index in group)}") for user_id, group in users]
    more = f" and {len(items) - _FAILED_LISTED} more" if len(items) > _FAILED_LISTED else ""
    return "; ".join(texts) + more


def _cut(text: str) -> str:
    """Shorten a text, after a whole word where it has words."""
    if len(text) <= _CHARS:
        return text
    return (text[:_CHARS].rpartition(" ")[0] or text[:_CHARS]) + " ..."


def _user_rows(user_index: Mapping[str, int]) -> str:
    """Return the users' rows of the embedding as text, where these are not simply id - 1: `3-5: 0-2, 17: 9`."""
    rows = sorted((int(user_id), row) for user_id, row in user_index.items())
    if all(row == user_id - 1 for user_id, row in rows):
        return ""
    texts = []
    # Where ids and rows both go up by one from pair to pair, so does the pair's number: the differences stay the same.
    for _, run in groupby(
        enumerate(rows), lambda numbered: (numbered[1][0] - numbered[0], numbered[1][1] - numbered[0])
    ):
        user_ids, run_rows = zip(*(pair for _, pair in run), strict=True)
        texts.append(f"{format_ids(user_ids)}: {format_ids(run_rows)}")
    return ", ".join(texts)


def _device(numerics: Mapping[str, Any]) -> str:
    compiled = numerics.get("compiled", "no")
    kernels = [f"compiled: {compiled}" * (compiled != "no"), "TF32" * bool(numerics.get("allow_tf32"))]
    return ", ".join([str(numerics.get("device", "")), *filter(None, kernels)])


def _course(entry: RunEntry, ended: datetime | None) -> str:
    """Return how many images a run made, how long it took, and its rate."""
    made, seconds = count(entry.published, "image"), entry.seconds(ended)
    if seconds is not None:
        seconds = round(seconds)
        rate = f" ({entry.published / seconds:.3g} images/s)" if entry.published and seconds else ""
        made += f" in {timedelta(seconds=seconds)}{rate}"
    started = datetime.fromisoformat(entry.started)
    return f"{made}, {count(entry.num_processes, 'process', 'processes')}, begun {started:%Y-%m-%d %H:%M} UTC"
