"""`userdiff merge --into`: the datasets of independent jobs, joined in one folder."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import model_flags
from tests.definitions import (
    IDENTITY,
    NUMERICS,
    RUN,
    entry_of,
    files_in,
    image_of,
    images_of,
    interrupt,
    manifest_of,
    name_of,
    record_of,
    shard_of,
    write_dataset,
)
from tests.job.test_output_folder import mounted
from tests.jobs import run_job, tree
from userdiff.cli import main
from userdiff.dataset.layout import PAGE_START
from userdiff.dataset.locks import folder_lock
from userdiff.tools.merge import merge_into
from userdiff.tools.status import read_status
from userdiff.tools.verify import verify


def dataset(folder, contents, user_ids="1-2", number=3, *, identity=IDENTITY, numerics=NUMERICS, **entry):
    """What a job leaves that ended; `contents` is {(user_id, image_index): file content}, or items to draw."""
    images = contents if isinstance(contents, dict) else images_of(contents)
    record = record_of(entry_of(user_ids, number, **entry), identity=identity, numerics=numerics)
    (write_dataset(folder, images, record) / "preview.html").write_bytes(PAGE_START)
    return folder


def all_of(user_ids, number=3):
    return [(user_id, image_index) for user_id in user_ids for image_index in range(number)]


def history(folder):
    return json.loads((folder / "run.json").read_text())["history"]


def state(*folders):
    """All there is to see of folders' files, times and inodes included."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) for path in paths if path.is_file()}
    return {**files, **dict.fromkeys(path for path in paths if path.is_dir())}


