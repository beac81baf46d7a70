"""What decides the pixels of a dataset: the identity, its hash, and how two of them differ."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any

OPTION_DEFAULTS = {
    "eta": 0.0,
    "mixed_precision": "no",
    "vae_precision": "default",
    "vae_output_range": "unit",
    "conditioning": "trained",
    "latents": "scaled",
    "guidance_scale": 1.0,
    "null_condition": "none",
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
}
"""An option at its default is left out of the identity, so that a new option changes no old dataset's hash.

`vae_precision` differs from its default only where fp16 has the VAE run in bf16, `latents` only where the VAE's config
has a shift_factor, or latents_mean and latents_std.
"""
_BRIEF = 12  # characters of a value that a message shows
_LISTED = 3  # changed fields of one nested mapping, such as the users' rows, that a message names


def make_identity(required: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity with these fields and these options, as it will read back from JSON."""
    chosen = {name: value for name, value in options.items() if value != OPTION_DEFAULTS[name]}
    identity: dict[str, Any] = json.loads(json.dumps({**required, **chosen}))
    return identity


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an identity's canonical JSON, 64 hex digits; every PNG carries it as `userdiff_run`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields in which two mappings differ: (dotted name, old value, new value), None where one lacks it."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after


def describe_differences(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    describe: Callable[[str, str, str], str] = "{} was {}, is {}".format,
) -> str:
    """Return one line that names the fields in which two identities differ, of a nested mapping the first few.

    describe: puts one field into words, given its dotted name and its old and new value as messages show them.
    """
    texts: list[str] = []
    for parent, fields in groupby(differences(old, new), key=lambda field: field[0].rpartition(".")[0]):
        changed = list(fields)
        shown = changed[:_LISTED] if parent else changed
        texts += [describe(name, _brief(name, before), _brief(name, after)) for name, before, after in shown]
        texts += [f"and {len(changed) - _LISTED} more of {parent}"] if len(changed) > len(shown) else []
    return "; ".join(texts)


def _brief(name: str, value: Any) -> str:
    """Return a value as messages show it: a hash is cut to what tells it from another."""
    if value is None and name not in OPTION_DEFAULTS:
        return "absent" if name.startswith("user_index.") else "left to diffusers' default"
    text = str(OPTION_DEFAULTS[name] if value is None else value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."
