"""Train the bundled checkpoint: a small VAE, then a user-conditioned UNet on its latents.

`python -m userdiff.demo.train` makes the bundled one again.

Ten users, user k writes the digit k - 1, index = user_id - 1. Samples during training come from
`userdiff.generate_samples`, the same sampling as in the batch job. Training takes about an hour on two CPU cores; if
other work shares them, OMP_NUM_THREADS=1 is faster.
"""

import argparse
import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from userdiff.demo.digits import IMAGE_SIZE, NUM_USERS, load_digits
from userdiff.demo.quality import CHECKPOINT, report
from userdiff.diffusion.checkpoint import load_vae
from userdiff.diffusion.conditioning import FILE_STEM, UserConditionEncoder
from userdiff.diffusion.schedule import load_noise_scheduler
from userdiff.diffusion.training_loop import generate_samples

KL_WEIGHT = 1e-4  # per latent value, beside an error per pixel value: noise of about 1 % of the range
L1_WEIGHT = 0.1  # flat black background, sharper strokes than the squared error alone
MAX_SNR_WEIGHT = 5.0  # Hang et al. 2023, https://arxiv.org/abs/2303.09556
CONDITION_DROPOUT = 0.1  # share of images denoised without a user, for guidance
EMA_DECAY = 0.999


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags; the defaults make the bundled checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m userdiff.demo.train",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=CHECKPOINT, help="where the finished checkpoint goes")
    parser.add_argument("--work_dir", type=Path, default=Path("demo_training"), help="sample grids, checkpoints so far")
    parser.add_argument("--vae_path", type=Path, help="a VAE trained before, in place of stage 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=2500)
    parser.add_argument("--vae_batch_size", type=int, default=32)
    parser.add_argument("--vae_channels", type=int, nargs=3, default=[16, 32, 64])
    parser.add_argument("--unet_steps", type=int, default=4000)
    parser.add_argument("--unet_batch_size", type=int, default=64)
    parser.add_argument("--unet_channels", type=int, nargs=2, default=[64, 96])
    parser.add_argument("--guidance", type=float, default=0.4, help="how far the model's own guidance goes, 0 = none")
    parser.add_argument("--guidance_start", type=float, default=0.7, help="share of the UNet steps before guidance")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--sample_every", type=int, default=500, help="steps from one sample grid to the next")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then measure the checkpoint as it lies on disk."""
    args = parse_args(argv)
    train(args)
    print(report(args.output_dir))


def train(args: argparse.Namespace) -> None:
    """Run both stages and publish the checkpoint in `output_dir`."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images, digits = load_digits()
    pixels = images.permute(0, 3, 1, 2).float() / 255  # [5000, 3, 32, 32] in [0, 1]
    vae_path = args.vae_path
    if vae_path is None:
        vae_path = args.work_dir / "vae"
        save_half(train_vae(pixels, args), vae_path)
    vae = load_vae(vae_path)  # as rounded to half precision: stage 2 learns the latents that are decoded later
    save_grid(reconstruct(vae, pixels[::125]), args.work_dir / "reconstructions.png", columns=8)
    train_denoiser(vae, pixels, digits, args)
    publish(args.work_dir / "checkpoint", args.output_dir)


# Stage 1: the VAE


def new_vae(channels: Sequence[int]) -> AutoencoderKL:
    """Make a VAE of images [batch, 3, 32, 32] and latents [batch, 4, 8, 8]."""
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def train_vae(pixels: Tensor, args: argparse.Namespace) -> AutoencoderKL:
    """Train a VAE on pixels [n, 3, 32, 32] in [0, 1] and normalise its latents."""
    torch.manual_seed(args.seed)
    vae = new_vae(args.vae_channels)
    optimizer, schedule = optimizer_and_schedule(vae, 2 * args.learning_rate, args.vae_steps)
    progress = tqdm(range(args.vae_steps), desc="VAE", mininterval=5)
    for _ in progress:
        loss = vae_loss(vae, pixels[torch.randint(len(pixels), (args.vae_batch_size,))])
        update(vae, loss, optimizer, schedule)
        progress.set_postfix(loss=f"{loss.item():.5f}", refresh=False)
    normalise_latents(vae.eval(), pixels)
    return vae


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Reconstruction error of pixels [batch, 3, 32, 32] through a sampled latent, plus the KL term."""
    posterior = vae.encode(pixels).latent_dist
    error = vae.decode(posterior.sample()).sample - pixels
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.square().mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """pixels: [n, 3, 32, 32] -> mean and standard deviation of their latents, each [n, 4, 8, 8], unscaled."""
    posteriors = [vae.encode(batch).latent_dist for batch in pixels.split(250)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Centre each latent channel exactly, in the 1x1 convolutions around it, and set `scaling_factor` to 1 / std."""
    mean, std = encode(vae, pixels)
    offset = mean.mean(dim=(0, 2, 3))
    vae.quant_conv.bias[: len(offset)] -= offset
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ offset
    variance = (mean - offset[:, None, None]).square() + std.square()
    print("latents: mean", offset.tolist(), "std", variance.mean(dim=(0, 2, 3)).sqrt().tolist())
    vae.register_to_config(scaling_factor=1 / variance.mean().sqrt().item())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels: [n, 3, 32, 32] -> [2n, 32, 32, 3] uint8, each image beside its reconstruction."""
    pairs = torch.stack([pixels, vae.decode(encode(vae, pixels)[0]).sample.clamp(0, 1)], dim=1).flatten(0, 1)
    return (pairs * 255).to(torch.uint8).permute(0, 2, 3, 1)


# Stage 2: the UNet and the condition encoder


def new_unet(channels: Sequence[int]) -> UNet2DConditionModel:
    """Make a UNet of latents [batch, 4, 8, 8] with cross-attention to one token at both resolutions."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """The UNet and the condition encoder, trained and averaged as one."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.unet = new_unet(channels)
        self.condition_encoder = UserConditionEncoder(NUM_USERS, self.unet.config.cross_attention_dim)

    def forward(self, latents: Tensor, timesteps: Tensor, user_index: Tensor, keep: Tensor) -> Tensor:
        """Predict the noise in latents [batch, 4, 8, 8]; where keep [batch] is 0, without knowing the user."""
        token = self.condition_encoder(user_index) * keep[:, None]
        noise: Tensor = self.unet(latents, timesteps, token.unsqueeze(1), return_dict=False)[0]
        return noise


def train_denoiser(vae: AutoencoderKL, pixels: Tensor, user_index: Tensor, args: argparse.Namespace) -> None:
    """Train on the latents of pixels [n, 3, 32, 32], of users at rows user_index [n]; leaves `work_dir/checkpoint`."""
    torch.manual_seed(args.seed + 1)
    scheduler = load_noise_scheduler(None)
    mean, std = (tensor * vae.config.scaling_factor for tensor in encode(vae, pixels))
    denoiser = Denoiser(args.unet_channels)
    average = copy.deepcopy(denoiser).requires_grad_(False).eval()
    optimizer, schedule = optimizer_and_schedule(denoiser, args.learning_rate, args.unet_steps)
    progress = tqdm(range(1, args.unet_steps + 1), desc="UNet", mininterval=5)
    for step in progress:
        chosen = torch.randint(len(mean), (args.unet_batch_size,))
        latents = mean[chosen] + std[chosen] * torch.randn_like(std[chosen])
        guidance = args.guidance if step > args.guidance_start * args.unet_steps else 0.0
        loss = denoiser_loss(denoiser, average, scheduler, latents, user_index[chosen], guidance)
        update(denoiser, loss, optimizer, schedule)
        update_average(average, denoiser, step)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if step % args.sample_every == 0 or step == args.unet_steps:
            save_checkpoint(average, vae, scheduler, args.work_dir / "checkpoint")
            save_samples(average, vae, scheduler, args.work_dir / f"samples_{step:05d}.png")


def denoiser_loss(
    denoiser: Denoiser,
    average: Denoiser,
    scheduler: DDPMScheduler,
    latents: Tensor,
    user_index: Tensor,
    guidance: float,
) -> Tensor:
    """Min-SNR weighted error of the predicted noise, for clean, scaled latents [batch, 4, 8, 8].

    guidance: w of Tang et al. 2025, https://arxiv.org/abs/2502.12154: the target moves by w times what knowing the
    user changes, so that one pass of the finished model predicts what classifier-free guidance would need two for.
    """
    noise = torch.randn_like(latents)
    timesteps = stratified_timesteps(len(latents), scheduler.config.num_train_timesteps)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    keep = (torch.rand(len(latents)) >= CONDITION_DROPOUT).float()
    target = noise
    if guidance > 0:
        difference = average_difference(average, noisy, timesteps, user_index)
        target = noise + guidance * keep[:, None, None, None] * difference
    error = mse_loss(denoiser(noisy, timesteps, user_index, keep), target, reduction="none").mean(dim=(1, 2, 3))
    alphas_cumprod = scheduler.alphas_cumprod[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (error * (MAX_SNR_WEIGHT / snr).clamp(max=1)).mean()


@torch.no_grad()
def average_difference(average: Denoiser, noisy: Tensor, timesteps: Tensor, user_index: Tensor) -> Tensor:
    """Return what knowing the user changes in the averaged model's prediction: [batch, 4, 8, 8]."""
    known, unknown = torch.ones(len(noisy)), torch.zeros(len(noisy))
    difference: Tensor = average(noisy, timesteps, user_index, known) - average(noisy, timesteps, user_index, unknown)
    return difference


def stratified_timesteps(batch_size: int, num_train_timesteps: int) -> Tensor:
    """Draw one timestep from each of `batch_size` equal parts of the schedule: [batch_size] int64."""
    return ((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size * num_train_timesteps).long()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the averaged weights towards the model's, faster in the beginning so that the random start is forgotten."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for kept, parameter in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(parameter, 1 - decay)


# Both stages


def optimizer_and_schedule(model: nn.Module, peak: float, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW with a warm-up over 4 % of the steps, then a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=1e-2, fused=True)
    warm_up = max(1, steps // 25)

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, LambdaLR(optimizer, factor)


def update(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
    """One optimizer step down the gradient of `loss`, its norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


# Files


def save_half(model: AutoencoderKL | UNet2DConditionModel, folder: Path) -> None:
    """Save a diffusers model in half precision, without the path it came from; the model itself stays as it is."""
    copy.deepcopy(model).half().save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_checkpoint(denoiser: Denoiser, vae: AutoencoderKL, scheduler: DDPMScheduler, folder: Path) -> None:
    """Write the four parts of a checkpoint under `folder`, in half precision, replacing what was there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_half(vae, temporary / "vae")
    save_half(denoiser.unet, temporary / "unet")
    scheduler.save_pretrained(temporary / "scheduler")
    weights = denoiser.condition_encoder.state_dict()
    save_file({name: tensor.half() for name, tensor in weights.items()}, temporary / f"{FILE_STEM}.safetensors")
    publish(temporary, folder)


def publish(source: Path, folder: Path) -> None:
    """Copy the folder `source` next to `folder`, then put it in its place; files get the umask's permissions."""
    fresh, old = (folder.with_name(f".{folder.name}.{name}") for name in ("fresh", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, fresh, copy_function=shutil.copyfile)  # safetensors writes its files 0600
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_samples(denoiser: Denoiser, vae: AutoencoderKL, scheduler: DDPMScheduler, file: Path) -> None:
    """Draw a row of samples for each user with the job's own sampling."""
    users = range(1, NUM_USERS + 1)
    images = generate_samples(
        denoiser.unet, denoiser.condition_encoder, vae, scheduler, users, num_images_per_user=10, batch_size=50
    )
    save_grid(images, file, columns=10)


def save_grid(images: Tensor, file: Path, columns: int) -> None:
    """images: [n, height, width, 3] uint8, n a multiple of columns -> one PNG, row by row, twice the size."""
    n, height, width, channels = images.shape
    grid = images.view(n // columns, columns, height, width, channels).permute(0, 2, 1, 3, 4)
    picture = Image.fromarray(grid.reshape(n // columns * height, columns * width, channels).numpy())
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(file)


if __name__ == "__main__":
    main()