def assert_is(folder, items):
    """Exactly these images, the manifest that says so, and no other file or folder."""
    contents, found = images_of(items), files_in(folder)
    records = {name: found.pop(name) for name in ("manifest.csv", "run.json", "preview.html")}
    assert found == {name_of(*item): data for item, data in contents.items()}
    assert records["manifest.csv"].decode() == manifest_of(contents)
    assert f"{len(contents)} image".encode() in records["preview.html"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {f"user_{item[0]:02d}" for item in contents}


def merge(*arguments):
    return main(["merge", *map(str, arguments)])


@pytest.fixture
def jobs(tmp_path):
    """Two finished jobs, of one user each."""
    return [
        dataset(tmp_path / f"job_{user_id}", all_of([user_id]), str(user_id), started=f"2026-01-0{user_id}T00:00+00:00")
        for user_id in (1, 2)
    ]


# What it is for


def test_two_jobs_joined_are_one_job(checkpoint, tmp_path, capsys):
    flags = [*model_flags(checkpoint), "--num_inference_steps", 1, "--batch_size", 4, "--num_images_per_user", 3]
    one, two, all_users, joined = (tmp_path / name for name in ("one", "two", "all", "joined"))
    assert run_job(*flags, "--user_ids", "1-2", "--output_dir", one) == 0
    assert run_job(*flags, "--user_ids", "3-5", "--output_dir", two) == 0
    assert run_job(*flags, "--output_dir", all_users) == 0
    capsys.readouterr()
    assert merge(one, two, "--into", joined) == 0
    assert capsys.readouterr().out == f"{joined / 'manifest.csv'}: 15 images, 15 linked and 0 copied now\n"
    assert tree(joined) == tree(all_users)
    assert {path.name for path in joined.iterdir()} == {path.name for path in all_users.iterdir()}
    assert verify(joined, deep=True) == []
    status = read_status(joined)
    assert (status.state, status.wanted, status.beyond) == ("complete", dict.fromkeys(range(1, 6), 3), 0)
    assert run_job(*flags[:-4], "--num_images_per_user", 4, "--output_dir", joined) == 0  # with its own batch size
    said = capsys.readouterr()
    assert "15 already there, 5 to make in" in said.out
    assert "batches of 4" in said.out
    assert "when this folder was begun" not in said.err


ITEMS = st.sets(st.sampled_from(all_of([1, 2, 107])), max_size=6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=st.lists(ITEMS, min_size=1, max_size=4), order=st.randoms())
def test_joined_are_all_images_whatever_the_order_and_however_often(held, order, tmp_path):
    folder = tmp_path / "example"
    shutil.rmtree(folder, ignore_errors=True)
    sources = [dataset(folder / f"job_{number}", items) for number, items in enumerate(held)]
    before = state(*sources)
    order.shuffle(sources)
    for into in ("C", "C", "another"):
        merge_into(sources, folder / into)
        assert_is(folder / into, set().union(*held))
        order.shuffle(sources)
    assert state(*sources) == before


def test_later_only_what_is_new_is_put_and_every_run_stands_once_in_the_history(jobs, tmp_path):
    into = tmp_path / "C"
    jobs.append(dataset(tmp_path / "job_3", all_of([3], 2), "3", started="2025-12-01T00:00:00+00:00"))
    interrupt(jobs[2])
    assert merge_into(jobs, into).num_missing == 1
    assert (read_status(into).state, read_status(into).done) == ("incomplete", {1: 3, 2: 3, 3: 2})
    old = state(into)
    (before,) = history(jobs[2])
    (jobs[2] / "manifest.part-00000.csv").unlink()
    write_dataset(
        jobs[2], images_of(all_of([3])), record_of(before, entry_of("3", 3, started="2026-02-01T00:00+00:00"))
    )
    joined = merge_into([jobs[2]], into)  # the others may be gone by now
    assert (joined.num_images, joined.num_linked, joined.num_copied, joined.num_missing) == (9, 1, 0, 0)
    assert_is(into, all_of([1, 2, 3]))
    assert all(state(into)[path] == seen for path, seen in old.items() if path.suffix == ".png")
    runs = [entry for entry in history(into) if "joined" not in entry]
    assert runs == [before, *(history(job)[0] for job in jobs[:2]), history(jobs[2])[1]]  # oldest first
    assert [entry["joined"] for entry in history(into) if "joined" in entry] == [["job_1", "job_2", "job_3"], ["job_3"]]
    last = history(into)[-1]
    assert (last["user_ids"], last["num_images_per_user"], last["published"]) == ("1-3", 3, 1)
    assert read_status(into).state == "complete"


def test_into_a_jobs_own_folder_which_keeps_what_it_has(jobs, tmp_path, capsys):
    into = dataset(tmp_path / "C", all_of([3]), "3", numerics={**NUMERICS, "batch_size": 9})
    kept = state(into)
    assert merge(*jobs, "--into", into) == 0
    said = capsys.readouterr()
    assert "6 linked" in said.out
    assert f"Warning: batch_size is 9 in {into}, 4 in {jobs[0]} and 1 more; " in said.err
    assert_is(into, all_of([1, 2, 3]))
    assert {path: seen for path, seen in state(into).items() if path.parent.name == "user_03"}.items() <= kept.items()
    assert json.loads((into / "run.json").read_text())["numerics"]["batch_size"] == 9
    assert read_status(into).wanted == {1: 3, 2: 3, 3: 3}


def test_the_largest_number_asked_for_is_what_is_wanted_and_failures_that_nobody_made_up_for_stay(tmp_path):
    one = dataset(tmp_path / "one", all_of([1], 1), "1", 2, failed=[[1, 1]])
    two = dataset(tmp_path / "two", [*all_of([2], 4)], "2", 4, failed=[])
    three = dataset(tmp_path / "three", [(3, 0), (3, 9)], "3", 1, failed=[[2, 3], [3, 0]])  # which others have
    assert merge_into([one, two, three], tmp_path / "C").num_missing == 6
    status = read_status(tmp_path / "C")
    assert (status.wanted, status.done, status.failed) == ({1: 4, 2: 4, 3: 4}, {1: 1, 2: 4, 3: 1}, {1: 1})
    assert history(tmp_path / "C")[-1]["failed"] == [[1, 1]]


def shards(tmp_path, num_shards, batch_sizes, number=6):
    """Finished shards of 1-2 x `number` images, one for each batch size."""
    folders = []
    for index, batch_size in enumerate(batch_sizes, 1):
        items = [item for item in all_of([1, 2], number) if shard_of(*item, batch_size, num_shards) == index]
        numerics = {**NUMERICS, "batch_size": batch_size}
        started = f"2026-01-0{index}T00:00+00:00"
        changes = {"shard": f"{index}/{num_shards}", "numerics": numerics, "started": started}
        record = record_of(entry_of("1-2", number, **changes), numerics=numerics)
        write_dataset(tmp_path / f"shard_{index}", images_of(items), record)
        folders.append(tmp_path / f"shard_{index}")
    return folders


def test_joined_shards_are_the_whole_dataset_and_one_that_is_not_among_them_is_named(tmp_path, capsys):
    folders = shards(tmp_path, 3, [4, 4, 4])
    assert merge(folders[2], folders[0], "--into", tmp_path / "C") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("4 of those asked for are not there: ")
    assert last.endswith("; no folder is of shard 2 of 3")
    assert "shard" not in history(tmp_path / "C")[-1]
    assert (read_status(tmp_path / "C").wanted, read_status(tmp_path / "C").shard) == ({1: 6, 2: 6}, None)
    assert merge(folders[1], "--into", tmp_path / "C") == 0
    assert "not there" not in capsys.readouterr().out
    assert_is(tmp_path / "C", all_of([1, 2], 6))


def test_shards_that_another_batch_size_cut_otherwise_are_named_where_images_are_missing(tmp_path, capsys):
    folders = shards(tmp_path, 2, [4, 3])
    assert merge(*folders, "--into", tmp_path / "C") == 0
    said = capsys.readouterr()
    assert f"Warning: batch_size is 4 in {folders[0]}, 3 in {folders[1]}; " in said.err
    assert said.out.splitlines()[-1].endswith(
        "; these are shards of different cuts, of 2 with --batch_size 3, of 2 with --batch_size 4, and images may be in none of "
        "them"
    )


# What is believed


def test_what_is_not_proven_stays_out_and_is_said(jobs, tmp_path, capsys):
    interrupt(jobs[0])
    (jobs[0] / name_of(1, 0)).write_bytes(b"")  # emptied by a power cut
    (jobs[0] / name_of(1, 5)).write_bytes(image_of(1, 5))  # its row was lost, and it explains itself
    (jobs[0] / name_of(1, 6)).write_bytes(image_of(1, 6, run=RUN))  # a stranger's
    (jobs[0] / name_of(1, 7)).write_bytes(image_of(1, 7)[:-9])
    (jobs[1] / name_of(2, 1)).unlink()
    dataset(tmp_path / "job_3", [(2, 1)], "2")  # which has that one
    before = state(*jobs)
    assert merge(*jobs, tmp_path / "job_3", "--into", tmp_path / "C") == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{jobs[0]}: 2 images missing, damaged or of another run: {name_of(1, 0)}, {name_of(1, 6)}"
    )
    assert_is(tmp_path / "C", [(1, 1), (1, 2), (1, 5), *all_of([2])])
    assert state(*jobs) == before


