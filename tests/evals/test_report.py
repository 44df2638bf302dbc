"""The report: its numbers, and the page in a real browser."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from seerattention.evals.report import explore, fitting_layers, page, read_results
from seerattention.evals.report.explorer import FLOOR, MISSED, READ_BEST, READ_OTHER, block_states
from seerattention.hosts.transformers import attach, detach, intercept
from seerattention.measure import bundled
from seerattention.measure.perplexity import hidden_states
from seerattention.policies import parse
from tests.browser import chromium, missing, screen

TOKENS, LAYERS = 680, [0, 7]
#: What must stay text wherever it is shown.
HOSTILE = "</script><img src=x onerror=alert(1)> {{data}} <!-- "


def row(task, method, policy, density, score, **more):
    share = task == "needle"
    low, high = (max(0.0, score - 0.2), min(1.0, score + 0.2)) if share else (score - 1, score + 1)
    return {
        "task": task, "length": 1024, "method": method, "policy": policy, "density": density,
        "asked": density if policy else None, "samples": 6, "planned": 6, "score": score,
        "metric": "share" if share else "perplexity", "interval": [low, high],
        "minus_dense": 0.0 if policy else None,
        "minus_dense_interval": None, "prefill_s": 0.5, "seconds": 0.6, "faults": {}, **more,
    }  # fmt: skip


def summary(folder: Path) -> Path:
    """Results as an evaluation writes them, of made-up numbers."""
    rows = []
    for task, dense, worse in (("needle", 1.0, -0.3), ("perplexity", 30.0, 2.0)):
        rows.append(row(task, "dense", "", 1.0, dense))
        for method, factor in (("gates", 1), ("random", 3 if task == "needle" else 9)):
            rows += [
                row(task, method, f"top_k:{d}", d, dense + factor * worse * (0.5 - d))
                for d in (0.4, 0.2, 0.1)
            ]
    versions = {"device": "a machine", "torch": "2", "transformers": "5"}
    about = {"model": "bundled", "dtype": "torch.float32", "text": "bundled", "date": "2026-01-01"}
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({**about, "versions": versions, "rows": rows}))
    return folder


@pytest.fixture(scope="module")
def explored():
    """What the explorer shows of a text, the attention it is about by layer, gates, and what was read."""
    model, tokenizer = bundled.load_teacher()
    gates = bundled.load_teacher_gates()
    text = f"{HOSTILE}\n{bundled.TEXT.read_text(encoding='utf-8')[3000:8000]}"
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False)[:TOKENS])
    policies = [parse(text) for text in ("top_k:0.5,sink_blocks=1", "threshold:2e-3,local_blocks=2")]
    data = explore(model, tokenizer, gates, tokens, policies, layers=[7, 0])
    calls = {}

    def keep(call):
        calls[call.layer] = call
        return call.dense()

    with intercept(model, keep), torch.inference_mode():
        hidden_states(model, tokens)
    # The first layer reads the same in a sparse run as in a dense one.
    first = []
    for policy in policies:

        def observe(layer, call, selection):
            if layer == 0:
                first.append(selection.to_mask()[0].numpy())

        attach(model, gates, policy, min_tokens=0, observe=observe)
        with torch.inference_mode():
            hidden_states(model, tokens)
        detach(model)
    return data, calls, dict(gates.items()), first


def unpacked(text: str, blocks: int) -> np.ndarray:
    """Bytes of the causal pairs as a map."""
    full = np.zeros((blocks, blocks), np.uint8)
    full[np.tril_indices(blocks)] = np.frombuffer(base64.b64decode(text), np.uint8)
    return full


def states_of(text: str, blocks: int) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(text), np.uint8)
    flat = (codes[:, None] >> np.array([0, 2, 4, 6])) & 3
    full = np.zeros((blocks, blocks), np.uint8)
    full[np.tril_indices(blocks)] = flat.flatten()[: blocks * (blocks + 1) // 2]
    return full


def test_maps_and_figures_are_those_of_the_attention_itself(explored):
    data, calls, gates, first = explored
    blocks = math.ceil(TOKENS / 64)
    assert (data["layers"], data["all_layers"], len(data["blocks"])) == (LAYERS, list(range(8)), blocks)
    assert HOSTILE[:20] in data["blocks"][0]
    for layer, heads in zip(data["layers"], data["heads"], strict=True):
        call = calls[layer]
        k = call.k[0].repeat_interleave(3, 0)
        weights = (call.q[0] @ k.mT * call.scale + torch.full((TOKENS, TOKENS), -math.inf).triu(1)).softmax(
            -1
        )
        with torch.inference_mode():
            scores = gates[layer](call.q_nope, call.k_nope, positions=call.positions)[0]
        causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
        gate = scores.masked_fill(~causal, -math.inf).softmax(-1).numpy()
        for h, head in enumerate(heads):
            tiles = [
                [weights[h, i : i + 64, j : j + 64] for j in range(0, TOKENS, 64)]
                for i in range(0, TOKENS, 64)
            ]
            largest = np.array([[float(tile.max()) for tile in line] for line in tiles])
            for name, share in (("true", largest / largest.sum(1, keepdims=True)), ("gate", gate[h])):
                steps = unpacked(head[name], blocks)
                shown = np.where(steps > 0, FLOOR ** ((255.0 - steps) / 254), 0)
                at_least = share >= FLOOR * 1.02
                np.testing.assert_allclose(shown[at_least], share[at_least], rtol=0.019)
                assert (steps[share < FLOOR * 0.98] == 0).all()
            for policy, read in enumerate(head["policies"]):
                mask = np.isin(states_of(read["states"], blocks), (READ_BEST, READ_OTHER))
                assert layer or (mask == first[policy][h]).all()
                assert read["density"] == pytest.approx(mask.sum() / (blocks * (blocks + 1) / 2), abs=1e-5)
                each = torch.from_numpy(mask.repeat(64, 0).repeat(64, 1)[:TOKENS, :TOKENS])
                kept = (weights[h] * each).sum(-1)
                assert read["recall"] == pytest.approx(float(kept.mean()), abs=1e-4)
                assert read["rows"] == pytest.approx(
                    [1000 * float(p.mean()) for p in kept.split(64)], abs=0.6
                )


def test_missed_blocks_are_the_best_of_as_many_that_are_not_read():
    generator = torch.Generator().manual_seed(0)
    blocks = 9
    valid = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    always = torch.eye(blocks, dtype=torch.bool)
    always[:, 0] = True
    true = torch.rand(3, blocks, blocks, generator=generator) * valid
    read = ((torch.rand(3, blocks, blocks, generator=generator) < 0.4) | always) & valid
    states = block_states(read, true, always, valid)
    for h in range(3):
        for i in range(blocks):
            forced = {j for j in range(i + 1) if always[i, j]}
            free = sorted(set(range(i + 1)) - forced, key=lambda j: -float(true[h, i, j]))
            best = forced | set(free[: int(read[h, i].sum()) - len(forced)])
            for j in range(blocks):
                taken = bool(read[h, i, j])
                wanted = (READ_BEST if j in best else READ_OTHER) if taken else MISSED if j in best else 0
                assert int(states[h, i, j]) == wanted


def test_as_many_layers_are_kept_as_fit_into_a_page():
    gates = bundled.load_teacher_gates()
    assert fitting_layers(gates, 4096, 3) == list(range(8))
    some = fitting_layers(gates, 32768, 3)
    assert 1 <= len(some) < 8
    assert some[0] == 0
    with pytest.raises(ValueError, match="too large for a page; give fewer tokens"):
        fitting_layers(gates, 200_000, 3)
    model, tokenizer = bundled.load_teacher()
    with pytest.raises(ValueError, match="at least two blocks, 128 tokens, got 100"):
        explore(model, tokenizer, gates, np.arange(100), [parse("top_k:0.1")])


def test_text_cannot_leave_the_data_of_the_page(explored):
    html = page(None, explored[0])
    assert html.count("</script>") == 2
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    assert json.loads(found[1])["explorer"] == explored[0]
    with pytest.raises(ValueError, match="needs results of an evaluation, or a model"):
        page(None, None)


# ---- in a browser


@pytest.fixture(scope="module")
def address(explored, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    data = {**explored[0], "text": "a text"}
    (folder / "report.html").write_text(page(read_results(summary(folder)), data), encoding="utf-8")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    """Chromium, started once; without one the tests say so, and fail where SEERATTENTION_BROWSER=required."""
    if reason := missing():
        if os.environ.get("SEERATTENTION_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    with chromium() as driver:
        yield driver


def look(browser, width=1280, height=1000, scheme="light", motion="no-preference"):
    screen(browser, width=width, height=height, prefers_color_scheme=scheme, prefers_reduced_motion=motion)


@pytest.fixture
def opened(browser, address):
    """The page, loaded anew; at the end nothing may have been complained about or asked for."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    look(browser)
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # The browser's own start page asks for more.
    asked = {r["request"]["url"] for r in requests if r["documentURL"] == address}
    assert {url for url in asked if not url.startswith("data:")} == {address}


