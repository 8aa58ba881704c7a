"""`vogue report`: what it computes, and what a reader sees in a browser."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from written_runs import change, write_lines, write_run

from vogue.cli import main
from vogue.report import write_report
from vogue.report.completions import TokenSums, sample
from vogue.report.figures import sections
from vogue.report.runs import group_methods, read_runs

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


# ------------------------------------------------------------------------------------------------- what it computes


def panel(folders, title):
    """The lines of the panel with that title, over all runs in `folders`."""
    panels = [panel for section in sections(group_methods(read_runs(folders))) for panel in section.panels]
    (found,) = [panel for panel in panels if panel.title == title]
    return {(line.label, line.thin, line.dashed): line.points for line in found.lines}


def test_seeds_of_a_method_are_one_line_with_their_mean_lowest_and_highest(tmp_path):
    folders = [
        write_run(tmp_path / str(seed), f"model.path=base{seed}", seed=seed, steps=2, logged=0) for seed in range(3)
    ]
    for seed, folder in enumerate(folders):
        change(folder / "metrics.jsonl", lambda step, row: row | {"reward": [0.0, 0.3, 0.9][seed] + step})  # noqa: B023
    write_run(tmp_path / "grpo", "method=grpo", steps=2, logged=0)
    lines = panel([*folders, tmp_path / "grpo"], "Reward")
    assert [(p.x, round(p.y, 9), p.low, p.high) for p in lines["vogue", False, False]] == [
        (0, 0.4, 0.0, 0.9),
        (1, 1.4, 1.0, 1.9),
    ]
    assert [label for label, thin, _ in lines if thin] == ["0", "1", "2"]
    assert ("grpo", False, False) in lines
    assert len(lines) == 5


def test_many_methods_are_their_means_alone(tmp_path):
    sigmas = (0.1, 0.2, 0.3, 0.5, 0.6)
    folders = [
        write_run(tmp_path / f"{sigma}_{seed}", f"perturb.sigma={sigma}", seed=seed, steps=2, logged=0)
        for sigma in sigmas
        for seed in range(2)
    ]
    for folder in folders:
        change(folder / "metrics.jsonl", lambda _, row: row | {"reward": float(folder.name.split("_")[1])})  # noqa: B023
    lines = panel(folders, "Reward")
    assert list(lines) == [(f"vogue, sigma={sigma}", False, False) for sigma in sigmas]
    assert all([(p.y, p.low) for p in points] == [(0.5, None)] * 2 for points in lines.values())


def test_another_setting_is_another_method_named_by_it(tmp_path):
    write_run(tmp_path / "a", steps=2, logged=0)
    write_run(tmp_path / "b", "perturb.sigma=0.8", steps=2, logged=0)
    methods = group_methods(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert [method.label for method in methods] == ["vogue", "vogue, sigma=0.8"]


def test_two_models_of_one_seed_are_two_methods(tmp_path):
    for name in ("3b", "7b"):
        write_run(tmp_path / name, f"model.path={name}", steps=2, logged=0)
    methods = group_methods(read_runs([tmp_path / "3b", tmp_path / "7b"]))
    assert [method.label for method in methods] == ["vogue, path=3b", "vogue, path=7b"]


def test_two_models_of_one_method_are_told_apart_where_another_has_one(tmp_path):
    for name, sigma in (("3b", 0.8), ("7b", 0.8), ("3b", 0.6)):
        given = f"model.path={name}", f"perturb.sigma={sigma}"
        write_run(tmp_path / f"{name}_{sigma}", *given, steps=2, logged=0)
    methods = group_methods(read_runs(sorted(tmp_path.iterdir())))
    assert [method.label for method in methods] == [
        "vogue, sigma=0.6",
        "vogue, sigma=0.8, path=3b",
        "vogue, sigma=0.8, path=7b",
    ]


def test_pass_at_k_before_and_after_comes_from_the_right_completions_of_each_problem(tmp_path):
    run = write_run(tmp_path / "run", steps=2, logged=0)
    rows = [{"step": 0, "right": [0, 0, 4]}, {"step": 2, "right": [0, 1, 4]}]
    write_lines(run / "evaluations.jsonl", [row | {"n": 4, "pass@1": [0.4, 0.3, 0.5]} for row in rows])
    lines = panel([run], "Held-out pass@k")
    # Two of four completions miss the one right one in C(3, 2) of C(4, 2) = 6 draws: pass@2 = 1/2.
    assert [(p.x, p.y) for p in lines["vogue", False, False]] == [
        (1, pytest.approx((0 + 1 / 4 + 1) / 3)),
        (2, pytest.approx((0 + 1 / 2 + 1) / 3)),
        (4, pytest.approx(2 / 3)),
    ]
    assert [p.y for p in lines["vogue, before", False, True]] == pytest.approx([1 / 3] * 3)


def test_exploration_is_read_from_training_groups_where_a_run_was_not_evaluated(tmp_path):
    run = write_run(tmp_path / "run", steps=2, logged=0)
    assert len(panel([run], "Held-out pass@4 − pass@1")["vogue", False, False]) == 3
    (run / "evaluations.jsonl").unlink()
    change(run / "metrics.jsonl", lambda _, row: row | {"pass_at_n": 0.75, "accuracy": 0.5})
    points = panel([run], "pass@G − accuracy of training groups")["vogue", False, False]
    assert [(p.x, p.y) for p in points] == [(0, 0.25), (1, 0.25)]


def test_a_panel_without_data_is_not_drawn(tmp_path):
    run = write_run(tmp_path / "run", steps=2, logged=0)
    (run / "evaluations.jsonl").unlink()
    change(run / "metrics.jsonl", lambda step, _: {"step": step, "reward": 0.5, "accuracy": 0.5, "entropy": 0.1})
    found = sections(group_methods(read_runs([run])))
    assert [panel.title for section in found for panel in section.panels] == [
        *("Reward", "Accuracy in training", "Entropy of tokens trained on")
    ]


def test_tokens_are_ranked_by_mean_u_per_where_it_was_measured():
    records = [
        {"tokens": ["a", "b", "a"], "u_per": [0.1, 0.5, 0.3], "entropy": [1.0, 2.0, 3.0]},
        {"tokens": ["b", "c"], "u_per": [0.7, 9.0], "entropy": [4.0, 0.0]},
        {"tokens": ["b"], "u_per": None, "entropy": [100.0]},
        {"completion": "b"},
    ]
    sums = TokenSums()
    for record in records:
        sums.add(record)
    ranked = [(row.text, row.count, row.u_per, row.entropy) for row in sums.ranked(min_count=2)]
    assert ranked == [("b", 2, pytest.approx(0.6), 3.0), ("a", 2, pytest.approx(0.2), 2.0)]


# ----------------------------------------------------------------------------------------------------- what it writes


def test_the_page_of_one_run_lies_in_its_folder_with_pngs_beside_it(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=3, logged=1)
    before = set(run.iterdir())
    assert main(["report", str(run)]) == 0
    assert f"report: {run / 'report.html'}\n" in capsys.readouterr().out
    pngs = {f"report_{name}.png" for name in ("learning_curves", "pass_at_k", "exploration")}
    assert {path.name for path in set(run.iterdir()) - before} == {"report.html", *pngs}
    for name in pngs:
        with Image.open(run / name) as image:
            assert image.format == "PNG"
            image.load()


def test_nothing_in_the_page_is_loaded_from_elsewhere(report):
    page = report.read_text()
    assert "default-src 'none'; img-src data:; style-src" in page
    assert "None: rewards differ" in page  # no alarm
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert all(value.startswith(("#", "data:")) for value in re.findall(r"\b(?:src|href)=\"([^\"]*)", page))


def test_a_run_that_can_not_be_reported_leaves_the_earlier_page(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=3, logged=2)
    page = run / "report.html"
    page.write_text("an earlier page")
    change(run / "completions.jsonl", lambda number, row: row | ({"entropy": [0.5]} if number == 1 else {}))
    assert main(["report", str(run)]) == 2
    assert re.search(r"completions.jsonl, line 2: \d+ tokens, but 1 values of entropy", capsys.readouterr().err)
    assert page.read_text() == "an earlier page"
    assert not list(run.glob("*.png"))


def test_a_folder_that_is_no_run_or_has_no_steps_or_cannot_be_read(tmp_path, capsys):
    def message(*arguments):
        assert main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert f"{tmp_path} is no run: it has no config.yaml" in message(tmp_path)
    run = write_run(tmp_path / "run", steps=2, logged=0)
    assert "several runs: say with --out where the page goes" in message(run, tmp_path)
    assert f"--out {tmp_path} is a folder" in message(run, "--out", tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n')
    assert "metrics.jsonl, line 2: " in message(run)
    (run / "metrics.jsonl").write_text("")
    assert "metrics.jsonl has no steps yet" in message(run)
    assert not (run / "report.html").exists()


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=2, logged=0)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')
    assert len(read_runs([run])[0].metrics) == 2


def test_images_too_large_for_a_page_are_scaled_down(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", steps=2, logged=2)
    for path in (run / "completions").iterdir():
        Image.new("RGB", (600, 300), "green").save(path)
    monkeypatch.setattr("vogue.report.completions.MAX_PIXELS", 256 * 128 * len(list((run / "completions").iterdir())))
    embedded = page_data(write_report([run])[0])["images"]
    assert {tuple(image["size"]) for image in embedded} == {(600, 300)}
    for image in embedded:
        with Image.open(io.BytesIO(base64.b64decode(image["uri"].split(",")[1]))) as small:
            assert small.size == (256, 128)


def test_completions_are_taken_evenly_from_all_runs_and_all_parts_of_their_logs(tmp_path):
    runs = [write_run(tmp_path / name, steps=4, logged=3) for name in "ab"]
    log = runs[0] / "completions.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    (runs[0] / "completions.1.jsonl").write_text("".join(lines[:7]))
    log.write_text("".join(lines[7:]))
    logged = [run.completions for run in read_runs(runs)]
    assert [len(completions) for completions in logged] == [12, 12]
    assert [row["step"] for row in logged[0]] == [i // 3 for i in range(12)]
    sampled = sample(logged, read=12, shown=6)
    assert (sampled.logged, sampled.read) == (24, 12)
    # Every second one is read, every fourth is shown: the 1st, 5th and 9th of each run.
    assert [(number, row["step"]) for number, row in sampled.shown] == [(r, s) for r in (0, 1) for s in (0, 1, 2)]
    assert [row["completion"] for _, row in sampled.shown[:3]] == [
        json.loads(lines[i])["completion"] for i in (0, 4, 8)
    ]
    tokens = sum(len(row["tokens"]) for _, row in sampled.shown)
    assert len(sample(logged, read=12, shown=6, most_tokens=tokens // 2).shown) == 3


def test_a_long_run_has_the_highs_and_lows_of_its_curves_and_its_alarms(tmp_path):
    run = write_run(tmp_path / "run", steps=2, logged=1)
    spikes = {1011: 5.0, 2000: -5.0}
    rows = [{"step": step, "reward": spikes.get(step, 0.5), "grad_norm": 0.1} for step in range(2500)]
    rows = [row | {"skipped_updates": float(row["step"] in (3, 4, 2499))} for row in rows]
    write_lines(run / "metrics.jsonl", rows)
    page = write_report([run])[0]
    lines = [line for panel in page_data(page)["panels"] if panel["title"] == "Reward" for line in panel["lines"]]
    points = lines[0]["points"]
    assert len(points) <= 1002
    assert {step: [step, value] for step, value in spikes.items()}.items() <= {p[0]: p for p in points}.items()
    assert [points[0][0], points[-1][0]] == [0, 2499]
    text = " ".join(page.read_text().split())
    assert "<b>skipped updates</b> steps 3 to 4: 100% of the step" in text
    assert '<li class="on"><b>skipped updates</b> step 2499, until the end: 100% of the step' in text


def page_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


# -------------------------------------------------------------------------------------------------- what a reader sees


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of two methods, one of whose completions, questions and answers are written by an attacker."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "vogue", seed=1), write_run(folder / "grpo", "method=grpo", seed=1)]

    def attack(_, row):
        hostile = {"problem": HOSTILE, "answer": HOSTILE, "category": HOSTILE, "completion": HOSTILE}
        return row | hostile | {"tokens": [HOSTILE], "entropy": [1.0], "u_per": [1.0], "components": {HOSTILE: 1}}

    change(runs[0] / "completions.jsonl", lambda number, row: attack(number, row) if number % 6 == 0 else row)
    return write_report(runs, folder / "report.html")[0]


@pytest.fixture
def page(driver, report):
    """The freshly opened page, 1280 pixels wide."""
    driver.get("about:blank")
    driver.get_log("browser")  # of a live page whose server is gone
    screen(driver, 1280)
    driver.get(report.as_uri())
    return driver


def screen(driver, width, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def select(page, **values):
    """Set fields of the filters as a reader does; returns how many completions are then found."""
    for name, value in values.items():
        page.execute_script(
            "const field = document.querySelector(`#filters [name=${arguments[0]}]`); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}))",
            *(name, str(value)),
        )
    told = page.find_element("id", "shown").text
    return 0 if told.startswith("none") else int(re.search(r"of ([\d,]+)", told)[1].replace(",", ""))


def test_the_page_opens_without_an_error_or_a_request(page, report):
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = {request["request"]["url"] for request in sent if request["documentURL"] == report.as_uri()}
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}


def test_every_panel_is_drawn(page, report):
    drawn = page.execute_script(
        "return [...document.querySelectorAll('figure.panel')].map((figure) => "
        "[...figure.querySelectorAll('path.curve')].map((path) => path.getAttribute('d')))"
    )
    panels = page_data(report)["panels"]
    assert [len(curves) for curves in drawn] == [len(panel["lines"]) for panel in panels]
    assert len(panels) > 15
    assert all(re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)+", curve) for curves in drawn for curve in curves)


def test_a_chart_shows_its_values_to_pointer_and_keyboard(page, report):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def chart():
        return page.find_element("css selector", "#learning_curves svg")

    def point(_):
        ActionChains(page).move_to_element(chart()).perform()
        return True

    # A chart is drawn once more when its size is first observed, which may be between finding and pointing.
    WebDriverWait(page, 10, ignored_exceptions=[StaleElementReferenceException]).until(point)
    step = int(re.match(r"step (\d+)\n", page.find_element("id", "tip").text)[1])
    (line, *_) = page_data(report)["panels"][0]["lines"]
    assert f"{line['label']}\n{line['points'][step][1]:.3g}" in page.find_element("id", "tip").text
    chart().send_keys(Keys.ARROW_RIGHT)
    assert page.find_element("id", "tip").text.startswith(f"step {step + 1}\n")


def test_the_filters_filter(page, report):
    records = page_data(report)["records"]

    def count(wanted):
        return sum(map(wanted, records))

    assert select(page) == len(records) == 2 * 12 * 6
    assert select(page, result="right") == count(lambda r: r["accuracy"] == 1)
    assert select(page, branch="noisy") == count(lambda r: r["accuracy"] == 1 and r["branch"] == "noisy")
    assert select(page, result="wrong", branch="", first=3, last=5) == count(
        lambda r: r["accuracy"] < 1 and 3 <= r["step"] <= 5
    )
    assert select(page, result="", first="", last="", run=1) == count(lambda r: r["run"] == 1)
    assert select(page, run="", text="LARGER?") == count(lambda r: "larger?" in r["problem"])
    assert select(page, text="no such text") == 0
    assert page.find_element("id", "shown").text == f"none of {len(records)}"
    assert not page.find_elements("css selector", ".card")


def test_only_one_page_of_completions_is_drawn_and_its_buttons_turn_it(page):
    def first():
        return page.find_element("css selector", ".card .tokens").text

    assert len(page.find_elements("css selector", ".card")) == 20
    before = first()
    previous, following = page.find_elements("css selector", ".pager button")[:2]
    assert not previous.is_enabled()
    following.click()
    assert page.find_element("id", "shown").text == "21–40 of 144"
    assert first() != before
    previous.click()
    assert first() == before


def test_a_token_shows_its_values_to_pointer_and_keyboard(page, report):
    from selenium.webdriver import ActionChains, Keys

    select(page, first=1, last=1)
    record = next(r for r in page_data(report)["records"] if r["step"] == 1 and r["u_per"] and len(r["tokens"]) > 2)
    card = page.find_elements("css selector", ".card")[
        [r for r in page_data(report)["records"] if r["step"] == 1].index(record)
    ]
    spans = card.find_elements("css selector", ".tokens > span")
    ActionChains(page).move_to_element(spans[1]).perform()
    assert tip_values(page) == pytest.approx([record["u_per"][1], record["entropy"][1]], rel=6e-3)
    spans[0].send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert tip_values(page) == pytest.approx([record["u_per"][2], record["entropy"][2]], rel=6e-3)
    assert page.execute_script("return document.activeElement") == spans[2]


def tip_values(page):
    return [float(text) for text in re.findall(r"([\d.e-]+) nats", page.find_element("id", "tip").text)]


def test_tokens_are_coloured_by_u_per_or_by_entropy(page, report):
    def heats():
        return page.execute_script(
            "return [...document.querySelector('.card:nth-child(2) .tokens').children].map((span) => "
            "Number(span.style.getPropertyValue('--heat')))"
        )

    data = page_data(report)
    record = data["records"][1]
    for signal in ("u_per", "entropy"):
        page.find_element("css selector", f"[name=signal][value={signal}]").click()
        assert heats() == pytest.approx([min(1, v / data["tops"][signal]) for v in record[signal]], abs=1e-3)
        assert f"{data['tops'][signal]:.3g}" in page.find_element("id", "scale").text


def test_text_of_a_model_or_a_data_set_stays_text(page):
    assert page.execute_script("return window.hacked") is None
    assert HOSTILE in page.find_element("css selector", ".card .tokens").text
    assert HOSTILE in page.find_element("css selector", ".card .problem").text
    assert HOSTILE.replace(" ", "␣") in page.find_element("css selector", "#tokens code").text
    assert page.execute_script("return document.querySelectorAll('script').length") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_its_contrast_on_every_colour(page, scheme):
    screen(page, 1280, scheme)
    pairs = page.execute_script(
        "const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
        "const rgb = (color) => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);"
        "  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3) };"
        "return [...document.querySelectorAll('.tokens > span, .chips > span, body, #tip')].map((element) => "
        "  { const style = getComputedStyle(element); return [rgb(style.color), rgb(style.backgroundColor)] })"
    )
    assert len({tuple(background) for _, background in pairs}) > 20
    assert min(contrast(*pair) for pair in pairs) >= 4.5


def contrast(*colors):
    """WCAG's ratio of the relative luminances of two sRGB colours."""
    shares = np.array(colors) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_does_not_scroll_sideways(page, width):
    screen(page, width)
    assert page.execute_script("return document.scrollingElement.scrollWidth") <= width


def test_completions_of_an_older_run_are_shown_without_colours(driver, tmp_path):
    run = write_run(tmp_path / "run", steps=2, logged=2)
    new = ("category", "components", "tokens", "entropy", "u_per", "image", "perturbed")
    change(run / "completions.jsonl", lambda _, row: {name: row[name] for name in row if name not in new})
    change(run / "evaluations.jsonl", lambda _, row: {name: row[name] for name in row if name not in ("n", "right")})
    driver.get(write_report([run])[0].as_uri())
    assert driver.get_log("browser") == []
    assert not driver.find_elements("css selector", "#tokens, .pictures, .tokens > span")
    assert not driver.find_element("id", "signals").is_displayed()
    texts = [row["completion"] for row in read_runs([run])[0].completions]
    assert [p.text for p in driver.find_elements("css selector", ".card .tokens")] == texts
    assert len(driver.find_elements("css selector", "#pass_at_k .curve")) == 2