def test_what_the_joined_folder_lacks_or_has_damaged_is_put_again(jobs, tmp_path):
    into = tmp_path / "C"
    merge_into(jobs, into)
    (into / name_of(1, 1)).unlink()
    (into / name_of(2, 0)).unlink()
    (into / name_of(2, 0)).write_bytes(b"half")
    (into / "user_02" / ".generated_001.png.tmp-0123abcd").write_bytes(b"half")
    before = state(*jobs)
    joined = merge_into(jobs, into)
    assert (joined.num_linked, joined.num_copied, joined.left_out) == (1, 1, {})
    assert_is(into, all_of([1, 2]))
    assert state(*jobs) == before


# What is refused, before anything is written


def refusal(capsys, *arguments):
    """Merge what cannot be merged: one line, exit status 2, and nothing changed, new folders included."""
    top = Path(arguments[0]).parent
    before = state(top)
    assert merge(*arguments) == 2
    assert state(top) == before
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "images/s]" not in line]  # the bar's
    assert (said.out, len(lines)) == ("", 1)
    return lines[0].removeprefix("userdiff merge: error: ")


def test_another_identity_is_refused_naming_the_fields(jobs, tmp_path, capsys):
    users = {str(user_id): user_id + 1 for user_id in range(3, 60)}
    other = {**IDENTITY, "seed": 43, "eta": 0.5, "unet": {"weights": "cd" * 32, "config": {}}, "user_index": users}
    two = dataset(tmp_path / "{other}", [], identity=other)
    said = refusal(capsys, *jobs, two, "--into", tmp_path / "new" / "C")
    one = jobs[0]
    assert said.startswith(
        f"{two} holds images made otherwise than those of {one} (eta is 0.0 in {one}, 0.5 in {two}; seed is 42 in "
        f"{one}, 43 in {two}; unet.weights is b2b2b2b2b2b2... in {one}, cdcdcdcdcdcd... in {two}; user_index."
    )
    assert re.search(r"; and \d+ more of user_index\); ", said)
    into = dataset(tmp_path / "C", [(7, 0)], identity=other)
    assert f"{one} holds images made otherwise than those of {into}" in refusal(capsys, *jobs, "--into", into)