PICTURES = "return ['true', 'gate', 'read'].map((n) => document.getElementById('map-' + n).toDataURL())"


def text(browser, name: str) -> str:
    return browser.find_element(By.ID, name).get_property("textContent")


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def test_picking_a_head_or_a_policy_changes_the_picture(opened, explored):
    before = opened.execute_script(PICTURES)
    assert len(set(before)) == 3
    other = opened.find_element(By.CSS_SELECTOR, "#heads button[aria-pressed=false]")
    other.click()
    assert other.get_attribute("aria-pressed") == "true"
    assert len(opened.find_elements(By.CSS_SELECTOR, "#heads button[aria-pressed=true]")) == 1
    after = opened.execute_script(PICTURES)
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert text(opened, "head-title") == "Layer 0, head 0"
    first = explored[0]["heads"][0][0]["policies"]
    assert f"{first[0]['density']:.1%}"[:-1] in text(opened, "tiles")
    Select(opened.find_element(By.ID, "policy")).select_by_index(1)
    changed = opened.execute_script(PICTURES)
    assert changed[:2] == after[:2]
    assert changed[2] != after[2]
    assert f"{first[1]['recall']:.1%}"[:-1] in text(opened, "tiles")
    Select(opened.find_element(By.ID, "layer")).select_by_visible_text("7")
    assert text(opened, "head-title") == "Layer 7, head 0"
    Select(opened.find_element(By.ID, "shade")).select_by_value("density")
    assert "of the blocks read" in opened.find_element(By.CSS_SELECTOR, "#heads button").get_attribute(
        "aria-label"
    )


