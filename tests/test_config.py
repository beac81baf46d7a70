import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import userdiff
from userdiff.config import (
    JobConfig,
    UsageError,
    bundled_model,
    errors_of,
    make_parser,
    parse_args,
)
from userdiff.text import format_ids, id_range

SCRIPT = Path(__file__).parents[1] / "batch_generate.py"
DEMO_CHECKPOINT = Path(userdiff.__file__).parent / "demo" / "checkpoint"

OWN_MODEL = {
    "vae_path": Path("V"),
    "unet_path": Path("U"),
    "condition_encoder_path": Path("U/condition_encoder.pt"),
}
OWN_MODEL_ARGV = [token for name, value in OWN_MODEL.items() for token in (f"--{name}", str(value))]
BUNDLED_MODEL = {
    "vae_path": DEMO_CHECKPOINT,
    "unet_path": DEMO_CHECKPOINT,
    "condition_encoder_path": DEMO_CHECKPOINT,
    "num_users": 10,
}
DEFAULTS = {
    "num_users": None,
    "unet_config": None,
    "scheduler_path": None,
    "train_user_ids": None,
    "train_data_dir": None,
    "user_map": None,
    "null_row": None,
    "sample_size": None,
    "scaling_factor": None,
    "vae_output_range": "unit",
    "on_incompatible_weights": "error",
    "user_ids": None,
    "num_images_per_user": 5,
    "shard": None,
    "num_shards": None,
    "output_dir": Path("generated_images"),
    "num_inference_steps": 20,
    "seed": 42,
    "eta": 0.0,
    "guidance_scale": 1.0,
    "null_condition": None,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
    "device": "auto",
    "batch_size": None,
    "mixed_precision": None,
    "overwrite": False,
    "allow_tf32": False,
    "dry_run": False,
    "png_compress_level": None,
}
# Flags, defaults, values


def test_the_parser_has_the_flags_of_the_contract_and_no_others():
    flags = {option for action in make_parser("p")._actions for option in action.option_strings}
    assert flags == {"-h", "--help", *(f"--{name}" for name in {**OWN_MODEL, **DEFAULTS})}


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_each_flag_has_its_default(name, default):
    value = getattr(parse_args(OWN_MODEL_ARGV), name)
    assert value == default
    assert type(value) is type(default)


@pytest.mark.parametrize(("name", "value"), BUNDLED_MODEL.items())
def test_without_any_model_path_the_bundled_checkpoint_is_used(name, value):
    assert getattr(parse_args([]), name) == value


def test_the_number_of_bundled_users_may_be_said():
    assert parse_args(["--num_users", "10"]) == parse_args([])


def test_only_the_bundled_checkpoint_counts_as_bundled():
    assert parse_args([]).is_bundled
    assert not parse_args(OWN_MODEL_ARGV).is_bundled


def test_bundled_model_gives_what_a_config_needs():
    assert JobConfig(**bundled_model()) == parse_args([])


