"""The recipes for containers and clusters, as far as a machine without either can tell."""

import json
import re
import sys

import kubernetes_validate
import pytest
import yaml

from tests.checkpoints import model_flags
from tests.jobs import ROOT, finish, run_job, start, tree

SCALE = (ROOT / "docs" / "scale.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def kubernetes_job():
    (text,) = [text for text in re.findall(r"```yaml\n(.*?)```", SCALE, re.DOTALL) if "kind: Job" in text]
    return yaml.safe_load(text)


@pytest.mark.parametrize("version", ["1.31", "1.34"])
def test_the_kubernetes_job_is_one(kubernetes_job, version):
    kubernetes_validate.validate(kubernetes_job, version, strict=True)


def test_the_schema_would_find_a_misspelt_field(kubernetes_job):
    wrong = json.loads(json.dumps(kubernetes_job).replace("completionMode", "completionsMode"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=True)


def test_the_command_of_the_kubernetes_job_makes_the_shards_of_one_dataset(kubernetes_job, checkpoint, tmp_path):
    (container,) = kubernetes_job["spec"]["template"]["spec"]["containers"]
    number = kubernetes_job["spec"]["completions"]
    (script,) = container["args"]
    job = [*model_flags(checkpoint), "--num_images_per_user", "3", "--num_inference_steps", "1", "--batch_size", "2"]
    for index in (0, 3):  # of seven: what all of them make is tested elsewhere
        line = script.replace("--vae_path /data/vae ...", " ".join(job)).replace("/data/", f"{tmp_path}/")
        line = line.replace("exec python", f"exec {sys.executable}")
        assert line.count(str(tmp_path)) == 1
        status, stdout, stderr = finish(start([*container["command"], line], JOB_COMPLETION_INDEX=str(index)))
        assert status == 0, stderr
        assert f"Shard: {index + 1}/{number} (JOB_COMPLETION_INDEX {index} of {number} from 0)\n" in stdout
    assert run_job(*job, "--output_dir", tmp_path / "whole") == 0
    whole = tree(tmp_path / "whole")
    for index in (0, 3):
        images = {name: value for name, value in tree(tmp_path / f"shard_{index}").items() if name != "manifest.csv"}
        assert images
        assert images.items() <= whole.items()


def test_the_dockerfile_copies_what_there_is_and_runs_as_nobody_without_a_shell():
    words = [line.split() for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    ignored = [f"!{name}" for line in words if line[0] == "COPY" for name in line[1:-1]]
    assert ignored
    assert set(ignored) <= set((ROOT / ".dockerignore").read_text().split())
    assert all((ROOT / name[1:]).exists() for name in ignored)
    (user,) = [line[1] for line in words if line[0] == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)  # by number: Kubernetes cannot tell whether a name is root's
    (entry,) = [line[1:] for line in words if line[0] == "ENTRYPOINT"]
    assert json.loads(" ".join(entry)) == ["python", "batch_generate.py"]
