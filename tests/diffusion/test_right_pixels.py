"""What decides the pixels is read from beside the weights: jobs on checkpoints as people save them, against the oracle."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from tests.checkpoints import Shape, make_checkpoint
from tests.definitions import read_csv
from tests.jobs import run_job
from tests.oracle import assert_parity, oracle_image
from userdiff import JobConfig, UsageError, UserConditionEncoder, load_model, make_image, parse_args
from userdiff.diffusion.schedule import ddim_scheduler, load_noise_scheduler
from userdiff.diffusion.training_loop import generate_samples
from userdiff.identity import identity_hash

NUM_USERS, STEPS = 3, 4
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """A checkpoint of three users, as the oracle reads it."""
    return make_checkpoint(tmp_path_factory.mktemp("truth"), Shape(num_users=NUM_USERS), seed=5)


@pytest.fixture
def folder(truth, tmp_path):
    """A copy of it to be saved otherwise."""
    return shutil.copytree(truth, tmp_path / "model")


@pytest.fixture
def make(folder, tmp_path):
    """Run a job on the copy; the paths of its models may be given as flags."""

    def run(*flags, status=0):
        paths = {"--vae_path": folder / "vae", "--unet_path": folder / "unet", "--condition_encoder_path": folder}
        given = [part for flag, path in paths.items() if flag not in flags for part in (flag, path)]
        how = ["--num_inference_steps", STEPS, "--num_images_per_user", 1, "--batch_size", 4]
        assert run_job(*given, *how, *flags, "--output_dir", tmp_path / "out") == status
        return tmp_path / "out"

    return run


def edit(file, remove=(), **values):
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in content.items() if name not in remove}))


def expected(truth, users=None, **options):
    """Return the oracle's images, by default of the users 1 to 3 in rows 0 to 2."""
    rows = users or {user_id: user_id - 1 for user_id in range(1, NUM_USERS + 1)}
    return {
        (user_id, 0): oracle_image(truth, user_id, 0, steps=STEPS, user_index=row, **options)
        for user_id, row in rows.items()
    }


# The noise schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["scheduler", ".", "unet"])
@pytest.mark.parametrize("is_pipeline", [True, False], ids=["pipeline", "unet"])
def test_the_schedule_beside_the_unet_is_read(place, is_pipeline, truth, folder, make, capsys):
    noise = DDPMScheduler(**TRAINING, prediction_type="v_prediction")
    noise.save_pretrained(folder / place)
    if is_pipeline or place != ".":
        out = make("--unet_path", folder if is_pipeline else folder / "unet")
        assert_parity(out, expected(truth, scheduler=DDIMScheduler.from_config(noise.config)))
        assert "v_prediction" in capsys.readouterr().out


def v_prediction(folder):
    noise = DDPMScheduler(**TRAINING, prediction_type="v_prediction")
    noise.save_pretrained(folder)
    return DDIMScheduler.from_config(noise.config)


def of_a_trainer(folder):
    """The trainer's own config.json lies at the top."""
    (folder / "config.json").write_text('{"lr": 0.0001}')
    return folder, "unet"


def of_a_run(folder):
    """The folder around all begins with unet, and what is named is a file in it."""
    run = folder.rename(folder.with_name("unet_run"))
    weights = run / "unet" / "diffusion_pytorch_model.safetensors"
    return weights.rename(run / "ck.safetensors"), "scheduler"


def of_averages(folder):
    (folder / "unet").rename(folder / "unet_ema")
    return folder, "unet_ema"


def by_a_link(folder):
    (folder.parent / "latest").symlink_to(folder / "unet")
    return folder.parent / "latest", "scheduler"


def from_below(folder):
    (folder / "unet" / "logs").mkdir()
    return folder / "unet" / "logs" / "..", "scheduler"


@pytest.mark.parametrize("arrange", [of_a_trainer, of_a_run, of_averages, by_a_link, from_below])
def test_the_schedule_is_found_wherever_the_unet_really_lies(arrange, truth, folder, make):
    path, place = arrange(folder)
    folder = folder if folder.is_dir() else folder.with_name("unet_run")
    scheduler = v_prediction(folder / place)
    paths = ("--vae_path", folder / "vae", "--condition_encoder_path", folder)
    assert_parity(make("--unet_path", path, *paths), expected(truth, scheduler=scheduler))


