"""What is shown while a job runs: a bar on a terminal, lines in a log."""

import io
import re
import sys
import time

import pytest

from tests.checkpoints import model_flags
from tests.jobs import run_job
from userdiff.diffusion import generate
from userdiff.job import console, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream):
    """What a bar of ten images writes as it is updated one by one, each time long enough after the last."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_TERMINAL_SECONDS", 0.0)
    with progress.make_bar(10, done=4) as bar:
        for _ in range(6):
            bar.update()
    return stream.getvalue()


def test_a_log_gets_lines(monkeypatch):
    text = shown(monkeypatch, io.StringIO())
    assert "\r" not in text
    lines = text.splitlines()
    assert [re.match(r" *(\d+)%\| (\d+)/10 \[", line).groups() for line in lines[:-1]] == [
        (str(10 * n), str(n)) for n in range(4, 11)
    ]
    assert lines[-1].startswith("100%| 10/10 [")
    assert all(line.endswith("images/s]") for line in lines)


def test_a_terminal_gets_one_line_that_changes(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert text.count("\n") == 1
    assert len(text.split("\r")) > 7
    assert "10/10 [" in text.splitlines()[-1]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_the_rate_and_the_time_left_are_those_of_the_whole_run(monkeypatch, stream):
    """Images come sixteen at a time every eight seconds, and in between the bar is asked forty times for nothing."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.make_bar(640, done=320) as bar:
        for _ in range(10):
            for _ in range(40):
                now[0] += 0.2
                bar.update(0)
            bar.update(16)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) images/s", stream.getvalue())]
    assert rates[-1] == pytest.approx(2.0, rel=0.01)
    assert max(rates) <= 2.0 * 1.01
    assert "480/640 [01:20<01:20" in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_nothing_to_do_shows_nothing(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.make_bar(10, done=10) as bar:
        bar.update(0)
    assert list(progress.show_reading([], 0)) == []
    assert stream.getvalue() == ""


def test_reading_gives_what_is_read(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.show_reading(iter("abc"), 3)) == ["a", "b", "c"]
    assert "Checking images" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # a log, for which it is over too soon
    assert list(progress.show_reading(iter("abc"), 3)) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == ""


def test_a_jobs_bar_counts_failures(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    images = generate.Batch.images

    def without_the_first_user(batch):
        return ((item, None if item[0] == 1 else pixels) for item, pixels in images(batch))

    monkeypatch.setattr(generate.Batch, "images", without_the_first_user)
    flags = [*model_flags(checkpoint), "--num_inference_steps", 2, "--num_images_per_user", 3, "--batch_size", 2]
    assert run_job(*flags, "--output_dir", tmp_path / "out", "--device", "cpu") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "images/s" in line]
    assert "failed" not in lines[0]
    assert ", 3 failed]" in lines[-1]
    assert "12/15" in lines[-1]


def test_what_takes_long_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SLOW_SECONDS", 0.05)
    for is_main_process, seconds in ((True, 0.3), (False, 0.3), (True, 0)):
        with progress.said_if_slow("Loading ...", is_main_process):
            time.sleep(seconds)
    time.sleep(0.2)
    assert capsys.readouterr() == ("Loading ...\n", "")
