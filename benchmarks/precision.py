"""What bf16 and fp16 cost in quality, on the bundled checkpoint: jobs of the same seed, against float32.

python -m benchmarks.precision        # wants the `train` extra, for the classifiers
"""

import argparse
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from userdiff.cli import generate
from userdiff.dataset.layout import file_name
from userdiff.demo.digits import NUM_USERS
from userdiff.demo.quality import accuracy_by_digit, split_digits, train_classifier, train_plain_classifier


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images_per_user", type=int, default=50)
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16", "fp16"])
    args = parser.parse_args()
    real = split_digits()
    classifiers = [train(real.images, real.digits) for train in (train_classifier, train_plain_classifier)]
    digits = torch.arange(NUM_USERS).repeat_interleave(args.num_images_per_user)
    items = [(user, index) for user in range(1, NUM_USERS + 1) for index in range(args.num_images_per_user)]
    drawn = {}
    print(
        "| precision | SVC, with shifted copies | plain SVC | mean abs. difference, levels | largest | equal pixels |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for precision in args.precisions:
            output = Path(folder) / precision
            flags = ["--output_dir", str(output), "--mixed_precision", precision, "--device", "cpu"]
            with open(Path(folder) / "log", "w") as log, redirect_stdout(log):
                if generate([*flags, "--num_images_per_user", str(args.num_images_per_user)]):
                    parser.exit(1, f"the job in {precision} failed\n")
            images = np.stack([np.asarray(Image.open(output / file_name(*item))) for item in items])
            drawn[precision] = images
            difference = np.abs(images.astype(int) - drawn[args.precisions[0]])
            shares = [accuracy_by_digit(c, torch.from_numpy(images), digits).values() for c in classifiers]
            accuracies = " | ".join(f"{sum(share) / len(share):.1%}" for share in shares)
            print(
                f"| {precision} | {accuracies} | {difference.mean():.2f} | {difference.max()} | {(difference == 0).mean():.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
