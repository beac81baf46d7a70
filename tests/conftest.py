import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.checkpoints import Shape, make_checkpoint

torch.set_num_threads(1)  # float32 changes in its last bits with the number of threads; the launches set it to 1 too


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The default small checkpoint: five users, images of 16 x 16."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), Shape())
