"""The training loop: VOGUE's Algorithm 1 (arXiv 2510.01444) on DeepSpeed and a rollout engine.

One step:

    x' = T(x);  z ~ Bernoulli(max(0, 1 - s/s_total))           which branch, drawn before the rollout
    o_1..o_G ~ pi(. | x or x', text)                           only the drawn branch is generated
    A = (r - mean r) / std r                                   in the group of one branch
    u_out = H(pi),  u_per = (KL(p||q) + KL(q||p)) / 2          per token, exact, without gradient
    A^ = A + min(|A|/beta_o, alpha_o u_out) + z min(|A|/beta_p, alpha_p u_per)
    ascend min(r A^, clip(r, 1 - low, 1 + high) A^)            r = pi / pi_old

Rows of the raw branch need one forward; rows of the noisy branch a second one, without gradient, on the raw image.
"""

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import deepspeed
import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoModelForImageTextToText

from vogue import branch, checkpoint, distributed
from vogue.advantage import group_advantages
from vogue.config import Config, ConfigError
from vogue.data import DataError, Sample
from vogue.evaluate import Judged, judge, pass_at_k
from vogue.inputs import Preprocessor, Prompt, View
from vogue.metrics import Clock, Sums, peak_memory
from vogue.packing import Batch, Row, collate, deal, pack, spread
from vogue.perturb import perturb
from vogue.policy import Policy
from vogue.rewards import Score, verifier
from vogue.rewards.groups import score_groups
from vogue.rollout import Completion, Request, create_engine, media_token_ids
from vogue.seeds import Purpose, rng_for, seed_for
from vogue_kernels import BranchStats, GuidanceConfig, LogprobStats, clipped_surrogate, shaped_advantage

NOISY_COST = 4 / 3  # of training on a noisy group, in that of a raw one: it adds a forward without gradient


@dataclass(frozen=True)
class Item:
    """Prompt `number` of a step: `raw` and `noisy` views, and which of its G completions train on the noisy branch."""

    number: int
    prompt: Prompt
    raw: View
    noisy: View | None
    draws: tuple[bool, ...]


