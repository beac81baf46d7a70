"""The flags of a job: their meaning, their defaults, and every check that needs no model."""

import argparse
import dataclasses
import difflib
import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from userdiff.shard import MAX_SHARDS, Shard
from userdiff.text import MAX_USERS, id_range, printable

BUNDLED_CHECKPOINT = Path(__file__).parent / "demo" / "checkpoint"
BUNDLED_JUDGE = Path(__file__).parent / "demo" / "judge.pt2"
BUNDLED_NUM_USERS = 10
DEFAULT_BATCH_SIZE = {"cpu": 16, "cuda": 64}
"""For a new folder, by the kind of device. Larger batches gain little, and lose more when a job is stopped."""
DEFAULT_COMPRESS_LEVEL = 6
MAX_SEED = 2**63 - 1
MAX_USER_ID = 10**18 - 1
MAX_IMAGES_PER_USER = 2**32  # more would share seeds within a user
MODEL_FLAGS = ("vae_path", "unet_path", "condition_encoder_path")
_USERS_FLAGS = ("train_user_ids", "train_data_dir", "user_map")  # each says alone which row a user has
_OTHER_NAMES = {  # flags of the scripts such models are trained and sampled with -> ours
    "checkpoint": "unet_path",
    "class_ids": "user_ids",
    "data_dir": "train_data_dir",
    "data_root": "train_data_dir",
    "dataset_dir": "train_data_dir",
    "ddim_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "images_per_user": "num_images_per_user",
    "num_images": "num_images_per_user",
    "num_samples": "num_images_per_user",
    "num_steps": "num_inference_steps",
    "out_dir": "output_dir",
    "resolution": "sample_size",
    "save_dir": "output_dir",
    "train_dir": "train_data_dir",
    "users": "user_ids",
    "vae_checkpoint": "vae_path",
}

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DASHES = "-\N{EN DASH}\N{EM DASH}"  # a word processor turns two hyphens into one of these

_DESCRIPTION = """\
Generate a labelled image dataset from a user-conditioned latent diffusion model. Without any model path, the bundled
checkpoint is used: ten users, user k writes the digit k-1.

  python batch_generate.py --output_dir out
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml batch_generate.py --vae_path vae --unet_path unet \\
      --condition_encoder_path unet/condition_encoder.pt --num_users 31 --num_images_per_user 1000 --output_dir out

The same command again continues where it was interrupted; what is there is kept."""


class UsageError(Exception):
    """Wrong arguments, model or output folder: the text is one line for the user, `<flag>: <what>`.

    What does not print, such as a line break in a file's name, is escaped.
    """

    exit_status = 2

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


@contextmanager
def errors_of(flag: str) -> Iterator[None]:
    """Turn an error about bad input, raised within this block, into a UsageError that names the flag it came by.

    For a file that the operating system refused, the flag's help says what is needed instead. A full disk is no bad input:
    its error passes.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) in _FULL:
            raise
        what = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            what = f"{os.fsdecode(error.filename)} cannot be used ({error.strerror})"
            for declared in dataclasses.fields(JobConfig):
                if flag == f"--{declared.name}":
                    what += f", needed: {declared.metadata['help'].partition(' (default: ')[0]}"
        raise UsageError(f"{flag}: {what}") from error


def null_condition_row(text: str) -> int | None:
    """Return the row of the table that a null condition is made of, `row:R`; None for `zeros`. Raises ValueError."""
    match = re.fullmatch(r"row:([0-9]{1,9})", text)
    if match is None and text != "zeros":
        raise ValueError(f"{text!r} is no null condition, needed: zeros, or row:R as row:0")
    return int(match[1]) if match else None


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceFlags:
    """The flags of classifier-free guidance."""

    scale: float = 1.0
    null_condition: str | None = None
    """`zeros` or `row:R`."""
    start: float = 0.0
    stop: float = 1.0

    def check(self) -> None:
        """Raise ValueError naming the flag for values that do not go together."""
        if self.null_condition is not None:
            try:
                null_condition_row(self.null_condition)
            except ValueError as error:
                raise ValueError(f"null_condition: {error}") from error
        elif self.scale != 1:
            raise ValueError(
                f"null_condition: missing with --guidance_scale {self.scale:g}, needed: zeros or row:R, whichever the model was "
                "trained with; another gives plausible images that are wrong"
            )
        if self.start >= self.stop:
            raise ValueError(
                f"guidance_stop: {self.stop:g} is not after --guidance_start {self.start:g}, needed: a larger fraction of the "
                "steps"
            )


NO_GUIDANCE = GuidanceFlags()


# How argparse parses the text of a flag. It puts the message of an ArgumentTypeError into its own error.


def path(text: str) -> Path:
    """Parse a path. An empty one, as from a shell variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path; the current folder is .")
    return Path(text)


