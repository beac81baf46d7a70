"""Loading a `.pt2` file that may be anybody's: tensors and torch's own operators, nothing that runs code.

`torch.export.load` warns that it trusts a file. Beside tensors a file may hold pickled objects, compiled libraries, sizes
that are evaluated as Python, and names of any function below `torch`. A classifier needs none of these: a file that has
one is refused before torch reads it.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

_HOLDS_TENSORS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)|"
    r"data/sample_inputs/model\.pt"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|pow|[lg][et]|eq|ne)"
)
_SYMBOL = re.compile(r"Symbol\('(\w+)'(, \w+=(True|False))*\)", re.ASCII)
_SIZE = re.compile(r"[\w+\-*/(), ]*", re.ASCII)
_IN_SIZES = re.compile(r"[suz]\d+|zuf\d+|int_oo|Max|Min|Mod|FloorDiv|CleanDiv|CeilDiv|PythonMod")
_NAME = re.compile(r"[\w.]*", re.ASCII)
_IMPORTS = re.compile(r"__|\\u|defaultdict")  # in what describes the arguments: classes that torch would import
_TENSORS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_MAX_JSON = 2**27  # bytes of a description


def load_exported(path: Path) -> ExportedProgram:
    """Load what `torch.export.save` wrote; raises ValueError for anything but tensors and torch's operators."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive)
        with _only_tensors():
            return torch.export.load(path)
    except (OSError, ValueError):
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} cannot be loaded by torch {torch.__version__} ({first_line})") from error


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Have torch unpickle tensors alone within this block, of the example inputs too."""
    before = os.environ.get(_TENSORS_ALONE)
    os.environ[_TENSORS_ALONE] = "1"
    try:
        yield
    finally:
        del os.environ[_TENSORS_ALONE]
        if before is not None:
            os.environ[_TENSORS_ALONE] = before


def _check(archive: zipfile.ZipFile) -> None:
    for info in archive.infolist():
        _, _, name = info.filename.partition("/")  # every name begins with that of the archive
        if not _HOLDS_TENSORS.fullmatch(name) or (name.endswith(".json") and info.file_size > _MAX_JSON):
            raise ValueError(
                f"{archive.filename} holds {info.filename} of {info.file_size} bytes, needed: what torch.export.save writes of "
                "a network"
            )
        if name.endswith(".json"):
            for key, value in _fields(json.loads(archive.read(info))):
                if key in _CHECKS and not _CHECKS[key](value):
                    raise ValueError(
                        f"{archive.filename}: {info.filename} has the {key} {str(value)[:60]!r}, needed: tensors and torch's own "
                        "operators alone"
                    )


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) of every mapping in a parsed JSON text."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            yield from one.items()
            left += one.values()
        elif isinstance(one, list):
            left += one


def _is_size(text: Any) -> bool:
    """Return whether a text is a formula of numbers and symbols, and calls nothing but arithmetic."""
    if not isinstance(text, str):
        return False
    plain = _SYMBOL.sub(r"\1", text)
    return _SIZE.fullmatch(plain) is not None and all(map(_IN_SIZES.fullmatch, re.findall(r"[A-Za-z_]\w*", plain)))


_CHECKS: dict[str, Callable[[Any], bool]] = {  # field of a description -> whether a value is one of a plain network
    "use_pickle": lambda value: not value,
    "target": lambda value: _OPERATOR.fullmatch(str(value)) is not None,
    "expr_str": _is_size,
    "name": lambda value: _NAME.fullmatch(str(value)) is not None,  # torch writes Python from these
    "in_spec": lambda value: not _IMPORTS.search(str(value)),
    "out_spec": lambda value: not _IMPORTS.search(str(value)),
}
