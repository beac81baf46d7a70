import errno
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userdiff.dataset.run_record import LOCK_NAME, RunRecord, folder_lock, wait_for_writers, writing
from userdiff.identity import OPTION_DEFAULTS, describe_differences, differences, identity_hash, make_identity

IDENTITY = {"seed": 42, "vae": {"weights": "ab12", "config": {"scaling_factor": 0.7}}, "user_index": {"1": 0, "3": 1}}
NUMERICS = {"batch_size": 16, "device": "x86_64"}
HISTORY = [{"state": "ended", "num_processes": 2}, {"state": "running", "ended": None}]

NAMES = st.text("abcxyz_0", min_size=1, max_size=3)
JSON_VALUES = st.recursive(
    st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.sampled_from([0.5, 1e-9, 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
IDENTITIES = st.dictionaries(NAMES, JSON_VALUES, max_size=4)


def hash_by_definition(identity):
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def example_record():
    return RunRecord(identity=IDENTITY, numerics=NUMERICS, history=HISTORY)


def in_another_order(value):
    if isinstance(value, dict):
        return {name: in_another_order(value[name]) for name in reversed(value)}
    return [in_another_order(item) for item in value] if isinstance(value, list) else value


# The file


def test_a_record_reads_back(tmp_path):
    (tmp_path / "run.json").write_bytes(example_record().to_bytes())
    assert RunRecord.read(tmp_path) == example_record()


def test_a_folder_without_a_record_has_none(tmp_path):
    assert RunRecord.read(tmp_path) is None
    assert RunRecord.read(tmp_path / "missing") is None


def test_a_new_record_has_no_history():
    first, second = (RunRecord(identity={}, numerics={}) for _ in range(2))
    first.history.append({"state": "running"})
    assert second.history == []


def test_the_file_says_which_run_it_is_what_it_is_and_how_it_went():
    assert json.loads(example_record().to_bytes()) == {
        "run": hash_by_definition(IDENTITY),
        "identity": IDENTITY,
        "numerics": NUMERICS,
        "history": HISTORY,
        "manifest_sha256": None,
    }


def example_json(**changes):
    content = json.loads(example_record().to_bytes())
    return json.dumps({name: value for name, value in {**content, **changes}.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(example_record().to_bytes()[:-3], id="truncated"),
        pytest.param(b"\0" * 500, id="a hole"),
        pytest.param(b'{"run": "\xff"}', id="not text"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="nothing"),
        pytest.param(b"7", id="a number"),
        pytest.param(b"{}", id="an empty object"),
        pytest.param(example_json(identity=...), id="no identity"),
        pytest.param(example_json(numerics=...), id="no numerics"),
        pytest.param(example_json(history=...), id="no history"),
        pytest.param(example_json(numerics=[]), id="numerics of another kind"),
        pytest.param(example_json(history={}), id="history of another kind"),
        pytest.param(example_json(identity=[], run=hash_by_definition([])), id="identity of another kind"),
    ],
)
def test_a_damaged_record_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged") as raised:
        RunRecord.read(tmp_path)
    assert str(raised.value) == (
        f"{path} is damaged; restore it, or remove it (the images say themselves what they are), or start again with "
        "--overwrite"
    )
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(example_json(identity={**IDENTITY, "seed": 43}), id="another seed"),
        pytest.param(example_json(identity={**IDENTITY, "eta": 0.5}), id="an option more"),
        pytest.param(example_json(identity={**IDENTITY, "user_index": {"1": 1, "3": 0}}), id="users swapped"),
        pytest.param(example_json(run=64 * "0"), id="another hash"),
        pytest.param(example_json(run=...), id="no hash"),
    ],
)
def test_an_edited_record_is_refused(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="edited") as raised:
        RunRecord.read(tmp_path)
    message = (
        f"{path} was edited, its identity no longer has the hash that the images carry; restore it, or start again with "
        "--overwrite"
    )
    assert str(raised.value) == message


def test_numerics_and_history_are_no_part_of_the_hash():
    other = RunRecord(identity=IDENTITY, numerics={"batch_size": 5}, history=[])
    assert other.run == example_record().run


# The identity


def test_options_at_their_default_are_left_out():
    identity = make_identity({"seed": 42}, {"eta": 0.0, "mixed_precision": "no", "vae_output_range": "signed"})
    assert identity == {"seed": 42, "vae_output_range": "signed"}


def test_a_required_value_is_kept_whatever_it_is():
    assert make_identity({"seed": 0, "nothing": None}, {}) == {"seed": 0, "nothing": None}


def test_a_later_option_at_its_default_changes_no_hash(monkeypatch):
    old = make_identity({"seed": 42}, {"eta": 0.6})
    monkeypatch.setitem(OPTION_DEFAULTS, "guidance_scale", 1.0)
    new = make_identity({"seed": 42}, {"eta": 0.6, "guidance_scale": 1.0})
    assert identity_hash(new) == identity_hash(old)


def test_an_identity_is_already_as_it_will_read_back():
    identity = make_identity({"user_index": {3: 1, 1: 0}, "shape": (4, 8)}, {})
    assert identity == {"user_index": {"3": 1, "1": 0}, "shape": [4, 8]}
    assert json.loads(json.dumps(identity)) == identity


@settings(max_examples=60, deadline=None)
@given(IDENTITIES)
def test_the_hash_follows_the_definition_in_any_order_of_keys(identity):
    assert identity_hash(identity) == hash_by_definition(identity)
    assert identity_hash(in_another_order(identity)) == hash_by_definition(identity)


@settings(max_examples=60, deadline=None)
@given(IDENTITIES)
def test_the_hash_survives_writing_and_reading(identity):
    read_back = json.loads(RunRecord(identity=make_identity(identity, {}), numerics={}).to_bytes())
    assert read_back["run"] == hash_by_definition(read_back["identity"]) == identity_hash(identity)


# Differences


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({}, {}, []),
        (IDENTITY, in_another_order(IDENTITY), []),
        ({"seed": 1}, {"seed": 2}, [("seed", 1, 2)]),
        ({"seed": 1, "eta": 0.6}, {"seed": 1}, [("eta", 0.6, None)]),
        ({"seed": 1}, {"seed": 1, "eta": 0.6}, [("eta", None, 0.6)]),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, [("a", 1, 2), ("b", 1, 2)]),
        (
            {"vae": {"weights": "x", "config": {"scaling_factor": 0.7, "force_upcast": True}}},
            {"vae": {"weights": "y", "config": {"scaling_factor": 1.5, "force_upcast": True}}},
            [("vae.config.scaling_factor", 0.7, 1.5), ("vae.weights", "x", "y")],
        ),
        ({"user_index": {"1": 0, "3": 1}}, {"user_index": {"1": 0, "3": 2}}, [("user_index.3", 1, 2)]),
        ({"vae": {"weights": "x"}}, {"vae": "x"}, [("vae", {"weights": "x"}, "x")]),
        ({"vae": {"weights": "x"}}, {}, [("vae", {"weights": "x"}, None)]),
        ({"shape": [4, 8]}, {"shape": [8, 4]}, [("shape", [4, 8], [8, 4])]),
    ],
)
def test_differences_are_named_by_where_they_are(old, new, found):
    assert list(differences(old, new)) == found


