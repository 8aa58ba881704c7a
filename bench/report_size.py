"""How large the report of a long run is, and how long it takes to write it and to open it in a browser.

    python bench/report_size.py                             100,000 completions of 300 tokens in 12,500 steps
    python bench/report_size.py --completions 1600 --tokens 1000

The run is made up: 8 completions a step, with u_per and entropy of every token and two images each. Opening is told
where chromium, chromedriver and selenium are there: seconds until the page's load event, with its charts and first
completions drawn, and the memory that the page's JavaScript holds then.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

A_STEP = 8  # completions
IMAGES = 400  # distinct ones
METRICS = (
    *("reward", "accuracy", "entropy", "measured/entropy", "u_per", "measured/u_per", "noisy_share", "mixed_share"),
    *(
        "solved_share",
        "finished",
        "tokens",
        "clip_fraction",
        "per_capped",
        "out_capped",
        "grad_norm",
        "distinct_answers",
    ),
    *("time/data", "time/rollout", "time/reward", "time/train", "time/pack", "time/forward", "time/backward"),
    *("time/update", "time/sync", "throughput/rollout", "throughput/train", "mismatch/logprob", "mismatch/kl"),
)


def made_up(folder: Path, completions: int, tokens: int) -> Path:
    """Write a run's folder."""
    from vogue.config import load_config, save_config

    steps, rng = -(-completions // A_STEP), np.random.default_rng(0)
    (folder / "completions").mkdir()
    save_config(load_config(None, ["model.path=base", f"trainer.steps={steps}"]), folder / "config.yaml")
    for number in range(IMAGES):
        noise = rng.integers(0, 256, (28, 56, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "completions" / f"{number}.webp", lossless=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(steps):
            values = dict(zip(METRICS, rng.random(len(METRICS)).tolist(), strict=True))
            file.write(json.dumps({"step": step} | values) + "\n")
    words = [f" word{number}" for number in range(2000)]
    with open(folder / "completions.jsonl", "w") as file:
        for number in range(completions):
            text = [words[i] for i in rng.integers(0, len(words), tokens)]
            signals = {name: rng.random(tokens).round(5).tolist() for name in ("entropy", "u_per")}
            record = {"step": number // A_STEP, "problem": "<image>How many?", "answer": "3", "category": "made up"}
            record |= {"completion": "".join(text), "branch": "raw", "paid": True, "reward": 1.0, "accuracy": 1.0}
            record |= {"parsed": "3", "components": {"format": 1.0}, "advantage": 0.5, "tokens": text} | signals
            paths = [f"completions/{i}.webp" for i in rng.integers(0, IMAGES, 2)]
            file.write(json.dumps(record | {"image": paths[:1], "perturbed": paths[1:]}) + "\n")
    return folder


def opened(page: Path) -> dict[str, float] | None:
    """What a headless Chromium needs for a page; None where there is none."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        return None
    if not (chromium and chromedriver):
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "enable-precise-memory-info"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    try:
        driver.get(page.as_uri())
        timing = driver.execute_script("return performance.getEntriesByType('navigation')[0].toJSON()")
        heap = driver.execute_script("return performance.memory.usedJSHeapSize")
        cards = driver.execute_script("return document.querySelectorAll('.card').length")
        curves = driver.execute_script("return document.querySelectorAll('path.curve').length")
        return {"seconds": timing["loadEventEnd"] / 1e3, "heap_mb": heap / 1e6, "cards": cards, "curves": curves}
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=300, help="of a completion")
    arguments = parser.parse_args()
    from vogue.report import write_report

    with tempfile.TemporaryDirectory() as name:
        run = made_up(Path(name), arguments.completions, arguments.tokens)
        logged = sum(file.stat().st_size for file in run.glob("*.jsonl")) / 1e6
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        start, used = time.perf_counter(), time.process_time()
        page = write_report([run])[0]
        seconds, processor = time.perf_counter() - start, time.process_time() - used
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
        print(f"{arguments.completions:,} completions of {arguments.tokens} tokens, {logged:,.0f} MB of logs")
        print(f"written in {seconds:.1f} s ({processor:.1f} s of the processor), with {memory:,.0f} MB more memory")
        print(f"size of the page: {os.path.getsize(page) / 1e6:.1f} MB")
        if found := opened(page):
            print(f"opened in {found['seconds']:.1f} s: {found['curves']} curves, {found['cards']} completions drawn")
            print(f"memory of its JavaScript: {found['heap_mb']:.0f} MB")


if __name__ == "__main__":
    main()