def test_two_contents_of_one_image_are_refused(jobs, tmp_path, capsys):
    images = {(1, 1): image_of(1, 1, "red"), (1, 2): image_of(1, 2, "red"), (4, 0): image_of(4, 0)}
    other = dataset(tmp_path / "other", images, "1", numerics={**NUMERICS, "batch_size": 8})
    said = refusal(capsys, *jobs, other, "--into", tmp_path / "C")
    assert said == (
        f"{jobs[0] / name_of(1, 1)} and {other / name_of(1, 1)} differ, and so do 1 more that several folders hold "
        f"(batch_size is 4 in {jobs[0]} and 1 more, 8 in {other}); join without one of the two folders"
    )
    merge_into(jobs, tmp_path / "C")
    said = refusal(capsys, other, "--into", tmp_path / "C")
    assert said.startswith(f"{tmp_path / 'C' / name_of(1, 1)} and {other / name_of(1, 1)} differ")


@pytest.mark.parametrize("held", ["job_2", "C"])
def test_a_folder_in_use_is_refused(jobs, tmp_path, held, monkeypatch):
    monkeypatch.setattr("userdiff.dataset.locks.LOCK_SECONDS", 0)
    into = dataset(tmp_path / "C", [(3, 0)], "3")
    what = rf"{held} is in use by another job \(process {os.getpid()} "
    with folder_lock(tmp_path / held), pytest.raises(ValueError, match=what):
        merge_into(jobs, into)
    assert [path.name for path in into.glob("user_*")] == ["user_03"]
    merge_into(jobs, into)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{}/job_1 {}/job_2", "2 folders; --into DIR says"),
        ("{}/job_1 {}/job_2 --into {}/job_2", "--into: {}/job_2 is one of the folders to join; it keeps what it holds"),
        ("{}/job_1 {}/job_2 --into {}/link", "--into: {}/link is one of the folders to join"),
        ("{}/job_1 {}/job_2 --into {}/job_2/all", "--into: {}/job_2/all lies in {}/job_2, whose folders loaders take"),
        ("{}/job_1 {}/job_2 --into {}", "--into: {}/job_1 lies in {}, whose folders loaders take for classes"),
        ("{}/job_1 {}/nothing --into {}/C", "{}/nothing holds no dataset: no run.json; leave it out, or run its job"),
        ("{}/job_1 {}/photos --into {}/C", "{}/photos holds no dataset: no run.json"),
        ("{}/job_1 --into {}/photos", "--into: {}/photos has no run.json but holds user_01/mine.jpg; needed: a new "),
        (
            "{}/job_1 --into {}/table",
            "--into: {}/table holds manifest.csv, which no job is known to have made; needed: a new folder",
        ),
        ("{}/job_1 --into {}/table/manifest.csv", "--into: {}/table/manifest.csv is a file, needed: a folder"),
        ("{}/job_1 --into {}/linked", "--into: {}/linked/user_01 is a link into {}/job_1, which is to stay as it is"),
        ("{}/job_1 --into {}/taken", "--into: {}/taken/user_01/generated_001.png was not made by these jobs"),
    ],
)
def test_folders_that_cannot_be_joined(jobs, tmp_path, capsys, arguments, said):
    for name in ("photos/user_01/mine.jpg", "table/manifest.csv"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("name,age\n")
    (tmp_path / "link").symlink_to("job_2")
    (dataset(tmp_path / "linked", []) / "user_01").symlink_to(tmp_path / "job_1" / "user_01")
    (dataset(tmp_path / "taken", [(1, 0)]) / name_of(1, 1)).write_bytes(image_of(1, 1, run=RUN))
    paths = arguments.replace("{}", str(tmp_path)).split()
    assert refusal(capsys, *paths).startswith(said.replace("{}", str(tmp_path)))


# Links and copies


def test_links_where_that_can_be_and_through_links(jobs, tmp_path):
    (jobs[0] / "user_01").rename(tmp_path / "larger_disk")
    (jobs[0] / "user_01").symlink_to("../larger_disk")
    kept = (jobs[1] / name_of(2, 0)).rename(tmp_path / "kept.png")
    (jobs[1] / name_of(2, 0)).symlink_to(kept)
    (tmp_path / "again").symlink_to("job_1")
    assert merge_into([*jobs, tmp_path / "again"], tmp_path / "C").num_linked == 5
    assert (tmp_path / "C" / name_of(1, 0)).samefile(tmp_path / "larger_disk" / "generated_000.png")
    assert not (tmp_path / "C" / name_of(2, 0)).samefile(kept)  # which is not of the source
    assert not any(path.is_symlink() for path in (tmp_path / "C").rglob("*"))


def no_link(source, target, **options):
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))