def test_the_original_command_line_means_what_it_meant():
    line = """--vae_path V --unet_path U --condition_encoder_path U/condition_encoder.pt --num_users 31
        --user_ids 1 5 10 15 --num_images_per_user 5 --num_inference_steps 20 --output_dir O --device auto --seed 42"""
    assert dataclasses.asdict(parse_args(line.split())) == {
        **DEFAULTS,
        **OWN_MODEL,
        "num_users": 31,
        "user_ids": (1, 5, 10, 15),
        "output_dir": Path("O"),
    }


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("--scheduler_path s", "scheduler_path", Path("s")),
        ("--train_user_ids 1 3-5", "train_user_ids", (1, 3, 4, 5)),
        ("--user_map m.json", "user_map", Path("m.json")),
        ("--train_data_dir d", "train_data_dir", Path("d")),
        ("--unet_config c", "unet_config", Path("c")),
        ("--num_users 7", "num_users", 7),
        ("--null_row 0", "null_row", 0),
        ("--sample_size 32", "sample_size", (32,)),
        ("--sample_size 32 48", "sample_size", (32, 48)),
        ("--scaling_factor 1", "scaling_factor", 1.0),
        ("--vae_output_range signed", "vae_output_range", "signed"),
        ("--on_incompatible_weights random", "on_incompatible_weights", "random"),
        ("--user_ids 1 5 10-15", "user_ids", (1, 5, 10, 11, 12, 13, 14, 15)),
        ("--user_ids 7 3", "user_ids", (7, 3)),
        ("--user_ids 4-4", "user_ids", (4,)),
        ("--user_ids 007", "user_ids", (7,)),
        ("--user_ids=9", "user_ids", (9,)),
        ("--num_images_per_user 1", "num_images_per_user", 1),
        ("--num_images_per_user 4294967296", "num_images_per_user", 2**32),
        ("--shard 1/1", "shard", "1/1"),
        ("--shard 7/1048576", "shard", "7/1048576"),
        ("--shard auto", "shard", "auto"),
        ("--output_dir a/b", "output_dir", Path("a/b")),
        ("--num_inference_steps 1", "num_inference_steps", 1),
        ("--seed 0", "seed", 0),
        ("--seed 9223372036854775807", "seed", 2**63 - 1),
        ("--eta 1", "eta", 1.0),
        ("--eta 6e-1", "eta", 0.6),
        ("--null_condition zeros", "null_condition", "zeros"),
        ("--null_condition row:31", "null_condition", "row:31"),
        ("--guidance_start 0.5", "guidance_start", 0.5),
        ("--guidance_stop 0.5", "guidance_stop", 0.5),
        ("--device cpu", "device", "cpu"),
        ("--device cuda", "device", "cuda"),
        ("--batch_size 1", "batch_size", 1),
        ("--batch_size 65536", "batch_size", 65536),
        ("--mixed_precision no", "mixed_precision", "no"),
        ("--mixed_precision fp16", "mixed_precision", "fp16"),
        ("--mixed_precision bf16", "mixed_precision", "bf16"),
        ("--overwrite", "overwrite", True),
        ("--allow_tf32", "allow_tf32", True),
        ("--dry_run", "dry_run", True),
        ("--png_compress_level 0", "png_compress_level", 0),
        ("--png_compress_level 9", "png_compress_level", 9),
    ],
)
def test_each_flag_takes_its_values(argv, name, value):
    found = dataclasses.asdict(parse_args([*OWN_MODEL_ARGV, *argv.split()]))
    assert found == {**OWN_MODEL, **DEFAULTS, name: value}
    assert type(found[name]) is type(value)


def test_the_number_of_shards_goes_with_auto():
    assert parse_args([*OWN_MODEL_ARGV, "--shard", "auto", "--num_shards", "1048576"]).num_shards == 2**20


# Errors: `golden/transcripts/arguments.txt` has what is refused, and in which words


def test_what_a_library_function_refuses_is_told_by_its_flag():
    with pytest.raises(UsageError, match=r"^--vae_path: no such folder$") as raised, errors_of("--vae_path"):
        raise FileNotFoundError("no such folder")
    assert isinstance(raised.value.__cause__, FileNotFoundError)
    refused = FileNotFoundError(2, "No such file", "gone.json")
    for flag, said in (
        ("--user_map", "gone.json cannot be used (No such file), needed: JSON file of user id"),
        ("--dynamo_mode", "gone.json cannot be used (No such file)$"),  # a flag of the launcher has no help of ours
    ):
        with (
            pytest.raises(UsageError, match=f"^{flag}: {said}".replace("(", r"\(").replace(")", r"\)")),
            errors_of(flag),
        ):
            raise refused


@pytest.mark.parametrize(
    ("flag", "ours"), [("--data_dir=d", "--train_data_dir"), ("--ddim_steps", "--num_inference_steps")]
)
def test_flags_of_other_scripts_are_answered_with_ours(flag, ours):
    with pytest.raises(UsageError, match=ours):
        parse_args([flag])


TOKENS = st.one_of(
    st.sampled_from([f"--{name}" for name in {**OWN_MODEL, **DEFAULTS}]),
    st.sampled_from(
        ["-h", "--help", "--", "-", "--=", "1-3", "5-", "-1", "1-99999999999999999999", "nan", "-inf", "1e999"]
    ),
    st.text(max_size=6),
    st.builds("--{}={}".format, st.sampled_from(list(DEFAULTS)), st.text(max_size=6)),
)


def outcome_of(argv):
    try:
        return parse_args(argv)
    except (UsageError, SystemExit) as end:
        return end


@settings(max_examples=150, deadline=None)
@given(st.lists(TOKENS, max_size=6))
@example(["--user_ids", "1-" + 30 * "9"])
@example(["--user_ids", 5000 * "9"])
@example(["--seed", 5000 * "9"])
@example(["--eta", 5000 * "9"])
def test_any_command_line_parses_or_is_refused_in_words(argv):
    outcome = outcome_of(argv)  # whatever else is raised fails this test
    if isinstance(outcome, UsageError):
        assert str(outcome)
        assert "id_range" not in str(outcome)  # a function's name tells a user nothing
    elif isinstance(outcome, SystemExit):
        assert outcome.code == 0
    else:
        assert isinstance(outcome, JobConfig)


