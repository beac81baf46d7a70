"""Tensors on disk as trainers leave them: whole files, shards, variants, training checkpoints, wrapped modules' names.

Two questions are answered apart: which files hold the weights (`find_weights`), and which of their tensors are the
module's own (`own_tensors`). Neither is ever guessed: where two answers are possible, both are named and nothing is loaded.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor

from userdiff.text import listed

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DIFFUSERS_STEM = "diffusion_pytorch_model"
FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Of files that hold weights; `.safetensors` in that format, the others as torch pickles."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DDP, torch.compile, FSDP and activation checkpointing put into the names of a module's tensors."""
_NUM_AVERAGED = "n_averaged"  # beside the tensors of torch's AveragedModel
_OLD_ATTENTION = (  # diffusers before 0.13 -> since
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
)
_ACCELERATE = re.compile(r"(?:model|pytorch_model|pytorch_model_fsdp)(?:_\d+)?\.(?:safetensors|bin)")
"""What `accelerator.save_state` calls the models of a run, by the order in which they were prepared."""
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")
_LFS_POINTER = b"version https://git-lfs"
_SHOWN = 6  # files of a folder that a message names


def ignore(_note: str) -> None:
    """Take a note and do nothing with it."""


@contextmanager
def silence() -> Iterator[None]:
    """Keep libraries from warning, within this block, of what is checked after it, and refused in one line."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


class NoWeightsError(FileNotFoundError):
    """A folder holds no file of weights that could be meant."""


class NoFitError(ValueError):
    """A checkpoint holds tensors, but none of a name that the module has."""


@dataclass(frozen=True)
class Weights:
    """Files that together hold the weights of one module."""

    files: tuple[Path, ...]
    """One file, or all shards."""
    name: str
    """The file that stands for them: the one, or the shards' index."""
    variant: str = ""
    """`fp16` in `diffusion_pytorch_model.fp16.safetensors`."""


# Which files ---------------------------------------------------------------------------------------------------------


def find_weights(folder: Path, stem: str = DIFFUSERS_STEM) -> tuple[list[Weights], list[str]]:
    """Return the weights of a diffusers folder, and notes on what lies beside them and is not used.

    More than one is returned where several complete ones could be meant, such as a `.safetensors` and a `.bin`; the caller
    compares what they hold. A variant (`fp16`, `non_ema`) is returned only where nothing else is there, as diffusers does.
    Raises NoWeightsError where there are none, ValueError where shards are missing.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    found, broken = _whole_and_sharded(files, stem)
    chosen = [weights for weights in found if not weights.variant] or found
    if chosen:
        used = {file for weights in chosen for file in weights.files}
        others = [file.name for file in files if _is_other(file) and file not in used]
        notes = [f"{what}; {chosen[0].name} is complete, and used" for what in broken]
        if others:
            notes.append(
                f"{folder} also holds {listed(others, limit=3)}, which is not used; name the file itself to use it"
            )
        return chosen, notes
    if broken:
        raise ValueError(f"{broken[0]}, needed: all shards, or one whole file")
    if accelerate := [Weights((file,), file.name) for file in files if _ACCELERATE.fullmatch(file.name)]:
        return accelerate, []
    if shards := [file.name for file in files if _SHARD.fullmatch(file.name)]:
        raise ValueError(
            f"{folder} holds {listed(shards, limit=2)}, but not their {stem}...index.json, needed: that too"
        )
    if any(folder.rglob("*.distcp")):
        raise ValueError(
            f"{folder} holds a distributed checkpoint (.distcp), needed: one file, which `accelerate merge-weights` makes of it"
        )
    raise NoWeightsError(
        f"{folder} holds no weights ({contents(folder)}), needed: {stem}.safetensors, or the name of the file"
    )


def _whole_and_sharded(files: Sequence[Path], stem: str) -> tuple[list[Weights], list[str]]:
    """Return the weights that are complete, and what is to be said of an index whose shards are not all there."""
    found, broken = [], []
    for file in files:
        whole = re.fullmatch(rf"{stem}(?:\.([^.]+))?(?:\.safetensors|\.bin)", file.name)
        index = re.fullmatch(rf"{stem}\.(?:safetensors|bin)\.index(?:\.([^.]+))?\.json", file.name)
        if whole and not _SHARD.fullmatch(file.name):
            found.append(Weights((file,), file.name, whole[1] or ""))
        elif index:
            shards = [file.with_name(name) for name in sorted(set(_shard_names(file)))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                broken.append(f"{file} names {listed(missing, limit=3)}, which are not there")
            else:
                found.append(Weights(tuple(shards), file.name, index[1] or ""))
    return found, broken


def _is_other(file: Path) -> bool:
    """Return whether a file may hold weights, and not a trainer's or an optimizer's state."""
    is_state = re.match(r"optimizer|scheduler|scaler|random_states", file.name)
    return file.suffix in FILE_SUFFIXES and not is_state and not _SHARD.fullmatch(file.name)


def contents(folder: Path) -> str:
    """Return what a folder holds, for a message: `it holds a.txt, b/`."""
    names = [f"{path.name}{'/' if path.is_dir() else ''}" for path in sorted(folder.iterdir())]
    return f"it holds {listed(names, limit=_SHOWN)}" if names else "it is empty"


def _shard_names(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map, needed: what diffusers' save_pretrained writes")
    if beyond := [shard for shard in shards.values() if Path(shard).name != shard]:
        raise ValueError(f"{index} names {beyond[0]!r}, needed: files of its own folder")
    return list(shards.values())


# What a file holds ---------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, with or without a byte order mark; raises ValueError saying what the file is instead."""
    content = file.read_bytes()
    _refuse_stand_in(file, content)
    try:
        value = json.loads(content)  # detects UTF-8, -16 and -32
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON, needed: what diffusers' save_pretrained writes") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object, needed: what diffusers' save_pretrained writes")
    return value


