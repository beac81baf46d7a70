"""Small judges for tests: one network in every kind of file, and what it says, written out plainly."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

NUM_CLASSES = 5
SIDE = 16  # of the images
KINDS = ("judge.pt2", "judge.torchscript", "judge.onnx")
FUNCTION = """
def bright(images, user_ids):
    means = images.float().mean(dim=(1, 2, 3))
    return {"brightness": means / 255, "odd": [user_id % 2 for user_id in user_ids]}
"""


class Network(nn.Module):
    """Logits [batch, NUM_CLASSES] from the means of 4 x 4 patches, by fixed weights."""

    def __init__(self, num_classes=NUM_CLASSES, channels=3):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.register_buffer("weights", 3 * torch.randn(channels * 16, num_classes, generator=generator))

    def forward(self, images):
        return avg_pool2d(images, SIDE // 4).flatten(1) @ self.weights


def save(path: Path, network: nn.Module | None = None, *, batch_size: int | None = None) -> Path:
    """Write the network as the kind of file that the name says; for batches of one size, if it is given."""
    network = network or Network()
    images = torch.zeros(batch_size or 2, 3, SIDE, SIDE)
    if path.suffix == ".pt2":
        dynamic = None if batch_size else ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=dynamic), path)
    elif path.suffix == ".onnx":
        save_onnx(path, network)
    else:
        torch.jit.trace(network, images).save(path)
    return path


def save_onnx(path: Path, network: nn.Module) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("AveragePool", ["images"], ["means"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "judge",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", NUM_CLASSES])],
        [numpy_helper.from_array(network.weights.numpy(), "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def expected_scores(pixels, own_class):
    """What the network says of one image, [height, width, 3] uint8: (confidence, margin), from the definition."""
    patches = pixels.astype(float).reshape(4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(1, 3)) / 255  # [4, 4, 3]
    logits = patches.transpose(2, 0, 1).ravel() @ Network().weights.double().numpy()
    powers = [np.exp(logit - max(logits)) for logit in logits]
    probabilities = [power / sum(powers) for power in powers]
    best_other = max(p for number, p in enumerate(probabilities) if number != own_class)
    return probabilities[own_class], probabilities[own_class] - best_other