# JobConfig itself


def test_a_config_cannot_be_changed():
    config = JobConfig(**OWN_MODEL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 7


def test_a_config_takes_keywords_alone():
    with pytest.raises(TypeError, match="positional"):
        JobConfig(Path("V"), Path("U"), Path("C"), 31)


@pytest.mark.parametrize("name", OWN_MODEL)
def test_a_config_needs_the_whole_model(name):
    with pytest.raises(TypeError, match=name):
        JobConfig(**{key: value for key, value in OWN_MODEL.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_users", 0, "--num_users: 0 is out of range, needed: 1 to 16777216"),
        ("num_images_per_user", 0, "--num_images_per_user: 0 is out of range, needed: 1 to 4294967296"),
        (
            "num_images_per_user",
            2**32 + 1,
            "--num_images_per_user: 4294967297 is out of range, needed: 1 to 4294967296",
        ),
        ("num_inference_steps", 0, "--num_inference_steps: 0 is out of range, needed: 1 to 65535"),
        ("seed", -1, "--seed: -1 is out of range, needed: 0 to 9223372036854775807"),
        ("seed", 2**63, "--seed: 9223372036854775808 is out of range, needed: 0 to 9223372036854775807"),
        ("eta", float("nan"), "--eta: nan is out of range, needed: 0 to 1"),
        ("eta", float("inf"), "--eta: inf is out of range, needed: 0 to 1"),
        ("batch_size", 0, "--batch_size: 0 is out of range, needed: 1 to 65536"),
        ("user_ids", (), "--user_ids: names no user"),
        ("user_ids", (3, -1), "--user_ids: -1 is out of range, user ids start at 0"),
        ("user_ids", (3, 1, 3), "--user_ids: 3 is given twice, needed: each id once"),
        ("train_user_ids", (), "--train_user_ids: names no user"),
        ("train_user_ids", (-1,), "--train_user_ids: -1 is out of range, user ids start at 0"),
        ("device", "cuda:1", "--device: 'cuda:1' is none of auto, cuda, cpu"),
        ("device", None, "--device: None is none of auto, cuda, cpu"),
        ("mixed_precision", "fp32", "--mixed_precision: 'fp32' is none of no, fp16, bf16"),
        ("vae_output_range", "", "--vae_output_range: '' is none of unit, signed"),
        ("on_incompatible_weights", "ignore", "--on_incompatible_weights: 'ignore' is none of error, random"),
    ],
)
def test_a_config_built_directly_checks_itself(name, value, message):
    with pytest.raises(UsageError) as raised:
        JobConfig(**{**OWN_MODEL, name: value})
    assert str(raised.value) == message


def test_a_folder_that_another_process_makes_meanwhile_is_no_file(tmp_path, monkeypatch):
    is_dir = Path.is_dir

    def look_and_make(path):
        found = is_dir(path)
        if not found:
            path.mkdir()
        return found

    monkeypatch.setattr(Path, "is_dir", look_and_make)
    assert JobConfig(**OWN_MODEL, output_dir=tmp_path / "out").output_dir == tmp_path / "out"


# Ids in writing


@pytest.mark.parametrize(
    ("ids", "text"),
    [([1], "1"), ([1, 2], "1-2"), ([5, 1, 3, 2], "1-3 5"), ([10, 8, 6], "6 8 10"), ([], ""), (range(1, 32), "1-31")],
)
def test_ids_are_written_as_runs(ids, text):
    assert format_ids(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(1, 60) | st.integers(1, 10**12)))
def test_ids_read_back_as_written_in_as_few_words_as_there_are_runs(ids):
    words = format_ids(ids).split()
    assert [user_id for word in words for user_id in id_range(word)] == sorted(ids)
    assert len(words) == sum(user_id - 1 not in ids for user_id in ids)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**15), st.integers(0, 5000))
def test_a_range_holds_both_its_ends(first, more):
    assert id_range(f"{first}-{first + more}") == range(first, first + more + 1)


# --help


