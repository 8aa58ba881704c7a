"""Runs' folders as `vogue train` leaves them, believable ones, for the tests of what reads them."""

import json
import re

import numpy as np

from vogue.config import load_config, save_config
from vogue.data.digits import demonstration, digit_pairs
from vogue.method.perturb import perturb


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


def change(path, edit):
    """Rewrite each object of a JSONL file as edit(number, object)."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [edit(number, row) for number, row in enumerate(rows)])
