"""The explorer in a real browser: what a person sees, hears and reaches, with pointer, keyboard and touch."""

import csv
import functools
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from audiomaepp.explorer import explore, own_neighbors, render_page
from audiomaepp.maps import AlignedMaps

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROME = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(not CHROME, reason=f"no browser: none of {', '.join(BROWSERS)} is there")

N, HOSTILE = 60, '<img src="https://example.invalid/x.png" onerror="document.title=\'hacked\'">'
RNG = np.random.default_rng(0)
GRID = np.stack([np.arange(N) % 10, np.arange(N) // 10], 1).astype(np.float32)
SETTINGS = {
    name: RNG.normal(size=(N, 8)).astype(np.float32) for name in ("plain", "both", "untrained", "epoch 1", "epoch 2")
}
PLACES = {
    "plain": GRID,
    "both": 9 - GRID,
    "untrained": GRID[::-1],
    "epoch 1": GRID * 0.5,
    "epoch 2": GRID * [1, -1] + [0, 5],
}
NAMES = [f"clip {i:02d}.wav" for i in range(N - 2)] + [HOSTILE, "</script><b>bold</b>"]
LABELS = np.array(["dog", "rain", "sea"])[np.arange(N) % 3]
TABLE = {"name": NAMES, "label": LABELS, "pitch": np.linspace(0.5, 99.5, N), "note": [f"=cmd {i}" for i in range(N)]}
HELD = np.arange(N) % 4 > 0


@functools.cache
def made():
    clips = [(0.3 * np.sin(np.arange(24000) * (0.05 + i / 100)).astype(np.float32), 16000) for i in range(N)]
    clips[7] = None
    numbers = {name: {"kNN-10": 0.1 * i + 0.3} for i, name in enumerate(SETTINGS)} | {"chance": {"kNN-10": 0.33}}
    return explore(
        SETTINGS,
        TABLE,
        clips,
        held_out=HELD,
        numbers=numbers,
        baselines=["untrained"],
        title=f"A map {HOSTILE}",
        steps=["epoch 1", "epoch 2"],
        maps=AlignedMaps(PLACES, {}),
    )


@pytest.fixture(scope="module")
def browser():
    flags = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--autoplay-policy=no-user-gesture-required"]
    with sync_api.sync_playwright() as driver:
        chrome = driver.chromium.launch(executable_path=CHROME, chromium_sandbox=False, args=flags)
        yield chrome
        chrome.close()


def until(page, expression, seconds=60):
    "Wait until an expression is true; playwright's own wait evaluates text, which the page's policy forbids."
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        time.sleep(0.01)


class Map:
    "A page with an explorer, and what it did: messages of the console, requests."

    def __init__(self, page, path):
        self.page, self.wrong, self.requests = page, [], []
        page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda r: self.requests.append(r.url))
        page.goto(path.as_uri())
        until(page, "document.getElementById('explorer')?.explorer?.frames > 0")

    def js(self, expression):
        return self.page.evaluate(
            f"(() => {{ const e = document.getElementById('explorer').explorer; return {expression}; }})()"
        )

    def wait(self, expression):
        until(
            self.page, f"(() => {{ const e = document.getElementById('explorer').explorer; return {expression}; }})()"
        )

    def place(self, i):
        return self.js(f"e.screen({i})")

    def settle(self):
        self.wait("e.state.t === 1")

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def click(self, i):
        self.page.mouse.click(*self.place(i))


@pytest.fixture
def opened(browser, tmp_path):
    "Open the page in a window of any kind; at the end it must have made no mistake and no request."
    path, maps = made().save(tmp_path / "map.html"), []

    def opens(page=path, **window):
        window = {"viewport": {"width": 1200, "height": 800}, "reduced_motion": "no-preference"} | window
        maps.append(Map(browser.new_context(**window).new_page(), page))
        return maps[-1]

    yield opens
    for shown in maps:
        assert shown.wrong == []
        assert [url for url in shown.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert sum(url.startswith("file:") for url in shown.requests) == 1
        shown.page.context.close()


def test_a_page_opens_with_webgl_and_shows_title_sentence_and_numbers(opened):
    shown = opened()
    assert shown.js("e.renderer") == "webgl2"
    assert "45 held-out clips" in shown.text(".amx-note") and "15 training clips" in shown.text(".amx-note")
    rows = [row.split() for row in shown.text(".amx-numbers").splitlines()]
    assert rows == [["kNN-10"], ["plain", "0.30"], ["untrained", "0.50"], ["chance", "0.33"]]


def test_the_numbers_are_explained_and_keep_their_columns(opened, tmp_path):
    "Two words of the table were explained nowhere, and columns changed places when a setting without one was shown."
    numbers = {"plain": {"kNN-10": 0.5, "trust": 0.9}, "both": {"kNN-10": 0.4, "RankMe": 3.0, "trust": 0.8}}
    maps = AlignedMaps({name: PLACES[name] for name in numbers}, {})
    page = explore({k: SETTINGS[k] for k in numbers}, held_out="x", numbers=numbers, baselines=["both"], maps=maps)
    shown = opened(page.save(tmp_path / "numbers.html"))
    heads = shown.page.locator(".amx-numbers thead th")
    before = heads.all_inner_texts()
    shown.page.get_by_label("both").check()
    assert [name for name in before if name in heads.all_inner_texts()] == heads.all_inner_texts()
    shown.page.get_by_text("What the numbers mean").click()
    words = shown.page.locator(".amx-meanings dt").all_inner_texts()
    assert words == [*before, "cosine distance"] and "nearest training clips" in shown.text(".amx-meanings")


def test_a_training_opens_at_its_end_and_one_comes_back_from_a_baseline(opened, tmp_path):
    "The first look would be at log-mel statistics; and after a look at them, the trained model was out of reach."
    few = {name: SETTINGS[name] for name in ("untrained", "epoch 1", "epoch 2", "plain")}
    steps, places = ("untrained", "epoch 1", "epoch 2"), AlignedMaps({name: PLACES[name] for name in few}, {})
    numbers = {name: {"kNN-10": 0.5} for name in few}
    page = explore(few, held_out="x", numbers=numbers, baselines=["untrained", "plain"], steps=steps, maps=places)
    shown = opened(page.save(tmp_path / "steps.html"))
    assert shown.text(".amx-step") == "epoch 2" and shown.text(".amx-current th") == "epoch 2"
    x, y = shown.place(9)
    shown.page.get_by_label("plain").check()
    shown.settle()
    assert shown.place(9) != [x, y]
    box = shown.page.locator(".amx-steps input").bounding_box()
    shown.page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    shown.settle()
    assert shown.place(9) == [x, y] and shown.js("e.state.setting") == 3


def test_a_clip_of_unknown_origin_is_called_neither(opened, tmp_path):
    shown = opened(explore(GRID, TABLE, held_out="unknown").save(tmp_path / "unknown.html"))
    shown.click(13)
    shown.wait("e.state.selected === 13")
    assert "training clip" not in shown.text(".amx-card") and "held out" not in shown.text(".amx-card")
    shown.js("e.state.rows = [13]")
    assert next(csv.DictReader(io.StringIO(shown.js("e.csv()"))))["held_out"] == ""


def test_the_pointer_shows_name_label_and_spectrogram(opened):
    shown = opened()
    shown.page.mouse.move(*shown.place(13))
    shown.page.wait_for_selector(".amx-tip .amx-picture.amx-ready")
    assert shown.text(".amx-tip").split("\n")[0] == "clip 13.wav" and "rain" in shown.text(".amx-tip")
    colors = shown.page.evaluate("""() => { const c = document.querySelector('.amx-tip canvas');
        const { data } = c.getContext('2d').getImageData(0, 0, c.width, c.height);
        return new Set(data.filter((v, k) => k % 4 == 0)).size }""")
    assert colors > 20  # a spectrogram, not an empty canvas
    shown.page.mouse.move(*shown.place(7))  # without a sound
    until(shown.page, "document.querySelector('.amx-tip strong').textContent == 'clip 07.wav'")
    assert not shown.page.locator(".amx-tip canvas").is_visible()
    shown.page.mouse.move(5, 5)
    assert not shown.page.locator(".amx-tip").is_visible()


def test_a_click_plays_the_clip_and_lists_its_neighbors_in_the_embedding(opened):
    shown = opened()
    shown.click(13)
    shown.wait("!e.sounds.audio.paused && e.sounds.audio.currentTime > 0.05")
    assert shown.js("e.sounds.playing") == 13 and 1.4 < shown.js("e.sounds.audio.duration") < 1.8
    assert shown.text(".amx-card h3") == "clip 13.wav" and "clip 13.wav" in shown.text("[role=status]")
    listed = shown.page.locator(".amx-list li")
    rows, far = own_neighbors(SETTINGS["plain"])
    assert [int(listed.nth(k).get_attribute("data-row")) for k in range(10)] == rows[13].tolist()
    assert [listed.nth(k).locator(".amx-far").inner_text() for k in range(10)] == [f"{d:.2f}" for d in far[13]]
    listed.nth(2).locator(".amx-play").click()
    shown.wait(f"e.sounds.playing === {rows[13][2]} && !e.sounds.audio.paused")
    assert shown.js("e.state.selected") == 13  # to listen is not to leave
    shown.wait("e.sounds.playing === -1")  # at its end
    listed.nth(2).locator(".amx-name").click()
    assert shown.js("e.state.selected") == rows[13][2]


def test_the_panel_leads_to_clips_among_another_label(opened, tmp_path):
    "Without it, a misplaced clip is found by luck: by its color among other colors."
    x = np.repeat(np.eye(3, 8), 12, axis=0) + RNG.normal(size=(36, 8)) * 0.01
    labels = np.repeat(["dog", "rain", "sea"], 12).astype(object)
    labels[[5, 30]] = "sea", None  # a sea among dogs; a clip without a label
    audio = [(np.sin(np.arange(8000) / 9).astype(np.float32), 16000)] * 36
    settings, places = {"good": x, "mixed": RNG.permutation(x)}, {"good": x[:, :2], "mixed": x[:, 1:3]}
    page = explore(settings, {"label": labels}, audio, held_out="x", maps=AlignedMaps(places, {}))
    shown = opened(page.save(tmp_path / "strays.html"))
    listed = shown.page.locator(".amx-strays li")
    assert listed.count() == 1 and "1 of 36" in shown.text(".amx-strays h4")
    assert "sea among dog" in listed.inner_text()
    shown.page.get_by_label("mixed").check()
    assert listed.count() == 8  # of the setting that is shown, the first eight of its list
    shown.page.get_by_label("good").check()
    listed.locator(".amx-name").click()
    shown.wait("e.state.selected === 5 && e.sounds.playing === 5")
    assert shown.page.locator(".amx-list li").count() == 10 and listed.count() == 0
    shown.page.keyboard.press("Escape")
    assert listed.count() == 1


def test_a_clip_can_be_closed_without_a_keyboard_and_its_neighbors_come_before_its_columns(opened):
    "A phone has no Escape key; and ten columns pushed the neighbors out of a panel of this height."
    shown = opened(viewport={"width": 1000, "height": 640})
    shown.click(13)
    shown.wait("e.state.selected === 13")
    place = {name: shown.page.locator(f".amx-{name}").bounding_box()["y"] for name in ("list", "facts")}
    assert place["list"] < place["facts"]
    shown.page.get_by_label("Close this clip").click()
    assert shown.js("e.state.selected") == -1 and shown.js("e.sounds.playing") == -1
    assert "Click a point" in shown.text(".amx-card") and shown.page.locator(".amx-facts").is_hidden()


def test_the_keyboard_alone_finds_plays_and_clears(opened):
    shown = opened()
    for _ in range(40):
        shown.page.keyboard.press("Tab")
        if shown.page.evaluate("document.activeElement.classList.contains('amx-map')"):
            break
    press = shown.page.keyboard.press
    press("ArrowRight")
    first = shown.js("e.state.selected")
    press("ArrowRight")
    assert shown.js("e.state.selected") == first + 1 and shown.js("e.sounds.playing") == -1
    press("ArrowDown")
    assert shown.js("e.state.selected") == first - 9
    assert NAMES[first - 9] in shown.text("[role=status]")
    press("Enter")
    shown.wait(f"e.sounds.playing === {first - 9} && !e.sounds.audio.paused")
    press(" ")
    assert shown.js("e.sounds.audio.paused") and shown.js("e.sounds.playing") == -1
    outline = shown.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"  # focus can be seen
    press("Escape")
    assert shown.js("e.state.selected") == -1
    unnamed = shown.page.evaluate("""() => [...document.querySelectorAll('.amx :is(button, input, select)')].filter(
        (b) => !(b.textContent.trim() || b.ariaLabel || b.labels?.length)).map((b) => b.outerHTML)""")
    assert unnamed == []


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_frame_whose_time_lies_before_the_click_moves_nothing_backward(opened, motion):
    """Points stepped back for a moment; with reduced motion they had no place at all."""
    shown = opened(reduced_motion=motion)
    seen = shown.js("""new Promise((done) => { const seen = [], plain = window.requestAnimationFrame;
        window.requestAnimationFrame = (draw) => plain((time) => { draw(time - 500); seen.push(e.position.slice(0, 2));
          if (seen.length === 2) { window.requestAnimationFrame = plain; done(seen); } });
        document.querySelector('input[value="1"]').click(); })""")
    whole = PLACES["both"][0] - PLACES["plain"][0]
    share = np.subtract(seen, PLACES["plain"][0]) @ whole / (whole @ whole)
    assert np.isfinite(share).all() and share.min() > -1e-6
    assert motion == "no-preference" or (share > 0.999).all()


def test_settings_glide_to_their_places_and_bring_their_numbers_and_neighbors(opened):
    shown = opened()
    before = shown.js("e.position")
    np.testing.assert_allclose(np.reshape(before, (N, 2)), PLACES["plain"])
    shown.click(13)
    seen = (
        shown.js("""new Promise((done) => { const seen = [];
        const look = () => { seen.push(e.position.slice(0, 2));
          e.state.t < 1 ? requestAnimationFrame(look) : done(seen); };
        document.querySelector('input[value="1"]').click(); look(); })""")
    )  # positions of the first clip, frame by frame
    way = np.linalg.norm(np.subtract(seen, PLACES["plain"][0]), axis=1)
    assert (np.diff(way) >= -1e-6).all() and ((way > 0) & (way < np.linalg.norm(PLACES["both"][0] - GRID[0]))).any()
    shown.settle()
    shown.wait(f"Math.abs(e.position[0] - {PLACES['both'][0, 0]}) < 1e-5")
    np.testing.assert_allclose(np.reshape(shown.js("e.position"), (N, 2)), PLACES["both"])
    assert "both\t0.40" in shown.text(".amx-numbers") and "plain" not in shown.text(".amx-numbers")
    listed = shown.page.locator(".amx-list li")
    expected = own_neighbors(SETTINGS["both"])[0][13].tolist()
    assert [int(listed.nth(k).get_attribute("data-row")) for k in range(10)] == expected
    shown.page.locator(".amx-map").focus()
    shown.page.keyboard.press("Escape")
    assert "Moved most from plain" in shown.text(".amx-list")
    move = np.linalg.norm(PLACES["both"] - PLACES["plain"], axis=1)
    far = int(listed.nth(0).get_attribute("data-row"))
    assert np.isclose(move[far], move.max())


def test_reduced_motion_jumps(opened):
    shown = opened(reduced_motion="reduce")
    shown.page.get_by_label("both").check()
    shown.wait(f"e.state.t === 1 && Math.abs(e.position[0] - {PLACES['both'][0, 0]}) < 1e-5")
    assert shown.js("e.frames") < 12 and shown.page.locator(".amx-trails input").is_checked()


def test_a_slider_walks_through_the_steps(opened):
    shown = opened()
    slider = shown.page.locator("input[type=range]")
    slider.focus()
    shown.page.keyboard.press("ArrowRight")
    shown.settle()
    assert shown.text(".amx-step") == "epoch 2" and shown.js("e.data.settings[e.state.setting].name") == "epoch 2"
    assert slider.get_attribute("aria-valuetext") == "epoch 2"
    shown.page.get_by_label("Play the steps").click()
    shown.wait("e.data.settings[e.state.setting].name === 'epoch 1'")
    shown.wait("e.data.settings[e.state.setting].name === 'epoch 2' && e.state.steps === null")


def drawn(shown, mode, *corners):
    shown.page.locator(f"[data-tool={mode}]").click()
    shown.page.mouse.move(*corners[0])
    shown.page.mouse.down()
    for corner in corners[1:]:
        shown.page.mouse.move(*corner, steps=4)
    shown.page.mouse.up()


def until_white(shown, x, y, seconds=20):
    from PIL import Image

    end = time.monotonic() + seconds
    while (color := Image.open(io.BytesIO(shown.page.screenshot())).convert("RGB").getpixel((int(x), int(y)))) != (
        255,
    ) * 3:
        assert time.monotonic() < end, f"still {color}"


def test_lasso_and_box_select_what_they_enclose(opened):
    shown = opened()
    (left, low), (right, high) = shown.place(11), shown.place(23)
    drawn(shown, "box", (left - 9, low + 9), (right + 9, high - 9))
    assert shown.js("e.state.rows") == [11, 12, 13, 21, 22, 23]
    assert "6 clips selected" in shown.text(".amx-picked")
    (x, y), (_, top) = shown.place(30), shown.place(50)
    drawn(shown, "lasso", (x - 9, y + 9), (x + 9, y + 9), (x + 9, top - 9), (x - 9, top - 9))
    assert shown.js("e.state.rows") == [30, 40, 50]
    between = np.mean([shown.place(30), shown.place(40)], axis=0).round().astype(int)
    until_white(shown, *between)  # the lasso itself is gone
    with shown.page.expect_download() as download:
        shown.page.get_by_text("Download CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8"))))
    assert [(row["row"], row["name"], row["label"]) for row in rows] == [
        (str(i), NAMES[i], LABELS[i]) for i in (30, 40, 50)
    ]
    assert rows[0]["note"] == "'=cmd 30"  # no formula
    shown.page.locator(".amx-picked").get_by_text("Clear").click()
    assert shown.js("e.state.rows") == [] and not shown.page.locator(".amx-picked").is_visible()


