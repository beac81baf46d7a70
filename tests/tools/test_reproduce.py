"""An image made again by itself is the job's file, to the byte; and what a training loop has is left as it was."""

import random
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.checkpoints import model_flags
from tests.definitions import NUMERICS, entry_of, name_of, record_of, write_dataset
from tests.jobs import run_job
from tests.oracle import assert_parity, oracle_seed
from userdiff import UserConditionEncoder, generate_samples, load_model, make_image, parse_args
from userdiff.diffusion.schedule import TRAINING_NOISE

# One image again


@pytest.fixture(scope="module")
def job(checkpoint, tmp_path_factory):
    """The flags of a small job whose folder is not there; `--num_users 5` of the checkpoint."""
    flags = [*model_flags(checkpoint), "--device", "cpu", "--num_inference_steps", "3", "--num_images_per_user", "3"]
    return [*flags, "--output_dir", str(tmp_path_factory.mktemp("job") / "none")]


def prepare(flags, precision="no"):
    config = parse_args(flags)
    return config, load_model(config, torch.device("cpu"), precision)


@pytest.fixture(scope="module")
def prepared(job):
    return prepare(job)


@pytest.fixture
def model(prepared):
    """A model of its own for a test that changes it, or listens to it."""
    return deepcopy(prepared[1])


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ([], "no"),
        (["--eta", "0.7", "--seed", "7", "--batch_size", "5", "--train_user_ids", "3", "17", "40"], "no"),
        (["--mixed_precision", "bf16"], "bf16"),
    ],
    ids=["default", "eta, odd batches and users by rank", "bf16"],
)
def test_an_image_made_again_is_the_same_file(job, tmp_path, flags, precision):
    flags = [*job, *flags, "--output_dir", str(tmp_path)]
    assert run_job(*flags) == 0
    config, model = prepare(flags, precision)
    items = [(user_id, image_index) for user_id in model.user_index for image_index in range(3)]
    for item in items[::2]:
        assert make_image(config, model, *item) == (tmp_path / name_of(*item)).read_bytes(), item


def test_the_folders_own_batch_size_is_taken(job, tmp_path, model):
    record = record_of(entry_of(), identity=model.identity, numerics={**NUMERICS, "batch_size": 6})
    here = [*job, "--output_dir", str(write_dataset(tmp_path, {}, record))]
    sizes = []
    model.unet.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    for flags in (here, [*here, "--batch_size", "2"], job):
        make_image(parse_args(flags), model, 1, 0)
    assert sizes == [6] * 3 + [2] * 3 + [16] * 3


def test_flags_other_than_the_jobs_are_refused(job, tmp_path, prepared):
    other = record_of(entry_of(), identity={**prepared[1].identity, "seed": 1, "eta": 0.5})
    config = parse_args([*job, "--output_dir", str(write_dataset(tmp_path, {}, other))])
    with pytest.raises(ValueError, match=r"^--output_dir: .* \(eta was 0.5, is 0.0; seed was 1, is 42\)$"):
        make_image(config, prepared[1], 1, 0)


@pytest.mark.parametrize(("user_id", "image_index", "slot"), [(1, 0, 4), (1, 2, 6), (2, 0, 1), (5, 1, 1), (3, 9, 0)])
def test_an_image_has_the_jobs_slot_of_the_batch(job, model, user_id, image_index, slot):
    """Slots of a batch of 7, by the golden ratio: floor(7 * frac(user_id / 1.618...)) + image_index, modulo 7."""
    batches = []
    model.unet.register_forward_hook(lambda _, args, __: batches.append(args[0].clone()))
    make_image(parse_args([*job, "--batch_size", "7"]), model, user_id, image_index)
    seeds = [oracle_seed(42, user_id, image_index) if row == slot else 0 for row in range(7)]
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.equal(batches[0], torch.stack(noise))


def test_numbers_of_a_table_will_do(prepared):
    assert make_image(*prepared, np.int64(4), np.int64(2)) == make_image(*prepared, 4, 2)


NO_USER = r"^user_id: {!r} is unknown, this model has users 1-5$"
NO_INDEX = r"^image_index: .*-?\d+\)? is out of range, needed: 0 to 4294967295$"


@pytest.mark.parametrize(
    ("item", "what"),
    [
        *(((user_id, 0), NO_USER.format(user_id)) for user_id in (0, 6, -1, "3")),
        *(((1, image_index), NO_INDEX) for image_index in (-1, np.int64(-1), 2**32)),
    ],
)
def test_an_image_that_no_job_makes_is_refused(prepared, item, what):
    with pytest.raises(ValueError, match=what):
        make_image(*prepared, *item)


def test_an_image_that_is_not_finite_is_refused(prepared, model):
    model.condition_encoder.user_embedding.weight.data[2] = float("nan")
    make_image(prepared[0], model, 2, 0)
    with pytest.raises(ValueError, match=r"^image 1 of user 3 is not finite"):
        make_image(prepared[0], model, 3, 1)


def kernel_settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.enabled, matmul.allow_tf32


