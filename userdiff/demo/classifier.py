"""Train the bundled judge: a small network that reads a digit, on real handwritten ones.

`python -m userdiff.demo.classifier` makes the bundled one again, in some minutes on one CPU core. Class k - 1 is user k's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from userdiff.config import BUNDLED_JUDGE
from userdiff.demo.digits import IMAGE_SIZE, NUM_USERS
from userdiff.demo.quality import split_digits

NUM_STEPS = 2500
BATCH_SIZE = 64
MAX_ROTATION = 0.2  # radians
MAX_SCALE = 0.1
MAX_SHIFT = 0.1  # of half the image


class Classifier(nn.Module):
    """A convolutional network: [batch, 3, 32, 32] in [0, 1] -> logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.4), nn.Linear(64 * (IMAGE_SIZE // 8) ** 2, NUM_USERS)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Read the digits, whose three channels are equal."""
        logits: Tensor = self.layers(images.mean(dim=1, keepdim=True))
        return logits


def moved(images: Tensor) -> Tensor:
    """Turn, scale and shift images [batch, channels, height, width], each a little otherwise."""
    angle, scale = MAX_ROTATION * signed(len(images)), 1 + MAX_SCALE * signed(len(images))
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift = MAX_SHIFT * torch.stack([signed(len(images)), signed(len(images))], dim=1)
    turned = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    grid = affine_grid(torch.cat([turned, shift.unsqueeze(2)], dim=2), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def signed(number: int) -> Tensor:
    """Draw numbers between -1 and 1: [number]."""
    return 2 * torch.rand(number) - 1


def train(images: Tensor, digits: Tensor, seed: int) -> Classifier:
    """Train on images [n, 32, 32, 3] uint8 of digits [n]."""
    torch.manual_seed(seed)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        chosen = torch.randint(len(pixels), (BATCH_SIZE,))
        loss = cross_entropy(network(moved(pixels[chosen])), digits[chosen], label_smoothing=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, digits: Tensor) -> float:
    """Share of images [n, 32, 32, 3] uint8 that are read as their digits [n]."""
    found = network(images.permute(0, 3, 1, 2).float() / 255).argmax(dim=1)
    return (found == digits).float().mean().item()


def save(network: Classifier, path: Path) -> None:
    """Write the network as a program of torch.export, for batches of any size."""
    images = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    torch.export.save(program, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and print the accuracy on digits that were held out."""
    parser = argparse.ArgumentParser(prog="python -m userdiff.demo.classifier", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=BUNDLED_JUDGE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    real = split_digits()
    network = train(real.images, real.digits, args.seed)
    save(network, args.output)
    print(
        f"{args.output}: {accuracy(network, real.held_out_images, real.held_out_digits):.2%} of {len(real.held_out_digits)}"
    )


if __name__ == "__main__":
    main()