def test_search_finds_names_and_enter_plays_the_first(opened):
    shown = opened()
    shown.page.get_by_label("Search clips by name or label").fill("CLIP 4")
    found = shown.page.locator(".amx-results li")
    assert found.count() == 10 and "10 clips" in shown.text(".amx-results")
    shown.page.keyboard.press("Enter")
    shown.wait("e.state.selected === 40 && e.sounds.playing === 40")
    assert not shown.page.locator(".amx-results").is_visible()


def test_the_legend_hides_and_isolates_classes_and_numbers_have_a_scale(opened):
    shown = opened()
    entries = shown.page.locator(".amx-class > button:first-child")
    assert [entries.nth(k).inner_text().split("\n")[0].strip("0123456789 ") for k in range(3)] == ["dog", "rain", "sea"]
    colors = [entries.nth(k).locator("svg").evaluate("s => getComputedStyle(s).fill") for k in range(3)]
    shapes = [entries.nth(k).locator("path").get_attribute("d") for k in range(3)]
    assert len(set(colors)) == len(set(shapes)) == 3
    entries.nth(0).click()
    shown.page.mouse.move(*shown.place(12))  # a dog, hidden
    assert not shown.page.locator(".amx-tip").is_visible()
    shown.page.get_by_label("Show only sea").focus()
    shown.page.keyboard.press("Enter")
    assert shown.js("[...e.state.hidden].sort()") == [0, 1]
    shown.page.get_by_text("show all").click()
    assert shown.js("e.state.hidden.size") == 0
    shown.page.get_by_label("Color by").select_option(label="pitch")
    assert shown.text(".amx-scale").split() == ["pitch", "0.5", "99.5"]