def test_the_schedule_beside_a_config_that_lies_elsewhere_is_read(truth, folder, make, tmp_path):
    (tmp_path / "ckpts").mkdir()
    file = (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "ckpts" / "ck.safetensors")
    scheduler = v_prediction(folder / "scheduler")
    assert_parity(make("--unet_path", file, "--unet_config", folder / "unet"), expected(truth, scheduler=scheduler))


@pytest.mark.parametrize("kind", ["dangling", "folder", "config.json"])
def test_a_schedule_that_cannot_be_read_is_not_passed_over(kind, folder, make, capsys):
    (folder / "scheduler").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    if kind == "dangling":
        file.symlink_to("nowhere")
    elif kind == "folder":
        file.mkdir()
    else:
        file.with_name("config.json").write_text("{}")
    make(status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --scheduler_path: ")
    assert str(folder / "scheduler") in line


def test_schedules_that_say_the_same_in_other_words_are_one(truth, folder, make):
    DDPMScheduler(**TRAINING).save_pretrained(folder / "scheduler")
    shutil.copy(folder / "scheduler" / "scheduler_config.json", folder / "unet")
    edit(folder / "unet" / "scheduler_config.json", _diffusers_version="0.1", some_later_option=None)
    assert_parity(make(), expected(truth))


def test_of_a_training_scripts_checkpoint_the_pipeline_around_it_has_the_schedule(truth, folder, make):
    noise = DDPMScheduler(**TRAINING, prediction_type="v_prediction")
    noise.save_pretrained(folder / "scheduler")
    (folder / "checkpoint-10").mkdir()
    (folder / "unet").rename(folder / "checkpoint-10" / "unet")
    for path in (folder / "checkpoint-10", folder / "checkpoint-10" / "unet"):
        out = make("--unet_path", path)
        assert_parity(out, expected(truth, scheduler=DDIMScheduler.from_config(noise.config)))


def test_a_dataset_of_before_the_schedule_was_read_is_refused_with_the_reason(folder, make, capsys):
    make()
    DDPMScheduler(**TRAINING, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    capsys.readouterr()
    make(status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "noise_schedule.prediction_type" in line
    assert str(folder / "scheduler" / "scheduler_config.json") in line


def test_the_flag_goes_before_what_lies_beside(truth, folder, make, tmp_path):
    DDPMScheduler(**TRAINING, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    DDPMScheduler(**TRAINING).save_pretrained(tmp_path / "own")
    own = tmp_path / "own" / "scheduler_config.json"
    assert_parity(make("--scheduler_path", own), expected(truth))


def test_two_schedules_that_differ_are_no_schedule(folder, make, capsys):
    DDPMScheduler(**TRAINING).save_pretrained(folder / "scheduler")
    DDPMScheduler(**TRAINING, prediction_type="v_prediction").save_pretrained(folder / "unet")
    make(status=2)
    err = capsys.readouterr().err
    assert err.startswith("batch_generate.py: error: --scheduler_path: ")
    assert err.count("scheduler_config.json") == 2


SAVED = {  # what the file says -> what DDIM is to be built with
    "of diffusers before 0.10": (
        {"_class_name": "DDPMScheduler", "predict_epsilon": False, "clip_sample": False},
        {"prediction_type": "sample", "clip_sample": False},
    ),
    "the same, of noise": (
        {"_class_name": "DDPMScheduler", "predict_epsilon": True, "clip_sample": False},
        {"prediction_type": "epsilon", "clip_sample": False},
    ),
    "of a sampler that never clips, and whose default is another spacing": (
        {"_class_name": "EulerDiscreteScheduler"},
        {"clip_sample": False, "timestep_spacing": "linspace"},
    ),
    "of a solver": (
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "timestep_spacing": "trailing"},
        {"clip_sample": False, "timestep_spacing": "trailing"},
    ),
    "of a class that clips by default": ({"_class_name": "DDPMScheduler"}, {"clip_sample": True}),
    "of no class": ({}, {"clip_sample": False}),
    "clipped": ({"clip_sample": True, "clip_sample_range": 1.5}, {"clip_sample": True, "clip_sample_range": 1.5}),
    "thresholded": (
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.2},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.2, "clip_sample": False},
    ),
    "zero terminal SNR": (
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        },
    ),
    "another offset": ({"steps_offset": 1, "set_alpha_to_one": False}, {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}),
    "betas of its own": (
        {"trained_betas": [0.001 + 0.00001 * k for k in range(1000)], "beta_start": None, "beta_end": None},
        {"trained_betas": [0.001 + 0.00001 * k for k in range(1000)], "clip_sample": False},
    ),
    "sigmoid, which DDPM alone knows": (
        {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid", "clip_sample": False},
        {"trained_betas": DDPMScheduler(1000, 0.00085, 0.012, "sigmoid").betas.tolist(), "clip_sample": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
def test_what_a_schedule_says_is_honoured(kind, truth, folder, make):
    content, settings = SAVED[kind]
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**base, **content}))
    assert_parity(make(), expected(truth, scheduler=DDIMScheduler(**{**base, **settings})))


UNKNOWN = {
    "a setting nobody knows": ({"snr_gamma_shift": 3.0}, ["snr_gamma_shift", "3.0"]),
    "an alpha schedule of its own": ({"snr_shift_scale": 3.0}, ["snr_shift_scale"]),
    "flow sigmas": ({"use_flow_sigmas": True}, ["use_flow_sigmas", "True"]),
    "continuous timesteps": ({"timestep_type": "continuous"}, ["timestep_type", "'continuous'"]),
    "a switch in words": ({"clip_sample": "false"}, ["clip_sample 'false'", "true or false"]),
    "a number in words": ({"num_train_timesteps": "1000"}, ["num_train_timesteps '1000'", "a whole number"]),
    "a number that is none": ({"thresholding": True, "sample_max_value": None}, ["sample_max_value None"]),
    "one beta": ({"trained_betas": 0.5}, ["no noise schedule"]),
    "two predictions": ({"predict_epsilon": False, "prediction_type": "v_prediction"}, ["predict_epsilon", "v_prediction"]),
    "a schedule unknown": ({"beta_schedule": "zigzag"}, ["beta_schedule", "'zigzag'"]),
    "a range of nothing": ({"clip_sample": True, "clip_sample_range": None}, ["clip_sample_range", "a number"]),
    "no finite step": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "epsilon"},
        ["timestep 999", "v_prediction"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_a_schedule_says_and_nobody_honours_stops(kind, folder, make, capsys):
    content, parts = UNKNOWN[kind]
    DDPMScheduler(**TRAINING).save_pretrained(folder / "scheduler")
    edit(folder / "scheduler" / "scheduler_config.json", **content)
    make(status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --scheduler_path: ")
    assert all(part in line for part in parts)


def test_a_flow_matching_schedule_is_refused_everywhere(folder, make, capsys):
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    make(status=2)
    assert "has no beta_schedule" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no beta_schedule"):
        ddim_scheduler(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDPMScheduler, PNDMScheduler])
def test_a_live_scheduler_is_what_its_file_is(kind, tmp_path):
    live = kind(beta_schedule="scaled_linear", beta_end=0.012)
    live.save_pretrained(tmp_path)
    edit(tmp_path / "scheduler_config.json", remove=["timestep_spacing", "prediction_type", "steps_offset"])
    of_file, of_live = ddim_scheduler(load_noise_scheduler(tmp_path)), ddim_scheduler(live)
    assert {**of_file.config, "_use_default_values": []} == {**of_live.config, "_use_default_values": []}
    assert of_live.config.clip_sample == (kind is DDPMScheduler)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_setting_of_a_model_that_its_class_does_not_know_stops(part, folder, make, capsys):
    edit(folder / part / "config.json", quantum_tunnelling=True)
    make(status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch_generate.py: error: --{part}_path: ")
    assert "quantum_tunnelling True" in line


def test_a_setting_that_is_null_or_of_the_file_alone_is_harmless(truth, folder, make):
    edit(folder / "unet" / "config.json", quantum_tunnelling=None, _name_or_path="elsewhere", _commit_hash="0")
    assert_parity(make(), expected(truth))


# Latents -------------------------------------------------------------------------------------------------------------

MEAN, STD = [0.5, -0.5, 1.0, 0.0], [2.0, 1.0, 0.5, 1.5]


def per_channel(values):
    return torch.tensor(values).view(1, -1, 1, 1)


UNSCALED = {
    "shift_factor": ({"shift_factor": 2.0}, lambda z: z / 0.7 + 2.0),
    "statistics": (
        {"latents_mean": MEAN, "latents_std": STD},
        lambda z: z * per_channel(STD) / 0.7 + per_channel(MEAN),
    ),
    "shift_factor 0": ({"shift_factor": 0.0}, lambda z: z / 0.7),
}


@pytest.mark.parametrize("kind", UNSCALED)
def test_latents_are_unscaled_as_the_vae_says(kind, truth, folder, make):
    settings, unscale = UNSCALED[kind]
    edit(folder / "vae" / "config.json", **settings)
    assert_parity(make(), expected(truth, unscale=unscale))


def test_a_dataset_made_before_shifts_were_honoured_is_not_gone_on_with(folder):
    """Its images were made without the shift, under an identity that had the VAE's whole config."""
    edit(folder / "vae" / "config.json", shift_factor=2.0)
    model = load_model(parse_args([str(flag) for flag in flags_of(folder)]))
    before = {name: value for name, value in model.identity.items() if name != "latents"}
    assert before["vae"]["config"]["shift_factor"] == 2.0
    assert identity_hash(before) != model.run


def flags_of(folder):
    return ["--vae_path", folder, "--unet_path", folder, "--condition_encoder_path", folder]


def test_a_unet_that_no_token_changes_is_refused(folder, make, capsys):
    plain = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None, cross_attention_dim=16,
    )  # fmt: skip
    plain.save_pretrained(folder / "unet")
    make(status=2)
    assert "no cross-attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "settings"),
    [("unet", {"norm_eps": None}), ("unet", {"freq_shift": None}), ("vae", {"norm_num_groups": -1})],
)
def test_a_setting_that_only_a_layer_finds_wrong_stops_before_the_job(part, settings, folder, make, capsys):
    edit(folder / part / "config.json", **settings)
    make(status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"batch_generate.py: error: --{part}_path: ")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"latents_mean": MEAN, "latents_std": [0.0] * 4}, "other than 0"),
        ({"shift_factor": float("nan")}, "shift_factor is nan"),
        ({"latents_mean": MEAN}, "latents_std is None"),
        ({"latents_mean": MEAN, "latents_std": [1.0]}, "latents_std is [1.0]"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 1.0}, "are all set"),
        ({"shift_factor": "much"}, "shift_factor is 'much'"),
    ],
)
def test_a_shift_that_cannot_be_is_refused(settings, part, folder, make, capsys):
    edit(folder / "vae" / "config.json", **settings)
    make(status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --vae_path: ")
    assert part in line


def test_the_scaling_factor_is_printed_and_may_be_given(truth, folder, make, capsys):
    out = make("--scaling_factor", 1)
    assert_parity(out, expected(truth, unscale=lambda z: z))
    assert "latents / 1 (--scaling_factor);" in capsys.readouterr().out
    assert load_model(parse_args([str(flag) for flag in flags_of(folder)])).vae.config.scaling_factor == 0.7


# The size of the images ----------------------------------------------------------------------------------------------


def test_a_size_that_the_vae_contradicts_is_told_and_may_be_given(truth, folder, make, capsys):
    edit(folder / "vae" / "config.json", sample_size=24)
    assert_parity(make(), expected(truth))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "--sample_size" in line]
    assert "sample_size 8" in warning
    assert "sample_size is 24" in warning
    assert "--sample_size 12" in warning
    out = make("--sample_size", 12, "--overwrite")
    assert_parity(out, expected(truth, size=12))
    assert "--sample_size" not in capsys.readouterr().err


