"""`preview.html`: what it shows, what it says, how large it gets, and what a browser makes of it."""

import base64
import colorsys
import hashlib
import io
import json
import os
import struct
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from tests.browser import CHROMEDRIVER, CHROMIUM, browse
from tests.checkpoints import model_flags
from tests.definitions import (
    IDENTITY,
    csv_of,
    entry_of,
    fields_of,
    name_of,
    png_of,
    png_of_pixels,
    record_of,
    run_of,
    seed_of,
    write_dataset,
)
from tests.jobs import run_job
from userdiff import text
from userdiff.cli import main
from userdiff.dataset.rows import Rows, read_lines
from userdiff.dataset.run_record import RunEntry, RunRecord
from userdiff.tools import preview, run_summary, thumbnails

BEGUN_WITH = {"batch_size": 16, "device": "x86_64", "compiled": "no", "allow_tf32": False, "torch": "2.13.0+cpu"}
VOID = {"meta", "link", "img", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""

    @property
    def name(self):
        return f"{self.tag}.{self.attributes['class']}" if "class" in self.attributes else self.tag


class Page(HTMLParser):
    """A page as an independent reader finds it; fails where tags are not properly nested."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.size = len(data)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(data.decode())
        self.close()
        assert self._open == []
        self.facts = dict(zip(self.texts("dt"), self.texts("dd"), strict=True))
        self.notices = self.texts("p.notice")

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        assert len(element.attributes) == len(attrs)
        if tag == "img":
            assert self._open[-1].tag == "a"
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1].text += data

    def texts(self, name):
        return [element.text for element in self.elements if element.name == name]

    @property
    def images(self):
        """Of each the attributes of its `img`, with the `href` around it."""
        pairs = pairwise(self.elements)
        return [{**link.attributes, **image.attributes} for link, image in pairs if image.tag == "img"]

    def users(self):
        """What it shows of each user: name -> the `alt` of its images, and the text of its other items."""
        users: dict[str, list[str]] = {}
        for element in self.elements:
            if element.tag == "h2":
                shown = users.setdefault(element.text, [])
            elif element.tag == "img":
                shown.append(element.attributes["alt"])
            elif element.name in {"li.unreadable", "li.more"}:
                shown.append(element.text)
        return users


def shown(user_id, image_indices, *others):
    """What a page shows of a user."""
    return [*(f"user {user_id}, image {index}" for index in image_indices), *others]


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


def noise_pixels(*seed, height=32, width=32, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_dataset(folder, num_users=2, num_images=3, png=lambda *item: png_of_pixels(noise_pixels(*item))):
    """A folder of images without a record."""
    return write_dataset(folder, {(1 + u, i): png(1 + u, i) for u in range(num_users) for i in range(num_images)})


def page_of(folder, *record_and_end):
    return Page(preview.preview_page(folder, Rows(read_lines(folder / "manifest.csv")), *record_and_end))


def entry(**changes):
    return {**entry_of("1-5", 100, numerics=BEGUN_WITH, published=490), **changes}


def record(*history, numerics=BEGUN_WITH, **identity):
    content = record_of(*history, identity=IDENTITY | identity, numerics=numerics)
    entries = [RunEntry(**one) for one in content["history"]]
    return RunRecord(identity=content["identity"], numerics=numerics, history=entries)


# What it shows


def test_every_image_of_every_user_is_shown_pixel_for_pixel_and_linked(tmp_path):
    page = page_of(make_dataset(tmp_path))
    assert page.users() == {"User 1": shown(1, range(3)), "User 2": shown(2, range(3))}
    for item, image in zip([(u, i) for u in (1, 2) for i in range(3)], page.images, strict=True):
        assert (tmp_path / unquote(image["href"])).samefile(tmp_path / name_of(*item))
        assert image["title"] == f"image {item[1]}, seed {seed_of(42, *item)}, {name_of(*item)}"
        assert np.array_equal(np.asarray(decoded(image)), noise_pixels(*item))
    assert page.texts("h1") == [tmp_path.name]
    assert page.texts("p.summary") == ["6 images of 2 users, 32 x 32 pixels"]
    assert page.texts("p.more") == []


@pytest.mark.parametrize("lossy", ["WEBP", "JPEG"])
@pytest.mark.parametrize(("size", "shown_size"), [((512, 256), (96, 48)), ((100, 300), (32, 96))])
def test_large_images_are_shown_small_each_with_its_own_colour(size, shown_size, lossy, tmp_path, monkeypatch):
    def png(user_id, image_index):
        values = np.full((size[1], size[0], 3), colour(user_id, image_index), np.uint8)
        values[: size[1] // 4, : size[0] // 4] = 255  # one corner white
        return png_of_pixels(values)

    monkeypatch.setattr(thumbnails, "_LOSSY", lossy)
    width, height = shown_size
    for number, image in enumerate(page_of(make_dataset(tmp_path, png=png)).images):
        picture = decoded(image)
        assert (picture.format, picture.size) == (lossy, shown_size)
        assert (int(image["width"]), int(image["height"]), "class" in image) == (*shown_size, False)
        values = np.asarray(picture.convert("RGB")).astype(int)
        assert values[: height // 4 - 2, : width // 4 - 2].min() > 230
        assert np.abs(values[height // 2 :].mean((0, 1)) - colour(1 + number // 3, number % 3)).max() < 6


def test_small_images_of_any_channels_are_enlarged_by_a_whole_number(tmp_path):
    widths = {1: 96, 8: 96, 28: 84, 48: 96, 64: 64, 96: 96, 97: 96}
    cases = [(side, channels) for side in widths for channels in (1, 3, 4)]
    pixels = [noise_pixels(side, height=side, width=side, channels=channels) for side, channels in cases]
    write_dataset(tmp_path, {(1 + i // 16, i % 16): png_of_pixels(values) for i, values in enumerate(pixels)})
    for (side, _), values, image in zip(cases, pixels, page_of(tmp_path).images, strict=True):
        assert image["width"] == image["height"] == str(widths[side])
        assert ("class" in image) == (side < widths[side])
        assert side > 96 or np.array_equal(np.asarray(decoded(image)), values)


# How large it gets


def test_the_first_images_of_the_first_users_are_shown_and_the_rest_is_counted(tmp_path, monkeypatch):
    items = [*((1 + u, i) for u in range(66) for i in range(17)), (67, 0)]
    write_dataset(tmp_path, dict.fromkeys(items, png_of({})))
    opened = []
    make_thumbnail = preview.make_thumbnail
    monkeypatch.setattr(preview, "make_thumbnail", lambda path, size: opened.append(path) or make_thumbnail(path, size))
    page = page_of(tmp_path)
    assert page.users() == {f"User {user_id}": shown(user_id, range(16), "and 1 more") for user_id in range(1, 65)}
    assert page.texts("p.more") == ["and 3 more users"]
    assert page.texts("p.summary") == [f"{66 * 17 + 1} images of 67 users, 3 x 2 pixels"]
    assert len(opened) == len(set(opened)) == 64 * 16


def test_a_page_of_all_the_noise_it_may_show_stays_small(tmp_path, monkeypatch):
    users = range(10**18 - 64, 10**18)  # names as long as they get
    files = [png_of_pixels(noise_pixels(number, height=96, width=96)) for number in range(4)]
    write_dataset(tmp_path, {(user_id, index): files[index % 4] for user_id in users for index in range(16)})
    made = {}
    make_thumbnail = preview.make_thumbnail

    def make_once(path, max_bytes):  # of four files, for the sake of the test's time
        file = int(path.stem[-3:]) % 4
        made[file] = made.get(file) or make_thumbnail(path, max_bytes)
        return made[file]

    monkeypatch.setattr(preview, "make_thumbnail", make_once)
    failed = [[10**18, image_index] for image_index in range(1000)]
    last = entry(failed=failed, user_ids="1 " * 10**5, state="&" * 10**6)
    page = page_of(tmp_path, record(last, user_index={str(user_id): 2 * user_id for user_id in range(10**5)}))
    assert len(page.images) == 1024
    assert 2_500_000 < page.size < 5_000_000
    assert all(decoded(image).size == (96, 96) for image in page.images[-16:])


def test_what_does_not_fit_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_IMAGE_BYTES", 9_000)
    page = page_of(make_dataset(tmp_path, 4, 5))
    numbers = [sum(text.startswith("user") for text in items) for items in page.users().values()]
    assert 0 < sum(numbers) < 20
    assert list(page.users().values()) == [
        shown(user_id, range(number), *[f"and {5 - number} more"] * (number < 5))
        for user_id, number in enumerate(numbers, 1)
    ]
    assert sum(len(image["src"]) for image in page.images) < 9_000


# Whatever lies there

GIGAPIXELS = b"IHDR" + struct.pack(">II5B", 10**5, 10**5, 8, 2, 0, 0, 0)
UNREADABLE = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[:-500],
    "of another format": lambda data: b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;",
    "of gigapixels": lambda data: data[:12] + GIGAPIXELS + struct.pack(">I", zlib.crc32(GIGAPIXELS)) + data[33:],
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_an_image_that_cannot_be_read_is_shown_as_such(damage, tmp_path):
    path = make_dataset(tmp_path) / name_of(1, 1)
    data = damage(path.read_bytes())
    path.unlink()
    path.mkdir() if data is None else path.write_bytes(data)
    page = page_of(tmp_path)
    users = {"User 1": ["user 1, image 0", "image 1 cannot be read", "user 1, image 2"], "User 2": shown(2, range(3))}
    assert page.users() == users
    (item,) = (element for element in page.elements if element.name == "li.unreadable")
    assert item.attributes["title"] == f"image 1, seed {seed_of(42, 1, 1)}, {name_of(1, 1)}"


def test_a_dataset_without_images_or_a_name_has_a_page():
    page = page_of(Path("/"))
    assert (page.users(), page.texts("h1"), page.texts("p.summary")) == ({}, ["dataset"], ["0 images of 0 users"])


def test_an_edited_manifest_opens_nothing_else_and_links_nowhere_and_may_have_rows_twice_and_unsorted(tmp_path):
    folder, secret = make_dataset(tmp_path / "out"), tmp_path / "secret.png"
    secret.write_bytes(png_of({}))
    names = ["../secret.png", str(secret), "javascript:alert(1)", "user_01/../../secret.png"]
    names += ["user_01/generated_000.png?x", "user_02/generated_000.png", "<script>alert(1)</script>"]
    rows = [fields_of(user_id, image_index, b"") for user_id in (1, 2) for image_index in range(3)]
    edited = [(name, *rows[0][1:]) for name in names]
    (folder / "manifest.csv").write_text(csv_of(*rows[3:], *edited, *rows, rows[0]))
    page = Page(remade(folder))
    assert [image["href"] for image in page.images] == [row[0] for row in rows]
    assert page.users() == {"User 1": shown(1, range(3)), "User 2": shown(2, range(3))}
    assert len(page.texts("script")) == 1
    ids = [element.attributes["id"] for element in page.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "name", [b"<b>&amp;\"'", b"<|title><script>alert(1)<|script>", b"{{users}}", "ä 日本", b"\xff"]
)
def test_a_folder_may_have_any_name(name, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + (name if isinstance(name, bytes) else name.encode())))
    page = page_of(make_dataset(folder, 1, 1))
    said = folder.name.encode(errors="replace").decode()
    assert page.texts("h1") == [said]
    assert page.texts("title") == [f"{said}: 1 image of 1 user, 32 x 32 pixels"]
    assert (len(page.texts("script")), len(page.users()), page.texts("b")) == (1, 1, [])


# What it says of the run


def test_the_facts_of_a_run(tmp_path):
    page = page_of(make_dataset(tmp_path), record(entry()))
    assert page.facts == {
        "Checkpoint": "VAE a1a1a1a1a1a1, UNet b2b2b2b2b2b2, condition encoder c3c3c3c3c3c3",
        "Noise schedule": "beta_schedule scaled_linear, clip_sample False",
        "Steps": "20 of DDIM",
        "Seed": "42",
        "Precision": "float32",
        "Batch size": "16",
        "Device": "x86_64",
        "Versions": "torch 2.13.0+cpu",
        "Asked for last": "users 1-5, 100 images each",
        "Last run": "490 images in 0:01:30 (5.44 images/s), 2 processes, begun 2026-11-23 11:06 UTC",
        "Runs": "1",
        "Identity": run_of(IDENTITY)[:12],
    }
    assert page.notices == []


NOW = {**BEGUN_WITH, "device": "H200", "compiled": "inductor", "allow_tf32": True}
UNUSUAL = {"eta": 0.5, "mixed_precision": "bf16", "vae_output_range": "signed", "noise_schedule": {}}
UNUSUAL["user_index"] = {"3": 0, "4": 1, "5": 2, "17": 9, "18": 3}
UNUSUAL_FACTS = {
    "Noise schedule": "DDIM's defaults",
    "Eta": "0.5",
    "Precision": "bf16",
    "VAE output range": "signed",
    "Device": "H200, compiled: inductor, TF32",
    "Runs": "2",
    "Row of the embedding, by user": "3-5: 0-2, 17: 9, 18: 3",
    "Changed since the first run": "allow_tf32 was False, compiled was no, device was A100",
}
FAILED = [[2, 1], *([3, index] for index in (0, 2, 3, 4)), *([4, index] for index in range(110))]
FAILED_NOTICE = "114 images failed in the last run: user 3: 0 2-4; user 4: 0-95 and 14 more"
UNDER_WAY = entry(state="running", ended=None, num_processes=1, published=1)
ENDED_BADLY = entry(state="failed", cause="--output_dir: No space left on device (/home/somebody/x)")
NO_TIME = "490 images, 2 processes, begun 2026-11-23 11:06 UTC"


@pytest.mark.parametrize(
    ("of_run", "facts", "notices"),
    [
        (record(entry(), entry(numerics=NOW), numerics={**BEGUN_WITH, "device": "A100"}, **UNUSUAL), UNUSUAL_FACTS, []),
        (record(), {"Seed": "42", "Runs": "0", "Batch size": "16"}, []),
        (record(entry(ended="2026-11-23T11:05:54+00:00")), {"Last run": NO_TIME}, []),
        (record(entry(failed=FAILED)), {}, [FAILED_NOTICE]),
        (record(entry(failed=[[4, 0]])), {}, ["1 image failed in the last run: user 4: 0"]),
        (record(entry(failed=[[2, 1]])), {}, []),  # made since
        (record(entry(shard="2/7")), {"Asked for last": "users 1-5, 100 images each, of which shard 2/7"}, []),
        (record(UNDER_WAY), {}, ["The last run is under way, or was killed."]),
        (record(ENDED_BADLY), {}, ["The last run did not come to its end: failed."]),
    ],
)
def test_what_is_told_of_runs(of_run, facts, notices, tmp_path):
    page = page_of(make_dataset(tmp_path), of_run)
    assert {name: page.facts.get(name) for name in facts} == facts
    assert page.notices == notices
    assert "somebody" not in str(page.elements)


def test_at_the_end_of_a_run_its_end_is_now(tmp_path):
    page = page_of(tmp_path, record(UNDER_WAY), datetime(2026, 11, 23, 11, 6, 2, tzinfo=timezone.utc))
    assert page.facts["Last run"] == "1 image in 0:00:02 (0.5 images/s), 1 process, begun 2026-11-23 11:06 UTC"
    assert page.notices == []
    facts = page_of(tmp_path, record(UNDER_WAY)).facts
    assert facts["Last run"] == "1 image, 1 process, begun 2026-11-23 11:06 UTC"


def test_random_weights_are_told(tmp_path):
    (tmp_path / "manifest.csv").write_text(csv_of(fields_of(1, 0, b"")).replace("trained", "random"))
    (notice,) = page_of(tmp_path).notices
    assert "RANDOM" in notice


def test_a_long_fact_is_cut_between_words():
    of_run = record(entry(user_ids=" ".join(str(user_id) for user_id in range(1000, 3000, 2))))
    told = dict(run_summary.run_summary(of_run))["Asked for last"]
    assert 290 < len(told) < 310
    assert told.startswith("users 1000 1002 ")
    assert told.endswith(" 1112 1114 ...")


# Alone


def test_a_page_names_nothing_but_itself_and_its_images(tmp_path):
    page = page_of(make_dataset(tmp_path), record(entry()))
    attributes = [(element.tag, *pair) for element in page.elements for pair in element.attributes.items()]
    for tag, name, value in attributes:
        if name in {"src", "href"}:
            parts = urlsplit(value)
            assert parts.scheme == "data" or (tag == "a" and not parts.scheme + parts.netloc and value[0] != "/")
        assert not name.startswith("on")
        assert name not in {"style", "srcset", "action"}
    (policy,) = [value for _, name, value in attributes if name == "content" and "default-src" in value]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag in ("style", "script"):
        (content,) = page.texts(tag)
        assert "url(" not in content
        assert "@import" not in content
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert rules == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert str(tmp_path) not in str(page.elements)


# The commands that make it


def remade(folder):
    (folder / "preview.html").unlink(missing_ok=True)
    assert main(["preview", str(folder)]) == 0
    return (folder / "preview.html").read_bytes()


def test_a_job_leaves_a_page_that_tells_of_it(checkpoint, tmp_path, monkeypatch):
    decode = AutoencoderKL.decode

    def decode_badly(self, latents, **options):
        images = decode(self, latents, **options)[0]
        if len(images) > 1:  # none of those with which it is tried whether it decodes at all
            images[3, 0, 3, 3] = float("nan")
        return (images,)

    monkeypatch.setattr(AutoencoderKL, "decode", decode_badly)
    flags = [*model_flags(checkpoint), "--num_inference_steps", 1, "--device", "cpu", "--num_images_per_user", 2]
    assert run_job(*flags, "--batch_size", 16, "--output_dir", tmp_path) == 1
    page = Page((tmp_path / "preview.html").read_bytes())
    failed = json.loads((tmp_path / "run.json").read_text())["history"][-1]["failed"]
    number = 10 - len(failed)
    (notice,) = page.notices
    assert notice.startswith(f"{text.count(len(failed), 'image')} failed in the last run: user {failed[0][0]}: ")
    assert len(page.images) == number
    assert page.facts["Last run"].startswith(f"{number} images in 0:0")
    assert page.facts["Batch size"] == "16"
    made_again = Page(remade(tmp_path))
    assert made_again.facts.pop("Last run")[-4:] == page.facts.pop("Last run")[-4:] == " UTC"
    assert (made_again.users(), made_again.facts, made_again.notices) == (page.users(), page.facts, page.notices)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_whose_record_is_gone_or_damaged_has_a_page_without_facts(content, tmp_path, capsys):
    make_dataset(tmp_path)
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    page = Page(remade(tmp_path))
    assert (page.facts, len(page.images)) == ({}, 6)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.endswith("; the page is made without the run's facts") for line in warnings] == [True] * bool(content)


# In a browser


needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver (Debian's chromium-driver) are not installed"
)
ALL_USERS = [*range(1, 13), 10**18 - 1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browse(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown") / "50% <b>#1?"  # of which a URL minds every sign
    images = {(u, i): png_of({}, (32, 32), colour=colour(u, i)) for u in ALL_USERS[:-1] for i in range(17)}
    write_dataset(folder, {**images, (ALL_USERS[-1], 0): png_of({})}, record_of(entry(failed=[[13, 0]])))
    (folder / name_of(ALL_USERS[-1], 0)).unlink()
    remade(folder)
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
        ("999999999999999999", ALL_USERS[-1:], "1 of 13 users on this page"),
        ("999999999999999998", [], "0 of 13 users on this page"),  # the same number to JavaScript as the last id
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