@pytest.fixture
def kernels_of_a_notebook():
    """The settings of somebody who wants speed."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
        yield
    matmul.allow_tf32 = before


@pytest.mark.parametrize("fails", [False, True])
def test_make_image_leaves_torchs_settings_as_they_were(prepared, model, kernels_of_a_notebook, fails):
    during = []
    model.unet.register_forward_hook(lambda *_: during.append(kernel_settings()))
    if fails:
        model.condition_encoder.user_embedding.weight.data.fill_(float("inf"))
    before, generators = kernel_settings(), generator_states()
    with pytest.raises(ValueError, match="not finite") if fails else nullcontext():
        make_image(prepared[0], model, 1, 0)
    assert set(during) == {(False, True, False, True, False)}
    assert kernel_settings() == before == (True, False, True, True, True)
    np.testing.assert_equal(generators, generator_states())


# From a training loop


def generator_states():
    numpys = np.random.get_state(legacy=False)  # noqa: NPY002 - the global one is what is looked after
    return {"torch": torch.get_rng_state().numpy(), "numpy": numpys, "python": random.getstate()}


class Training:
    """The models of a training loop in the midst of it, each part in a mode of its own."""

    def __init__(self, checkpoint: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").train()
        self.vae = AutoencoderKL.from_pretrained(checkpoint / "vae").eval().requires_grad_(False)
        self.condition_encoder = UserConditionEncoder(5, 16).train()
        self.condition_encoder.load_state_dict(load_file(checkpoint / "condition_encoder.safetensors"))
        self.noise_scheduler = DDPMScheduler(**TRAINING_NOISE)
        self.unet.mid_block.eval()  # as where a part is frozen
        self.unet.conv_in.requires_grad_(False)
        self.vae.decoder.train()
        token = self.condition_encoder(torch.tensor([0, 3])).unsqueeze(1)
        self.unet(torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), token).sample.square().mean().backward()

    @property
    def modules(self):
        return [self.unet, self.condition_encoder, self.vae]

    def sample(self, **options):
        images = generate_samples(*self.modules, self.noise_scheduler, **{"num_inference_steps": 3, **options})
        assert not images.requires_grad
        return images

    def state(self):
        """All that sampling might change, as plain numbers."""
        parameters = [(name, p) for module in self.modules for name, p in module.named_parameters()]
        return {
            "modes": [(name, part.training) for module in self.modules for name, part in module.named_modules()],
            "requires_grad": [(name, p.requires_grad) for name, p in parameters],
            "weights": [(name, p.detach().numpy().copy()) for name, p in parameters],
            "gradients": [(name, None if p.grad is None else p.grad.numpy().copy()) for name, p in parameters],
            "schedule": (dict(self.noise_scheduler.config), self.noise_scheduler.timesteps.numpy().copy()),
            "is_grad_enabled": torch.is_grad_enabled(),
        }


@pytest.fixture
def training(checkpoint):
    torch.manual_seed(1)
    return Training(checkpoint)


@pytest.mark.parametrize(
    ("eta", "raises"), [(0.0, None), (0.5, None), (0.5, "unet"), (0.5, "condition_encoder"), (0.5, "vae")]
)
def test_sampling_leaves_a_training_loop_as_it_was(training, eta, raises):
    before, generators = training.state(), generator_states()
    assert {mode for _, mode in before["modes"]} == {True, False}
    assert any(gradient is not None for _, gradient in before["gradients"])

    def fail(*_):
        raise KeyboardInterrupt

    if raises:
        module = getattr(training, raises)
        handle = (module.decoder if raises == "vae" else module).register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt) if raises else nullcontext():
        training.sample(user_ids=[1, 2], eta=eta)
    if raises:
        handle.remove()
    np.testing.assert_equal(before, training.state())
    np.testing.assert_equal(generators, generator_states())


@contextmanager
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def train_a_little(training, modules):
    unet, condition_encoder, _ = modules
    optimizer = torch.optim.AdamW([*unet.parameters(), *condition_encoder.parameters()], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        latents, noise, timesteps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.randint(1000, (4,))
        noisy = training.noise_scheduler.add_noise(latents, noise, timesteps)
        token = condition_encoder(torch.randint(5, (4,))).unsqueeze(1)
        (unet(noisy, timesteps, token).sample - noise).square().mean().backward()
        optimizer.step()


def test_samples_are_the_images_of_a_job_on_the_checkpoint_saved_then(training, tmp_path):
    with process_group():
        wrapped = [*map(DistributedDataParallel, training.modules[:2]), training.vae]
        train_a_little(training, wrapped)
        training.unet, training.condition_encoder = map(extract_model_from_parallel, wrapped[:2])
        images = training.sample(user_ids=[1, 2, 3, 4, 5], num_images_per_user=2, seed=9)
        weights = wrapped[1].state_dict()
    assert all(name.startswith("module.") for name in weights)
    torch.save({"step": 3, "condition_encoder_state_dict": weights}, tmp_path / "condition_encoder.pt")
    training.unet.save_pretrained(tmp_path / "unet")
    training.vae.save_pretrained(tmp_path / "vae")
    flags = [*model_flags(tmp_path), "--num_inference_steps", 3, "--num_images_per_user", 2, "--seed", 9]
    assert run_job(*flags, "--device", "cpu", "--output_dir", tmp_path / "out") == 0
    items = [(user_id, image_index) for user_id in range(1, 6) for image_index in range(2)]
    assert_parity(tmp_path / "out", dict(zip(items, images.numpy(), strict=True)))
