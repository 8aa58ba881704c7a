"""Single mistakes put into a copy of the code, each with the tests that must see it; prints which survived.

    python tools/mutants.py            all of them, about twenty minutes
    python tools/mutants.py --only 3   one of them; the numbers are those that it prints

A mistake that no test sees says where one is missing. An entry whose text is no longer exactly once in its file is an
error, since it would test nothing; `tests/test_mutants.py` looks for those. So are tests that fail without a mistake,
since they would see any. The exit code is 1 where a mistake survived, 2 after an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
COPIED = ("vogue", "kernels", "tests", "examples", "bench", "docs", "tools", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Mutant:
    file: str
    text: str  # exactly once in the file
    replacement: str
    tests: str  # the file that must see it
    chosen: str = ""  # of its tests, as pytest's -k


SURROGATES, SEEN_BY = "kernels/vogue_kernels/surrogates.py", "tests/kernels/test_surrogates.py"
SAMPLING = "tests/test_sampling.py", "not vllm"
SAVING = "tests/test_save_schedule.py", "not two_ranks"
RESHARDING = "tests/test_resharding.py", "two_ranks_and_one"
REPLAY, VIDEOS = ("tests/test_replay.py", "not stopped"), ("tests/test_videos.py", "not train")
LATENT = "tests/test_latent.py", "not family and not stopped"
MUTANTS = (
    # What is random is a function of the seed and of where it stands.
    Mutant("vogue/step/groups.py", "Purpose.ROLLOUT, step, item", "Purpose.ROLLOUT, item", "tests/test_trainer.py"),
    Mutant("vogue/step/loader.py", "Purpose.PERTURB, step, number", "Purpose.PERTURB, number", "tests/test_loader.py"),
    Mutant(
        "vogue/step/loader.py",
        "drawn[first : first + rollout.prompts]",
        "drawn[: rollout.prompts]",
        "tests/test_loader.py",
    ),
    Mutant("vogue/rewards/scoring.py", "*place, number)", "*place)", "tests/test_rewards_scoring.py"),
    Mutant(
        "vogue/step/loader.py", "(step * rollout.rounds + number) *", "step * rollout.rounds *", "tests/test_loader.py"
    ),
    Mutant("vogue/step/loader.py", "purpose, *where, i)", "purpose, *where)", "tests/test_loader.py"),
    Mutant(
        "vogue/method/branch.py", "SeedSequence((seed, step))", "SeedSequence((seed + step,))", "tests/test_branch.py"
    ),
    Mutant("vogue/step/loader.py", "epoch, offset = epoch + 1, 0", "epoch, offset = epoch, 0", "tests/test_loader.py"),
    # What a step trains on, and where.
    Mutant("vogue/step/loader.py", "self.state.settle()\n", "pass\n", "tests/test_loader.py"),
    Mutant("vogue/step/loader.py", "ahead and ahead[0] == step", "ahead", "tests/test_loader.py"),
    Mutant("vogue/step/loader.py", "NOISY_COST if z.any() else 1", "1", "tests/test_loader.py"),
    Mutant(
        "vogue/step/dynamic_sampling.py",
        "(not found[number], number)",
        "(found[number], number)",
        "tests/test_groups.py",
    ),
    Mutant("vogue/step/groups.py", "keep and completion.finished", "completion.finished", "tests/test_groups.py"),
    Mutant(
        "vogue/step/dynamic_sampling.py", "place * updates // len(chosen)", "place % updates", "tests/test_groups.py"
    ),
    Mutant(
        "vogue/step/groups.py",
        "pass_at_k(len(scores), right, len(scores))",
        "right / len(scores)",
        "tests/test_groups.py",
    ),
    Mutant(
        "vogue/step/groups.py", "other = RAW if trained == NOISY else NOISY", "other = NOISY", "tests/test_methods.py"
    ),
    # Sampling, the length of a run, and its checkpoints.
    Mutant("vogue/rollout/sampling.py", "before >= sampling.top_p", "likely.cumsum(-1) >= sampling.top_p", *SAMPLING),
    Mutant("vogue/rollout/sampling.py", "+ log(sampling.min_p)", "+ log(sampling.min_p) / 2", *SAMPLING),
    Mutant(
        "vogue/rollout/hf.py", "if temperature else logits).log_softmax", "if False else logits).log_softmax", *SAMPLING
    ),
    Mutant("vogue/config/__init__.py", "steps = ceil(", "steps = int(", "tests/test_epochs.py"),
    Mutant("vogue/run/save_schedule.py", 'best["value"] >= value', 'best["value"] > value', *SAVING),
    Mutant("vogue/run/kept_checkpoints.py", "[-keep:], best_of(root))", "[-keep:],)", *SAVING),
    Mutant(
        "vogue/model/optimizer_state.py", "[start - place.first : end - place.first]", "[: end - start]", *RESHARDING
    ),
    Mutant("vogue/model/optimizer_state.py", "rate * factor(updates)", "rate * factor(0)", *RESHARDING),
    # The optimizer's step.
    Mutant(
        "vogue/model/optimizer.py",
        '"gradient_clipping": config.optimizer.max_grad_norm,',
        "",
        "tests/test_trainer.py",
    ),
    Mutant("vogue/trainer.py", "boundary(i == len(batches) - 1)", "boundary(i == 0)", "tests/test_trainer.py"),
    Mutant("vogue/trainer.py", "skipped = 0 if isfinite(norm) else", "skipped =", "tests/test_trainer.py"),
    Mutant(
        "vogue/trainer.py", "            config.rollout.temperature,\n", "            1.0,\n", "tests/test_trainer.py"
    ),
    Mutant(
        "vogue/model/policy.py", "= temperature, keep_logits_bytes", "= 1.0, keep_logits_bytes", "tests/test_trainer.py"
    ),
    Mutant("vogue/trainer.py", "loss * (self.ranks / divisor)", "loss / divisor * 2", "tests/test_trainer.py"),
    # The objective.
    Mutant("vogue/step/objective.py", "torch.where(comparable,", "torch.where(~comparable,", "tests/test_objective.py"),
    Mutant("vogue/step/objective.py", "batch.weights * old.chosen", "batch.weights", "tests/test_entropy.py"),
    Mutant("vogue/step/objective.py", "loss - coef * (weights", "loss + coef * (weights", "tests/test_entropy.py"),
    Mutant("vogue/method/entropy.py", "1 - share", "share", "tests/test_entropy.py"),
    Mutant("vogue/step/groups.py", "measures or reads_all(config.loss)", "measures", "tests/test_entropy.py"),
    Mutant(
        "vogue/step/groups.py", "is None or group.item.number in chosen]", "is None or True]", "tests/test_methods.py"
    ),
    Mutant("vogue/step/ahead.py", "if rollout and rollout.step == step", "if rollout", "tests/test_ahead.py"),
    # KL to a reference, and the image's part in a token.
    Mutant("vogue/method/kl.py", "else ratio_of(logprob, old_logprob) * found", "else found", "tests/test_kl.py"),
    Mutant("vogue/model/policy.py", "detach(), found.kl_qp)", "detach(), found.kl_pq)", "tests/test_kl.py"),
    Mutant("vogue/model/policy.py", "with without_adapters(self.model):", "if True:", "tests/test_kl.py"),
    Mutant(
        "vogue/step/objective.py", "loss = loss - _perceived", "loss = loss + _perceived", "tests/test_perception.py"
    ),
    Mutant("vogue/method/credit.py", "+ (1 - least) / average", "+ (1 - least)", "tests/test_credit.py"),
    Mutant("vogue/step/objective.py", "and sending_gradient(batch)[here].any()", "", "tests/test_credit.py"),
    Mutant("vogue/method/robust.py", "argmax(dim=0", "argmin(dim=0", "tests/test_robust.py"),
    Mutant("vogue/step/objective.py", "held & batch.right[:m]", "held", "tests/test_robust.py"),
    Mutant("vogue/method/critic.py", "[spread[1:], ", "[spread[:-1], ", "tests/test_critic.py"),
    Mutant("vogue/model/critic.py", "if step >= settings.warmup_steps", "if True", "tests/test_critic.py"),
    # What is trained on again, and videos.
    Mutant(
        "vogue/step/objective.py", "fresh, old.logprob, batch.behaviour", "fresh, old.logprob, old.logprob", *REPLAY
    ),
    Mutant("vogue/method/replay.py", "values - known.mean()", "values - values.mean()", *REPLAY),
    Mutant("vogue/step/replay.py", "fresh_enough(step + 1 - one", "fresh_enough(step - one", *REPLAY),
    Mutant("vogue/step/replay.py", "trace is None else trace.logprob.clone()", "True else None", *REPLAY),
    Mutant("vogue/step/loader.py", "perturb(frame, **settings, seed=seed)", "perturb(frame, **settings)", *VIDEOS),
    Mutant("vogue/families.py", "places[0].double() * pace", "places[0].double()", *VIDEOS),
    Mutant("vogue/model/packing.py", "(self.seconds[i] is not None) == video", "True", *VIDEOS),
    # States that are read in place of tokens.
    Mutant("vogue/model/packing.py", "+ torch.tensor(read) - 1", "- 1", *LATENT),
    Mutant("vogue/model/embedding.py", "states.detach()", "states", *LATENT),
    Mutant(
        "vogue/model/policy.py", "reading(model, batch.latent_positions, batch", "reading(model, None, batch", *LATENT
    ),
    Mutant(
        "vogue/rollout/latent_spans.py",
        "rng_for(seed, Purpose.LATENT, i, at)",
        "rng_for(0, Purpose.LATENT, i, at)",
        *LATENT,
    ),
    Mutant("vogue/rollout/latent_spans.py", "begins = ~inside & (", "begins = (", *LATENT),
    Mutant("vogue/rollout/latent_spans.py", "at < sampled[-1]", "True", *LATENT),
    Mutant("vogue/warmstart.py", "[places - 1]", "[places]", "tests/test_latent_warmstart.py"),
    # Ranks.
    Mutant("vogue/step/balance.py", "(-claims[claim], claim)", "(claims[claim], claim)", "tests/test_balance.py"),
    Mutant("vogue/step/balance.py", "pack(loads, middle)", "pack(loads, budget)", "tests/test_balance.py"),
    Mutant("vogue/step/loader.py", "o.number, o.draws", "0, o.draws", "tests/test_balance.py"),
    Mutant("vogue/step/objective.py", "(advantages != 0).any()", "(advantages != 0).all()", "tests/test_objective.py"),
    Mutant("vogue/step/objective.py", "guidance, sign)", "guidance, 1.0)", "tests/test_raw_rollouts.py"),
    Mutant(
        "vogue/step/objective.py",
        "acted_on(batch) & (batch.advantages != 0)",
        "acted_on(batch)",
        "tests/test_trainer.py",
    ),
    Mutant(
        "kernels/vogue_kernels/loss.py",
        "torch.where(kept, ratio, 0.0).amax()",
        "ratio.amax()",
        "tests/kernels/test_loss.py",
    ),
    Mutant(
        "kernels/vogue_kernels/loss.py",
        "(lengths > 0).sum()\n",
        "len(lengths)\n",
        "tests/kernels/test_loss.py",
    ),
    Mutant(
        "kernels/vogue_kernels/capped_bonus.py",
        "advantage + per if",
        "advantage - per if",
        "tests/kernels/test_loss.py",
    ),
    Mutant(SURROGATES, "(advantage < 0) & (obj", "(advantage > 0) & (obj", SEEN_BY),
    Mutant(SURROGATES, "clamp(1 - clip_low, 1 + clip_high) * a", "clamp(1 - clip_low, 1 + clip_low) * a", SEEN_BY),
    Mutant(SURROGATES, "of_level.detach(), old", "logprob.detach(), old", SEEN_BY),
    Mutant(SURROGATES, "masked_fill(advantage > 0", "masked_fill(advantage < 0", SEEN_BY),
    Mutant(SURROGATES, "clamp(config.importance_floor, ", "clamp(None, ", SEEN_BY),
    Mutant(SURROGATES, " / self.lengths.clamp(min=1)[self.ids]", "", SEEN_BY),
    # Both readings of VOGUE.
    Mutant("vogue/step/groups.py", "item.draws) if config", "(True,) * n) if config", "tests/test_raw_rollouts.py"),
    Mutant("vogue/step/groups.py", "group.paid[i] == paid", "True", "tests/test_raw_rollouts.py"),
    Mutant("vogue/method/uncertainty.py", "paid & ~noisy", "paid", "tests/test_uncertainty.py"),
    Mutant(
        "vogue/method/uncertainty.py",
        'noisy == (divergence == "forward")',
        'divergence == "forward"',
        "tests/test_uncertainty.py",
    ),
    Mutant("vogue/method/branch.py", "1 - 2 * (step", "1 - (step", "tests/test_branch.py"),
    Mutant("vogue/method/perturb.py", "MAX_ANGLE * (2 * angle - 1)", "MAX_ANGLE * angle", "tests/test_perturb.py"),
    Mutant("vogue/method/advantage.py", "1 - mean - fails", "1 - mean", "tests/test_advantage.py"),
    Mutant(
        "vogue/method/advantage.py",
        "rewards.std(dim=1, keepdim=True)",
        "rewards.std(dim=1, keepdim=True, correction=0)",
        "tests/test_advantage.py",
    ),
    Mutant("vogue/method/perturb.py", "(255 * pixels).round()", "(255 * pixels)", "tests/test_perturb.py"),
    # Rewards.
    Mutant(
        "vogue/rewards/answer_types.py",
        "return apart and not joined",
        "return not apart",
        "tests/test_rewards_answers.py",
    ),
    Mutant(
        "vogue/rewards/correctness.py", "and given.unit != answer.unit", "and False", "tests/test_rewards_answers.py"
    ),
    Mutant(
        "vogue/rewards/equality_worker.py",
        "1e-{AGREEING}",
        "1e-6",
        "tests/test_rewards_answers.py",
    ),
    Mutant("vogue/rewards/designs.py", "weights[name] * one", "one", "tests/test_rewards_own.py"),
    Mutant(
        "vogue/rewards/designs.py",
        "min(difference % circle, -difference % circle)",
        "difference % circle",
        "tests/test_rewards_designs.py",
    ),
    Mutant(
        "vogue/rewards/scoring.py",
        "1, sampling)",
        "1, replace(sampling, temperature=1.0))",
        "tests/test_rewards_scoring.py",
    ),
    Mutant("vogue/rewards/function_worker.py", "and math.isfinite(reward)", "", "tests/test_rewards_function.py"),
    Mutant(
        "vogue/rewards/function_worker.py",
        "len(values) != len(c",
        "len(values) < len(c",
        "tests/test_rewards_function.py",
    ),
    Mutant(
        "vogue/rewards/equality_worker.py",
        "    resource.setrlimit",
        "    0 and resource.setrlimit",
        "tests/test_rewards.py",
    ),
    # Estimates, state, runs and files.
    Mutant("vogue/estimates.py", "comb(n - right, k)", "comb(n - right, 1)", "tests/test_evaluate.py"),
    Mutant("vogue/estimates.py", "np.abs(sums) >=", "sums >=", "tests/test_sweep_table.py"),
    Mutant(
        "vogue/estimates.py",
        "np.quantile(means, [0.025, 0.975])",
        "np.quantile(means, [0.05, 0.95])",
        "tests/test_sweep_table.py",
    ),
    Mutant(
        "vogue/step/run_state.py",
        'values["current"], values["settled"]',
        'values["current"], values["current"]',
        "tests/test_run_state.py",
        "settled",
    ),
    Mutant(
        "vogue/step/run_state.py", "copy.deepcopy(self.current)", "self.current", "tests/test_run_state.py", "settled"
    ),
    Mutant(
        "vogue/sweep.py",
        'evaluations[-1]["step"] == (self.config.trainer.steps or logs.steps_of(self.folder))',
        "True",
        "tests/test_sweep.py",
        "last",
    ),
    Mutant(
        "vogue/data/samples.py",
        "unfinished = Path(folder) / path.name",
        "unfinished = path",
        "tests/data/test_samples.py",
    ),
    Mutant(
        "vogue/run/training.py",
        "distributed.largest([int(stop.asked)], trainer.device)[0]",
        "stop.asked",
        "tests/test_stopping.py",
        "one_of_them",
    ),
    Mutant(
        "vogue/run/restarts.py",
        "if reached == crashed_at:",
        "if reached == crashed_at and restart == times:",
        "tests/test_restarts.py",
        "second_crash",
    ),
    Mutant(
        "vogue/run/restarts.py",
        "            left = _left(note)\n",
        "            left = []\n",
        "tests/test_restarts.py",
        "crashes_goes_on",
    ),
    Mutant(
        "vogue/run/launch.py",
        "_of_open_mpi(given) or _of_mpich(given) or _of_srun(given)",
        "_of_srun(given) or _of_open_mpi(given) or _of_mpich(given)",
        "tests/test_launch_names.py",
    ),
    # The weight's gradient over batches of tokens.
    Mutant(
        "kernels/vogue_kernels/reference.py",
        "                if tile_weight is not None:\n                    tile",
        "                if tile_weight is not None and 2 * rows.start != len(targets):\n                    tile",
        "tests/kernels/test_linear_stats.py",
        "references_weight",
    ),
    Mutant(
        "kernels/vogue_kernels/gpu/__init__.py",
        "len(batches) == 1:  # nothing",
        "len(batches) <= 2:  # nothing",
        "tests/kernels/test_gpu.py",
        "every_kernel_test",
    ),
)


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the mistake; raises ValueError where the place isn't there exactly once."""
    count = text.count(mutant.text)
    if count != 1:
        raise ValueError(
            f"{mutant.file} has {mutant.text!r} {count} times, not once: mend the entry in tools/mutants.py"
        )
    return text.replace(mutant.text, mutant.replacement)


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests pass on the copy in spite of the mistake.

    Raises RuntimeError where they can't be run, or fail without the mistake too.
    """
    path = copy / mutant.file
    original = path.read_text()
    _write(path, mutated(mutant, original))
    try:
        passed, _ = tried(mutant.tests, mutant.chosen, copy)
    finally:
        _write(path, original)
    if not passed:
        passes, output = tried_without(mutant.tests, mutant.chosen, copy)
        if not passes:
            raise RuntimeError(f"{mutant.tests} fails without a mistake:\n{output}")
    return passed


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    # Byte-code is told by the second and the size of its source, which a mistake may leave as they were.
    Path(cache_from_source(path)).unlink(missing_ok=True)


def tried(tests: str, chosen: str, copy: Path) -> tuple[bool, str]:
    """Whether the tests pass on the copy as it is, and the end of what they print."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests]
    command += ["-k", chosen] if chosen else ["-m", "not slow"]
    environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'kernels'}"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    output = done.stdout[-2000:] + done.stderr[-2000:]
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{tests} can't be run:\n{output}")
    return done.returncode == 0, output


tried_without = cache(tried)  # once for all mistakes of the same tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the mistakes to try")
    chosen = parser.parse_args().only or range(len(MUTANTS))
    if unknown := [number for number in chosen if not 0 <= number < len(MUTANTS)]:
        parser.error(f"--only {unknown[0]}: the mistakes are numbered 0 to {len(MUTANTS) - 1}")
    try:
        for number in chosen:
            mutated(MUTANTS[number], (ROOT / MUTANTS[number].file).read_text())
    except ValueError as error:
        parser.error(str(error))
    console, found = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for number in track(chosen, "mistakes", console=console):
            mutant = MUTANTS[number]
            try:
                seen = not survives(mutant, copy)
            except RuntimeError as error:
                parser.exit(2, f"mistake {number}: {error}\n")
            change = f"{mutant.file}: {mutant.text!r} -> {mutant.replacement!r}"
            line = f"{number:3} {'seen    ' if seen else 'SURVIVED'} {change}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            found += [] if seen else [number]
    console.print(f"{len(found)} of {len(chosen)} survived" + (f": {found}" if found else ""), highlight=False)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
