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

The other methods are settings of this loop (`vogue.config.METHODS`). DAPO's dynamic sampling repeats the rollout with
new prompts (`dynamic_sampling`); NoisyRollout's groups hold completions of both views and are trained on the raw one.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple, cast

from torch.nn.utils import get_total_norm

from vogue import distributed
from vogue.config import Config, with_steps
from vogue.data import DataError, Sample
from vogue.data.dataset import Checked
from vogue.evaluate import CHUNK, FAILURES, Judged, judge, requests_for
from vogue.inputs import NOISY, RAW, Preprocessor
from vogue.method import branch
from vogue.method.uncertainty import Signals, TokenStats, read_signals
from vogue.metrics import Clock, Means, memory_limit, peak_memory
from vogue.model import checkpoint, resuming
from vogue.model.critic import Critic
from vogue.model.loading import load_model
from vogue.model.optimizer import start_deepspeed
from vogue.model.packing import Batch, Place, collate
from vogue.model.policy import Policy
from vogue.model.reference import load_reference
from vogue.model.weights import gathered_weights
from vogue.rewards import Score, verifier
from vogue.rewards.scoring import score_groups
from vogue.rollout import create_engine
from vogue.rollout.engine import Completion, EngineError, media_token_ids
from vogue.rollout.sampling import of_rollouts
from vogue.run.kept_checkpoints import BEST, root_of
from vogue.step.ahead import AHEAD, Ahead
from vogue.step.balance import IDLE, IDLE_COMPARED, all_loads, balance, bring_home, deal, exchange
from vogue.step.dynamic_sampling import dynamic_sampling
from vogue.step.engine_check import Servers, doubt, mismatch
from vogue.step.entropy_target import entropy_coef, steer_entropy
from vogue.step.forwards import looked_at, needs_look, referred
from vogue.step.groups import (
    RIGHT,
    WRONG,
    Group,
    Trace,
    compared_views,
    curious,
    generate,
    idle_row,
    in_updates,
    judged,
    kept_lengths,
    penalised,
    rows,
    scaled_over_step,
    tally,
    traced,
)
from vogue.step.loader import SCORES, Item, Loader
from vogue.step.objective import objective, uncertainties
from vogue.step.pair_shuffle import shuffled
from vogue.step.prompt_scores import TOKENS, refreshed, remembered
from vogue.step.replay import remember, with_replayed
from vogue.step.run_state import RunState
from vogue_kernels import GuidanceConfig

DATA = "data"  # the run's state under this name: the fingerprint of what it is trained on
MOST_SKIPPED = 3  # updates in a row whose gradient isn't finite


class StepResult(NamedTuple):
    metrics: dict[str, float]  # over all ranks
    groups: list[Group]  # this rank's


