"""`vogue report`: what it computes, and what a reader sees in a browser."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from vogue.cli import main
from vogue.config import load_config, save_config
from vogue.data.digits import demonstration, digit_pairs
from vogue.method.perturb import perturb
from vogue.report import write_report
from vogue.report.figures import sections
from vogue.report.page import unsure_tokens
from vogue.report.runs import group_methods, read_runs

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


# ----------------------------------------------------------------------------------------------- a believable run


def write_run(folder, *settings, seed=0, steps=12, logged=6, problems=40):
    """A run's folder as `vogue train` leaves it, with digits that the policy reads better from step to step."""
    base = ["model.path=base", "data.train=train.parquet", "data.test=test.parquet", "trainer.eval_every=6"]
    chosen = [*base, f"seed={seed}", f"trainer.steps={steps}", f"trainer.output_dir={folder}", *settings]
    (folder / "completions").mkdir(parents=True)
    config = load_config(None, chosen)
    save_config(config, folder / "config.yaml")
    rng = np.random.default_rng((seed, config.method == "vogue"))
    pairs = iter(digit_pairs("train", steps * logged, seed))
    completions = [
        completion(folder, rng, step, number, next(pairs), steps) for step in range(steps) for number in range(logged)
    ]
    write_lines(folder / "completions.jsonl", completions)
    write_lines(folder / "metrics.jsonl", [metrics(rng, step, steps) for step in range(steps)])
    write_lines(folder / "evaluations.jsonl", [evaluation(rng, step, steps, problems) for step in (0, 6, 12)])
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(rng, step, steps):
    accuracy = 0.3 + 0.2 * step / steps + rng.normal(0, 0.03)
    noisy = 1 - step / steps
    seconds = {"data": 0.1, "rollout": 2.5, "reward": 0.05, "train": 2.6 + noisy, "pack": 0.1, "forward": 1 + noisy}
    seconds |= {"backward": 1.2, "update": 0.2, "sync": 0.12}
    return {
        "step": step, "reward": 0.1 + 0.9 * accuracy, "accuracy": accuracy, "format": 0.98, "finished": 0.99,
        "tokens": 22.0, "noisy_share": noisy, "mixed_share": 0.7, "solved_share": 0.1,
        "distinct_answers": 5 - 2 * step / steps,
        "pass_at_n": 0.8, "entropy": 0.25 - 0.1 * step / steps, "clip_fraction": 0.01, "out_capped": 0.1,
        "u_per": 0.02 + rng.normal(0, 0.002), "per_capped": 0.02, "mismatch/logprob": 2.5e-7, "mismatch/kl": 1e-12,
        "grad_norm": 0.2, "reward/accuracy": accuracy, "reward/format": 0.98, "lr": 1e-4, "memory_gb": 2.8,
        "throughput/rollout": 1950.0, "throughput/train": 1700.0, "loss": float("nan"),
    } | {f"time/{phase}": value for phase, value in seconds.items()}  # fmt: skip


def evaluation(rng, step, steps, problems):
    right = rng.binomial(4, rng.beta(0.4 + 0.4 * step / steps, 0.8, problems)).tolist()
    one, four = np.mean(right) / 4, np.mean(np.array(right) > 0)
    estimates = {"pass@1": [one, one - 0.03, one + 0.03], "pass@4": [four, four - 0.04, four + 0.04]}
    return {"step": step, **estimates, "n": 4, "right": right, "distinct": [2] * problems}


def completion(folder, rng, step, number, pair, steps):
    """A record of completions.jsonl and its images; in half of them a digit is misread."""
    noisy = bool(rng.random() < 1 - step / steps)
    read = (pair.left, pair.right) if rng.random() < 0.5 else pair.misread(rng)
    text, answer = demonstration(pair.question, *read), pair.sample().answer
    right = text.endswith(f"{{{answer}}}")
    tokens = re.findall(r"</?think>|\\boxed| ?[a-z]+| ?\d| ?\S|\n", text)
    digits = [bool(re.fullmatch(r" ?\d", token)) for token in tokens]
    paths = [f"completions/{step:06d}_{number}_{kind}.webp" for kind in ("raw", "perturbed")]
    pair.image.save(folder / paths[0], lossless=True)
    perturb(pair.image, seed=step * 100 + number).save(folder / paths[1], lossless=True)
    return {
        "step": step, "problem": pair.sample().problem, "answer": answer, "category": pair.question,
        "completion": text, "branch": "noisy" if noisy else "raw", "reward": 0.1 + 0.9 * right,
        "accuracy": float(right), "components": {"accuracy": float(right), "format": 1.0},
        "advantage": float(rng.normal(right - 0.5, 0.3)), "tokens": tokens,
        "entropy": rng.gamma(1, [0.4 if digit else 0.02 for digit in digits]).tolist(),
        "u_per": rng.gamma(1, [0.1 if digit else 0.003 for digit in digits]).tolist() if noisy else None,
        "image": paths[:1], "perturbed": paths[1:] if noisy else None,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- what it computes


def panel(folders, title):
    """The lines of the panel with that title, over all runs in `folders`."""
    panels = [panel for section in sections(group_methods(read_runs(folders))) for panel in section.panels]
    (found,) = [panel for panel in panels if panel.title == title]
    return {(line.label, line.thin, line.dashed): line.points for line in found.lines}


def change(path, edit):
    """Rewrite each object of a JSONL file as edit(number, object)."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [edit(number, row) for number, row in enumerate(rows)])


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
    ranked = [(row.text, row.count, row.u_per, row.entropy) for row in unsure_tokens(records, min_count=2)]
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
    assert "default-src 'none'" in page
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
    monkeypatch.setattr("vogue.report.page.MAX_PIXELS", 256 * 128 * len(list((run / "completions").iterdir())))
    embedded = page_data(write_report([run])[0])["images"]
    assert {tuple(image["size"]) for image in embedded} == {(600, 300)}
    for image in embedded:
        with Image.open(io.BytesIO(base64.b64decode(image["uri"].split(",")[1]))) as small:
            assert small.size == (256, 128)


def page_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


# -------------------------------------------------------------------------------------------------- what a reader sees


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A headless Chromium, started once."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver aren't both installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('browser')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


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
    from selenium.webdriver import ActionChains, Keys

    svg = page.find_element("css selector", "#learning_curves svg")
    ActionChains(page).move_to_element(svg).perform()
    step = int(re.match(r"step (\d+)\n", page.find_element("id", "tip").text)[1])
    (line, *_) = page_data(report)["panels"][0]["lines"]
    assert f"{line['label']}\n{line['points'][step][1]:.3g}" in page.find_element("id", "tip").text
    svg.send_keys(Keys.ARROW_RIGHT)
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
