"""The page that compares results: its files, and the page itself in a browser."""

import base64
import csv
import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.browser import PROGRAM, Browser
from tests.conftest import as_tensor, photograph, tiny_options, write_yaml
from tlw_basicsr import SSIMDistance
from tlw_basicsr.tools.comparison import HR, Shot, data_url, most_different, write_page
from tlw_basicsr.tools.evaluation import FIELD, Pair, measure

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")


@pytest.fixture
def gt(tmp_path):
    """Two HR images whose sides are no multiples of the scale; beside them blurred ones, named as BasicSR does."""
    for number, (top, left) in enumerate([(20, 160), (300, 30)]):
        image = photograph("astronaut", top, left, 97, 131)[..., ::-1]
        blurred = cv2.GaussianBlur(image, (5, 5), 0)[:96, :130]
        for folder, name, content in (("gt", f"a{number}", image), ("blurred", f"a{number}_theirs", blurred)):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), content)
    return tmp_path / "gt"


@pytest.fixture
def page(gt, photographs, train, tmp_path, script):
    """A page of bicubic, a folder, and a training with its weighting network."""
    opt = tiny_options(photographs, train__total_iter=4)
    train(opt)
    results = ["bicubic", "Blurred=blurred", write_yaml(tmp_path, opt, "TLW.yml")]
    assert "compare.html: 2 images" in script("compare.py", *results, "--gt", gt, "--distance", "{type: SSIMDistance}")
    return tmp_path / "compare.html"


def rows_of(path):
    with open(path.with_suffix(".csv")) as file:
        return {(row["image"], row["result"]): row for row in csv.DictReader(file)}


def test_the_numbers_are_those_of_the_images(page, gt):
    rows = rows_of(page)
    file = "experiments/tiny/models/net_g_latest.pth"
    assert f". TLW: {file} (params_ema, a young average" in data_of(page)["about"]  # and the entry is named once
    assert {image for image, _ in rows} == {"a0", "a1", "mean"}
    assert [label for image, label in rows if image == "a0"] == ["bicubic", "Blurred", "TLW (params_ema)"]
    paths = gt.parent / "blurred/a1_theirs.png", gt / "a1.png"
    sr, hr = (as_tensor(cv2.imread(str(path))[:96, :130, ::-1].copy()) for path in paths)
    values = measure(sr, Pair("", "", sr, hr, 2, FIELD), FIELD.metrics)
    expected = {**values, "d": SSIMDistance()(sr, hr).item()}
    assert {key: float(rows["a1", "Blurred"][key]) for key in expected} == pytest.approx(expected, rel=1e-6)
    for metric in expected:
        of_one = [float(rows[image, "TLW (params_ema)"][metric]) for image in ("a0", "a1")]
        assert float(rows["mean", "TLW (params_ema)"][metric]) == pytest.approx(np.mean(of_one))


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_in_a_browser(page, tmp_path, width, height):
    browser = Browser(width, height, tmp_path / "profile")
    try:
        browser.open(page)
        browser.wait("document.body.dataset.drawn == 1")
        assert browser.value("document.documentElement.scrollWidth") <= width
        rows = rows_of(page)
        pair = "['left', 'right'].map((id) => document.getElementById(id).selectedOptions[0].text)"
        assert browser.value(pair) == ["Blurred", "TLW (params_ema)"]  # the last two
        back = "getComputedStyle(document.body).backgroundColor"
        assert browser.value(back) == "rgb(255, 255, 255)"
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert browser.value(back) == "rgb(20, 23, 27)"

        def shows(table, image):
            shown = browser.value(f"[...document.querySelectorAll('#{table} tbody tr')].map((row) => row.innerText)")
            digits = {"psnr_y": 2, "ssim_y": 4, "d": 4}
            return shown == [
                "\t".join([label, *(f"{float(row[key]):.{count}f}" for key, count in digits.items())])
                for (name, label), row in rows.items()
                if name == image
            ]

        def press(key, drawn):
            browser.key(key)
            browser.wait(f"document.body.dataset.drawn == {drawn}")

        assert shows("one", "a0") and shows("all", "mean")
        assert browser.value("[...document.querySelectorAll('.scroll')].every((e) => e.scrollWidth <= e.clientWidth)")
        press("ArrowRight", 2)
        assert shows("one", "a1")
        assert browser.value("document.getElementById('image').selectedOptions[0].text") == "a1"
        press("ArrowLeft", 3)
        assert shows("one", "a0")

        # the border follows the mouse; right of it lies the right result
        box = "document.getElementById('stage').getBoundingClientRect()"
        left, top, wide = (browser.value(f"{box}.{side}") for side in ("left", "top", "width"))
        for kind, part in (("Pressed", 2), ("Moved", 4), ("Released", 4)):
            browser.mouse(kind, left + wide / part, top + 20)
        place = float(browser.value("parseFloat(document.getElementById('handle').style.left)"))
        assert place == pytest.approx(25, abs=1)
        clip = browser.value("getComputedStyle(document.getElementById('over')).clipPath")
        assert clip.startswith(f"inset(0px 0px 0px {place:g}"[:22])

        # one pixel of the image is one of the screen, or four
        assert wide == 130
        press("4", 4)
        assert browser.value(f"{box}.width") == 520
        assert browser.value("getComputedStyle(document.getElementById('over')).imageRendering") == "pixelated"

        # the error map has the colours of the errors, the weights those of the trained network's
        for key, drawn, legend in (("w", 5, "weight"), ("e", 6, "levels of 255")):
            press(key, drawn)
            assert legend in browser.value("document.getElementById('legend').innerText")
        pixel = "[...document.querySelectorAll('#crops canvas')].map((c) => [...c.getContext('2d').getImageData(9, 9, 1, 1).data])"
        colours = browser.value(pixel)
        assert len(colours) == 4 and colours[-1] == [0, 0, 4, 255]  # HR has no error: magma's darkest

        # a link opens one image at one part; what this page does not have is left out
        ends = "['nameleft', 'nameright'].map((id) => document.getElementById(id).innerText)"
        link = "image=a1&x=40&y=30&left=bicubic&right=TLW+%28params_ema%29&zoom=4&map=weights"
        browser.value(f"location.hash = '{link}'")
        browser.wait("document.body.dataset.drawn == 7")
        assert browser.value(ends) == ["← bicubic: no weights", "TLW (params_ema) →"] and shows("one", "a1")
        part = browser.value("['left', 'top'].map((side) => document.getElementById('box').style[side])")
        assert part == ["160px", "120px"]
        press("1", 8)
        assert browser.value("location.hash") == "#" + link.replace("zoom=4", "zoom=1")
        assert browser.value("document.documentElement.scrollWidth") <= width
        browser.value("location.hash = 'image=other&x=nothing&y=&left=none&zoom=9&map=depth'")
        browser.wait("document.body.dataset.drawn == 9")
        assert browser.value(ends) == ["← bicubic: no weights", "TLW (params_ema) →"]
        assert browser.errors == []
    finally:
        browser.close()