def whole_number(text: str) -> int:
    """Parse an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def natural_number(text: str) -> int:
    """Parse an int that is 1 or more."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range, needed: 1 or more")
    return value


def number(text: str) -> float:
    """Parse a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _flag(group: str, help_text: str, default: Any = MISSING, **options: Any) -> Any:
    """Declare a field that is also a flag: one home for its name, default, meaning, parsing and check.

    options: argparse's, and `bounds`, the smallest and the largest value.
    """
    return field(default=default, metadata={"group": group, "help": help_text, **options})


_MODEL, _WHAT, _HOW, _RUN = "the model", "what to make", "how to sample", "how to run"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """One job, checked: every field is the flag of the same name.

    Raises UsageError for a value that is out of range, naming the flag, the rule and the value.
    """

    vae_path: Path = _flag(
        _MODEL, "diffusers folder of the AutoencoderKL, or one holding it as vae/ (default: bundled demo)", type=path
    )
    unet_path: Path = _flag(
        _MODEL, "diffusers folder of the UNet2DConditionModel, or one holding it as unet/; or a file of its weights "
        "(default: bundled demo)",
        type=path,
    )  # fmt: skip
    condition_encoder_path: Path = _flag(
        _MODEL, "file (.pt, .safetensors), or folder with condition_encoder.pt or .safetensors (default: bundled demo)",
        type=path,
    )  # fmt: skip
    num_users: int | None = _flag(
        _MODEL, "rows of the user embedding table (default: what the weights have)",
        None, type=whole_number, metavar="N", bounds=(1, MAX_USERS),
    )  # fmt: skip
    unet_config: Path | None = _flag(
        _MODEL, "config.json of the UNet, or its folder (default: beside the weights)", None, type=path
    )
    scheduler_path: Path | None = _flag(
        _MODEL, "folder with the scheduler_config.json of training (default: the one beside the UNet, else "
        "scaled_linear 0.00085-0.012, epsilon)",
        None, type=path,
    )  # fmt: skip
    train_user_ids: tuple[int, ...] | None = _flag(
        _MODEL, "the ids the model was trained on, ids or ranges, where a user's row in the table is the rank of its id "
        "among them (default: the row is id - 1)",
        None, type=id_range, nargs="+", action="extend", metavar="ID",
    )  # fmt: skip
    train_data_dir: Path | None = _flag(
        _MODEL, "folder of training images whose folders, ID_17, user_17 or 17, name those ids; instead of --train_user_ids "
        "(default: none)",
        None, type=path,
    )  # fmt: skip
    user_map: Path | None = _flag(
        _MODEL, 'JSON file of user id to row in the table, {"17": 0, "23": 1}; instead of --train_user_ids (default: none)',
        None, type=path,
    )  # fmt: skip
    null_row: int | None = _flag(
        _MODEL, "row of the table that is no user's, as trainers with a null condition have one; the others are counted "
        "without it (default: none)",
        None, type=whole_number, metavar="N", bounds=(0, MAX_USERS - 1),
    )  # fmt: skip
    sample_size: tuple[int, ...] | None = _flag(
        _MODEL, "side of the latents, or height and width (default: sample_size in the UNet's config.json)",
        None, type=natural_number, nargs="+", metavar="N",
    )  # fmt: skip
    scaling_factor: float | None = _flag(
        _MODEL, "what latents were multiplied by in training, 1 if by nothing (default: the VAE's config.json)",
        None, type=number,
    )  # fmt: skip
    vae_output_range: str = _flag(
        _MODEL, "the pixel range the VAE was trained on: unit = [0, 1], signed = [-1, 1] (default: %(default)s)",
        "unit", choices=("unit", "signed"),
    )  # fmt: skip
    on_incompatible_weights: str = _flag(
        _MODEL, "what to do when the condition encoder's weights do not fit: stop, or go on with seeded random weights "
        "and mark every row as such (default: %(default)s)",
        "error", choices=("error", "random"),
    )  # fmt: skip

    user_ids: tuple[int, ...] | None = _flag(
        _WHAT, "ids and ranges, such as 1 5 10-15 (default: all)",
        None, type=id_range, nargs="+", action="extend", metavar="ID",
    )  # fmt: skip
    num_images_per_user: int = _flag(
        _WHAT, "images of each user, image_index 0 to N-1 (default: %(default)s)",
        5, type=whole_number, metavar="N", bounds=(1, MAX_IMAGES_PER_USER),
    )  # fmt: skip
    shard: str | None = _flag(
        _WHAT, "I/N: of these, the I-th of N shards, each in a folder of its own, for `userdiff merge`; auto: the one of this "
        "task of a Slurm array or Kubernetes Indexed Job (default: all of it)",
        None, metavar="I/N",
    )  # fmt: skip
    num_shards: int | None = _flag(
        _WHAT, "how many shards there are, with --shard auto, where task 0 makes the first (default: the tasks of the Slurm "
        "array)",
        None, type=whole_number, metavar="N", bounds=(1, MAX_SHARDS),
    )  # fmt: skip
    output_dir: Path = _flag(
        _WHAT, "folder of the dataset, one that can be written to; made if needed (default: ./%(default)s)",
        Path("generated_images"), type=path,
    )  # fmt: skip

    num_inference_steps: int = _flag(
        _HOW, "DDIM steps (default: %(default)s)", 20, type=whole_number, metavar="N", bounds=(1, 2**16 - 1)
    )
    seed: int = _flag(
        _HOW, "base seed, 0 to 2^63-1; every image's own seed follows from it (default: %(default)s)",
        42, type=whole_number, bounds=(0, MAX_SEED),
    )  # fmt: skip
    eta: float = _flag(
        _HOW, "DDIM stochasticity, 0 to 1: 0 is deterministic, 1 is DDPM (default: %(default)s)",
        0.0, type=number, bounds=(0, 1),
    )  # fmt: skip

    guidance_scale: float = _flag(
        _HOW, "classifier-free guidance: null + S * (condition - null); 1 is without (default: %(default)s)",
        1.0, type=number, metavar="S", bounds=(0, 1000),
    )  # fmt: skip
    null_condition: str | None = _flag(
        _HOW, "what guidance leads away from, as the model was trained with it: zeros, a token of zeros, or row:R, what the "
        "encoder makes of row R of the table; needed where S is not 1 (default: none)",
        None, metavar="zeros|row:R",
    )  # fmt: skip
    guidance_start: float = _flag(
        _HOW, "fraction of the steps at which guidance begins (default: %(default)s)", 0.0, type=number, bounds=(0, 1)
    )
    guidance_stop: float = _flag(
        _HOW, "fraction of the steps at which guidance ends (default: %(default)s)", 1.0, type=number, bounds=(0, 1)
    )

    device: str = _flag(
        _RUN, "under a multi-process launch each process takes its own GPU (default: %(default)s)",
        "auto", choices=("auto", "cuda", "cpu"),
    )  # fmt: skip
    batch_size: int | None = _flag(
        _RUN, "images in every forward pass (default: what the folder began with, else "
        f"{DEFAULT_BATCH_SIZE['cuda']} on a GPU, {DEFAULT_BATCH_SIZE['cpu']} on a CPU)",
        None, type=whole_number, metavar="N", bounds=(1, 2**16),
    )  # fmt: skip
    mixed_precision: str | None = _flag(
        _RUN, "precision of the UNet and the VAE (default: the launcher's, else no)",
        None, choices=("no", "fp16", "bf16"),
    )  # fmt: skip
    dry_run: bool = _flag(
        _RUN, "check everything, print what would be made, and change nothing (default: off)", False, action="store_true"
    )  # fmt: skip
    overwrite: bool = _flag(
        _RUN, "start again: first remove what a job wrote in the output folder, and nothing else (default: off)",
        False, action="store_true",
    )  # fmt: skip
    allow_tf32: bool = _flag(
        _RUN, "let float32 matrix products use TF32 on GPUs that have it (default: off)", False, action="store_true"
    )
    png_compress_level: int | None = _flag(
        _RUN, "0 to 9: how hard to compress; up to 3 with one fixed filter, several times faster and a sixth larger "
        f"(default: what the folder began with, else {DEFAULT_COMPRESS_LEVEL})",
        None, type=whole_number, metavar="N", bounds=(0, 9),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every value; nothing is corrected silently."""
        self._take_what_python_gives()
        flags = [(declared, getattr(self, declared.name)) for declared in dataclasses.fields(self)]
        for declared, value in flags:
            choices = declared.metadata.get("choices")
            if choices and value not in choices and value != declared.default:
                raise UsageError(f"--{declared.name}: {value!r} is none of {', '.join(choices)}")
        self._check_ids("user_ids", self.user_ids)
        self._check_ids("train_user_ids", self.train_user_ids)
        for declared, value in flags:
            bounds = declared.metadata.get("bounds")
            if bounds and value != declared.default and not bounds[0] <= value <= bounds[1]:
                raise UsageError(f"--{declared.name}: {value} is out of range, needed: {bounds[0]} to {bounds[1]}")
        if self.sample_size is not None and len(self.sample_size) > 2:
            raise UsageError(f"--sample_size: {len(self.sample_size)} numbers, needed: one, or height and width")
        if self.scaling_factor is not None and not 0 < self.scaling_factor < float("inf"):
            raise UsageError(f"--scaling_factor: {self.scaling_factor} is out of range, needed: a number above 0")
        self._check_guidance()
        given = [name for name in _USERS_FLAGS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"--{given[1]}: {getattr(self, given[1])} goes without --{given[0]}, both say which row a user has"
            )
        if self.shard not in (None, "auto"):
            with errors_of("--shard"):
                Shard.parse(str(self.shard))
        if self.num_shards is not None and self.shard != "auto":
            raise UsageError(f"--num_shards: {self.num_shards} goes with --shard auto alone; --shard I/N says N itself")
        self._check_output_dir()

    def _check_guidance(self) -> None:
        try:
            self.guidance.check()
        except ValueError as error:
            raise UsageError(f"--{error}") from error

    @property
    def guidance(self) -> GuidanceFlags:
        """The flags of guidance, together."""
        return GuidanceFlags(
            scale=float(self.guidance_scale),
            null_condition=self.null_condition,
            start=float(self.guidance_start),
            stop=float(self.guidance_stop),
        )

    @property
    def is_bundled(self) -> bool:
        """True for the model that comes with the package."""
        return self.unet_path == BUNDLED_CHECKPOINT

    def batch_size_and_level(self, numerics: Mapping[str, Any], device_type: str) -> tuple[int, int]:
        """Return (batch size, PNG compression level): the flag's, else what the folder began with, else the default.

        numerics: those in the folder's `run.json`, empty for a new folder. device_type: `cpu` or `cuda`.
        """
        level = self.png_compress_level
        return (
            self.batch_size or numerics.get("batch_size", DEFAULT_BATCH_SIZE[device_type]),
            numerics.get("png_compress_level", DEFAULT_COMPRESS_LEVEL) if level is None else level,
        )

    def _take_what_python_gives(self) -> None:
        """Let a path be a string, and a size one number, where this is built by hand."""
        for declared in dataclasses.fields(self):
            value = getattr(self, declared.name)
            if declared.metadata.get("type") is path and isinstance(value, str):
                object.__setattr__(self, declared.name, path(value))
        if isinstance(self.sample_size, int):
            object.__setattr__(self, "sample_size", (self.sample_size,))

    @staticmethod
    def _check_ids(name: str, ids: Sequence[int] | None) -> None:
        if ids is None:
            return
        if not ids:
            raise UsageError(f"--{name}: names no user")
        seen: set[int] = set()
        for user_id in ids:
            if user_id < 0:
                raise UsageError(f"--{name}: {user_id} is out of range, user ids start at 0")
            if user_id > MAX_USER_ID:
                raise UsageError(f"--{name}: {user_id} is out of range, user ids end at {MAX_USER_ID}")
            if user_id in seen:
                raise UsageError(f"--{name}: {user_id} is given twice, needed: each id once")
            seen.add(user_id)

    def _check_output_dir(self) -> None:
        """Refuse a path where no folder can be made before the models are loaded, which may take minutes."""
        with errors_of("--output_dir"):
            if not self.output_dir.exists() and (what := _not_meant(str(self.output_dir))):
                raise ValueError(f"{str(self.output_dir)!r} {what}")
            if any("\ud800" <= letter <= "\udfff" for letter in str(self.output_dir)):  # how Python reads other bytes
                raise ValueError(f"{self.output_dir} is not UTF-8, needed: a name that the pages and lines can hold")
            for folder in (self.output_dir, *self.output_dir.parents):
                # Looked up in this order: another process of the job may make the folder in between.
                if os.path.lexists(folder):
                    if folder.is_dir():
                        return
                    kind = "a link that leads nowhere" if folder.is_symlink() else "a file"
                    raise ValueError(f"{folder} is {kind}, needed: a folder, or a path where one can be made")