HELP_TEXTS = {
    "vae_path": "(default: bundled demo)",
    "unet_path": "(default: bundled demo)",
    "condition_encoder_path": "(default: bundled demo)",
    "num_users": "(default: what the weights have)",
    "unet_config": "(default: beside the weights)",
    "scheduler_path": "(default: the one beside the UNet, else scaled_linear 0.00085-0.012, epsilon)",
    "train_user_ids": "(default: the row is id - 1)",
    "train_data_dir": "instead of --train_user_ids",
    "user_map": "instead of --train_user_ids",
    "null_row": "(default: none)",
    "sample_size": "(default: sample_size in the UNet's config.json)",
    "scaling_factor": "(default: the VAE's config.json)",
    "vae_output_range": "(default: unit)",
    "on_incompatible_weights": "(default: error)",
    "user_ids": "(default: all)",
    "num_images_per_user": "(default: 5)",
    "output_dir": "(default: ./generated_images)",
    "num_inference_steps": "(default: 20)",
    "seed": "(default: 42)",
    "eta": "(default: 0.0)",
    "device": "(default: auto)",
    "batch_size": "(default: what the folder began with, else 64 on a GPU, 16 on a CPU)",
    "mixed_precision": "(default: the launcher's, else no)",
    "dry_run": "change nothing",  # a switch, as the next ones
    "overwrite": "start again",  # a switch, off where it is not given
    "allow_tf32": "let float32 matrix products use TF32",  # a switch, off where it is not given
    "png_compress_level": "(default: what the folder began with, else 6)",
}
HELP_GROUPS = {
    "options": {"-h"},
    "the model": set(list(HELP_TEXTS)[:14]),
    "what to make": {"user_ids", "num_images_per_user", "shard", "num_shards", "output_dir"},
    "how to sample": {
        *("num_inference_steps", "seed", "eta"),
        *("guidance_scale", "null_condition", "guidance_start", "guidance_stop"),
    },
    "how to run": {
        "device",
        "batch_size",
        "mixed_precision",
        "dry_run",
        "overwrite",
        "allow_tf32",
        "png_compress_level",
    },
}


@pytest.fixture
def help_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is wrapped
    return make_parser("batch_generate.py").format_help()


@pytest.mark.parametrize(("name", "text"), HELP_TEXTS.items())
def test_help_says_of_each_flag_what_holds_without_it(help_text, name, text):
    (entry,) = re.findall(rf"^  --{name}\b.*(?:\n {{4,}}.*)*", help_text, re.MULTILINE)
    assert text in entry


def test_help_is_grouped():
    sections = re.split(r"^([a-z ]+):\n", make_parser("batch_generate.py").format_help(), flags=re.MULTILINE)[1:]
    groups = dict(zip(sections[::2], sections[1::2], strict=True))
    assert {
        title: set(re.findall(r"^  (?:--)?(-h|\w+)", text, re.MULTILINE)) for title, text in groups.items()
    } == HELP_GROUPS


def test_help_leaves_with_status_zero(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_args(["--help"], prog="some name")
    assert leaving.value.code == 0
    assert capsys.readouterr().out.startswith("usage: some name ")


def run_script(*argv, cwd):
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *argv]
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    lines = finished.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert "userdiff.config" in imported
    return finished.returncode, finished.stdout, said, imported


def test_help_of_the_script_imports_nothing_heavy(tmp_path):
    status, output, said, imported = run_script("--help", cwd=tmp_path)
    assert (status, said) == (0, [])
    assert output.startswith("usage: batch_generate.py ")
    assert all(f"--{name}" in output for name in HELP_TEXTS)
    assert imported.isdisjoint({"torch", "diffusers", "accelerate", "transformers", "numpy", "PIL"})


def test_a_wrong_argument_of_the_script_is_one_line_and_leaves_nothing_behind(tmp_path):
    status, output, said, imported = run_script("--seed", "-1", "--output_dir", "out", cwd=tmp_path)
    assert (status, output) == (2, "")
    assert said == ["batch_generate.py: error: --seed: -1 is out of range, needed: 0 to 9223372036854775807"]
    assert list(tmp_path.iterdir()) == []
    assert "torch" not in imported


def test_user_ids_given_in_two_places_add_up():
    assert parse_args(["--user_ids", "1", "2", "--seed", "1", "--user_ids", "5-6"]).user_ids == (1, 2, 5, 6)


def test_user_ids_end_where_rows_of_the_manifest_do():
    assert parse_args(["--user_ids", str(10**18 - 1)]).user_ids == (10**18 - 1,)
    with pytest.raises(UsageError, match=r"^--user_ids: 1000000000000000000 is out of range"):
        parse_args(["--user_ids", str(10**18)])