def read(weights: Weights, on_note: Callable[[str], None] = ignore) -> dict[str, Any]:
    """Read everything that files of weights hold. Raises ValueError for a file that cannot be read, naming it.

    on_note: called with a line on what a file holds beside tensors and plain values, which is not loaded.
    """
    content: dict[str, Any] = {}
    for file in weights.files:
        part = _read_file(file, on_note)
        if not isinstance(part, Mapping) or (isinstance(part, _Foreign) and not part):
            raise ValueError(
                f"{file} holds one {type(part).__name__}, needed: a state dict of tensors by name{_save_the_state_dict(part)}"
            )
        content |= part
    return content


def _read_file(file: Path, on_note: Callable[[str], None]) -> Any:
    with file.open("rb") as opened:
        _refuse_stand_in(file, opened.read(512))
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except OSError:
            raise
        except Exception as error:  # of a library of its own
            raise ValueError(
                f"{file} cannot be read as a safetensors file; it is cut short, or not one; save or copy it again"
            ) from error
    try:
        with silence():  # of what is then refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle and zip each fail in ways of their own
        is_script = zipfile.is_zipfile(file) and any(
            name.endswith("/constants.pkl") for name in zipfile.ZipFile(file).namelist()
        )
        if is_script:  # torch.load would hand it to a loader that runs what it holds
            raise ValueError(f"{file} is a TorchScript module, needed: a state dict") from error
        if isinstance(error, pickle.UnpicklingError):
            return _read_foreign(file, on_note)
        raise ValueError(
            f"{file} cannot be read as a torch file of plain tensors; it is cut short, or not one"
        ) from error


def _refuse_stand_in(file: Path, head: bytes) -> None:
    if not head:
        raise ValueError(f"{file} is empty, needed: the whole file; save or copy it again")
    if head.startswith(_LFS_POINTER):
        raise ValueError(f"{file} is a Git LFS pointer and not the file itself; `git lfs pull` fetches that")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{file} is a web page and not the file itself; download it again")


def _read_foreign(file: Path, on_note: Callable[[str], None]) -> Any:
    """Read a pickle that holds objects beside its tensors: the tensors are loaded, and of the rest nothing is run."""
    foreign: list[str] = []
    try:
        with silence():
            content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_inert_pickle(foreign))
    except Exception as error:  # pickle and zip each fail in ways of their own
        what = f"it holds {listed(foreign, limit=3)}, " if foreign else ""
        raise ValueError(
            f"{file} cannot be read as a torch file of plain tensors; {what}it is cut short, or not one; save the state_dict() "
            "again"
        ) from error
    on_note(f"{file} also holds {listed(sorted(set(foreign)), limit=3)}; only its tensors were loaded")
    return content


