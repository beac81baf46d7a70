"""The bundled judge: it reads digits, and nobody's machine can be read off it."""

import pytest
import torch

from userdiff.config import BUNDLED_JUDGE
from userdiff.demo import classifier
from userdiff.demo.quality import split_digits
from userdiff.judge.network import load_network
from userdiff.judge.scores import load_judge


def test_the_bundled_judge_reads_digits_that_it_has_not_seen():
    real = split_digits()
    network = load_network(BUNDLED_JUDGE, torch.device("cpu"))
    assert classifier.accuracy(network, real.held_out_images, real.held_out_digits) == pytest.approx(0.989, abs=0.002)


def test_it_is_small_and_names_no_folder():
    content = BUNDLED_JUDGE.read_bytes()
    assert len(content) < 1_000_000
    assert b"stack_trace" not in content
    assert b"site-packages" not in content


def test_training_learns_and_what_it_saves_is_a_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "NUM_STEPS", 60)
    real = split_digits()
    network = classifier.train(real.images, real.digits, seed=0)
    held_out = real.held_out_images[:200], real.held_out_digits[:200]
    assert classifier.accuracy(network, *held_out) > 0.5
    classifier.save(network, tmp_path / "judge.pt2")
    judge = load_judge(str(tmp_path / "judge.pt2"), torch.device("cpu"), {1: 0})
    with torch.no_grad():
        logits = network(held_out[0].permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(judge(held_out[0], [1] * 200).predicted, logits.argmax(dim=1))