class Trainer:
    """What lives through a run: policy, DeepSpeed's engine, rollout engine, data and state. `step` is the next one."""

    def __init__(self, config: Config, data: Checked, preprocessor: Preprocessor, resume: str | None):
        """`resume`: the checkpoint to go on from, by its name, the newest one for ""; None for a new run."""
        self.config = config = with_steps(config, len(data.samples))
        self.rank, self.ranks, self.device = distributed.start(config.trainer.timeout)
        self.state = RunState()
        self.loader = Loader(config, data, preprocessor, self.state, self.rank, self.ranks)
        found = None if resume is None else resuming.find(self.checkpoints, resume)
        if found:
            resuming.load_state(self.state, found[0])
            if self.state.current[DATA] != data.fingerprint:
                raise DataError(f"--resume: data.train={config.data.train} isn't what the run in {found[0]} trained on")
            if config.trainer.save_best is None:  # nothing is compared with it any more
                self.state.current.pop(BEST, None)
        self.state.current[DATA] = data.fingerprint
        self.preprocessor = preprocessor
        self.processor = preprocessor.processor
        self.policy = Policy(
            load_model(config, self.device),
            config.rollout.temperature,
            media_token_ids(self.processor),
            config.model.attention,
            int(config.model.keep_logits_gb * 1e9),
            load_reference(config, self.device),
            config.perception.gradient if config.perception.on else None,
            config.robust.gradient,
            states=config.advantage.valued,
        )
        self.shared_prefix = config.trainer.shared_prefix and not self.policy.why_separate
        if config.trainer.shared_prefix and self.policy.why_separate and self.rank == 0:
            warnings.warn(f"every completion is a row of its own: {self.policy.why_separate}", stacklevel=2)
        self.deepspeed = start_deepspeed(self.policy, config)
        width = self.policy.model.config.text_config.hidden_size
        self.critic = Critic(config, width, self.device, self.state) if config.advantage.valued else None
        self.engine = create_engine(config, self.processor, self.policy.model)
        ahead = self.state.current.pop(AHEAD, [])
        self.ahead = Ahead(config, self.loader, self.engine, ahead) if config.rollout.ahead else None
        self.distrust: EngineError | None = None
        self.guidance = GuidanceConfig(**config.guidance.model_dump(exclude={"sign_transition"}))
        folder, self.step = found or (None, 0)
        if folder:
            resuming.load(self.deepspeed, folder)
        if found or config.lora.adapter:
            self.sync()
        self.keep_up()

    @property
    def checkpoints(self):
        return root_of(self.config)

    def run_step(self) -> StepResult:
        """One pass of the algorithm.

        Raises, on all ranks, what one rank's data or reward raises. The trainer is then as it was before the step.
        """
        clock, means, settled = Clock(), Means(), self.state.settled
        try:
            self.keep_up()
            self.refresh(means, clock)
            groups = self.roll_out(means, clock)  # x' = T(x), z, o_1..o_G, r, A
            groups = with_replayed(groups, self.state, self.config, self.step, means)
            self.engine.sleep()
            if self.config.kl.in_reward:
                groups = self.penalised(groups, means, clock)
            with clock("train"):
                traces = self.update(groups, means, clock)  # u_out, u_per, A^, the clipped surrogate
        except FAILURES:  # no weight has changed yet
            self.state.settled = settled
            raise
        if self.config.sampling.remembers:
            self.state.current[SCORES] = remembered(self.state.current.get(SCORES), len(self.loader.samples), groups)
        traces = bring_home(traces, self.rank)
        groups = [
            replace(group, traces=tuple(traces.get(Place(number, i, self.rank)) for i in range(len(group.completions))))
            for number, group in enumerate(groups)
        ]
        remember(groups, self.state, self.config, self.step, means)
        self.step += 1
        if self.ahead:
            with clock("rollout"):
                self.ahead.meet()  # of the step to come: its weights must not change under it
        with clock("sync"):
            self.sync()
            self.check_sync(groups[0].item, means)
        tally(groups, means)
        return StepResult(self.step_metrics(means, clock), groups)

    def refresh(self, means: Means, clock: Clock) -> None:
        """Measure all samples anew, where `sampling` asks for it before this step, and let the loader know.

        Also where nothing was measured yet: a run may be resumed with such sampling that began without.
        """
        settings = self.config.sampling
        if settings.refreshes(self.step) or (settings.measures and SCORES not in self.state.current):
            with clock("refresh"):
                self.state.current[SCORES] = refreshed(self.engine, self.loader, self.step, means)
            self.state.settle()

    def step_metrics(self, means: Means, clock: Clock) -> dict[str, float]:
        """The step's means over all ranks, seconds a phase, and all ranks' tokens in those of the slowest one."""
        metrics = means.over_ranks() | {"lr": self.deepspeed.get_lr()[0]} | clock.over_ranks()
        metrics |= {"memory_gb": peak_memory(), "memory_gb_limit": memory_limit()}
        if RIGHT in metrics and WRONG in metrics:
            metrics["calibration_gap"] = metrics[WRONG] - metrics[RIGHT]  # CDE's: a calibrated policy doubts its errors
        sums = {"verifier_failures": float(verifier.take_failures())}
        sums["generated_tokens"] = means["tokens"].total + means[TOKENS].total
        sums["trained_tokens"] = means["trained_share"].total
        if self.config.sampling.kind == "variance":
            sums[TOKENS] = means[TOKENS].total
        metrics |= distributed.total(sums, self.device)
        mine = {"rollout": means["tokens"].total, "train": means["trained_share"].total}
        for phase, tokens in distributed.total(mine, self.device).items():
            during = AHEAD if self.ahead and phase == "rollout" else phase
            slowest = f"time/{during}_slowest" if self.ranks > 1 else f"time/{during}"
            metrics[f"throughput/{phase}"] = tokens / metrics[slowest]
        return metrics

    def roll_out(self, means: Means, clock: Clock) -> list[Group]:
        """This rank's judged groups of the step; what dynamic sampling doesn't train on has nothing kept."""
        config, chosen = self.config, None
        if self.ahead:
            groups = self.ahead.groups(self.step, self.judge, means, clock)
        elif config.rollout.rounds == 1:
            groups = self.rolled_out(0, means, clock)
        else:
            groups, chosen = dynamic_sampling(lambda number: self.rolled_out(number, means, clock), config, means)
        return scaled_over_step(groups, config, chosen)

    def rolled_out(self, number: int, means: Means, clock: Clock) -> list[Group]:
        """This rank's judged groups of a round of the step; raises, on all ranks, what of `FAILURES` one meets."""
        # Apart from the rollout: ranks that share an engine would wait in it for one that has failed here.
        with distributed.together(*FAILURES, meeting=clock.waiting), clock("data"):
            items = self.loader.items(self.step, number) if number else self.loader.load_ahead(self.step)
            means.add("broken_share", sum(item.skipped for item in items), len(items))
        with distributed.together(*FAILURES, meeting=clock.waiting):
            with clock("rollout"):
                generated = generate(self.engine, self.config, items, self.step)
            with clock("reward"):
                return self.judge(generated)

    def judge(self, groups: list[Group]) -> list[Group]:
        """The groups with their scores and advantages, from all G completions of each."""
        samples = [group.item.prompt.sample for group in groups]
        completions = [group.completions for group in groups]
        places = [(self.step, group.item.number, group.view == NOISY) for group in groups]
        sampling = of_rollouts(self.config)
        scores = score_groups(self.engine, self.preprocessor, self.config, samples, completions, places, sampling)
        return [
            judged(group, curious(group, found, self.config, self.step), self.config)
            for group, found in zip(groups, scores, strict=True)
        ]

    def update(self, groups: list[Group], means: Means, clock: Clock) -> dict[Place, Trace]:
        """`trainer.updates` optimizer updates, each on its share of the step's prompts.

        Returns the traces of the completions that went through a forward here, of other ranks' too. Raises `DataError`,
        on all ranks, before anything changes.
        """
        config, traces = self.config, {}
        if config.trainer.shuffle:
            updates = shuffled(groups, config, self.step, means, clock)
        else:
            updates = in_updates(groups, config.trainer.updates)
        with clock("pack"):
            packed = [self.micro_batches(part, groups[0], means, clock) for part in updates]
        if needs_look(config, len(updates)):
            with clock("old"):
                packed = [self.looked_at(batches, means, several=len(updates) > 1) for batches in packed]
        sign = branch.bonus_sign(self.step, config.trainer.steps, config.guidance.sign_transition)
        for number, (part, batches) in enumerate(zip(updates, packed, strict=True)):
            lengths = kept_lengths(part.values())
            items = {"token-mean": sum(lengths), "sequence-mean": len(lengths)}
            items["constant"] = len(lengths) * config.rollout.max_tokens
            weight = float(items[config.loss.aggregation])
            # Of all ranks: with a divisor of its own, a rank with fewer tokens would weigh more. 1 where none has any.
            mine = {"weight": weight, "pairs": float(self.critic.pairs(lengths) if self.critic else 0)}
            totals = distributed.total(mine, self.device)
            divisor, pairs = totals["weight"] or 1.0, totals["pairs"] or 1.0
            coef, told = entropy_coef(self.state, config.loss), Means()
            for i, batch in enumerate(batches):
                self.deepspeed.set_gradient_accumulation_boundary(i == len(batches) - 1)
                batch = batch.to(self.device)  # here, so that a GPU holds the pixels of one micro-batch
                with clock("forward"):
                    stats = self.deepspeed(batch, refers=config.kl.in_loss)
                    traces |= traced(batch, stats)
                    means.add_all(uncertainties(batch, stats, measuring=config.trainer.measures(self.step)))
                    signals = self.signals(batch, stats)
                    loss, metrics = objective(
                        batch,
                        signals,
                        config.loss,
                        self.guidance,
                        sign,
                        first=number == 0,
                        entropy_coef=coef,
                        kl=config.kl,
                        perception=config.perception,
                        robust=config.robust,
                    )
                    means.add_all(metrics)
                    told.add_all(metrics)
                    if self.critic and stats.hidden is not None:
                        means.add_all(self.critic.learn(batch, stats.hidden, pairs))
                with clock("backward"):
                    # DeepSpeed averages gradients over the ranks; this loss is one summand of the global mean.
                    self.deepspeed.backward(loss * (self.ranks / divisor))
                weight -= float(batch.weights.sum())
                means.add("trained_share", int((batch.weights > 0).sum()), 0)
            with clock("update"):
                norm = self.apply()
                if self.critic:
                    self.critic.step()
            steer_entropy(self.state, config.loss, told)
            means.add("loss", 0.0, weight)  # of what went through no forward: its loss is 0
            means.add("trained_share", 0.0, sum(lengths))
            self.check_gradient(norm, means)
        return traces

    def penalised(self, groups: list[Group], means: Means, clock: Clock) -> list[Group]:
        """The groups with the KL to the reference in their rewards, which takes a forward of every completion.

        Raises `DataError` as `update`.
        """
        count, alone = self.config.rollout.n, self.config.rollout.rounds == 1
        whole = {
            number: replace(group, kept=(True,) * count, paid=(False,) * count, advantages=(1.0,) * count)
            for number, group in enumerate(groups)
            if alone or any(group.kept)
        }
        with clock("reference"):
            batches = self.micro_batches(whole, groups[0], Means(), clock)
            traces = referred(self.deepspeed, batches, self.config, self.device, means)
            traces = bring_home(traces, self.rank)
        groups = [
            penalised(group, [traces[Place(number, i, self.rank)] for i in range(count)], self.config)
            if number in whole
            else group
            for number, group in enumerate(groups)
        ]
        chosen = None if alone else {group.item.number for group in whole.values()}
        return scaled_over_step(groups, self.config, chosen)

    def signals(self, batch: Batch, stats: TokenStats) -> Signals:
        """What the loss reads of the batch's tokens."""
        return read_signals(stats, batch.noisy, batch.paid, **self.config.uncertainty.model_dump())

    def looked_at(self, batches: list[Batch], means: Means, *, several: bool) -> list[Batch]:
        """An update's batches with what has to be known of them before it (`vogue.step.forwards`)."""
        measuring = self.config.trainer.measures(self.step)
        given = self.deepspeed, self.signals, batches, self.config, self.device
        valued = partial(self.critic.advantages, step=self.step, means=means) if self.critic else None
        return looked_at(*given, several=several, measuring=measuring, valued=valued)

    def micro_batches(self, groups: dict[int, Group], some: Group, means: Means, clock: Clock) -> list[Batch]:
        """This rank's share of an update's rows, whoever generated them (`vogue.step.balance`); `groups` are its own.

        Micro-batches with compared rows come first, as many on every rank and in the same order. Every rank has to take
        part in as many forwards of each kind as the others, and has `some` group for it.
        """
        config = self.config
        own = rows(groups, config, self.step, self.shared_prefix, self.rank)
        with clock.waiting():
            loads = all_loads(own, self.rank)
        shares = deal([load for part in loads for load in part], config.trainer.micro_batch_tokens, self.ranks)
        if self.ranks > 1:
            means.add("balance", *balance(shares))
        items = [groups[row.places[0].group].item for row in own]
        taken = exchange(shares, own, items, self.loader, self.step, clock)
        taken |= {load: own[load.number] for load in loads[self.rank]}
        views, degraded = compared_views(config, self.step, RAW), len(config.robust.views)
        taken |= {load: idle_row(some, views if load.others else (), degraded) for load in (IDLE, IDLE_COMPARED)}
        pad_id, token_mean = self.processor.tokenizer.pad_token_id, config.loss.aggregation != "sequence-mean"
        filled = ([taken[load] for load in micro_batch] for micro_batch in shares[self.rank])
        return [collate(micro_batch, pad_id, token_mean=token_mean) for micro_batch in filled]

    def apply(self) -> float:
        """Apply the update of the summed gradients; returns their norm, which is of all ranks."""
        if self.deepspeed.zero_optimization_stage() == 0 and self.config.model.dtype == "float32":
            # Here DeepSpeed neither tells the norm nor looks whether it is finite.
            norm = float(get_total_norm([p.grad for p in self.policy.model.parameters() if p.grad is not None]))
            if not isfinite(norm):
                raise FloatingPointError(
                    f"step {self.step}: the gradient isn't finite, and ZeRO's stage 0 would apply it. Stage 1 leaves "
                    "such an update out: trainer.deepspeed.zero_optimization.stage=1"
                )
            self.deepspeed.step()
            return norm
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def check_gradient(self, norm: float, means: Means) -> None:
        """Add the update's norm, which is of all ranks; raises FloatingPointError after too many that aren't finite.

        DeepSpeed doesn't apply such an update, which one odd batch may cause.
        """
        skipped = 0 if isfinite(norm) else self.state.current.get("skipped_updates", 0) + 1
        self.state.current["skipped_updates"] = skipped  # in a row
        means.add("skipped_updates", skipped > 0)
        if not skipped:
            means.add("grad_norm", norm)
        if skipped == MOST_SKIPPED:
            raise FloatingPointError(
                f"step {self.step}: the gradient wasn't finite in {MOST_SKIPPED} updates in a row, none of which was "
                "applied. Start again from model.path=an earlier checkpoint's hf folder, with a smaller optimizer.lr"
            )

    def sync(self) -> None:
        """Give the rollout engine the policy's weights; its version is the number of steps they have seen."""
        self.engine.load_weights(gathered_weights(self.policy.model), self.step)
        if self.engine.version != self.step:
            raise RuntimeError(f"the rollout engine has weights of step {self.engine.version}, not of {self.step}")

    def keep_up(self) -> None:
        """Give the weights again to a server that has restarted; raises `EngineError` for what `check_sync` found."""
        if self.distrust:
            raise self.distrust
        if not self.engine.up_to_date():
            self.sync()

    def check_sync(self, item: Item, means: Means) -> None:
        """Hold log-probabilities of every server to the policy's, on a prompt.

        If they aren't the same `keep_up` says so, and not the step, which is done: what it has found is written first.
        """
        if self.config.rollout.engine == "server":
            given = (self.config, self.step, self.device, self.processor.tokenizer.pad_token_id)
            found = mismatch(cast(Servers, self.engine), self.deepspeed, item, *given)
            means.add("mismatch/sync", found)
            self.distrust = doubt(found, self.config, self.step)

    def evaluate(self, samples: Sequence[Sample]) -> list[Judged]:
        """Judge `samples` with the rollout engine's weights, shared over the ranks; every rank gets all results."""
        self.keep_up()
        numbers = range(self.rank, len(samples), self.ranks)  # in turns, since neighbours are often of one kind
        mine: list[Judged] = []
        for start in range(0, -(-len(samples) // self.ranks), CHUNK):  # as many on every rank: some share an engine
            chunk = numbers[start : start + CHUNK]
            part = [samples[i] for i in chunk]
            with distributed.together(*FAILURES):
                requests = requests_for(self.preprocessor, self.config, part, chunk)
            with distributed.together(*FAILURES):
                mine += judge(self.engine, self.preprocessor, self.config, part, requests, chunk)
        # Not the samples: every rank has them, and their images may be large.
        parts = distributed.gather([(judged.completions, judged.scores) for judged in mine], Completion, Score)
        found = (parts[i % self.ranks][i // self.ranks] for i in range(len(samples)))
        return [Judged(sample, *one) for sample, one in zip(samples, found, strict=True)]

    def save(self) -> Path:
        """Write a checkpoint of all ranks; returns its folder."""
        with self.ahead.saved_in(self.state, self.step) if self.ahead else nullcontext():
            run = checkpoint.Run(self.deepspeed, self.policy.model, self.processor, self.state, self.config, self.step)
            return checkpoint.save(run)