class _Foreign(dict[Any, Any]):
    """Stands for an object of a class that is not loaded: takes whatever pickle gives it, and keeps items of a mapping."""

    def __new__(cls, *_args: Any, **_options: Any) -> "_Foreign":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return super().__new__(cls)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def append(self, _item: Any) -> None: ...

    def extend(self, _items: Any) -> None: ...

    def add(self, _item: Any) -> None: ...

    def __call__(self, *_args: Any, **_options: Any) -> "_Foreign":
        return self


_REBUILT = {  # all that is called while a file is read: what makes tensors of bytes, and plain containers
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
}


def _parameter_without_state(tensor: Tensor, *_state: Any) -> Tensor:
    """Make of a parameter with attributes of somebody's own a tensor."""
    return tensor


def _plain_dict(*_factory: Any) -> dict[Any, Any]:
    """Make of a defaultdict a dict."""
    return {}


def _inert_pickle(foreign: list[str]) -> Any:
    """Return a `pickle_module` for torch.load that makes tensors, and a `_Foreign` of anything else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            is_type = module == "torch" and (
                name.endswith("Storage") or isinstance(getattr(torch, name, 0), torch.dtype)
            )
            is_storage = (module, name) == ("torch.storage", "UntypedStorage")
            if (module, name) in _REBUILT or is_type or is_storage:
                return super().find_class(module, name)
            if (module, name) == ("torch._utils", "_rebuild_parameter_with_state"):
                return _parameter_without_state
            if (module, name) == ("collections", "defaultdict"):
                return _plain_dict
            foreign.append(f"{module}.{name}")
            return type(name, (_Foreign,), {"__module__": module})

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__="userdiff's inert pickle")


# Which tensors -------------------------------------------------------------------------------------------------------


def own_tensors(
    content: Mapping[str, Any],
    needed: Mapping[str, Tensor],
    source: str,
    preferred: str = "",
    on_note: Callable[[str], None] = ignore,
) -> dict[str, Tensor]:
    """Return the tensors of a module from among all that a checkpoint holds.

    Mappings are searched at every depth for the one whose names fit best; names may carry what wrappers put into them, and
    a prefix in front of all (`unet.`).

    needed: the module's own names.
    source: what messages call the checkpoint.
    preferred: the key under which trainers keep this module; where it is there, nothing else is looked at.
    on_note: called with a line on averages of weights that lie beside and are not used.
    Raises ValueError where nothing fits, and where several fit equally and differ.
    """
    averages = [
        str(name)
        for name, value in content.items()
        if isinstance(value, Mapping | list | tuple) and re.search(r"ema|average|shadow", str(name), re.IGNORECASE)
    ]
    if isinstance(content.get(preferred), Mapping):
        content = {preferred: content[preferred]}
    candidates = []
    for place, tensors in _mappings(content):
        candidates += [(place + prefix, own) for prefix, own in _by_prefix(_unwrapped(tensors, needed, source), needed)]
    if not candidates:
        raise ValueError(f"{source} holds no state dict ({_held(content)}), needed: tensors by name")
    best = max(_num_fitting(own, needed) for _, own in candidates)
    if not best:
        raise NoFitError(f"{source} has no tensor {next(iter(needed))}, nor any other that is needed; {_held(content)}")
    fitting = [(place, own) for place, own in candidates if _num_fitting(own, needed) == best]
    for place, own in fitting[1:]:
        if not same_tensors(own, fitting[0][1]):
            raise ValueError(
                f"{source} holds two that fit and differ, under {fitting[0][0]!r} and {place!r}; save the one that is meant "
                "alone"
            )
    if others := [name for name in averages if not fitting[0][0].startswith(name)]:
        on_note(f"{source} also holds {listed(others, limit=3)}, which is not used; a file of that alone would be")
    return fitting[0][1]


def load_own(
    sets: Sequence[Weights],
    needed: Mapping[str, Tensor],
    preferred: str = "",
    on_note: Callable[[str], None] = ignore,
) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors of a module from the one of several sets of files that holds it, and that file.

    Raises ValueError where several hold it and differ; NoFitError where none does; what `own_tensors` raises.
    """
    found: list[tuple[dict[str, Tensor], Path]] = []
    for weights in sets:
        file = weights.files[0].with_name(weights.name)
        notes: list[str] = []
        try:
            found.append((own_tensors(read(weights, notes.append), needed, str(file), preferred, notes.append), file))
        except ValueError as error:
            if len(sets) == 1 or not isinstance(error, NoFitError):
                raise type(error)("; ".join([str(error), *notes])) from error
        for note in notes:
            on_note(note)
    if not found:
        folder = sets[0].files[0].parent
        raise NoFitError(
            f"{folder} has no tensor {next(iter(needed))}, nor any other that is needed; {contents(folder)}"
        )
    best = max(_num_fitting(own, needed) for own, _ in found)
    fitting = [(own, file) for own, file in found if _num_fitting(own, needed) == best]
    for own, file in fitting[1:]:
        if not same_tensors(own, fitting[0][0]):
            raise ValueError(
                f"{file.parent} holds both {fitting[0][1].name} and {file.name}, which differ; name the file that is meant, or "
                "move the other away"
            )
    return fitting[0]