@dataclass(frozen=True)
class Group:
    """G completions of one item from one branch, scored; `kept` are those the draw trains on."""

    item: Item
    noisy: bool
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]
    advantages: tuple[float, ...]
    kept: tuple[bool, ...]


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
        model = config.model
        self.policy = Policy(
            AutoModelForImageTextToText.from_pretrained(
                model.path,
                dtype=model.dtype,
                attn_implementation="sdpa" if model.attention in ("auto", "flex_attention") else model.attention,
            ),
            config.rollout.temperature,
            media_token_ids(self.processor),
            model.attention,
        )
        self.shared_prefix = config.trainer.shared_prefix and not self.policy.why_separate
        if config.trainer.shared_prefix and self.policy.why_separate and self.rank == 0:
            warnings.warn(f"every completion is a row of its own: {self.policy.why_separate}", stacklevel=2)
        self.engine = _deepspeed_engine(self.policy, config)
        tied = self.policy.model.config.tie_word_embeddings
        self.rollout = create_engine(config, self.processor, tied)
        self.guidance = GuidanceConfig(**config.guidance.model_dump(exclude={"divergence"}))
        self.step = 0
        self._background = ThreadPoolExecutor(max_workers=1)
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
        clock = Clock()
        with clock("data"):
            items = self.items_ahead()
        with clock("rollout"):
            groups = self.generate(items)
        with clock("reward"):
            groups = self.judge(groups)
        sums = Sums()
        with clock("train"):
            self.update(groups, sums, clock)
        self.step += 1
        with clock("sync"):
            self.sync()
        _count(groups, sums)
        sums.add("verifier_failures", verifier.failures)
        metrics = sums.means(self.device)
        metrics["lr"] = self.engine.get_lr()[0]
        metrics |= {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        tokens = distributed.total({"tokens": float(sum(_lengths(groups)))}, self.device)["tokens"]
        metrics["throughput/rollout"] = tokens / clock.seconds["rollout"]
        metrics["throughput/train"] = tokens / clock.seconds["train"]
        metrics["memory_gb"] = peak_memory()
        return metrics, groups

    # ------------------------------------------------------------------------------------------------ rollout

    def items_ahead(self) -> list[Item]:
        """`items` of this step; those of the next one are loaded and perturbed from now on, while this one trains."""
        step, ahead = self._ahead or (None, None)
        items = ahead.result() if step == self.step else self.items(self.step)
        self._ahead = None
        if self.step + 1 < self.config.trainer.steps:
            self._ahead = self.step + 1, self._background.submit(self.items, self.step + 1)
        return items

    def items(self, step: int) -> list[Item]:
        """This rank's prompts of `step`, perturbed where the draw asks for it; a function of the step alone."""
        rollout = self.config.rollout
        p = branch.noisy_probability(step, self.config.trainer.steps, self.config.branch.probability)
        draws = branch.draw(
            self.config.branch.granularity,
            rollout.prompts,
            rollout.n,
            p,
            seed_for(self.config.seed, Purpose.BRANCH),
            step,
        )
        order = sample_order(len(self.samples), step * rollout.prompts, rollout.prompts, self.config.seed)
        costs = [self.lengths[i] * (NOISY_COST if drawn.any() else 1) for i, drawn in zip(order, draws, strict=True)]
        size = rollout.prompts // self.config.trainer.updates
        mine = [
            start + i
            for start in range(0, rollout.prompts, size)  # an update's prompts, shared by all ranks
            for i in deal(costs[start : start + size], self.ranks)[self.rank]
        ]
        return [self.item(self.samples[order[i]], step, i, tuple(draws[i].tolist())) for i in mine]

    def item(self, sample: Sample, step: int, number: int, draws: tuple[bool, ...]) -> Item:
        images, settings = sample.load_images(), self.config.perturb
        seeds = (seed_for(self.config.seed, Purpose.PERTURB, step, number, i) for i in range(len(images)))
        try:
            raw, noisy = self.preprocessor.view(images), None
            if any(draws):
                copies = zip(images, seeds, strict=True)
                noisy = self.preprocessor.view(
                    [perturb(x, settings.preset, settings.sigma, seed) for x, seed in copies]
                )
        except (OSError, ValueError) as error:
            raise DataError(f"{sample.place}: {error}") from error
        return Item(number, self.preprocessor.prompt(sample, raw), raw, noisy, draws)

    def generate(self, items: list[Item]) -> list[Group]:
        """Groups of every branch that a draw asks for, unscored. Both, where draws are per response and differ."""
        wanted = [(item, noisy) for item in items for noisy in (False, True) if noisy in item.draws]
        requests = []
        for item, noisy in wanted:
            seed = seed_for(self.config.seed, Purpose.ROLLOUT, self.step, item.number, noisy)
            requests.append(Request(item.prompt, (item.noisy if noisy else item.raw).images, seed))
        rollout = self.config.rollout
        outputs = self.rollout.generate(requests, rollout.n, rollout.max_tokens, rollout.temperature)
        return [
            Group(item, noisy, tuple(completions), (), (), tuple(draw == noisy for draw in item.draws))
            for (item, noisy), completions in zip(wanted, outputs, strict=True)
        ]

    def judge(self, groups: list[Group]) -> list[Group]:
        """Scores and group-relative advantages, from all G completions of each branch."""
        samples = [group.item.prompt.sample for group in groups]
        completions = [group.completions for group in groups]
        places = [(self.step, group.item.number, group.noisy) for group in groups]
        scores = score_groups(self.rollout, self.preprocessor, self.config, samples, completions, places)
        return [_judged(group, found) for group, found in zip(groups, scores, strict=True)]

    # ----------------------------------------------------------------------------------------------- training

    def update(self, groups: list[Group], sums: Sums, clock: Clock) -> None:
        """`trainer.updates` optimizer updates, each on its share of the step's prompts."""
        with clock("pack"):
            parts = [self.batches(part) for part in _split(groups, self.config.trainer.updates)]
        if len(parts) > 1:
            with clock("old"), torch.no_grad():
                parts = [[replace(batch, old=self.read(self.engine(batch))) for batch in part] for part in parts]
        for number, batches in enumerate(parts):
            weight = distributed.total({"w": sum(float(b.weights.sum()) for b in batches)}, self.device)["w"]
            for i, batch in enumerate(batches):
                self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
                with clock("forward"):
                    logprob, entropy, divergence = self.read(self.engine(batch))
                    loss = self.loss(batch, logprob, entropy, divergence, sums, first=number == 0)
                with clock("backward"):
                    # DeepSpeed averages gradients over the ranks; this loss is one summand of the global mean.
                    self.engine.backward(loss * (self.ranks / weight))
            with clock("update"):
                self.engine.step()
            sums.add("grad_norm", float(self.engine.get_global_grad_norm() or 0.0))

    def batches(self, groups: list[Group]) -> list[Batch]:
        """Micro-batches, noisy rows first, as many on every rank and in the same order."""
        rows = [row for group in groups for row in self.rows(group)]
        noisy = [row for row in rows if row.noisy]
        raw = [row for row in rows if not row.noisy]
        packed = [pack(part, self.config.trainer.micro_batch_tokens) for part in (noisy, raw)]
        counts = distributed.largest([len(part) for part in packed], self.device)
        token_mean = self.config.loss.aggregation == "token-mean"
        filled = []
        for part, count, is_noisy in zip(packed, counts, (True, False), strict=True):
            filler = rows[0]
            filler = replace(filler, other=(filler.other or filler.view) if is_noisy else None)
            filled += spread(part, count, filler)
        pad_id = self.processor.tokenizer.pad_token_id
        return [collate(rows, pad_id, token_mean).to(self.device) for rows in filled]

    def rows(self, group: Group) -> list[Row]:
        """A group as one row, or as a row a completion where the model can't share the prompt."""
        drawn = zip(group.completions, group.advantages, group.kept, strict=True)
        kept = [(completion, advantage) for completion, advantage, keep in drawn if keep]
        view, other = (group.item.noisy, group.item.raw) if group.noisy else (group.item.raw, None)
        parts = [kept] if self.shared_prefix else [[pair] for pair in kept]
        return [Row(group.item.prompt, view, other, *zip(*part, strict=True)) for part in parts if part]

    def read(self, stats: BranchStats | LogprobStats) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability (with its gradient), and entropy and divergence (without) of the behaviour branch."""
        if isinstance(stats, LogprobStats):
            return stats.logprob, stats.entropy.detach(), None
        divergence = {
            "symmetric": stats.symmetric_kl,
            "forward": stats.kl_raw_noisy,
            "reverse": stats.kl_noisy_raw,
        }[self.config.guidance.divergence]
        return stats.logprob_noisy, stats.entropy_noisy.detach(), divergence.detach()

    def loss(
        self,
        batch: Batch,
        logprob: Tensor,
        entropy: Tensor,
        divergence: Tensor | None,
        sums: Sums,
        first: bool,
    ) -> Tensor:
        """Weighted sum of the tokens' losses; adds the batch's metrics to `sums`."""
        settings = self.config.loss
        old_logprob, old_entropy, old_divergence = batch.old or (logprob.detach(), entropy, divergence)
        noisy = torch.full_like(batch.targets, divergence is not None, dtype=torch.bool)
        shaped = shaped_advantage(batch.advantages, old_entropy, old_divergence, noisy, self.guidance)
        token_loss, clipped = clipped_surrogate(
            logprob, old_logprob, shaped.advantage, settings.clip_low, settings.clip_high
        )
        mismatch = old_logprob - batch.rollout_logprob
        if settings.importance_cap is not None:
            token_loss = token_loss * mismatch.exp().clamp(max=settings.importance_cap)
        real = batch.weights > 0
        sums.add_tokens(
            real,
            {
                "entropy": entropy,
                "clip_fraction": clipped,
                "mismatch/logprob": mismatch.abs(),
                "mismatch/kl": mismatch.expm1() - mismatch,
            }
            | ({"u_per": divergence} if divergence is not None else {})
            | ({"ratio_error": (logprob.detach() - old_logprob).expm1().abs()} if first else {}),
        )
        # Where A is 0 every bonus is, and says nothing about the caps.
        sums.add_tokens(
            real & (batch.advantages != 0),
            {"out_capped": shaped.out_capped} | ({"per_capped": shaped.per_capped} if divergence is not None else {}),
        )
        sums.add_sum("loss", float((batch.weights * token_loss.detach()).sum()), float(batch.weights.sum()))
        return (batch.weights * token_loss).sum()

    # ----------------------------------------------------------------------------------- weights and evaluation

    def sync(self) -> None:
        """Give the rollout engine the policy's weights; its version is the number of steps they have seen."""
        self.rollout.load_weights(checkpoint.gathered_weights(self.policy.model), self.step)
        if self.rollout.version != self.step:
            raise RuntimeError(f"the rollout engine has weights of step {self.rollout.version}, not of {self.step}")

    def evaluate(self, samples: list[Sample], n: int) -> list[Judged]:
        """Judge `samples` with the rollout engine's weights, shared over the ranks; every rank gets all results."""
        size = -(-len(samples) // self.ranks)
        first = self.rank * size
        mine = judge(self.rollout, self.preprocessor, self.config, samples[first : first + size], n, first)
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


def sample_order(size: int, start: int, count: int, seed: int) -> list[int]:
    """Indices of samples number `start` to `start + count` of an endless sequence of shuffled epochs."""
    order: list[int] = []
    epoch, offset = divmod(start, size)
    while len(order) < count:
        shuffled = rng_for(seed, Purpose.DATA, epoch).permutation(size)
        order += shuffled[offset : offset + count - len(order)].tolist()
        epoch, offset = epoch + 1, 0
    return order


def _judged(group: Group, scores: tuple[Score, ...]) -> Group:
    advantages = group_advantages(torch.tensor([[score.reward for score in scores]]))[0]
    return replace(group, scores=scores, advantages=tuple(advantages.tolist()))


def _split(groups: list[Group], parts: int) -> list[list[Group]]:
    """Groups by prompt into `parts` of equally many prompts."""
    prompts = list(dict.fromkeys(id(group.item) for group in groups))
    size = len(prompts) // parts
    number = {item: i // size for i, item in enumerate(prompts)}
    return [[group for group in groups if number[id(group.item)] == part] for part in range(parts)]


def _lengths(groups: list[Group]) -> list[int]:
    return [len(completion.token_ids) for group in groups for completion in group.completions]


def _count(groups: list[Group], sums: Sums) -> None:
    """Metrics of groups and completions."""
    for group in groups:
        scores = group.scores
        right = sum(score.accuracy == 1 for score in scores)
        sums.add("solved_share", right == len(scores))
        sums.add("mixed_share", 0 < right < len(scores))
        sums.add("distinct_answers", len({score.parsed for score in scores}))
        sums.add("pass_at_n", pass_at_k(len(scores), right, len(scores)))
        for score, completion, kept in zip(scores, group.completions, group.kept, strict=True):
            sums.add("reward", score.reward)
            sums.add("accuracy", score.accuracy)
            sums.add("format", score.format)
            for name, value in score.components.items():
                sums.add(f"reward/{name}", value)
            sums.add("finished", completion.finished)
            sums.add("tokens", len(completion.token_ids))
            if kept:
                sums.add("noisy_share", group.noisy)


def _check_split(config: Config, ranks: int) -> None:
    per_update = config.rollout.prompts // config.trainer.updates
    if per_update % ranks:
        raise ConfigError(
            f"rollout.prompts / trainer.updates = {per_update} prompts an update can't be shared by {ranks} ranks"
        )


def _deepspeed_engine(policy: Policy, config: Config):
    settings, model = config.optimizer, config.model
    if model.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()  # transformers ignores it in a model that isn't training
    if model.freeze_vision:
        getattr(policy.model.model, policy.family.tower).requires_grad_(False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, settings.betas, weight_decay=settings.weight_decay)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: min(1.0, (update + 1) / (settings.warmup_steps + 1))
    )
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": model.dtype == "bfloat16"},
    }
    deepspeed_config = OmegaConf.to_container(OmegaConf.merge(deepspeed_config, config.trainer.deepspeed))
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, lr_scheduler=warmup, config=deepspeed_config)
    return engine