def test_a_unet_without_a_size_takes_the_flags(truth, folder, make, capsys):
    edit(folder / "unet" / "config.json", sample_size=None)
    make(status=2)
    assert "--sample_size" in capsys.readouterr().err
    edit(folder / "vae" / "config.json", sample_size=16)  # tells which it may be
    make(status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --unet_path: sample_size is None")
    assert "--sample_size says it, 8 by the VAE's own" in line
    assert_parity(make("--sample_size", 8), expected(truth))


def test_height_and_width_may_differ(folder, make):
    out = make("--sample_size", 8, 12)
    assert {(row["width"], row["height"]) for row in read_csv(out / "manifest.csv")} == {("24", "16")}


# Users ---------------------------------------------------------------------------------------------------------------


def train_folders(tmp_path, *names):
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
    return tmp_path / "train"


def test_the_number_of_users_is_read_off_the_table(truth, make):
    assert_parity(make(), expected(truth))


@pytest.mark.parametrize("names", [("ID_9", "ID_10", "ID_2"), ("user_09", "user_10", "user_2"), ("9", "10", "2")])
def test_training_folders_say_who_has_which_row_in_numeric_order(names, truth, make, tmp_path, capsys):
    folders = train_folders(tmp_path, *names, "logs", ".cache")
    (tmp_path / "train" / "11").write_text("a file is no user")
    assert_parity(make("--train_data_dir", folders), expected(truth, {2: 0, 9: 1, 10: 2}))
    assert "ImageFolder" in capsys.readouterr().out  # the order of these names is another


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("ID_1", "ID_2"), ["2 users", "3"]),
        (("ID_1", "user_1", "ID_2"), ["ID_1", "user_1"]),
        (("cats", "dogs"), ["cats", "ID_17"]),
    ],
)
def test_training_folders_that_do_not_fit_are_refused(names, parts, make, tmp_path, capsys):
    make("--train_data_dir", train_folders(tmp_path, *names), status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --train_data_dir: ")
    assert all(part in line for part in parts)


@pytest.mark.parametrize(("null_row", "rows"), [(2, {1: 0, 2: 1}), (0, {1: 1, 2: 2})])
def test_a_null_row_is_no_user(null_row, rows, truth, make, capsys):
    out = make("--null_row", null_row)
    assert {row["user_id"] for row in read_csv(out / "manifest.csv")} == {"1", "2"}
    assert_parity(out, expected(truth, rows))
    assert f"row {null_row} is no user's" in capsys.readouterr().out


def test_a_map_may_begin_at_0_and_names_no_null_row(truth, make, tmp_path, capsys):
    (tmp_path / "map.json").write_text('{"0": 2, "ID_7": 0}')  # as torchvision's class_to_idx has it
    out = make("--user_map", tmp_path / "map.json", "--user_ids", "0", "7")
    assert_parity(out, expected(truth, {0: 2, 7: 0}))
    assert (out / "user_00" / "generated_000.png").is_file()
    before = (out / "manifest.csv").read_bytes()
    make("--user_map", tmp_path / "map.json", "--user_ids", "0", "7")  # resumed: user 0 is found again
    assert "2 already there" in capsys.readouterr().out
    assert (out / "manifest.csv").read_bytes() == before
    make("--user_map", tmp_path / "map.json", "--null_row", 2, status=2)
    assert "--null_row" in capsys.readouterr().err


def test_a_table_of_a_null_row_alone_has_no_users(folder, make, tmp_path, capsys):
    make("--null_row", 3, status=2)
    assert "--null_row: 3 is out of range" in capsys.readouterr().err
    tensors = load_file(folder / "condition_encoder.safetensors")
    for num_rows, flag in ((1, "--null_row"), (0, "--condition_encoder_path")):
        table = tensors["user_embedding.weight"][:num_rows].clone()
        save_file({**tensors, "user_embedding.weight": table}, tmp_path / "e.safetensors")
        make("--condition_encoder_path", tmp_path / "e.safetensors", "--null_row", 0, status=2)
        assert capsys.readouterr().err.startswith(f"batch_generate.py: error: {flag}: ")


def test_ids_with_gaps_are_pointed_at_the_flags_that_say_their_rows(make, capsys):
    make("--user_ids", 2, 17, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("batch_generate.py: error: --user_ids: 17 ")
    assert "--train_user_ids" in line
    assert "--train_data_dir" in line


def test_one_row_more_than_users_points_at_the_null_row(make, capsys):
    make("--num_users", 2, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "--null_row" in line


# The range of the pixels ---------------------------------------------------------------------------------------------


def test_a_signed_vae_of_ink_on_paper_is_noticed(folder, make, capsys):
    """Few values lie below 0, but far below."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.weight"] *= 3
    tensors["decoder.conv_out.bias"].fill_(0.9)
    save_file(tensors, file)
    make()
    assert "--vae_output_range signed" in capsys.readouterr().err


# The kind of CPU -----------------------------------------------------------------------------------------------------


def test_the_kind_of_cpu_is_noted_and_another_is_warned_of(folder, make, monkeypatch, capsys):
    """With a capped instruction set a kernel rounds otherwise, and nothing but this would tell."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    out = make()
    numerics = json.loads((out / "run.json").read_text())["numerics"]
    assert numerics["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert numerics["cpu_settings"] == "default"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    make("--num_images_per_user", 2)
    err = capsys.readouterr().err
    assert "Warning: cpu_settings was default when this folder was begun, is ONEDNN_MAX_CPU_ISA=AVX2" in err
    assert "Warning: cpu_capability was " in err


# The other entrances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        ("--seed", "7"), ("--eta", "0.5"), ("--num_inference_steps", "5"), ("--vae_output_range", "signed"),
        ("--unet_path", "elsewhere"), ("--scaling_factor", "1"), ("--null_row", "0"), ("--train_user_ids", "5-7"),
    ],
)  # fmt: skip
def test_a_model_loaded_with_other_settings_makes_no_image(changed, folder, tmp_path):
    flags = [str(flag) for flag in [*flags_of(folder), "--output_dir", tmp_path / "out", "--batch_size", 2]]
    model = load_model(parse_args(flags))
    config = parse_args([*flags, *changed])
    with pytest.raises(ValueError, match=changed[0].strip("-")):
        make_image(config, model, 1, 0)
    assert make_image(parse_args(flags), model, 1, 0)[:4] == b"\x89PNG"


def models_of(folder):
    model = load_model(JobConfig(vae_path=folder, unet_path=folder, condition_encoder_path=folder))
    return model.unet, model.condition_encoder, model.vae, DDPMScheduler(**TRAINING)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_inference_steps": 1001}, "1001 is out of range"),
        ({"eta": 2.0}, "eta: 2.0"),
        ({"vae_output_range": "wide"}, "'wide'"),
        ({"num_images_per_user": 0}, "num_images_per_user 0"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": None}, "seed: None"),
        ({"user_index": {1: 99}}, "row 99"),
        ({"user_index": {1: -1}}, "row -1"),
        ({"user_index": {1: 0, 2: 0}}, "two users have one row"),
        ({"user_index": [0, 1, 2]}, "a mapping"),
    ],
)
def test_a_training_loop_is_refused_what_a_job_is(options, part, folder):
    with pytest.raises(ValueError, match=part):
        generate_samples(*models_of(folder), user_ids=[1], **options)


@pytest.mark.parametrize(
    "ids", [np.array([1, 2]), torch.tensor([1, 2]), (user_id for user_id in (1, 2))], ids=["numpy", "torch", "iterator"]
)
def test_a_training_loop_takes_ids_of_any_kind(ids, folder):
    assert len(generate_samples(*models_of(folder), user_ids=ids, num_inference_steps=1)) == 2


def test_a_training_loops_models_must_belong_together(folder):
    unet, _, vae, noise = models_of(folder)
    with pytest.raises(ValueError, match="8 wide, needed: 16"):
        generate_samples(unet, UserConditionEncoder(3, 8), vae, noise, user_ids=[1])
    vae.register_to_config(scaling_factor=0)
    with pytest.raises(ValueError, match="scaling_factor is 0"):
        generate_samples(unet, UserConditionEncoder(3, 16), vae, noise, user_ids=[1])


def test_python_may_give_strings_and_one_number(folder):
    config = JobConfig(vae_path=str(folder), unet_path=str(folder), condition_encoder_path=str(folder), sample_size=8)
    assert config.sample_size == (8,)
    assert load_model(config, "cpu").image_shape == (16, 16, 3)
    with pytest.raises(UsageError, match="no CUDA device"):
        load_model(config, torch.device("cuda"))


def test_a_training_loop_samples_shifted_latents_as_the_job_does(truth, folder):
    edit(folder / "vae" / "config.json", shift_factor=2.0)
    unet, encoder, vae, noise = models_of(folder)
    (image,) = generate_samples(unet, encoder, vae, noise, user_ids=[2], num_inference_steps=STEPS)
    want = oracle_image(truth, 2, 0, steps=STEPS, unscale=lambda z: z / 0.7 + 2.0)
    assert abs(image.numpy().astype(int) - want.astype(int)).max() <= 1
    unet.register_to_config(out_channels=8)
    with pytest.raises(ValueError, match="4 channels in and 8 out"):
        generate_samples(unet, encoder, vae, noise, user_ids=[2])
