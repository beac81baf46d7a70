"""What a judge says of images: named scores of each, from a network's logits or from a function of the user's own."""

import importlib.util
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from userdiff.judge.network import NEEDED, Network, load_network

CONFIDENCE, MARGIN = "confidence", "margin"
NO_CLASS = -1
_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)", re.ASCII)
_SCORE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_MAX_SCORES = 16
_MAX_REASON = 400  # characters

Function = Callable[[Tensor, Sequence[int]], Any]
"""A function of the user's own, of images [batch, height, width, channels] uint8 and the user id of each."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a judge says of a batch."""

    names: tuple[str, ...]
    table: Tensor
    """[batch, names] float32 on the device; NaN where the judge could not tell."""
    predicted: Tensor | None
    """[batch] the most probable class, NO_CLASS where the logits are not finite; None where the judge names no classes."""


Judge = Callable[[Tensor, Sequence[int]], Scores]
"""Returns the scores of uint8 images, [batch, height, width, channels], of these users; raises ValueError where it fails."""


def load_judge(source: str, device: torch.device, classes: Mapping[int, int]) -> Judge:
    """Load a judge; raises ValueError for what is none, OSError for a file that cannot be read.

    source: a file that `load_network` takes, whose output is logits, or `file.py:function`. classes: user id -> class.
    """
    function = function_of(source)
    if function is not None:
        return _of_function(function, source)
    return _of_logits(load_network(Path(source), device), source, classes)


def is_function(source: str) -> bool:
    """Return whether a source names a function of the user's own, `file.py:function`."""
    return _FUNCTION.fullmatch(source) is not None


def function_of(source: str) -> Function | None:
    """Run the Python file that a source names and return its function; None for a source that is a network's file.

    Raises ValueError with the line of the file that fails.
    """
    if not is_function(source):
        if source.endswith(".py"):
            raise ValueError(f"{source} names no function in it, {NEEDED}")
        return None
    file, _, name = source.rpartition(":")
    path = Path(file)
    with path.open("rb"):  # says at once what the system has against it
        pass
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(_where(path, error)) from error
    function: Function | None = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name}")
    return function


@torch.inference_mode()
def call_function(function: Function, source: str, images: Tensor, user_ids: Sequence[int]) -> Any:
    """Return what a function of the user's own returns; raises ValueError with the line of the file that fails."""
    try:
        return function(images, user_ids)
    except Exception as error:
        raise ValueError(_where(Path(source.rpartition(":")[0]), error)) from error


def _where(path: Path, error: BaseException) -> str:
    """Return what an error is, and at which line of the user's file it came up."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = f", line {lines[-1]}" if lines else ""
    return f"{path}{line}: {type(error).__name__}: {error}"


def _of_function(function: Function, source: str) -> Judge:
    """Make a judge of a function of the user's own."""

    def judge(images: Tensor, user_ids: Sequence[int]) -> Scores:
        found = call_function(function, source, images, user_ids)
        if not isinstance(found, Mapping) or not found:
            raise ValueError(
                f"{source} returns {type(found).__name__}, needed: a mapping of a score's name to [batch] floats"
            )
        names = tuple(found)
        if len(names) > _MAX_SCORES or not all(isinstance(name, str) and _SCORE.fullmatch(name) for name in names):
            raise ValueError(
                f"{source} returns the scores {names}, needed: up to {_MAX_SCORES} names of letters and digits"
            )
        try:
            columns = [torch.as_tensor(found[name], dtype=torch.float32, device=images.device) for name in names]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{source} returns scores that are no numbers ({error})") from error
        for name, column in zip(names, columns, strict=True):
            if column.shape != (len(images),):
                raise ValueError(f"{source} returns {name} of shape {list(column.shape)} for {len(images)} images")
        return Scores(names=names, table=torch.stack(columns, dim=1), predicted=None)

    return judge


def _of_logits(network: Network, source: str, classes: Mapping[int, int]) -> Judge:
    """Make a judge of a network: the probability of the user's own class, and that minus the best other."""

    def judge(images: Tensor, user_ids: Sequence[int]) -> Scores:
        logits = run_network(network, images, source)
        if missing := [user_id for user_id in user_ids if classes.get(user_id, logits.shape[1]) >= logits.shape[1]]:
            user_id = missing[0]
            has = f"class {classes[user_id]}" if user_id in classes else "no class"
            raise ValueError(
                f"{source} has {logits.shape[1]} classes, user {user_id} has {has}; --judge_classes says which"
            )
        own = torch.tensor([classes[user_id] for user_id in user_ids], device=images.device).unsqueeze(1)
        probabilities = logits.float().softmax(dim=1)
        confidence = probabilities.gather(1, own)
        others = probabilities.scatter(1, own, -1).amax(dim=1, keepdim=True)
        table = torch.cat([confidence, confidence - others], dim=1)
        predicted = logits.argmax(dim=1).where(logits.isfinite().all(dim=1), NO_CLASS)
        return Scores(names=(CONFIDENCE, MARGIN), table=table, predicted=predicted)

    return judge


@torch.inference_mode()
def run_network(network: Network, images: Tensor, source: str) -> Tensor:
    """Return a network's output for uint8 images [batch, height, width, channels]: [batch, columns].

    It sees the pixels of the PNG in [0, 1], as `ToTensor` gives them, in float32 whatever the job's precision. Raises
    ValueError where it takes no such images, or returns another shape.
    """
    pixels = images.permute(0, 3, 1, 2).float().div(255).contiguous()
    try:
        with torch.autocast(images.device.type, enabled=False):
            output = network(pixels)
    except Exception as error:
        shape = " x ".join(map(str, pixels.shape))
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(said)
        reason = reason if len(reason) <= _MAX_REASON else said[-1]  # below a traceback of the network's own code
        raise ValueError(f"{source} takes no images of {shape} (batch, channels, height, width): {reason}") from error
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images) or output.shape[1] < 2:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{source} returns {found} for {len(images)} images, needed: [{len(images)}, columns], logits or features"
        )
    return output