def test_pointing_at_a_block_shows_its_tokens_and_figures(opened, explored):
    data = explored[0]
    opened.find_element(By.CSS_SELECTOR, "#heads button").click()
    canvas = opened.find_element(By.ID, "map-true")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    blocks, width = len(data["blocks"]), canvas.rect["width"]

    def offset(block):
        return round((block + 0.5) * width / blocks - width / 2)

    ActionChains(opened).move_to_element_with_offset(canvas, offset(0), offset(5)).perform()
    assert text(opened, "query-text") == data["blocks"][5]
    assert text(opened, "key-text") == data["blocks"][0]
    assert HOSTILE[:20] in text(opened, "key-text")
    assert text(opened, "query-title") == "Query block 5, tokens 320–383"
    step = unpacked(data["heads"][0][0]["true"], blocks)[5, 0]
    value = 100 * FLOOR ** ((255.0 - step) / 254)
    shown = re.search(r"true map, share of the row([\d.]+) %", text(opened, "figures"))
    assert shown
    assert float(shown[1]) == pytest.approx(value, rel=0.05)
    canvas.click()
    assert "(held" in text(opened, "block-title")
    held = text(opened, "query-title")
    ActionChains(opened).move_to_element_with_offset(canvas, offset(0), offset(9)).perform()
    assert text(opened, "query-title") == held
    last = f"Query block {blocks - 1}, tokens 640–679"
    canvas.click()
    ActionChains(opened).move_to_element_with_offset(canvas, offset(1), offset(blocks - 1)).perform()
    assert text(opened, "query-title") == last
    opened.find_element(By.CSS_SELECTOR, "#row-details summary").click()
    assert f"Query block {blocks - 1}" in text(opened, "row-table")