def data_of(path):
    """The page's JSON as a browser takes it: up to the first end of a script, and without infinity."""
    text = path.read_text("utf-8").partition('id="data">')[2].partition("</script>")[0]
    return json.loads(text, parse_constant=pytest.fail)


def test_a_page_of_equal_images_and_of_any_name(tmp_path, script):
    """PSNR of equal images is infinite, which JSON is not; a name may look like HTML."""
    name = "<!--<script>&amp;"
    for folder in ("gt", "sr"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / f"{name}.png"), photograph(height=48, width=48))
    (tmp_path / "lr=1e-4").symlink_to("sr")  # a folder of this name, not a label
    script("compare.py", "bicubic", "<!--<script>=sr", "lr=1e-4", "--gt", "gt", "--scale", 2)
    page = (tmp_path / "compare.html").read_text("utf-8")
    assert page.count("<script") == 2 and page.count("<!--") == 0
    data = data_of(tmp_path / "compare.html")
    assert data["labels"] == ["bicubic", "<!--<script>", "lr=1e-4", "HR"] and data["images"][0]["name"] == name
    assert data["means"]["<!--<script>"] == {"psnr_y": None, "ssim_y": 1.0}
    assert data["images"][0]["rows"]["bicubic"]["psnr_y"] > 20


def test_what_does_not_fit_is_cut_to_where_the_results_differ_most(tmp_path):
    generator = np.random.default_rng(0)
    gt = generator.integers(0, 255, (300, 400, 3), np.uint8)
    one, other = gt.copy(), gt.copy()
    other[210:230, 310:330] = 255 - other[210:230, 310:330]
    shot = Shot("noise", {HR: gt, "one": one, "other": other}, {}, {"one": {"psnr_y": 1.0}, "other": {"psnr_y": 2.0}})
    write_page(tmp_path / "whole.html", [shot], "whole")
    assert data_of(tmp_path / "whole.html")["images"][0]["whole"] is True
    write_page(tmp_path / "cut.html", [shot], "cut", largest=300_000)
    assert (tmp_path / "cut.html").stat().st_size < 350_000
    entry = data_of(tmp_path / "cut.html")["images"][0]
    assert entry["whole"] is False
    top, left = entry["top"], entry["left"]
    assert top <= 210 and left <= 310 and top + entry["height"] >= 230 and left + entry["width"] >= 330


def test_images_are_kept_to_the_bit_and_cut_to_the_square_with_the_largest_sum():
    image = photograph()
    content = base64.b64decode(data_url(image).partition(",")[2])
    assert (np.array(Image.open(io.BytesIO(content)).convert("RGB")) == image).all()
    spread = np.zeros((20, 30), np.float32)
    spread[12:16, 20:24] = 1
    top, left = most_different(spread, 6)
    assert 10 <= top <= 12 and 18 <= left <= 20 and most_different(spread, 100) == (0, 0)


WRONG = {
    "bicubic": "--scale: expected one",
    "nothing --scale 2": "nothing: expected bicubic, a folder of SR images, a YAML",
    "bicubic bicubic --scale 2": "bicubic: names more than one result",
    "gt --scale 2 --out page.png": "--out: page.png must end in .html",
    "empty --scale 2": "empty: no image for a0; accepted names are a0, a0x2 and a0_…",
    "small --scale 2": "small/a0.png is 40×40; expected 96×130, as HR",
    "bicubic --scale 9": "--scale: expected 1 to 8, got 9",
}


def test_wrong_arguments_are_one_line(gt, tmp_path, script):
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    cv2.imwrite(str(tmp_path / "small/a0.png"), photograph(height=40, width=40))
    for words, message in WRONG.items():
        assert script("compare.py", *words.split(), "--gt", "gt", code=2).startswith(f"error: {message}")
    assert not list(tmp_path.glob("*.html"))