def test_copies_elsewhere_and_only_of_what_has_its_rows_hash(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    for damaged in (jobs[0] / name_of(1, 0), jobs[1] / name_of(2, 0)):
        damaged.write_bytes(bytes(damaged.stat().st_size))
    dataset(tmp_path / "job_3", [(2, 0)], "2")
    joined = merge_into([*jobs, tmp_path / "job_3"], tmp_path / "C")
    assert (joined.num_linked, joined.num_copied, joined.num_missing) == (0, 5, 1)
    assert joined.left_out == {jobs[0]: [(1, 0)]}
    assert_is(tmp_path / "C", [(1, 1), (1, 2), *all_of([2])])
    assert (tmp_path / "C" / name_of(1, 1)).stat().st_nlink == 1


def test_a_folder_where_nothing_can_be_written_gives_its_images(jobs, tmp_path):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        dataset(disk / "job_3", all_of([3]), "3")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert merge_into([*jobs, disk / "job_3"], tmp_path / "C").num_copied == 3
    assert_is(tmp_path / "C", all_of([1, 2, 3]))


# Early ends


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, capsys):
    items = all_of([1], 40)
    job = dataset(tmp_path / "job", items, "1", 40)
    with mounted(tmp_path / "disk", "size=100k") as disk:
        into = disk / "C"
        capsys.readouterr()
        assert merge(job, "--into", into) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"userdiff merge: error: No space left on device ({into}")
        assert error.endswith(f" of 40 images are in {into}, the same command goes on from there")
        there = list(into.glob("user_*/*"))
        assert 5 < len(there) < 40
        assert {path.read_bytes() for path in there} <= set(images_of(items).values())
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert merge(job, "--into", into) == 0
        assert_is(into, items)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_put", [0, 2])
def test_a_signal_is_one_line_and_the_same_command_goes_on(jobs, tmp_path, capsys, monkeypatch, number, num_put):
    def track(items, total):
        for count, item in enumerate(items):
            if count == num_put:
                signal.raise_signal(number)
            yield item

    into = dataset(tmp_path / "C", all_of([3]), "3")
    if num_put == 0:
        interrupt(jobs[0])  # so that its images are read, before anything is written
    before = state(into)
    with monkeypatch.context() as patch:
        patch.setattr("userdiff.job.progress.show_reading", track)
        assert merge(*jobs, "--into", into) == 128 + number
    what = "nothing was changed, the same command starts again"
    if num_put:
        what = f"5 of 9 images are in {into}, the same command goes on from there"
        status = read_status(into)
        assert (status.state, sum(status.done.values())) == (f"stopped by {number.name}", 5)
    else:
        assert state(into) == before
    assert capsys.readouterr().err == f"userdiff merge: stopped by {number.name}; {what}\n"
    assert merge(*jobs, "--into", into) == 0
    assert_is(into, all_of([1, 2, 3]))
    assert read_status(into).state == "complete"


CHANGES = {"os.rename": 0, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.link": 1}


def join(sources, into, at_change):
    """Join in another process, which calls a function before every change of `into`; returns its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def hook(event, args):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (writes or event in CHANGES) and str(args[CHANGES.get(event, 0)]).startswith(str(into)):
            at_change()

    try:
        sys.addaudithook(hook)
        merge_into(sources, into)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("link", [os.link, no_link])
def test_killed_at_any_change_of_the_disk_and_run_again(tmp_path, monkeypatch, link):
    """What a kill leaves is what lies there just before the change that did not come."""
    monkeypatch.setattr(os, "link", link)
    jobs = [dataset(tmp_path / f"job_{user_id}", [(user_id, 0)], str(user_id), 1) for user_id in (1, 2)]
    into, items, before, numbers = tmp_path / "C", all_of([1, 2], 1), state(*jobs), itertools.count(1)

    def keep():
        kept = tmp_path / "kept" / str(next(numbers))
        shutil.copytree(into, kept) if into.exists() else kept.mkdir(parents=True)

    assert join(jobs, into, keep) == 0
    assert_is(into, items)
    left = list((tmp_path / "kept").iterdir())
    assert len(left) > 15
    whole = {name_of(*item): data for item, data in images_of(items).items()}
    for folder in left:
        images = {name: data for name, data in files_in(folder).items() if "/generated_" in name}
        assert images.items() <= whole.items()
        if (folder / "run.json").exists():
            assert read_status(folder).state in {"killed", "complete"}
        merge_into(jobs, folder)
        assert_is(folder, items)
        assert read_status(folder).state == "complete"
    assert state(*jobs) == before


def test_killed_again_and_again_some_changes_further_each_time(jobs, tmp_path):
    for number in itertools.count(0, 3):
        left = iter(range(number))
        if join(jobs, tmp_path / "C", lambda left=left: next(left, None) is None and os._exit(9)) == 0:
            break
    assert number > 15
    assert_is(tmp_path / "C", all_of([1, 2]))
