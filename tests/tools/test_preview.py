"""`preview.html`: what it shows, what it says, how large it gets, and what a browser makes of it."""

import base64
import colorsys
import hashlib
import io
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from tests.browser import CHROMEDRIVER, CHROMIUM, browse
from tests.checkpoints import model_flags
from tests.jobs import run_job
from userdiff import text
from userdiff.cli import main
from userdiff.dataset.manifest import write_manifest
from userdiff.dataset.recipe import Recipe
from userdiff.dataset.rows import Rows
from userdiff.dataset.run_record import RunEntry, RunRecord
from userdiff.dataset.scan import listed_rows
from userdiff.tools import preview, run_summary, thumbnails

RECIPE = Recipe(seed=42, num_inference_steps=20, conditioning="trained", run="0" * 64)
BEGUN_WITH = {"batch_size": 16, "device": "x86_64", "compiled": "no", "allow_tf32": False, "torch": "2.13.0+cpu"}
VOID = {"meta", "link", "img", "input"}


@dataclass
class User:
    name: str = ""
    images: list[dict[str, str]] = field(default_factory=list)
    """Each the attributes of its `img` and the `href` around it."""
    unreadable: list[dict[str, str]] = field(default_factory=list)
    more: str = ""


class Page(HTMLParser):
    """A page as an independent reader finds it; fails where tags are not properly nested."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.size = len(data)
        self.users: list[User] = []
        self.facts: dict[str, str] = {}
        self.texts: dict[str, list[str]] = {}  # tag.class -> what stands in each
        self.attributes: list[tuple[str, str, str]] = []
        self._open: list[str] = []
        self._href = ""
        self.feed(data.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs)
        self.attributes += [(tag, name, value) for name, value in attrs]
        name = f"{tag}.{values['class']}" if "class" in values else tag
        if name == "section.user":
            self.users.append(User())
        elif name == "li.unreadable":
            self.users[-1].unreadable.append(values)
        elif tag == "a":
            self._href = values["href"]
        elif tag == "img":
            self.users[-1].images.append({**values, "href": self._href})
        self.texts.setdefault(name, []).append("")
        if tag not in VOID:
            self._open.append(name)

    def handle_endtag(self, tag):
        assert self._open.pop().partition(".")[0] == tag

    def handle_data(self, data):
        if not self._open:
            return
        name = self._open[-1]
        self.texts[name][-1] += data
        if name == "h2":
            self.users[-1].name = data
        elif name == "li.more":
            self.users[-1].more = data
        elif name == "dd":
            self.facts[self.texts["dt"][-1]] = data

    @property
    def notices(self):
        return self.texts.get("p.notice", [])


def decoded(image):
    """The picture that an `img` holds."""
    head, _, data = image["src"].partition(";base64,")
    assert head.startswith("data:image/")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        picture.load()
    return picture


def colour(user_id, image_index):
    """Another one for every image."""
    hue, value = (user_id * 7 % 16) / 16, 1 - image_index / 40
    return tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.9, value))


def flat_pixels(user_id, image_index, size=(32, 32)):
    return np.full((size[1], size[0], 3), colour(user_id, image_index), np.uint8)


def noise_pixels(user_id, image_index):
    return np.random.default_rng([user_id, image_index]).integers(0, 256, (32, 32, 3), np.uint8)


def make_dataset(folder, num_users=2, num_images=3, pixels=noise_pixels):
    """A folder of images without a record; gives its rows."""
    rows = []
    for user_id in range(1, num_users + 1):
        (folder / f"user_{user_id:02d}").mkdir(parents=True)
        for image_index in range(num_images):
            values = pixels(user_id, image_index)
            row = RECIPE.row(user_id, image_index, size=(values.shape[1], values.shape[0]), png=b"")
            Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).save(folder / row.file_name)
            rows.append(row._replace(num_bytes=(folder / row.file_name).stat().st_size))
    return rows


def preview_page(folder, rows, *others):
    return preview.preview_page(folder, Rows(rows), *others)


def entry(**changes):
    values = {
        "started": "2026-11-23T11:06:06+00:00",
        "ended": "2026-11-23T11:08:26+00:00",
        "state": "ended",
        "cause": None,
        "num_processes": 2,
        "user_ids": "1-5",
        "num_images_per_user": 100,
        "published": 490,
        "failed": [],
        "numerics": BEGUN_WITH,
    }
    return RunEntry(**values | changes)


def record(history=None, numerics=None, **identity):
    values = {
        "vae": {"weights": "a1" * 32, "config": {"scaling_factor": 0.7}},
        "unet": {"weights": "b2" * 32, "config": {}},
        "condition_encoder": "c3" * 32,
        "noise_schedule": {"beta_schedule": "scaled_linear", "clip_sample": False},
        "user_index": {"1": 0, "2": 1},
        "seed": 7,
        "num_inference_steps": 20,
    }
    history = [entry()] if history is None else history
    return RunRecord(identity=values | identity, numerics=BEGUN_WITH | (numerics or {}), history=history)


# What it shows


def test_every_image_of_every_user_is_shown_pixel_for_pixel_and_linked(tmp_path):
    rows = make_dataset(tmp_path)
    page = Page(preview_page(tmp_path, rows))
    assert [user.name for user in page.users] == ["User 1", "User 2"]
    shown = [image for user in page.users for image in user.images]
    for row, image in zip(rows, shown, strict=True):
        assert (tmp_path / unquote(image["href"])).samefile(tmp_path / row.file_name)
        assert image["alt"] == f"user {row.user_id}, image {row.image_index}"
        assert image["title"] == f"image {row.image_index}, seed {row.seed}, {row.file_name}"
        assert np.array_equal(np.asarray(decoded(image)), noise_pixels(row.user_id, row.image_index))
        assert (image["width"], image["height"], image["class"]) == ("96", "96", "enlarged")
    assert page.texts["h1"] == [tmp_path.name]
    assert page.texts["p.summary"] == ["6 images of 2 users, 32 x 32 pixels"]
    assert "and " not in "".join(user.more for user in page.users) + "".join(page.texts.get("p.more", []))


@pytest.mark.parametrize("lossy", ["WEBP", "JPEG"])
@pytest.mark.parametrize(("size", "shown_size"), [((512, 256), (96, 48)), ((100, 300), (32, 96))])
def test_large_images_are_shown_small_each_with_its_own_colour(size, shown_size, lossy, tmp_path, monkeypatch):
    def pixels(user_id, image_index):
        values = flat_pixels(user_id, image_index, size)
        values[: size[1] // 4, : size[0] // 4] = 255  # one corner white
        return values

    monkeypatch.setattr(thumbnails, "_LOSSY", lossy)
    rows = make_dataset(tmp_path, pixels=pixels)
    page = Page(preview_page(tmp_path, rows))
    for row, image in zip(rows, [image for user in page.users for image in user.images], strict=True):
        picture = decoded(image)
        assert (picture.format, picture.size) == (lossy, shown_size)
        assert (int(image["width"]), int(image["height"])) == shown_size
        assert "class" not in image
        values = np.asarray(picture.convert("RGB")).astype(int)
        width, height = shown_size
        assert values[: height // 4 - 2, : width // 4 - 2].min() > 230
        assert np.abs(values[height // 2 :].mean((0, 1)) - colour(row.user_id, row.image_index)).max() < 6


@pytest.mark.parametrize(("side", "width"), [(1, 96), (8, 96), (28, 84), (48, 96), (64, 64), (96, 96), (97, 96)])
def test_small_images_are_enlarged_by_a_whole_number(side, width, tmp_path):
    rows = make_dataset(tmp_path, 1, 1, lambda *item: flat_pixels(*item, (side, side)))
    (image,) = Page(preview_page(tmp_path, rows)).users[0].images
    assert image["width"] == image["height"] == str(width)
    assert ("class" in image) == (side < width)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_whatever_channels_a_vae_makes_are_shown(channels, tmp_path):
    rng = np.random.default_rng(0)
    rows = make_dataset(tmp_path, 1, 2, lambda *item: rng.integers(0, 256, (16, 16, channels), np.uint8))
    for row, image in zip(rows, Page(preview_page(tmp_path, rows)).users[0].images, strict=True):
        assert np.array_equal(np.asarray(decoded(image)), np.asarray(Image.open(tmp_path / row.file_name)))


# How large it gets


def test_the_first_images_of_the_first_users_are_shown_and_the_rest_is_counted(tmp_path, monkeypatch):
    rows = make_dataset(tmp_path, 66, 17, lambda *item: flat_pixels(*item, (4, 4)))
    rows += [
        row for row in make_dataset(tmp_path / "b", 67, 1, lambda *item: flat_pixels(*item, (4, 4))) if row.user_id > 66
    ]
    opened = []
    make_thumbnail = preview.make_thumbnail
    monkeypatch.setattr(preview, "make_thumbnail", lambda path, size: opened.append(path) or make_thumbnail(path, size))
    page = Page(preview_page(tmp_path, rows))
    assert [user.name for user in page.users] == [f"User {user_id}" for user_id in range(1, 65)]
    for user_id, user in enumerate(page.users, 1):
        assert [image["alt"] for image in user.images] == [f"user {user_id}, image {index}" for index in range(16)]
        assert user.more == "and 1 more"
    assert page.texts["p.more"] == ["and 3 more users"]
    assert page.texts["p.summary"] == [f"{66 * 17 + 1} images of 67 users, 4 x 4 pixels"]
    assert len(opened) == len(set(opened)) == 64 * 16


def test_a_page_of_all_the_noise_it_may_show_stays_small(tmp_path, monkeypatch):
    def pixels(user_id, image_index):
        noise = np.random.default_rng(image_index).integers(0, 256, (96, 96, 3), np.uint8)
        return noise.repeat(6, 0).repeat(6, 1)  # is noise still when it is small

    make_dataset(tmp_path, 1, 4, pixels)
    sources = sorted((tmp_path / "user_01").iterdir())
    rows = []
    for user_id in range(10**18 + 1, 10**18 + 65):  # names as long as they get
        (tmp_path / f"user_{user_id}").mkdir()
        for image_index in range(16):
            rows.append(RECIPE.row(user_id, image_index, size=(576, 576), png=b""))
            os.link(sources[image_index % 4], tmp_path / rows[-1].file_name)
    made = {}
    make_thumbnail = preview.make_thumbnail

    def make_once(path, max_bytes):  # of four files, for the sake of the test's time
        file = path.stat().st_ino
        made[file] = made.get(file) or make_thumbnail(path, max_bytes)
        return made[file]

    monkeypatch.setattr(preview, "make_thumbnail", make_once)
    failed = [[10**18, image_index] for image_index in range(1000)]
    history = [entry(failed=failed, user_ids="1 " * 10**6, state="&" * 10**6)]
    of_run = record(history, user_index={str(user_id): 2 * user_id for user_id in range(10**5)})
    page = Page(preview_page(tmp_path, rows, of_run))
    assert sum(len(user.images) for user in page.users) == 1024
    assert 2_500_000 < page.size < 5_000_000
    assert all(decoded(page.users[63].images[index]).size == (96, 96) for index in range(16))
    assert len(made) == 4


def test_what_does_not_fit_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_IMAGE_BYTES", 9_000)
    rows = make_dataset(tmp_path, 4, 5)
    page = Page(preview_page(tmp_path, rows))
    shown = [len(user.images) for user in page.users]
    assert 0 < sum(shown) < 20
    assert [user.more for user in page.users] == [f"and {5 - number} more" if number < 5 else "" for number in shown]
    assert page.size - Page(preview_page(tmp_path, [])).size < 9_000 + 4 * 400


# Whatever lies there


def damage_missing(path):
    path.unlink()


def damage_empty(path):
    path.write_bytes(b"")


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-500])


def damage_other_format(path):
    Image.new("RGB", (8, 8)).save(path, format="GIF")


def damage_folder(path):
    path.unlink()
    path.mkdir()


def damage_to_claim_gigapixels(path):
    start = b"IHDR" + struct.pack(">II5B", 10**5, 10**5, 8, 2, 0, 0, 0)
    path.write_bytes(path.read_bytes()[:12] + start + struct.pack(">I", zlib.crc32(start)) + path.read_bytes()[33:])


@pytest.mark.parametrize(
    "damage",
    [damage_missing, damage_empty, damage_cut, damage_other_format, damage_folder, damage_to_claim_gigapixels],
)
def test_an_image_that_cannot_be_read_is_shown_as_such(damage, tmp_path):
    rows = make_dataset(tmp_path)
    damage(tmp_path / rows[1].file_name)
    page = Page(preview_page(tmp_path, rows))
    assert [image["alt"] for image in page.users[0].images] == ["user 1, image 0", "user 1, image 2"]
    assert [item["title"] for item in page.users[0].unreadable] == [
        f"image 1, seed {rows[1].seed}, {rows[1].file_name}"
    ]
    assert page.texts["li.unreadable"] == ["image 1 cannot be read"]
    assert len(page.users[1].images) == 3


def test_a_dataset_without_images_or_a_name_has_a_page():
    page = Page(preview_page(Path("/"), []))
    assert (page.users, page.texts["h1"], page.texts["p.summary"]) == ([], ["dataset"], ["0 images of 0 users"])


def test_a_manifest_that_was_edited_opens_nothing_else_and_links_nowhere(tmp_path):
    rows = make_dataset(tmp_path, 2, 1)
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "secret.png")
    names = ["../secret.png", str(tmp_path.parent / "secret.png"), "javascript:alert(1)", "user_01/../../secret.png"]
    names += ["user_01/generated_000.png?x", "user_02/generated_000.png", "<script>alert(1)</script>"]
    write_manifest(tmp_path, [*(rows[0]._replace(file_name=name) for name in names), rows[1]])
    page = Page(preview.preview_page(tmp_path, listed_rows(tmp_path)))
    assert [[image["href"] for image in user.images] for user in page.users] == [["user_02/generated_000.png"]]
    assert len(page.texts["script"]) == 1


@pytest.mark.parametrize(
    "name", ["<b>&amp;\"'", "</title><script>alert(1)</script>".replace("/", "|"), "{{users}}", "ä 日本"]
)
def test_a_folder_may_have_any_name(name, tmp_path):
    rows = make_dataset(tmp_path / name, 1, 1)
    page = Page(preview_page(tmp_path / name, rows))
    assert page.texts["h1"] == [name]
    assert page.texts["title"] == [f"{name}: 1 image of 1 user, 32 x 32 pixels"]
    assert (len(page.texts["script"]), len(page.users), "b" in page.texts) == (1, 1, False)


def test_a_folder_whose_name_is_not_utf_8_has_a_page(tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert Page(preview_page(folder, make_dataset(folder, 1, 1))).texts["h1"] == ["?"]


def test_a_damaged_manifest_may_have_rows_twice_and_out_of_order(tmp_path):
    rows = make_dataset(tmp_path)
    write_manifest(tmp_path, [*rows[3:], *rows, rows[0]])
    page = Page(preview.preview_page(tmp_path, listed_rows(tmp_path)))
    assert [user.name for user in page.users] == ["User 1", "User 2"]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


# What it says of the run


def test_the_facts_of_a_run(tmp_path):
    page = Page(preview_page(tmp_path, make_dataset(tmp_path), record()))
    assert page.facts == {
        "Checkpoint": "VAE a1a1a1a1a1a1, UNet b2b2b2b2b2b2, condition encoder c3c3c3c3c3c3",
        "Noise schedule": "beta_schedule scaled_linear, clip_sample False",
        "Steps": "20 of DDIM",
        "Seed": "7",
        "Precision": "float32",
        "Batch size": "16",
        "Device": "x86_64",
        "Versions": "torch 2.13.0+cpu",
        "Asked for last": "users 1-5, 100 images each",
        "Last run": "490 images in 0:02:20 (3.5 images/s), 2 processes, begun 2026-11-23 11:06 UTC",
        "Runs": "1",
        "Identity": record().run[:12],
    }
    assert page.notices == []


def test_what_is_not_the_default_is_told(tmp_path):
    unusual = {
        "eta": 0.5,
        "mixed_precision": "bf16",
        "vae_output_range": "signed",
        "user_index": {"3": 0, "4": 1, "5": 2, "17": 9, "18": 3},
    }
    now = {"batch_size": 16, "device": "H200", "compiled": "inductor", "allow_tf32": True, "torch": "2.13.0+cpu"}
    of_run = record([entry(), entry(numerics=now)], {"device": "A100"}, **unusual)
    page = Page(preview_page(tmp_path, [], of_run))
    told = {name: page.facts.get(name) for name in ("Eta", "Precision", "VAE output range", "Device", "Runs")}
    assert told == {
        "Eta": "0.5",
        "Precision": "bf16",
        "VAE output range": "signed",
        "Device": "H200, compiled: inductor, TF32",
        "Runs": "2",
    }
    assert page.facts["Row of the embedding, by user"] == "3-5: 0-2, 17: 9, 18: 3"
    assert page.facts["Changed since the first run"] == "allow_tf32 was False, compiled was no, device was A100"


def test_at_the_end_of_a_run_its_end_is_now(tmp_path):
    of_run = record([entry(state="running", ended=None, num_processes=1, published=1)])
    ended = datetime(2026, 11, 23, 11, 6, 8, tzinfo=timezone.utc)
    page = Page(preview_page(tmp_path, [], of_run, ended))
    assert page.facts["Last run"] == "1 image in 0:00:02 (0.5 images/s), 1 process, begun 2026-11-23 11:06 UTC"
    assert page.notices == []
    page = Page(preview_page(tmp_path, [], of_run))
    assert page.facts["Last run"] == "1 image, 1 process, begun 2026-11-23 11:06 UTC"
    assert page.notices == ["The last run is under way, or was killed."]


@pytest.mark.parametrize(
    ("ended", "told"),
    [("2026-11-23T11:06:06+00:00", "4 images in 0:00:00,"), ("2026-11-23T11:06:00+00:00", "4 images, ")],
)
def test_a_run_of_no_time_has_no_rate(ended, told):
    """The clock may have been set back meanwhile."""
    facts = dict(run_summary.run_summary(record([entry(ended=ended, published=4)])))
    assert facts["Last run"].startswith(told)
    assert "images/s" not in facts["Last run"]


def test_a_long_fact_is_cut_between_words():
    of_run = record([entry(user_ids=" ".join(str(user_id) for user_id in range(1000, 3000, 2)))])
    told = dict(run_summary.run_summary(of_run))["Asked for last"]
    assert 290 < len(told) < 310
    assert told.startswith("users 1000 1002 ")
    assert told.endswith(" 1112 1114 ...")


def test_failed_images_are_listed_but_those_made_since(tmp_path):
    rows = make_dataset(tmp_path)
    failed = [[2, 1], *([3, index] for index in (0, 2, 3, 4)), *([4, index] for index in range(110))]
    (notice,) = Page(preview_page(tmp_path, rows, record([entry(failed=failed)]))).notices
    assert notice == "114 images failed in the last run: user 3: 0 2-4; user 4: 0-95 and 14 more"
    (notice,) = Page(preview_page(tmp_path, rows, record([entry(failed=[(4, 0)])]))).notices
    assert notice == "1 image failed in the last run: user 4: 0"
    assert Page(preview_page(tmp_path, rows, record([entry(failed=[[2, 1]])]))).notices == []


def test_how_a_run_ended_and_random_weights_are_told_but_no_path(tmp_path):
    rows = [row._replace(conditioning="random") for row in make_dataset(tmp_path)]
    stopped = record([entry(state="failed", cause=f"--output_dir: No space left on device ({tmp_path}/x)")])
    data = preview_page(tmp_path, rows, stopped)
    random, state = Page(data).notices
    assert "RANDOM" in random
    assert state == "The last run did not come to its end: failed."
    assert str(tmp_path).encode() not in data


def test_a_record_of_nothing_run_yet_has_a_page(tmp_path):
    page = Page(preview_page(tmp_path, make_dataset(tmp_path, 1, 1), record([])))
    assert (page.facts["Seed"], page.facts["Runs"], len(page.users[0].images)) == ("7", "0", 1)


# Alone


def test_a_page_names_nothing_but_itself_and_its_images(tmp_path):
    data = preview_page(tmp_path, make_dataset(tmp_path), record())
    page = Page(data)
    for tag, name, value in page.attributes:
        if name in {"src", "href"}:
            parts = urlsplit(value)
            assert parts.scheme == "data" or (tag == "a" and not parts.scheme + parts.netloc and value[0] != "/")
        assert not name.startswith("on")
        assert name not in {"style", "srcset", "action"}
    (policy,) = [value for tag, name, value in page.attributes if name == "content" and "default-src" in value]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag in ("style", "script"):
        (content,) = page.texts[tag]
        assert "url(" not in content
        assert "@import" not in content
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert str(tmp_path).encode() not in data


# The commands that make it


@pytest.fixture(scope="module")
def job(checkpoint):
    return [*model_flags(checkpoint), "--num_inference_steps", 1, "--device", "cpu", "--num_images_per_user", 2]


def test_a_job_leaves_a_page_that_tells_of_it(job, tmp_path, monkeypatch):
    decode = AutoencoderKL.decode

    def decode_badly(self, latents, **options):
        (images,) = decode(self, latents, **options)
        images[3, 0, 3, 3] = float("nan")
        return (images,)

    monkeypatch.setattr(AutoencoderKL, "decode", decode_badly)
    assert run_job(*job, "--batch_size", 16, "--output_dir", tmp_path) == 1
    page = Page((tmp_path / "preview.html").read_bytes())
    failed = json.loads((tmp_path / "run.json").read_text())["history"][-1]["failed"]
    number = 10 - len(failed)
    (notice,) = page.notices
    assert notice.startswith(f"{text.count(len(failed), 'image')} failed in the last run: user {failed[0][0]}: ")
    assert sum(len(user.images) for user in page.users) == number
    assert page.facts["Last run"].startswith(f"{number} images in 0:0")
    assert page.facts["Batch size"] == "16"
    made_again = Page(remade(tmp_path))
    assert made_again.facts.pop("Last run")[-4:] == page.facts.pop("Last run")[-4:] == " UTC"
    assert (made_again.users, made_again.facts, made_again.notices) == (page.users, page.facts, page.notices)


def remade(folder):
    (folder / "preview.html").unlink()
    assert main(["preview", str(folder)]) == 0
    return (folder / "preview.html").read_bytes()


@pytest.mark.parametrize("content", [None, "", "{", '{"identity": {}, "numerics": {"batch_size": 1}, "history": []}'])
def test_a_folder_whose_record_is_gone_or_damaged_has_a_page_without_facts(content, tmp_path, capsys):
    rows = make_dataset(tmp_path)
    write_manifest(tmp_path, rows)
    (tmp_path / "preview.html").write_text("")
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    page = Page(remade(tmp_path))
    assert (page.facts, [len(user.images) for user in page.users]) == ({}, [3, 3])
    warnings = capsys.readouterr().err.splitlines()
    assert [line.endswith("; the page is made without the run's facts") for line in warnings] == [True] * (
        content is not None
    )


# In a browser


needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver (Debian's chromium-driver) are not installed"
)
ALL_USERS = [*range(1, 13), 2**63 - 1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browse(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "50% <b>#1?"  # of which a URL minds every sign
    rows = make_dataset(folder, 12, 17, flat_pixels)
    rows.append(RECIPE.row(ALL_USERS[-1], 0, size=(32, 32), png=b""))  # has no file
    of_run = record([entry(failed=[[13, 0]])])
    (folder / "preview.html").write_bytes(preview_page(folder, rows, of_run))
    return (folder / "preview.html").as_uri()


def visible_users(browser):
    script = "return [...document.querySelectorAll('.user')].filter(e => e.offsetHeight > 0).map(e => e.dataset.user)"
    return list(map(int, browser.run(script)))


@needs_browser
def test_a_browser_shows_it_without_a_complaint_or_a_request(browser, url):
    browser.open(url)
    broken = (
        "return [...document.images].filter(i => !(i.complete && i.naturalWidth == 32 && i.offsetWidth == 96)).length"
    )
    assert browser.run("return document.images.length") == 12 * 16
    assert browser.run(broken) == 0
    assert visible_users(browser) == ALL_USERS
    assert browser.run("return getComputedStyle(document.images[0]).imageRendering") == "pixelated"
    assert browser.console() == []
    assert browser.requests() == [url]


@needs_browser
@pytest.mark.parametrize(
    ("text", "users", "said"),
    [
        ("3", [3], "1 of 13 users on this page"),
        ("1 5 10-15", [1, 5, 10, 11, 12], "5 of 13 users on this page"),
        (" 2,4 ", [2, 4], "2 of 13 users on this page"),
        ("9223372036854775806", [], "0 of 13 users on this page"),
        ("5-", ALL_USERS, "ids and ranges, like 1 5 10-15"),
        ("", ALL_USERS, "13 of 13 users on this page"),
    ],
)
def test_users_are_filtered(text, users, said, browser, url):
    browser.open(url)
    browser.type("input", text)
    assert visible_users(browser) == users
    assert browser.run("return document.querySelector('output').textContent") == said
    assert browser.run("return document.querySelector('input').ariaInvalid") == str(said.startswith("ids")).lower()
    assert browser.console() == []


@needs_browser
def test_an_image_opens_by_click_and_by_keyboard(browser, url):
    for act in (
        lambda: browser.click("#user-5 li:nth-child(4) a"),
        lambda: browser.type("#user-5 li:nth-child(4) a", "\ue007"),
    ):
        browser.open(url)
        act()
        assert browser.url == url.replace("preview.html", "user_05/generated_003.png")
        assert browser.run("return document.images[0].naturalWidth") == 32


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1400])
def test_it_fits_every_window_and_light(width, scheme, browser, url):
    browser.resize(width, 800)
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(url)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    colours = browser.run(
        "return ['body', 'h1', '.summary', '.facts dt', '.user p', '.notice'].map(s => document.querySelector(s))"
        ".map(e => getComputedStyle(e).color)"
    )
    page = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert all(contrast(colour, page) >= 4.5 for colour in colours)  # WCAG 2.2, 1.4.3
    assert (luminance(page) < 0.2) == (scheme == "dark")


def luminance(css):
    channels = [int(part) / 255 for part in css.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)
