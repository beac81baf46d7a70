"""Make the folders beside this file with the code of another commit: what was made then has to be good for later code.

    git worktree add /tmp/then 548d3c2
    cd /tmp/then && PYTHONPATH=. OMP_NUM_THREADS=1 python PROJECT/tests/golden/make.py PROJECT/tests/golden/548d3c2

They are never made anew: another CPU rounds otherwise, and they stand for datasets that people have.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MODEL = "--vae_path {0} --unet_path {0} --condition_encoder_path {0} --num_users 5"
JOBS = {  # by name: what is asked for, besides the model
    "plain": "--num_inference_steps 2 --user_ids 1 3 5 --num_images_per_user 2 --batch_size 4",
    "eta": "--num_inference_steps 2 --user_ids 2 --num_images_per_user 3 --eta 0.5 --batch_size 3 --seed 7",
    "signed": "--num_inference_steps 2 --user_ids 4 --num_images_per_user 2 --vae_output_range signed",
    "bf16": "--num_inference_steps 2 --user_ids 1 --num_images_per_user 2 --mixed_precision bf16",
    "ranked": "--num_inference_steps 2 --train_user_ids 3 17 20 21 40 --user_ids 17 40 --num_images_per_user 2",
    "random": "--num_inference_steps 2 --user_ids 1 --num_images_per_user 2 --on_incompatible_weights random",
    "other_users": "--num_inference_steps 2 --user_ids 2 4 --num_images_per_user 2 --batch_size 4",
}
STOPPED = "--num_inference_steps 60 --user_ids 1 2 --num_images_per_user 6 --batch_size 1"


def command(name: str, flags: str) -> list[str]:
    """Return the command line of a job, its paths relative to the folder they lie in."""
    model = MODEL.format("checkpoint")
    if name == "random":
        model = model.replace("--num_users 5", "--num_users 6")
    script = Path.cwd() / "batch_generate.py"
    return [sys.executable, str(script), "--device", "cpu", *model.split(), *flags.split(), "--output_dir", name]


def main() -> None:
    """Make a checkpoint, whole datasets, and one that was stopped and one that was killed half way."""
    from tests.checkpoints import Shape, make_checkpoint

    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True)
    make_checkpoint(folder / "checkpoint", Shape())
    for name, flags in JOBS.items():
        subprocess.run(command(name, flags), cwd=folder, check=True)
    for name, number in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        process = subprocess.Popen(command(name, STOPPED), cwd=folder)
        while len(list((folder / name).glob("user_*/*.png"))) < 4 and process.poll() is None:
            time.sleep(0.001)
        os.kill(process.pid, number)
        process.wait()


if __name__ == "__main__":
    main()