def test_everything_works_from_the_keyboard(opened, explored):
    data = explored[0]
    opened.execute_script("document.querySelector('#heads button[tabindex=\"0\"]').focus()")
    press(opened, Keys.HOME, Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert text(opened, "head-title") == "Layer 0, head 2"
    assert len(opened.find_elements(By.CSS_SELECTOR, '#heads button[tabindex="0"]')) == 1
    focused = "return getComputedStyle(document.activeElement).outlineStyle"
    assert opened.execute_script(focused) != "none"
    opened.execute_script("document.getElementById('maps').focus()")
    before = opened.execute_script(PICTURES)
    press(opened, Keys.PAGE_UP, Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert text(opened, "block-title").startswith("Query block 3 and KV block 1:")
    assert all(a != b for a, b in zip(before, opened.execute_script(PICTURES), strict=True))
    assert text(opened, "say").startswith("Query block 3, KV block 1:")
    assert data["blocks"][1] in text(opened, "say")
    press(opened, Keys.END)
    assert text(opened, "block-title").startswith("Query block 3 and KV block 3:")
    Select(opened.find_element(By.ID, "least")).select_by_value("0")
    missed = [
        (layer, h, states_of(head["policies"][0]["states"], len(data["blocks"])) == MISSED)
        for layer, heads in enumerate(data["heads"])
        for h, head in enumerate(heads)
    ]
    layer, h, where = next(entry for entry in missed if entry[2].any())
    Select(opened.find_element(By.ID, "layer")).select_by_index(layer)
    Select(opened.find_element(By.ID, "head")).select_by_index(h)
    places = [tuple(int(x) for x in place) for place in np.argwhere(where)]
    opened.execute_script("document.getElementById('maps').focus()")
    press(opened, "m")
    wanted = next((p for p in places if p > (3, 3)), places[0])
    assert text(opened, "block-title").startswith("Query block {} and KV block {}: missed".format(*wanted))
    opened.execute_script("document.querySelector('.chart .point[tabindex=\"0\"]').focus()")
    press(opened, Keys.ARROW_RIGHT)
    tip = opened.find_element(By.CSS_SELECTOR, ".chart .tip")
    assert tip.is_displayed()
    assert "gates: density 20.0 %, found 91.0 %, 95 % interval 71.0 % to 100.0 %, 6 samples" in tip.text


def test_curves_and_tables_hold_every_method_dense_first(opened):
    tables = opened.find_elements(By.CSS_SELECTOR, "#tables table")
    lines = [
        line.get_property("textContent") for line in tables[0].find_elements(By.CSS_SELECTOR, "tbody tr")
    ]
    assert len(lines) == 7
    assert lines[0].startswith("denseall100.0%6100.0%80.0% to 100.0%")
    assert len(opened.find_elements(By.CSS_SELECTOR, ".chart .point")) == 6
    assert "dense 100.0 %" in opened.find_element(By.CSS_SELECTOR, ".chart svg").get_property("textContent")
    opened.find_elements(By.CSS_SELECTOR, "#methods input")[1].click()
    assert len(opened.find_elements(By.CSS_SELECTOR, ".chart .point")) == 3
    Select(opened.find_element(By.ID, "task")).select_by_value("perplexity")
    labels = [p.get_attribute("aria-label") for p in opened.find_elements(By.CSS_SELECTOR, ".chart .point")]
    assert labels[0].startswith("gates: density 10.0 %, perplexity 30.800")


CONTRASTS = """
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
  .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
const bad = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
  if (!own || !e.checkVisibility() || e.closest('script, noscript, svg, .hidden, .skip')) continue;
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) bad.push(`${e.tagName} ${e.id} ${e.className} ${e.textContent.slice(0, 20)}: ${ratio}`);
}
return bad;
"""


def test_it_is_light_and_dark_and_legible_in_both(opened):
    ground = "return getComputedStyle(document.body).backgroundColor"
    light, pictures = opened.execute_script(ground), opened.execute_script(PICTURES)
    assert opened.execute_script(CONTRASTS) == []
    look(opened, scheme="dark", motion="reduce")
    dark = opened.execute_script(ground)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))
    assert opened.execute_script(PICTURES)[2] != pictures[2]
    assert opened.execute_script(CONTRASTS) == []
    moving = "return getComputedStyle(document.querySelector('#heads button')).transitionDuration"
    assert opened.execute_script(moving) == "0s"
    Select(opened.find_element(By.ID, "theme")).select_by_value("light")
    assert opened.execute_script(ground) == light
    assert opened.execute_script(PICTURES)[2] == pictures[2]
    Select(opened.find_element(By.ID, "theme")).select_by_value("dark")
    look(opened)
    assert opened.execute_script(ground) == dark


def test_every_control_has_a_name_and_a_phone_scrolls_one_way(opened):
    nodes = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = (
        "button", "combobox", "checkbox", "link", "image", "img", "application", "grid", "table", "region",
        "group", "navigation", "gridcell",
    )  # fmt: skip
    seen = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    roles = [role for role, _ in seen]
    for role in (
        "button",
        "combobox",
        "checkbox",
        "application",
        "grid",
        "table",
        "region",
        "main",
        "heading",
    ):
        assert role in roles
    assert [role for role, name in seen if role in named and not name.strip()] == []
    ids = opened.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    described = opened.execute_script(
        "return [...document.querySelectorAll('[aria-labelledby], [aria-describedby]')].flatMap((e) =>"
        " [e.getAttribute('aria-labelledby'), e.getAttribute('aria-describedby')]).filter(Boolean)"
    )
    assert set(described) <= set(ids)
    levels = opened.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map((e) => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert opened.execute_script("return document.documentElement.lang") == "en"
    look(opened, width=360, height=740)
    widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, room = opened.execute_script(widths)
    assert wide <= room
    assert opened.find_element(By.ID, "map-true").rect["width"] >= 200