@pytest.mark.parametrize("kind", ["webgl2", "2d"])
def test_both_renderers_fill_held_out_clips_and_leave_training_clips_hollow(opened, tmp_path, kind):
    path = tmp_path / f"{kind}.html"
    page = render_page(made().payload)
    if kind == "2d":  # a browser without WebGL: the policy stays in force, so the page is made for it
        from audiomaepp import explorer as module

        source = module.module_source().replace('canvas.getContext("webgl2"', 'canvas.getContext("no webgl2"')
        original, module.module_source = module.module_source, lambda: source
        try:
            page = render_page(made().payload)
        finally:
            module.module_source = original
    path.write_text(page, "utf-8")
    shown = opened(path)
    assert shown.js("e.renderer") == kind
    image = shown.page.screenshot()
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)
    for i in (12, 13, 14, 15):  # dog, rain, sea, dog; 12 is a training clip
        x, y = map(round, shown.place(i))
        middle = picture[y, x]
        color = made().payload["styles"][i % 3][0]
        rgb = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
        assert np.abs(middle - (rgb if HELD[i] else [255, 255, 255])).max() < (40 if HELD[i] else 10), (i, middle)


def test_wheel_zooms_at_the_pointer_drag_moves_and_double_click_fits(opened):
    shown = opened()
    start, scale = shown.place(13), shown.js("e.view.scale")
    shown.page.mouse.move(*start)
    shown.page.mouse.wheel(0, -300)
    shown.wait(f"e.view.scale > {scale * 1.2}")
    np.testing.assert_allclose(shown.place(13), start, atol=1.5)  # the wheel reports whole pixels
    shown.page.mouse.move(start[0] + 25, start[1] + 25)
    shown.page.mouse.down()
    shown.page.mouse.move(start[0] + 85, start[1] + 65, steps=5)
    shown.page.mouse.up()
    np.testing.assert_allclose(shown.place(13), [start[0] + 60, start[1] + 40], atol=1.5)
    assert shown.js("e.state.selected") == -1  # a drag is no click
    shown.page.mouse.dblclick(start[0] + 25, start[1] + 25)
    shown.wait(f"Math.abs(e.view.scale - {scale}) < 1e-6")