def test_differences_are_told_with_both_values_and_of_a_mapping_a_few():
    old = {
        "seed": 1,
        "user_index": {str(user_id): user_id - 1 for user_id in range(1, 10)},
        "unet": {"weights": 30 * "a"},
    }
    new = {"seed": 2, "user_index": {"1": 5, "2": 1}, "unet": {"weights": 30 * "b"}, "eta": 0.5}
    assert describe_differences(old, new) == (
        "eta was 0.0, is 0.5; seed was 1, is 2; unet.weights was aaaaaaaaaaaa..., is bbbbbbbbbbbb...; "
        "user_index.1 was 0, is 5; user_index.3 was 2, is absent; user_index.4 was 3, is absent; and 5 more of user_index"
    )
    assert describe_differences({"seed": 1}, {"seed": 2}, lambda *field: "/".join(field)) == "seed/1/2"
    assert describe_differences(old, old) == ""


@settings(max_examples=100, deadline=None)
@given(IDENTITIES, IDENTITIES)
def test_two_identities_differ_where_their_hashes_do(old, new):
    assert bool(list(differences(old, new))) == (hash_by_definition(old) != hash_by_definition(new))


# The lock


LOCK_HOLDER = """
import sys
from pathlib import Path
from userdiff.dataset.run_record import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held_by_another_process(folder):
    command = [sys.executable, "-c", LOCK_HOLDER, str(folder)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def take(folder):
    with folder_lock(folder):
        pass


def test_a_second_job_is_refused_by_the_name_of_the_first(tmp_path):
    with held_by_another_process(tmp_path) as holder:
        for _ in range(2):  # a refusal does not wipe out who the holder is
            with pytest.raises(ValueError, match="in use") as raised:
                take(tmp_path)
            who = f"process {holder.pid} on {socket.gethostname()}"
            assert str(raised.value) == f"{tmp_path} is in use by another job ({who})"


def test_a_killed_job_leaves_no_lock_behind(tmp_path):
    with held_by_another_process(tmp_path) as holder:
        holder.kill()
        holder.wait()
        with folder_lock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_ends_leaves_no_file_behind(tmp_path):
    with held_by_another_process(tmp_path) as holder:
        assert len(list(tmp_path.iterdir())) == 1
        holder.communicate("go on\n")
        assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == []
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_gives_the_folder_back(tmp_path):
    error = KeyError("of the job")

    def fail():
        with folder_lock(tmp_path):
            raise error

    with pytest.raises(KeyError) as raised:
        fail()
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []
    take(tmp_path)


def test_the_lock_holds_within_one_process_too(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            take(tmp_path)
        with pytest.raises(ValueError, match="in use"):  # the refused one did not give it back either
            take(tmp_path)


def test_two_folders_have_two_locks(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with folder_lock(folders[0]), folder_lock(folders[1]):
        assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]


# Those who may still write


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_what_helps(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ValueError, match=f"keeps no locks.*{os.strerror(number)}.*a folder on another one"),
        folder_lock(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    held = tmp_path / LOCK_NAME  # by a machine that has locks there
    held.touch()
    with pytest.raises(ValueError, match="keeps no locks"), folder_lock(tmp_path):
        pass
    assert held.exists()


def test_a_process_that_may_still_write_is_waited_for_and_then_refused(tmp_path):
    with writing(tmp_path), writing(tmp_path), pytest.raises(ValueError, match="a process of an earlier job still has"):
        wait_for_writers(tmp_path, seconds=0.2)
    wait_for_writers(tmp_path, seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_goes_is_waited_for(tmp_path):
    gate = threading.Event()

    def write():
        with writing(tmp_path):
            gate.wait(60)

    writer = threading.Thread(target=write)
    writer.start()
    while not list(tmp_path.iterdir()):
        pass
    threading.Timer(0.3, gate.set).start()
    wait_for_writers(tmp_path, seconds=60)
    writer.join(60)