def check_fit(
    tensors: Mapping[str, Tensor],
    needed: Mapping[str, Tensor],
    source: str,
    *,
    by: str = "",
    error: type[ValueError] = ValueError,
) -> None:
    """Raise an `error` for the first tensor that is missing, has another shape, or has no place; `by` says whose word that is."""
    for name, tensor in needed.items():
        if name not in tensors:
            raise error(f"{source} has no tensor {name}, needed{by} with shape {list(tensor.shape)}")
        if tensors[name].shape != tensor.shape:
            raise error(f"{source} has {name} with shape {list(tensors[name].shape)}, needed{by}: {list(tensor.shape)}")
    for name in tensors:
        if name not in needed:
            raise error(
                f"{source} has a tensor {name} with shape {list(tensors[name].shape)}, needed{by}: no such tensor"
            )


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two state dicts hold the same names, types and numbers."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def as_float32(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return tensors of which names and shapes were checked in float32, dense; raises ValueError for what is no number.

    Only those `needed` are touched, and only after their shapes were checked: an expanded tensor of a few bytes may
    stand for gigabytes.
    """
    for name in needed:
        tensor = tensors[name]
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}"
            raise ValueError(f"{source} holds {name} as {kind}, needed: floating-point numbers, dense, stored")
    plain = {name: tensors[name].float().contiguous() for name in needed}
    for name, tensor in plain.items():
        # of the extremes, which NaN takes for its own: seconds faster than asking every number
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise ValueError(
                f"{source} holds NaN or infinity in {name}; the file is damaged or training diverged, needed: another"
            )
    return plain


def _mappings(content: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _mappings(value, f"{place}{name}.")


def _unwrapped(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return tensors without what wrappers put into their names, or beside them."""
    own: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        name = stored if stored in needed else ".".join(part for part in stored.split(".") if part not in _WRAPPERS)
        if name == _NUM_AVERAGED:
            continue
        if name in own:
            raise ValueError(f"{source} holds a tensor twice, {name} and {stored}, needed: each once")
        own[name] = tensor
    return own


def _by_prefix(tensors: dict[str, Tensor], needed: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (prefix, the tensors that have it, without it), for every prefix under which the module may be."""
    first = next(iter(needed))
    prefixes = {name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")}
    for prefix in sorted(prefixes or {""}):
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        yield prefix, {_of_today(name, needed): tensor for name, tensor in own.items()}


def _of_today(name: str, needed: Mapping[str, Tensor]) -> str:
    """Return the name that diffusers gives today to a tensor of a VAE's attention."""
    for old, new in _OLD_ATTENTION:
        if name not in needed and name.replace(old, new) in needed:
            return name.replace(old, new)
    return name


def _num_fitting(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> int:
    return len(tensors.keys() & needed.keys())


def _held(content: Mapping[str, Any]) -> str:
    names: Sequence[str] = [str(name) for name in content]
    return f"it holds {listed(names, limit=_SHOWN)}" if names else "it holds nothing"


def _save_the_state_dict(value: Any) -> str:
    return ", of its state_dict(); a module itself is code and is not loaded" if isinstance(value, _Foreign) else ""