def test_dark_follows_the_system_and_the_button(opened):
    ground = "getComputedStyle(document.querySelector('.amx')).backgroundColor"
    light, dark = opened(), opened(color_scheme="dark")
    assert light.page.evaluate(ground) == "rgb(255, 255, 255)" and dark.page.evaluate(ground) == "rgb(22, 24, 29)"
    for shown, expected in ((light, "rgb(22, 24, 29)"), (dark, "rgb(255, 255, 255)")):
        shown.page.get_by_label("Light or dark").click()
        assert shown.page.evaluate(ground) == expected


def test_a_phone_has_the_panel_below_and_nothing_to_scroll_sideways(opened):
    shown = opened(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2)
    shown.page.touchscreen.tap(*shown.place(22))
    shown.wait("e.state.selected === 22 && e.sounds.playing === 22")
    assert shown.page.evaluate("document.documentElement.scrollWidth") == 390
    place = {name: shown.page.locator(f".amx-{name}").bounding_box() for name in ("map", "panel")}
    assert place["panel"]["y"] >= place["map"]["y"] + place["map"]["height"] and place["map"]["width"] > 340
    assert all(0 <= box["x"] and box["x"] + box["width"] <= 390 for box in place.values())
    card, numbers = (shown.page.locator(f".amx-{name}").bounding_box() for name in ("card", "numbers"))
    assert card["y"] < numbers["y"]  # what was tapped is next to the map