def _not_meant(path: str) -> str:
    """Return what is wrong with a path that can be made, and that nobody means; empty if nothing is."""
    if "://" in path or re.match(r"[a-z][a-z0-9+.-]+:/", path):  # a Path has one slash of two
        return "is an address, needed: a folder; copy it there when it is complete (docs/scale.md)"
    if path.startswith("="):
        return "begins with =, needed: one after --output_dir; a folder of that name is ./=..."
    if path.startswith("~"):
        return "begins with ~, which a shell replaces only where a word begins, needed: $HOME; a folder of that name is ./~"
    if path.endswith("\r"):
        return "ends in a carriage return, needed: a script without line ends of Windows"
    return ""


def bundled_model() -> dict[str, Any]:
    """Return the model fields of the bundled checkpoint: `JobConfig(**bundled_model(), output_dir=...)`."""
    paths = dict.fromkeys(("vae_path", "unet_path", "condition_encoder_path"), BUNDLED_CHECKPOINT)
    return {**paths, "num_users": BUNDLED_NUM_USERS}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage and exiting: the caller decides which process prints, and when."""
        flag, _, what = message.removeprefix("argument ").partition(": ")
        if what.startswith("expected "):  # one argument, at least one argument
            what = f"{what}; one that begins with - is written {flag}=-..."
        raise UsageError(f"{flag}: {what.replace('ignored explicit argument', 'takes no value, got')}")


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Make the parser from the fields of JobConfig."""
    parser = _Parser(
        prog=prog,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, group in groupby(dataclasses.fields(JobConfig), key=lambda declared: declared.metadata["group"]):
        arguments = parser.add_argument_group(title)
        for declared in group:
            # JobConfig checks choices and bounds, in the same words in every Python.
            options = {k: v for k, v in declared.metadata.items() if k not in ("group", "choices", "bounds")}
            if choices := declared.metadata.get("choices"):
                options["metavar"] = f"{{{','.join(choices)}}}"
            default = None if declared.default is MISSING else declared.default
            arguments.add_argument(f"--{declared.name}", default=default, **options)
    return parser


def parse_args(argv: Sequence[str] | None = None, prog: str = "batch_generate.py") -> JobConfig:
    """Parse and check a command line; raises UsageError, and SystemExit(0) after --help."""
    namespace, unknown = make_parser(prog).parse_known_args(argv)
    if unknown:
        raise UsageError(_no_such_flag(unknown[0]))
    values = vars(namespace)
    for name in ("user_ids", "train_user_ids"):
        if values[name] is not None:
            values[name] = tuple(user_id for ids in values[name] for user_id in ids)
    if values["sample_size"] is not None:
        values["sample_size"] = tuple(values["sample_size"])
    return JobConfig(**_with_model(values))


def _no_such_flag(token: str) -> str:
    """Return the message for a token that belongs to no flag, with the flag that was probably meant."""
    flag = token.partition("=")[0]
    if flag.strip(_DASHES) == flag:
        return f"{token!r}: no flag takes it; --help lists them"
    typed = flag.strip(_DASHES).replace("-", "_").lower()
    if typed in _OTHER_NAMES:
        return f"{flag}: no such flag; here it is --{_OTHER_NAMES[typed]}"
    names = [declared.name for declared in dataclasses.fields(JobConfig)]
    meant = [name for name in names if typed and name.startswith(typed)] or difflib.get_close_matches(typed, names, n=1)
    return f"{flag}: no such flag; " + (f"did you mean --{meant[0]}?" if meant else "--help lists them")


def _with_model(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the bundled model where no path is given; raises UsageError where only some of the three are given."""
    missing = [name for name in MODEL_FLAGS if values[name] is None]
    if missing == list(MODEL_FLAGS):
        if values["num_users"] not in (None, BUNDLED_NUM_USERS):
            raise UsageError(
                f"--num_users: {values['num_users']} without model paths; the bundled checkpoint has "
                f"{BUNDLED_NUM_USERS} users, your own needs --vae_path, --unet_path and --condition_encoder_path"
            )
        return {**values, **bundled_model()}
    if missing:
        flags = ", ".join(f"--{name}" for name in missing)
        raise UsageError(f"{flags}: missing; your own model needs all of --{', --'.join(MODEL_FLAGS)}")
    return values
