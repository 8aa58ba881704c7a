"""The training loop: VOGUE's Algorithm 1 (arXiv 2510.01444) on DeepSpeed and a rollout engine.

One step:

    x' = T(x);  z ~ Bernoulli(max(0, 1 - s/s_total))           which branch, drawn before the rollout
    o_1..o_G ~ pi(. | x or x', text)                           only the drawn branch is generated
    A = (r - mean r) / std r                                   in the group of one branch
    u_out = H(pi),  u_per = (KL(p||q) + KL(q||p)) / 2          per token, exact, without gradient
    A^ = A + min(|A|/beta_o, alpha_o u_out) + z min(|A|/beta_p, alpha_p u_per)
    ascend min(r A^, clip(r, 1 - low, 1 + high) A^)            r = pi / pi_old

With `branch.rollout=raw` all completions are generated from x and trained on it, as in the authors' code: z only
decides whether u_per is paid.

A completion needs one forward, and where z = 1 a second one, without gradient, on the image that it isn't trained on.
Completions with A = 0 need none. Every `trainer.measure_every` steps all of it is computed, to be logged.

The other methods are settings of this loop (`vogue.config.METHODS`). Two need more: DAPO's dynamic sampling repeats the
rollout with new prompts (`Trainer.rounds`), and NoisyRollout's groups hold completions of both branches and are trained
on the raw one, where old log-probabilities are computed too.
"""

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import isfinite

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from vogue import distributed
from vogue.config import Config, ConfigError
from vogue.data import DataError, Sample
from vogue.evaluate import CHUNK, Judged, judge
from vogue.groups import (
    Group,
    Item,
    Trace,
    assigned,
    choose,
    found_mixed,
    judged,
    kept_lengths,
    sample_order,
    split,
    tally,
)
from vogue.inputs import Preprocessor
from vogue.method import branch
from vogue.method.perturb import annealed, perturb
from vogue.method.uncertainty import Signals, TokenStats, read_signals
from vogue.metrics import Clock, Sums, peak_memory
from vogue.model import checkpoint
from vogue.model.loading import load_model
from vogue.model.optimizer import start_deepspeed
from vogue.model.packing import Batch, Row, collate, deal, pack, spread
from vogue.model.policy import Policy
from vogue.rewards import verifier
from vogue.rewards.groups import score_groups
from vogue.rollout import Completion, Request, create_engine, media_token_ids
from vogue.seeds import Purpose, seed_for
from vogue_kernels import GuidanceConfig, clipped_surrogate, shaped_advantage

MOST_SKIPPED = 3  # updates in a row whose gradient isn't finite
NOISY_COST = 4 / 3  # of training on a noisy group, in that of a raw one: it adds a forward without gradient