def test_on_a_phone_a_report_shows_the_whole_explorer_without_a_scroll_area_in_the_page(opened, tmp_path):
    "A box of fixed height cut the map in two, and what a tap had found was below its edge."
    page = made().save(tmp_path / "part.html")
    page.write_text(page.read_text("utf-8").replace('class="amx-page"', ""), "utf-8")
    shown = opened(page, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert shown.page.evaluate("""() => [...document.querySelectorAll('.amx, .amx-body, .amx-panel')].every(
        (box) => box.scrollHeight <= box.clientHeight + 1)""")
    root, panel = (shown.page.locator(name).bounding_box() for name in (".amx", ".amx-panel"))
    assert panel["y"] + panel["height"] <= root["y"] + root["height"]


def test_no_clip_is_under_the_tools_when_the_whole_map_is_shown(opened):
    shown = opened(viewport={"width": 800, "height": 420})
    shown.page.get_by_label("both").check()  # the map with the highest clips
    shown.settle()
    tools = shown.page.locator(".amx-tools").bounding_box()
    assert min(shown.place(i)[1] for i in range(N)) > tools["y"] + tools["height"]


def test_two_fingers_zoom(opened):
    shown = opened(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    touch = functools.partial(shown.page.context.new_cdp_session(shown.page).send, "Input.dispatchTouchEvent")
    scale, (x, y) = shown.js("e.view.scale"), shown.place(22)
    touch({"type": "touchStart", "touchPoints": [{"x": x - 20, "y": y, "id": 0}, {"x": x + 20, "y": y, "id": 1}]})
    for gap in (30, 45, 60):
        touch({"type": "touchMove", "touchPoints": [{"x": x - gap, "y": y, "id": 0}, {"x": x + gap, "y": y, "id": 1}]})
    touch({"type": "touchEnd", "touchPoints": []})
    assert shown.js("e.view.scale") > 2 * scale and shown.js("e.state.selected") == -1


def test_hostile_names_stay_text(opened):
    shown = opened()
    shown.click(N - 2)
    assert shown.text(".amx-card h3") == HOSTILE and HOSTILE in shown.text("h2")
    shown.page.mouse.move(*shown.place(N - 1))
    assert "</script><b>bold</b>" in shown.text(".amx-tip")
    assert shown.page.locator(".amx img, .amx b").count() == 0 and shown.page.title() == f"A map {HOSTILE}"


def test_the_page_itself_forbids_every_request(opened):
    shown = opened()
    blocked = shown.page.evaluate("""async () => {
        const tries = [fetch('https://example.invalid/'), fetch('other.txt')];
        return (await Promise.allSettled(tries)).map((r) => r.status) }""")
    assert blocked == ["rejected", "rejected"]
    assert all("Content Security Policy" in text or "Failed to" in text for text in shown.wrong)
    shown.wrong.clear()


def test_an_explorer_in_a_notebook_can_be_removed_and_drawn_again(opened):
    shown = opened()
    left = shown.js(
        "(() => { const el = document.getElementById('explorer'); e.choose(3, true); e.destroy(); "
        "return [el.children.length, e.sounds.audio.paused, el.explorer === undefined]; })()"
    )
    assert left == [0, True, True]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab server in a folder with one notebook."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = ["import numpy as np\nfrom audiomaepp.explorer import explore\n"
            "e = explore(np.random.default_rng(0).normal(size=(40, 8)), {'label': ['a', 'b'] * 20}, held_out='x')\ne",
            "print('rows', e.selection.tolist())"]  # fmt: skip
    cells = [
        dict(cell_type="code", id=f"c{i}", execution_count=None, metadata={}, outputs=[], source=c)
        for i, c in enumerate(code)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = dict(cells=cells, metadata={"kernelspec": kernel}, nbformat=4, nbformat_minor=5)
    (tmp_path / "a.ipynb").write_text(json.dumps(book), "utf-8")
    home = {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "HOME": str(tmp_path),
    }
    options = [
        "--no-browser",
        f"--port={port}",
        "--IdentityProvider.token=",
        "--ServerApp.allow_root=True",
        "--ip=127.0.0.1",
    ]
    with open(tmp_path / "log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options, f"--notebook-dir={tmp_path}"]
        server = subprocess.Popen(command, env=os.environ | home, stdout=log, stderr=log)  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api")
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/a.ipynb"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("jupyterlab", "anywidget"))), reason="the extra jupyter is not installed"
)
def test_the_widget_in_jupyterlab_gives_the_selection_to_python(browser, lab):
    page = browser.new_context(viewport={"width": 1300, "height": 1000}).new_page()
    page.set_default_timeout(120_000)
    page.goto(lab)
    page.locator(".jp-Notebook .jp-CodeCell").first.click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".amx-map")
    until(page, "[...document.querySelectorAll('*')].find((e) => e.explorer)?.explorer.frames > 0")
    js = "(() => { const e = [...document.querySelectorAll('*')].find((e) => e.explorer).explorer; return %s; })()"
    page.locator(".amx-map").scroll_into_view_if_needed()
    page.mouse.click(*page.evaluate(js % "e.screen(5)"))
    assert page.evaluate(js % "e.state.selected") == 5
    page.evaluate(js % "e.setMode('box')")
    box = page.locator(".amx-map").bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 9, box["y"] + box["height"] - 9, steps=4)
    page.mouse.up()
    assert page.evaluate(js % "e.state.rows.length") == 40
    page.locator(".jp-Notebook .jp-CodeCell").nth(1).click()
    page.keyboard.press("Shift+Enter")
    until(page, "document.body.innerText.includes('rows [0, 1, 2')")
    page.context.close()
