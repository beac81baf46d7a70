"""What every command prints, frozen: the files in `golden/transcripts` hold commands, what each prints, and its status.

Each file is a story in a folder of its own. `python -m tests.test_transcripts` runs the commands of all files and writes
what they print now; the difference is then to be read, line by line, before it is committed.
"""

import contextlib
import difflib
import io
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import Shape, make_checkpoint, model_flags
from userdiff.cli import generate, main

FILES = sorted((Path(__file__).parent / "golden" / "transcripts").glob("*.txt"))
MODEL = " ".join(model_flags(Path("model"))) + " --device cpu --num_inference_steps 1"
VARIES = [  # what differs between machines, libraries and runs
    (r" in \d\d:\d\d, [\d.]+ images/s", ""),
    (r"(about|at most) [\d.]+[kM]?B", r"\1 <SIZE>"),
    (r"[\d.]+[kMGT]?B free", "<SIZE> free"),
    (r"\b[0-9a-f]{12}\.\.\.", "<HASH>..."),
    (r"process \d+ on [\w.-]+", "process <PID> on <HOST>"),
    (r"\b\d+ bytes, its row says \d+", "<N> bytes, its row says <N>"),
    (rf"\b{platform.machine()}\b", "<MACHINE>"),
    (r"(torch|diffusers|pillow) \d[\w.+]*", r"\1 <VERSION>"),
]


def run(command: str) -> list[str]:
    """Run a command in the current folder: what it prints, on stderr with ! in front, and its exit status."""
    words = shlex.split(command.replace("MODEL", MODEL))
    if words[0] not in ("batch_generate.py", "userdiff"):  # something done to the folder
        subprocess.run(["bash", "-ec", command], check=True)
        return []
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = generate(words[1:]) if words[0] == "batch_generate.py" else main(words[1:])
        except SystemExit as end:  # argparse's
            status = end.code
    lines = [line for line in err.getvalue().splitlines() if "images/s]" not in line and not line.startswith("usage:")]
    text = "\n".join([*out.getvalue().splitlines(), *(f"! {line}" for line in lines)])
    if words[1:2] == ["inspect"]:
        text = re.sub(r"[ \d.]*\d( ?%)?", " #", re.sub(r"(?<=like another: ).*", "<USERS>", text))
    for pattern, replacement in VARIES:
        text = re.sub(pattern, replacement, text)
    return [*(line.rstrip() for line in text.splitlines()), f"exit {status}"]


def play(transcript: Path, folder: Path) -> str:
    """Run the commands of a transcript in a folder: the transcript as it is now."""
    commands = [line for line in transcript.read_text().splitlines() if line.startswith(("$ ", "# "))]
    before = Path.cwd()
    os.chdir(folder)
    try:
        make_checkpoint(Path("model"), Shape())
        lines = [[line] if line[0] == "#" else [line, *run(line[2:])] for line in commands]
    finally:
        os.chdir(before)
    return "\n".join(line for some in lines for line in some).replace(str(folder), "<FOLDER>") + "\n"


@pytest.mark.parametrize("transcript", FILES, ids=lambda path: path.stem)
def test_commands_print_what_they_did(transcript, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    expected, found = transcript.read_text(), play(transcript, tmp_path)
    diff = difflib.unified_diff(expected.splitlines(), found.splitlines(), "frozen", "now", lineterm="", n=2)
    assert expected == found, "\n".join(diff)


if __name__ == "__main__":
    import tempfile

    os.environ["COLUMNS"] = "100"
    torch.set_num_threads(1)
    for path in [Path(name) for name in sys.argv[1:]] or FILES:
        with tempfile.TemporaryDirectory() as temporary:
            path.write_text(play(path, Path(temporary)))
        print(path.name)