class Trainer:
    """Holds what lives through a run: policy, optimizer, rollout engine and data. `step` is the next step."""

    def __init__(self, config: Config, samples: list[Sample], preprocessor: Preprocessor, resume: bool):
        self.config = config
        self.lengths = preprocessor.check(samples)
        self.rank, self.ranks, self.device = distributed.start()
        _check_split(config, self.ranks)
        found = checkpoint.latest(self.checkpoints, self.ranks) if resume else None
        self.samples = samples
        self.preprocessor = preprocessor
        self.processor = preprocessor.processor
        self.policy = Policy(
            load_model(config, self.device),
            config.rollout.temperature,
            media_token_ids(self.processor),
            config.model.attention,
        )
        self.shared_prefix = config.trainer.shared_prefix and not self.policy.why_separate
        if config.trainer.shared_prefix and self.policy.why_separate and self.rank == 0:
            warnings.warn(f"every completion is a row of its own: {self.policy.why_separate}", stacklevel=2)
        self.engine = start_deepspeed(self.policy, config)
        self.rollout = create_engine(config, self.processor, self.policy.model)
        self.guidance = GuidanceConfig(**config.guidance.model_dump(exclude={"sign_transition"}))
        self.step = 0
        self._skipped = 0  # updates in a row, of this process
        self._background = ThreadPoolExecutor(max_workers=1, initializer=_one_openmp_thread)
        self._ahead: tuple[int, Future[list[Item]]] | None = None
        if found:
            folder, self.step = found
            checkpoint.load(self.engine, folder)
            self.sync()

    @property
    def checkpoints(self):
        return self.config.trainer.output_dir / "checkpoints"

    def run_step(self) -> tuple[dict[str, float], list[Group]]:
        """One pass of the algorithm; returns metrics over all ranks and this rank's groups."""
        clock, sums = Clock(), Sums()
        groups = self.rounds(sums, clock)
        with clock("train"):
            traces = self.update(groups, sums, clock)
        groups = [replace(g, traces=tuple(traces.get(id(completion)) for completion in g.completions)) for g in groups]
        self.step += 1
        with clock("sync"):
            self.sync()
        tally(groups, sums)
        sums.add("verifier_failures", verifier.failures)
        metrics = sums.means(self.device)
        metrics["lr"] = self.engine.get_lr()[0]
        metrics |= {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        mine = {"rollout": float(sums.sums["tokens"]), "train": float(sums.sums["trained_share"])}
        for phase, tokens in distributed.total(mine, self.device).items():
            metrics[f"throughput/{phase}"] = tokens / clock.seconds[phase]
        metrics["memory_gb"] = peak_memory()
        return metrics, groups

    # ------------------------------------------------------------------------------------------------ rollout

    def rounds(self, sums: Sums, clock: Clock) -> list[Group]:
        """This rank's judged groups of the step; `rollout.rounds` of new prompts at most, until enough are mixed.

        A prompt is mixed where accuracies differ within one of its groups. Too few of them after the last round are
        filled up with others. What isn't trained on stays in the list, with nothing kept. All ranks decide together.
        """
        rollout = self.config.rollout
        groups: list[Group] = []
        for number in range(rollout.rounds):
            with clock("data"):
                items = self.items(self.step, number) if number else self.items_ahead()
            with clock("rollout"):
                generated = self.generate(items)
            with clock("reward"):
                groups += self.judge(generated)
            if rollout.rounds == 1:
                return groups
            found = {k: v for part in distributed.gather(found_mixed(groups)) for k, v in part.items()}
            if sum(found.values()) >= rollout.prompts:
                break
        chosen = choose(found, rollout.prompts)
        sums.add("rounds", number + 1)
        sums.add("filled_share", sum(not found[prompt] for prompt in chosen) / len(chosen))
        return assigned(groups, chosen, self.config.trainer.updates)

    def items_ahead(self) -> list[Item]:
        """`items` of this step; those of the next one are loaded and perturbed from now on, while this one trains."""
        step, ahead = self._ahead or (None, None)
        items = ahead.result() if step == self.step else self.items(self.step)
        self._ahead = None
        if self.step + 1 < self.config.trainer.steps:
            self._ahead = self.step + 1, self._background.submit(self.items, self.step + 1)
        return items

    def items(self, step: int, number: int = 0) -> list[Item]:
        """This rank's prompts of `step`'s round `number`, perturbed where that is needed; a function of both alone.

        Every step has its place in the order of samples for all rounds it may have, so that nothing needs remembering.
        """
        rollout = self.config.rollout
        p = branch.noisy_probability(step, self.config.trainer.steps, self.config.branch.probability)
        seed, total, first = self.config.seed, rollout.prompts * rollout.rounds, rollout.prompts * number
        branch_seed = seed_for(seed, Purpose.BRANCH)
        drawn = branch.draw(self.config.branch.granularity, total, rollout.n, p, branch_seed, step)
        draws = drawn[first : first + rollout.prompts]
        order = sample_order(len(self.samples), step * total + first, rollout.prompts, seed)
        costs = [self.lengths[i] * (NOISY_COST if z.any() else 1) for i, z in zip(order, draws, strict=True)]
        size = rollout.prompts // self.config.trainer.updates
        mine = [
            start + i
            for start in range(0, rollout.prompts, size)  # an update's prompts, shared by all ranks
            for i in deal(costs[start : start + size], self.ranks)[self.rank]
        ]
        items = (self.item(self.samples[order[i]], step, first + i, tuple(draws[i].tolist())) for i in mine)
        return [replace(item, part=i // size) for i, item in zip(mine, items, strict=True)]

    def item(self, sample: Sample, step: int, number: int, draws: tuple[bool, ...]) -> Item:
        images, settings = sample.load_images(), self.config.perturb
        seeds = (seed_for(self.config.seed, Purpose.PERTURB, step, number, i) for i in range(len(images)))
        sigma = settings.sigma
        if settings.anneal_at is not None:
            sigma = annealed(sigma, step, self.config.trainer.steps, settings.anneal_at)
        try:
            raw, noisy = self.preprocessor.view(images), None
            if any(draws) or self.config.rollout.noisy or self.measures(step):
                copies = zip(images, seeds, strict=True)
                noisy = self.preprocessor.view([perturb(x, settings.preset, sigma, seed) for x, seed in copies])
        except (OSError, ValueError) as error:
            raise DataError(f"{sample.place}: {error}") from error
        return Item(number, self.preprocessor.prompt(sample, raw), raw, noisy, draws)

    def generate(self, items: list[Item]) -> list[Group]:
        """Groups of every branch that a draw asks for, unscored. Both, where draws are per response and differ.

        With `branch.rollout=raw` the raw group alone, whose draws decide where u_per is paid. With
        `rollout.noisy_share`, one group of completions of both views, trained on the raw branch.
        """
        n, noisy_n = self.config.rollout.n, self.config.rollout.noisy
        if noisy_n:
            clean = self.complete([(item, False) for item in items], n - noisy_n)
            noisy = self.complete([(item, True) for item in items], noisy_n)
            foreign = (False,) * (n - noisy_n) + (True,) * noisy_n
            joined = zip(items, clean, noisy, strict=True)
            return [
                Group(item, False, (*a, *b), kept=(True,) * n, paid=(False,) * n, foreign=foreign)
                for item, a, b in joined
            ]
        if self.config.branch.rollout == "raw":
            found = self.complete([(item, False) for item in items], n)
            return [
                Group(item, False, tuple(completions), kept=(True,) * n, paid=item.draws)
                for item, completions in zip(items, found, strict=True)
            ]
        wanted = [(item, noisy) for item in items for noisy in (False, True) if noisy in item.draws]
        return [
            Group(item, noisy, tuple(completions), kept=tuple(z == noisy for z in item.draws), paid=(noisy,) * n)
            for (item, noisy), completions in zip(wanted, self.complete(wanted, n), strict=True)
        ]

    def complete(self, wanted: list[tuple[Item, bool]], n: int) -> list[list[Completion]]:
        """`n` completions for each item's raw or (True) noisy view."""
        rollout, requests = self.config.rollout, []
        for item, noisy in wanted:
            seed = seed_for(self.config.seed, Purpose.ROLLOUT, self.step, item.number, noisy)
            requests.append(Request(item.prompt, item.noisy if noisy else item.raw, seed))
        return self.rollout.generate(requests, n, rollout.max_tokens, rollout.temperature)

    def judge(self, groups: list[Group]) -> list[Group]:
        """Scores and advantages, from all G completions of each group."""
        samples = [group.item.prompt.sample for group in groups]
        completions = [group.completions for group in groups]
        places = [(self.step, group.item.number, group.noisy) for group in groups]
        temperature = self.config.rollout.temperature
        scores = score_groups(self.rollout, self.preprocessor, self.config, samples, completions, places, temperature)
        return [judged(group, found, self.config) for group, found in zip(groups, scores, strict=True)]

    # ----------------------------------------------------------------------------------------------- training

    def measures(self, step: int) -> bool:
        """Whether all that the step keeps is computed on both branches, rather than what the loss needs."""
        every = self.config.trainer.measure_every
        return every > 0 and step % every == 0

    def update(self, groups: list[Group], sums: Sums, clock: Clock) -> dict[int, Trace]:
        """`trainer.updates` optimizer updates, each on its share of the step's prompts.

        Returns the traces of the completions that went through a forward, by their id().
        """
        traces: dict[int, Trace] = {}
        parts = split(groups, self.config.trainer.updates)
        with clock("pack"):
            packed = [self.batches(part) for part in parts]
        if len(parts) > 1:
            with clock("old"), torch.no_grad():
                packed = [[self.with_old(batch) for batch in part] for part in packed]
        for number, (part, batches) in enumerate(zip(parts, packed, strict=True)):
            kept = kept_lengths(part)
            mine = float(sum(kept) if self.config.loss.aggregation == "token-mean" else len(kept))
            weight = distributed.total({"w": mine}, self.device)["w"] or 1.0  # where no rank keeps anything, nor loses
            for i, batch in enumerate(batches):
                self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
                with clock("forward"):
                    stats = self.engine(batch)
                    traces |= measure(batch, stats, sums, self.measures(self.step))
                    loss = self.loss(batch, self.signals(batch, stats), sums, first=number == 0)
                with clock("backward"):
                    # DeepSpeed averages gradients over the ranks; this loss is one summand of the global mean.
                    self.engine.backward(loss * (self.ranks / weight))
            with clock("update"):
                self.engine.step()
            # What went through no forward has a loss of 0.
            sums.add_sum("loss", 0.0, mine - sum(float(batch.weights.sum()) for batch in batches))
            sums.add_sum("trained_share", 0.0, sum(kept))
            self.check_gradient(float(self.engine.get_global_grad_norm() or 0.0), sums)
        return traces

    def check_gradient(self, norm: float, sums: Sums) -> None:
        """Add the update's `norm` to `sums`; raises FloatingPointError after too many in a row that aren't finite.

        DeepSpeed doesn't apply such an update, which one odd batch may cause. Norms are of all ranks.
        """
        self._skipped = 0 if isfinite(norm) else self._skipped + 1
        sums.add("skipped_updates", self._skipped > 0)
        if not self._skipped:
            sums.add("grad_norm", norm)
        if self._skipped == MOST_SKIPPED:
            raise FloatingPointError(
                f"step {self.step}: the gradient wasn't finite in {MOST_SKIPPED} updates in a row, none of which was "
                "applied. Start again from model.path=an earlier checkpoint's hf folder, with a smaller optimizer.lr"
            )

    def batches(self, groups: list[Group]) -> list[Batch]:
        """Micro-batches, those with compared rows first, as many on every rank and in the same order."""
        rows = [row for group in groups for row in self.rows(group)]
        item, completions = groups[0].item, groups[0].completions
        idle = Row(item.prompt, item.raw, None, completions[:1], (0.0,))
        packed = pack(rows, self.config.trainer.micro_batch_tokens)
        compared = sum(micro_batch[0].compared for micro_batch in packed)
        counts = distributed.largest([compared, len(packed) - compared], self.device)
        if not any(counts):
            counts = [0, 1]  # nothing sends a gradient, but the optimizer's moments and decay go on
        filled = spread(packed[:compared], counts[0], replace(idle, other=item.raw))
        filled += spread(packed[compared:], counts[1], idle)
        pad_id, token_mean = self.processor.tokenizer.pad_token_id, self.config.loss.aggregation == "token-mean"
        return [collate(rows, pad_id, token_mean).to(self.device) for rows in filled]

    def rows(self, group: Group) -> list[Row]:
        """A group as one row, or as a row a completion where the model can't share the prompt.

        A completion with A = 0 sends no gradient, and only a paid one's loss reads the other branch: what isn't needed
        is left out, unless the step `measures`. Completions that are paid and those that aren't, which a draw a
        response leaves in one raw group, are two rows, so that the second forward is of the paid ones alone.
        """
        measures, item = self.measures(self.step), group.item
        seen = bool(item.raw.images)  # without images the branches are one
        foreign = group.foreign or (False,) * len(group.completions)
        needed = [kept and (measures or a != 0) for kept, a in zip(group.kept, group.advantages, strict=True)]
        everything = list(zip(group.completions, group.advantages, foreign, group.paid, strict=True))
        view, other = (item.noisy, item.raw) if group.noisy and seen else (item.raw, item.noisy)
        rows = []
        for paid in (False, True):
            chosen = [one for one, need in zip(everything, needed, strict=True) if need and one[-1] == paid]
            read = other if measures or (paid and seen and self.reads_other) else None
            for part in [chosen] if self.shared_prefix else [[one] for one in chosen]:
                if part:
                    completions, advantages, foreign, _ = zip(*part, strict=True)
                    marks = {"foreign": foreign, "noisy": group.noisy and seen, "paid": paid and seen}
                    rows.append(Row(item.prompt, view, read, completions, advantages, **marks))
        return rows

    @property
    def reads_other(self) -> bool:
        """Whether the loss of a completion whose draw was noisy reads the branch that it isn't trained on."""
        config = self.config
        of_drawn = config.branch.rollout == "raw" and config.uncertainty.entropy == "drawn"
        return config.guidance.alpha_per > 0 or (of_drawn and config.guidance.alpha_out > 0)

    def signals(self, batch: Batch, stats: TokenStats) -> Signals:
        """What the loss reads of the batch's tokens."""
        return read_signals(stats, batch.noisy, batch.paid, **self.config.uncertainty.model_dump())

    def with_old(self, batch: Batch) -> Batch:
        """The batch with its signals before the first update."""
        return replace(batch, old=self.signals(batch, self.engine(batch)))

    def loss(self, batch: Batch, signals: Signals, sums: Sums, first: bool) -> Tensor:
        """Weighted sum of the tokens' losses; adds the batch's metrics to `sums`."""
        settings, logprob = self.config.loss, signals.logprob
        old = batch.old or signals._replace(logprob=logprob.detach())
        sign = branch.bonus_sign(self.step, self.config.trainer.steps, self.config.guidance.sign_transition)
        shaped = shaped_advantage(batch.advantages, old.u_out, old.u_per, batch.paid, self.guidance, sign)
        clips = settings.clip_low, settings.clip_high, settings.clip_dual
        token_loss, clipped = clipped_surrogate(logprob, old.logprob, shaped.advantage, *clips)
        comparable = ~batch.rollout_logprob.isnan()
        mismatch = torch.where(comparable, old.logprob - batch.rollout_logprob, 0.0)
        if settings.importance_cap is not None:
            token_loss = token_loss * mismatch.exp().clamp(max=settings.importance_cap)
        trained = _trained(batch)
        ratio_error = {"ratio_error": (logprob.detach() - old.logprob).expm1().abs()} if first else {}
        sums.add_tokens(trained, {"clip_fraction": clipped, "out_capped": shaped.out_capped} | ratio_error)
        sums.add_tokens(
            trained & comparable, {"mismatch/logprob": mismatch.abs(), "mismatch/kl": mismatch.expm1() - mismatch}
        )
        if signals.u_per is not None:
            sums.add_tokens(trained & batch.paid, {"per_capped": shaped.per_capped})
        sums.add_sum("loss", float((batch.weights * token_loss.detach()).sum()), float(batch.weights.sum()))
        return (batch.weights * token_loss).sum()

    # ----------------------------------------------------------------------------------- weights and evaluation

    def sync(self) -> None:
        """Give the rollout engine the policy's weights; its version is the number of steps they have seen."""
        self.rollout.load_weights(checkpoint.gathered_weights(self.policy.model), self.step)
        if self.rollout.version != self.step:
            raise RuntimeError(f"the rollout engine has weights of step {self.rollout.version}, not of {self.step}")

    def evaluate(self, samples: list[Sample]) -> list[Judged]:
        """Judge `samples` with the rollout engine's weights, shared over the ranks; every rank gets all results."""
        size = -(-len(samples) // self.ranks)
        numbers = range(len(samples))[self.rank * size : (self.rank + 1) * size]
        mine: list[Judged] = []
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            part = [samples[i] for i in chunk]
            mine += judge(self.rollout, self.preprocessor, self.config, part, chunk[0])
        return [judged for part in distributed.gather(mine) for judged in part]

    def save(self) -> None:
        checkpoint.save(
            self.engine,
            self.policy.model,
            self.processor,
            self.checkpoints,
            self.step,
            self.config.trainer.keep,
        )


def measure(batch: Batch, stats: TokenStats, sums: Sums, all_groups: bool) -> dict[int, Trace]:
    """Add the exact entropy and symmetric divergence to `sums`, whatever estimates of them guide.

    Returns the completions' traces by their id().
    """
    real, trained = batch.weights > 0, _trained(batch)
    entropy = stats.entropy.detach()
    u_per = entropy[:0] if stats.other is None else stats.other.symmetric_kl
    compared = slice(len(u_per))
    sums.add_tokens(trained, {"entropy": entropy})
    sums.add_tokens((trained & batch.paid)[compared], {"u_per": u_per})
    if all_groups:
        sums.add_tokens(real, {"measured/entropy": entropy})
        sums.add_tokens(real[compared], {"measured/u_per": u_per})
    sums.sums["trained_share"] += int(real.sum())
    entropy, u_per, real = entropy.cpu(), u_per.cpu(), real.cpu()
    traces, start = {}, 0
    for completion in batch.completions:
        here = slice(start, start + len(completion.token_ids))
        if real[start]:
            traces[id(completion)] = Trace(entropy[here], u_per[here] if here.stop <= len(u_per) else None)
        start = here.stop
    return traces


def _one_openmp_thread() -> None:
    """Of the calling thread: a second pool of OpenMP's makes both sleep at every end of a parallel loop.

    With as many threads as cores in one pool alone, they wait actively; a rollout then takes half the time.
    """
    torch.get_num_threads()  # torch sets the number when a thread first asks for it
    threadpool_limits(1, "openmp")


def _trained(batch: Batch) -> Tensor:
    """Which tokens (N,) send a gradient."""
    return (batch.weights > 0) & (batch.advantages != 0)


def _check_split(config: Config, ranks: int) -> None:
    per_update = config.rollout.prompts // config.trainer.updates
    if per_update % ranks:
        raise ConfigError(
            f"rollout.prompts / trainer.updates = {per_update} prompts an update can't be shared by {ranks} ranks"
        )
