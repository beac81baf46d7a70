"""Loading a classifier from a file: a `.pt2` program, TorchScript, or ONNX; called with images, it returns a table.

A network maps [batch, channels, height, width] float32 in [0, 1] to [batch, columns], logits or features.
"""

import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from userdiff.judge.exported import load_exported

Network = Callable[[Tensor], Tensor]
TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")
NEEDED = "needed: a .pt2 program of torch.export, TorchScript (.pt), .onnx, or file.py:function"
_EXPORT = "torch.export.save(torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim('batch')},)), 'judge.pt2')"


def load_network(path: Path, device: torch.device) -> Network:
    """Load a network onto a device; raises ValueError for a file that is none, OSError for one that cannot be read.

    No file of these kinds runs code of its own when it is loaded or called.
    """
    with path.open("rb"):  # says at once what the system has against it
        pass
    suffix = path.suffix.lower()
    if suffix == ".pt2":
        return _exported(path, device)
    if suffix == ".onnx":
        return _onnx(path, device)
    if suffix in TORCHSCRIPT_SUFFIXES:
        return _torchscript(path, device)
    raise ValueError(f"{path} is of no known kind, {NEEDED}")


def _exported(path: Path, device: torch.device) -> Network:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .pt2 file, needed: one that torch.export.save has written")
    program = load_exported(path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    try:  # what the file says of its guards is Python: torch checks the shapes by itself
        return program.module(check_guards=False)
    except TypeError:  # torch before 2.9 has no such guards
        return program.module()


def _torchscript(path: Path, device: torch.device) -> Network:
    is_script = zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())
    if not is_script:
        raise ValueError(
            f"{path} is a checkpoint of weights, or no file of torch's; needed: the network too, {_EXPORT}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # users are told to export in the manual
            network: nn.Module = torch.jit.load(path, map_location=device)
    except RuntimeError as error:
        raise ValueError(
            f"{path} cannot be loaded as TorchScript ({str(error).strip().splitlines()[-1].strip()})"
        ) from error
    return network.eval()


def _onnx(path: Path, device: torch.device) -> Network:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: onnxruntime is not installed, needed: pip install 'userdiff[onnx]'") from error
    providers = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[*providers, "CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded by onnxruntime ({str(error).strip().splitlines()[0]})") from error
    names = [value.name for value in session.get_inputs()]
    if len(names) != 1:
        raise ValueError(f"{path} takes {len(names)} inputs, needed: one, the images")
    return partial(_run_onnx, session, names[0])


def _run_onnx(session: Any, name: str, images: Tensor) -> Tensor:
    outputs = session.run(None, {name: images.cpu().numpy()})
    return torch.from_numpy(outputs[0]).to(images.device)
