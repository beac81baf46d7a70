import json
from dataclasses import replace

import numpy as np
import pytest

from tests.definitions import IDENTITY, NUMERICS, entry_of, record_of, run_of, shard_of
from userdiff.dataset.run_record import RunEntry, RunRecord, changed_numerics
from userdiff.shutdown import Failed, Stopped

ENTRY = entry_of("1-3 7", 5, published=18, failed=[[3, 4], [7, 0]])
RUNNING = {**ENTRY, "state": "running", "ended": None, "failed": []}


def example_record():
    return RunRecord(identity=IDENTITY, numerics=NUMERICS, history=[RunEntry(**ENTRY), RunEntry(**RUNNING)])


def example_json(**changes):
    content = {**record_of(ENTRY, RUNNING), **changes}
    return json.dumps({name: value for name, value in content.items() if value is not ...}).encode()


def test_a_record_says_what_it_is_and_reads_back(tmp_path):
    example_record().publish(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == json.dumps(json.loads(example_json()), indent=2).encode() + b"\n"
    assert RunRecord.read(tmp_path) == example_record()
    assert RunRecord.read(tmp_path / "missing") is None
    assert replace(example_record(), numerics={"batch_size": 5}, history=[]).run == run_of(IDENTITY)


def test_an_entry_knows_what_was_asked_for_and_how_long_it_took():
    entry = RunEntry(**ENTRY)
    assert entry.wanted() == {1: 5, 2: 5, 3: 5, 7: 5}
    assert entry.failed == [(3, 4), (7, 0)]
    assert entry.seconds() == 90
    assert RunEntry(**RUNNING).seconds() is None
    assert replace(entry, ended=entry.started.replace("2026", "2025")).seconds() is None  # a clock was set back
    joined = RunEntry(**ENTRY, joined=["a", "b"])
    assert "joined" not in entry.to_json()
    assert joined.to_json()["joined"] == ["a", "b"]


def test_an_entry_of_a_shard_asks_for_its_share_alone():
    entry = RunEntry(**ENTRY)
    shards = [RunEntry(**ENTRY, shard=f"{number}/3") for number in (1, 2, 3)]
    wanted = [shard.wanted() for shard in shards]
    assert {user_id: sum(one[user_id] for one in wanted) for user_id in (1, 2, 3, 7)} == entry.wanted()
    assert wanted[0] == {
        user_id: sum(shard_of(user_id, index, 4, 3) == 1 for index in range(5)) for user_id in (1, 2, 3, 7)
    }
    indices = np.arange(10, dtype=np.uint32)
    asked_for = [shard.asks_for(7, indices) for shard in shards]
    assert (sum(one.astype(int) for one in asked_for) == entry.asks_for(7, indices)).all()
    assert asked_for[1].tolist() == [index < 5 and shard_of(7, index, 4, 3) == 2 for index in range(10)]
    assert "shard" not in entry.to_json()
    assert shards[1].to_json()["shard"] == "2/3"


def with_entry(**changes):
    entry = {name: value for name, value in {**ENTRY, **changes}.items() if value is not ...}
    return example_json(history=[entry])


DAMAGED = {
    "empty": b"",
    "truncated": example_json()[:-3],
    "a hole": b"\0" * 500,
    "not text": b'{"run": "\xff"}',
    "nested without end": b"[" * 100_000,
    "a list": b"[]",
    "nothing": b"null",
    "an empty object": b"{}",
    "no identity": example_json(identity=...),
    "no numerics": example_json(numerics=...),
    "no history": example_json(history=...),
    "numerics of another kind": example_json(numerics=[]),
    "no batch size": example_json(numerics={}),
    "a batch of none": example_json(numerics={**NUMERICS, "batch_size": 0}),
    "a batch of too many": example_json(numerics={**NUMERICS, "batch_size": 10**5}),
    "a batch that is true": example_json(numerics={**NUMERICS, "batch_size": True}),
    "history of another kind": example_json(history={}),
    "identity of another kind": example_json(identity=[], run=run_of([])),
    "entries that are no objects": example_json(history=[17, None]),
    "an entry without its users": with_entry(user_ids=...),
    "an entry with odd users": with_entry(user_ids="one"),
    "an entry with too many users": with_entry(user_ids="1-9999999999"),
    "an entry with odd numbers": with_entry(num_images_per_user="5"),
    "an entry with a negative number": with_entry(published=-1),
    "an entry of infinity": with_entry(num_processes=float("inf")),
    "an entry of no time": with_entry(started="yesterday"),
    "an entry of no zone": with_entry(started="2026-11-23T11:06:00"),
    "an entry that ended never": with_entry(ended=17),
    **{
        f"an identity {what}": example_json(identity=identity, run=run_of(identity))
        for what, identity in {
            "without a seed": {name: value for name, value in IDENTITY.items() if name != "seed"},
            "of no number of steps": {**IDENTITY, "num_inference_steps": "20"},
            "of no users": {**IDENTITY, "user_index": None},
            "of no user's id": {**IDENTITY, "user_index": {"anna": 0}},
            "without weights": {**IDENTITY, "vae": {}},
        }.items()
    },
    "an odd level of compression": example_json(numerics={**NUMERICS, "png_compress_level": "fast"}),
    "more users than the model has": with_entry(user_ids="1-10"),
    "a thousand million users": with_entry(user_ids=" ".join(f"{k * 2**24 + 1}-{(k + 1) * 2**24}" for k in range(64))),
    "an entry with odd failures": with_entry(failed=[[1, 2, 3]]),
    "an entry with an odd shard": with_entry(shard="3/2"),
    "an entry with an empty shard": with_entry(shard=""),
    "an entry with a number for a shard": with_entry(shard=3),
    "an entry of a shard without a batch size": with_entry(shard="2/3", numerics={}),
    "an entry of a shard with batches of none": with_entry(shard="2/3", numerics={"batch_size": 0}),
    "an entry with fields of another version": with_entry(mood="good"),
}


EDITED = {
    "another seed": example_json(identity={**IDENTITY, "seed": 43}),
    "an option more": example_json(identity={**IDENTITY, "eta": 0.5}),
    "users swapped": example_json(identity={**IDENTITY, "user_index": {**IDENTITY["user_index"], "1": 1, "2": 0}}),
    "another hash": example_json(run=64 * "0"),
    "no hash": example_json(run=...),
}


@pytest.mark.parametrize("name", [*DAMAGED, *EDITED])
def test_a_damaged_or_edited_record_is_refused_and_left_as_it_is(tmp_path, name):
    content, path = {**DAMAGED, **EDITED}[name], tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{'is damaged' if name in DAMAGED else 'was edited'}.*--overwrite"):
        RunRecord.read(tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("error", "state", "cause"),
    [
        (None, "ended", None),
        (Stopped(15), "stopped by signal 15", None),
        (Failed("disk full"), "failed", "disk full"),
        (KeyError(), "failed", "KeyError"),
    ],
)
def test_a_run_notes_how_it_ended(tmp_path, error, state, cause):
    record = RunRecord(identity=IDENTITY, numerics=NUMERICS)
    record.begin(tmp_path, RunEntry(**RUNNING))
    assert RunRecord.read(tmp_path).last.state == "running"
    record.end(tmp_path, error)
    entry = RunRecord.read(tmp_path).last
    assert (entry.state, entry.cause) == (state, cause)
    assert entry.ended


def test_numerics_differ_where_both_note_them():
    old, new = {"batch_size": 4, "torch": "1", "cudnn": 9}, {"batch_size": 8, "torch": "1", "zlib": "1.3"}
    assert list(changed_numerics(old, new)) == [("batch_size", 4, 8)]
    assert list(changed_numerics(old, {**old, "png_compress_level": 6})) == []  # what older records do not say
    assert list(changed_numerics(old, {**old, "png_compress_level": 1})) == [("png_compress_level", 6, 1)]
