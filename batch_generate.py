"""Generate an image dataset from a user-conditioned diffusion model; run plainly or under `accelerate launch`."""

import sys

from userdiff.cli import generate

if __name__ == "__main__":
    sys.exit(generate())
