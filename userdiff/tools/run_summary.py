"""What a page says of a run: the facts of its record, and what is not as it should be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

from userdiff.dataset.rows import Item, Table
from userdiff.dataset.run_record import RunRecord, changed_numerics
from userdiff.text import format_ids

_FAILED_LISTED = 100
_CHARS = 300  # of a fact; a mapping of many users has more
_HASH_CHARS = 12  # enough to tell it from another
_EDITED = (LookupError, TypeError, ValueError, AttributeError, OverflowError)  # what a record edited by hand leads to

Values = Mapping[str, Any]


def count(number: int, what: str, plural: str = "") -> str:
    """Write a number of things: `1 image`, `2 images`."""
    return f"{number} {what if number == 1 else plural or what + 's'}"


def notices(rows: Table, run_record: RunRecord | None, ended: datetime | None = None) -> Iterator[str]:
    """Tell what is not as it should be, a line each; `ended` as for `facts`."""
    if any(rows.block(user_id)["is_random"].any() for user_id in rows.user_ids):
        yield "The condition encoder's weights were RANDOM: images do not show the users they are filed under."
    entry = _last_run(run_record)
    state = entry.get("state", "ended")
    if state == "running" and ended is None:
        yield "The last run is under way, or was killed."
    elif state not in ("running", "ended"):
        yield f"The last run did not come to its end: {_cut(str(state))}."
    with suppress(*_EDITED):
        failed = {(int(user_id), int(image_index)) for user_id, image_index in entry["failed"]}
        failed = {item for item in failed if not rows.of_image(*item)}
        if failed:
            yield f"{count(len(failed), 'image')} failed in the last run: {_items(sorted(failed))}"


def facts(run_record: RunRecord, ended: datetime | None = None) -> Iterator[tuple[str, str]]:
    """Tell how a dataset was made, as (name, value); what its record does not say, or says oddly, is left out.

    ended: when the last run ended, where that is now and its entry does not say so yet.
    """
    entry = _last_run(run_record)
    numerics = entry.get("numerics", run_record.numerics)
    sources: list[tuple[dict[str, Callable[[Any], str]], Any]] = [
        (_OF_IDENTITY, run_record.identity),
        (_OF_NUMERICS, numerics),
        ({"Changed since the first run": lambda new: _changes(run_record.numerics, new)}, numerics),
        ({"Asked for last": _request, "Last run": lambda entry: _course(entry, ended)}, entry),
        ({"Runs": lambda record: str(len(record.history)), "Identity": lambda record: _brief(record.run)}, run_record),
    ]
    for tellers, source in sources:
        for name, tell in tellers.items():
            with suppress(*_EDITED):
                if value := tell(source):
                    yield name, _cut(value)


def _last_run(run_record: RunRecord | None) -> dict[str, Any]:
    entry = run_record.history[-1] if run_record and run_record.history else None
    return entry if isinstance(entry, dict) else {}


def _items(items: Sequence[Item]) -> str:
    """Write images, sorted by user: `user 3: 0 2-4; user 5: 1`."""
    users = groupby(items[:_FAILED_LISTED], lambda item: item[0])
    texts = [_cut(f"user {user_id}: {format_ids(index for _, index in group)}") for user_id, group in users]
    more = f" and {len(items) - _FAILED_LISTED} more" if len(items) > _FAILED_LISTED else ""
    return "; ".join(texts) + more


def _cut(text: str) -> str:
    """Shorten a text, after a whole word where it has words."""
    if len(text) <= _CHARS:
        return text
    return (text[:_CHARS].rpartition(" ")[0] or text[:_CHARS]) + " ..."


def _brief(content_hash: str) -> str:
    return content_hash[:_HASH_CHARS]


# What decides the pixels ---------------------------------------------------------------------------------------------


def _checkpoint(identity: Values) -> str:
    vae, unet, encoder = identity["vae"]["weights"], identity["unet"]["weights"], identity["condition_encoder"]
    return f"VAE {_brief(vae)}, UNet {_brief(unet)}, condition encoder {_brief(encoder)}"


def _noise_schedule(identity: Values) -> str:
    """Give what differs from the scheduler's defaults, as the record has it."""
    return ", ".join(f"{name} {value}" for name, value in identity["noise_schedule"].items()) or "DDIM's defaults"


def _user_rows(identity: Values) -> str:
    """Give the rows of the embedding, where they are not simply id - 1."""
    rows = sorted((int(user_id), index) for user_id, index in identity["user_index"].items())
    if all(row == user_id - 1 for user_id, row in rows):
        return ""
    runs: list[list[int]] = []  # first id, its row, how many ids follow with the rows that follow
    for user_id, row in rows:
        if runs and (user_id, row) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1][2] += 1
        else:
            runs.append([user_id, row, 1])
    return ", ".join(f"{_span(user_id, number)}: {_span(row, number)}" for user_id, row, number in runs)


def _span(first: int, number: int) -> str:
    return str(first) if number == 1 else f"{first}-{first + number - 1}"


_OF_IDENTITY: dict[str, Callable[[Any], str]] = {
    "Checkpoint": _checkpoint,
    "Noise schedule": _noise_schedule,
    "Row of the embedding, by user": _user_rows,
    "Steps": lambda identity: f"{identity['num_inference_steps']} of DDIM",
    "Seed": lambda identity: str(identity["seed"]),
    "Eta": lambda identity: str(identity.get("eta", "")),
    "Precision": lambda identity: str(identity.get("mixed_precision", "float32")),
    "VAE output range": lambda identity: str(identity.get("vae_output_range", "")),
}


# What may change their last bits -------------------------------------------------------------------------------------


def _device(numerics: Values) -> str:
    compiled = numerics.get("compiled", "no")
    kernels = [f"compiled: {compiled}" * (compiled != "no"), "TF32" * bool(numerics.get("allow_tf32"))]
    return ", ".join([numerics["device"], *filter(None, kernels)])


def _versions(numerics: Values) -> str:
    return ", ".join(
        f"{name} {numerics[name]}"
        for name in ("torch", "cuda", "hip", "cudnn", "triton", "diffusers", "pillow")
        if name in numerics
    )


def _changes(first: Values, last: Values) -> str:
    return ", ".join(f"{name} was {before}" for name, before, _ in changed_numerics(first, last))


_OF_NUMERICS: dict[str, Callable[[Any], str]] = {
    "Batch size": lambda numerics: str(numerics["batch_size"]),
    "Device": _device,
    "Versions": _versions,
}


# How its last run went -----------------------------------------------------------------------------------------------


def _request(entry: Values) -> str:
    return f"users {entry['user_ids']}, {count(entry['num_images_per_user'], 'image')} each"


def _course(entry: Values, ended: datetime | None) -> str:
    """Tell how many images a run made, in which time, at which rate."""
    started = datetime.fromisoformat(entry["started"])
    until = datetime.fromisoformat(entry["ended"]) if entry["ended"] else ended
    made = count(entry["published"], "image")
    if until is not None:
        seconds = max(round((until - started).total_seconds()), 0)
        rate = f" ({entry['published'] / seconds:.3g} images/s)" if entry["published"] and seconds > 0 else ""
        made += f" in {timedelta(seconds=seconds)}{rate}"
    return f"{made}, {count(entry['num_processes'], 'process', 'processes')}, begun {started:%Y-%m-%d %H:%M} UTC"
