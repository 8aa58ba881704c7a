r"""VOGUE in TRL: a `GRPOTrainer` that draws a branch for each prompt and trains TRL's own loss on shaped advantages.

    Â = A + min(|A| / β_out, α_out u_out) + z min(|A| / β_per, α_per u_per)        arXiv 2510.01444
    z ~ Bernoulli(max(0, 1 − s / s_total)), one draw a prompt; p = π(·|x) and q = π(·|T(x))
    u_out = H of the branch that is trained, u_per = ½ (KL(p‖q) + KL(q‖p)), exact over the vocabulary

Everything else is TRL's: models, rollouts, rewards, `loss_type`, importance sampling, logs, checkpoints. With both
α = 0 the loss is GRPOTrainer's. TRL's fused head gives the log-probability and the entropy of one branch; the head here
takes its place in the model's forward, because the divergences need the hidden states of both branches at once.

It is written for TRL 1.16, which the extra `dev` installs.
"""

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import is_peft_model
from PIL.Image import Image
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from vogue.method import branch
from vogue.method.perturb import perturb
from vogue.seeds import Purpose, seed_for
from vogue_kernels import IGNORE, GuidanceConfig, linear_branch_stats, linear_logprob, shaped_advantage

NOT_THE_MODELS = ("num_images", "num_tiles", "compute_entropy", "compute_aux_loss")  # TRL's arguments, not a model's


@dataclass
class VogueConfig(GRPOConfig):
    """TRL's settings and VOGUE's. Raises ValueError for a value that can't be used."""

    alpha_out: float = field(default=0.4, metadata={"help": "Advantage per nat of entropy; 0 switches the bonus off."})
    alpha_per: float = field(
        default=1.0, metadata={"help": "Advantage per nat of divergence between the images; 0 switches the bonus off."}
    )
    beta_out: float = field(default=2.0, metadata={"help": "The entropy's bonus is at most |A| / beta_out."})
    beta_per: float = field(default=2.0, metadata={"help": "The divergence's bonus is at most |A| / beta_per."})
    branch_rollout: str = field(
        default="raw",
        metadata={
            "help": "Image that drawn prompts are generated from and trained on: 'raw' (the authors' code) or 'drawn', "
            "the perturbed one (the paper's Algorithm 1)."
        },
    )
    branch_probability: float | None = field(
        default=None, metadata={"help": "Probability that a prompt is drawn; unset, it falls from 1 to 0 over the run."}
    )
    perturb_preset: str = field(default="noise", metadata={"help": "'noise', or 'paper' with flips and rotations too."})
    perturb_sigma: float = field(default=0.4, metadata={"help": "Standard deviation of the noise on pixels in [0, 1]."})

    def __post_init__(self):
        super().__post_init__()
        for name, known in {"branch_rollout": ("raw", "drawn"), "perturb_preset": ("noise", "paper")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.branch_probability is not None and not 0 <= self.branch_probability <= 1:
            raise ValueError(f"branch_probability is {self.branch_probability}; it must be from 0 to 1")
        self.guidance()

    def guidance(self) -> GuidanceConfig:
        return GuidanceConfig(self.alpha_out, self.beta_out, self.alpha_per, self.beta_per)


class OtherView(NamedTuple):
    """The other image of some rows of a batch, as the model's own inputs."""

    rows: list[int]  # ascending
    inputs: dict[str, Tensor]  # (len(rows), …)


@dataclass
class BranchOutput(FusedCausalLMOutput):
    """TRL's output, and the divergence where two branches were compared."""

    symmetric_kl: Tensor | None = None  # (B, L − 1) nats, without gradient; 0 where nothing was compared


class VogueTrainer(GRPOTrainer):
    """TRL's GRPOTrainer for VOGUE; takes its arguments, with `args` a `VogueConfig`.

    It logs, beside TRL's metrics, `paid_share` (of completions whose u_per is paid), `u_per` (nats, of their tokens),
    `per_capped` (of them) and `out_capped` (of all): the shares of tokens whose bonus is at its cap.

    Raises TypeError without a VogueConfig; ValueError for what the head can't do (`add_branch_head`), for tools and
    environments, whose images have no second view, and for a router's auxiliary loss.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "vogue"]
    _name = "VOGUE"
    # What TRL's trainer has at these names; it declares wider types.
    args: VogueConfig
    model: Any
    accelerator: Any
    processing_class: Any
    chat_template_kwargs: dict[str, Any]
    num_generations: int

    def __init__(self, model, reward_funcs, args: VogueConfig, **kwargs):
        if not isinstance(args, VogueConfig):
            raise TypeError(f"args must be a VogueConfig, got {type(args).__name__}")
        for name in ("tools", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{name}: an image that comes in mid-completion has no perturbed view")
        super().__init__(model, reward_funcs, args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError("the model's router has an auxiliary loss; set router_aux_loss_coef=0 to train without it")
        self.guidance = args.guidance()
        self._micro_batch: dict[str, Any] | None = None  # while its loss is computed
        add_branch_head(self.model.get_base_model() if is_peft_model(self.model) else self.model, self.temperature)

    def _generate_and_score_completions(self, inputs):
        """TRL's, on the images that were drawn; a batch of which something is drawn gets the other images too."""
        if not self.model.training:  # evaluation sees the images as they are
            return super()._generate_and_score_completions(inputs)
        drawn, numbers, step = self._draws(len(inputs))
        if not drawn.any():  # on any rank
            self._metrics["train"]["paid_share"].append(0.0)
            return super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        raw = [_images(row) for row in inputs]
        paid = [bool(drawn[first + i]) and bool(images) for i, images in enumerate(raw)]
        noisy = [
            self._perturbed(images, step, number) if z else images
            for images, z, number in zip(raw, paid, numbers[first:], strict=False)
        ]
        seen, other = (noisy, raw) if self.args.branch_rollout == "drawn" else (raw, noisy)
        batch = super()._generate_and_score_completions(_with_images(inputs, seen))
        if "pixel_values" in batch:
            pixels = self._pixel_values(_with_images(inputs, other), other)
            if pixels.shape != batch["pixel_values"].shape:
                raise ValueError(
                    f"the other images' pixel_values have shape {tuple(pixels.shape)}, not those of the images that "
                    f"are trained on, {tuple(batch['pixel_values'].shape)}: this processor's output depends on pixels"
                )
            batch["other_pixel_values"] = split_pixel_values_by_grid({**batch, "pixel_values": pixels})["pixel_values"]
        batch["paid"] = torch.tensor(paid, device=self.accelerator.device)
        self._metrics["train"]["paid_share"].append(self.accelerator.gather(batch["paid"]).float().mean().item())
        return batch

    def _draws(self, rows: int) -> tuple[Tensor, list[int], int]:
        """z of all ranks' rows, the prompt's number of each, and the number of this generation in the run.

        They are functions of the seed and of where the run stands, so that a resumed run draws the same, and every rank
        knows whether any of them compares two branches.
        """
        accumulation, generations = self.args.gradient_accumulation_steps, self.num_generations
        step = self.state.global_step * accumulation + self._step % accumulation
        probability = branch.noisy_probability(
            self.state.global_step, self.state.max_steps, self.args.branch_probability
        )
        prompts = self.accelerator.num_processes * rows // generations
        seed = seed_for(self.args.seed, Purpose.BRANCH)
        drawn = branch.draw("prompt", prompts, generations, probability, seed, step).flatten()
        return drawn, [row // generations for row in range(len(drawn))], step

    def _perturbed(self, images: Sequence[Image], step: int, number: int) -> list[Image]:
        seeds = [seed_for(self.args.seed, Purpose.PERTURB, step, number, i) for i in range(len(images))]
        preset, sigma = self.args.perturb_preset, self.args.perturb_sigma
        return [perturb(image, preset, sigma, seed) for image, seed in zip(images, seeds, strict=True)]

    def _pixel_values(self, inputs: list[dict[str, Any]], images: list[list[Image]]) -> Tensor:
        """What the processor makes of the prompts' images: the one input of a model that differs between two views."""
        texts = []
        for row, row_images in zip(inputs, images, strict=True):
            prompt = {"prompt": prepare_multimodal_messages(row["prompt"], images=row_images)}
            texts.append(apply_chat_template(prompt, self.processing_class, **self.chat_template_kwargs)["prompt"])
        processed = self.processing_class(images=images, text=texts, padding=True, return_tensors="pt")
        return processed["pixel_values"].to(self.accelerator.device)

    def _compute_loss(self, model, inputs):
        """TRL's own loss; its advantages are shaped as soon as it has asked for the tokens' statistics."""
        self._micro_batch = dict(inputs)
        try:
            return super()._compute_loss(model, self._micro_batch)
        finally:
            self._micro_batch = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """TRL's for the old policy and the reference; within the loss, those of both branches."""
        batch = self._micro_batch
        if batch is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        given = {name: value for name, value in kwargs.items() if value is not None and name not in NOT_THE_MODELS}
        labels = input_ids.masked_fill(attention_mask == 0, IGNORE)
        labels[:, :-logits_to_keep] = IGNORE
        other = _other_view(batch, text | given) if "other_pixel_values" in batch else None
        with self.accelerator.autocast():
            outputs = model(**text, **given, labels=labels, fused_lm_head=True, other=other)
        kept = slice(-logits_to_keep, None)
        self._shape_advantages(batch, outputs.entropy[:, kept], outputs.symmetric_kl[:, kept])
        return outputs.log_probs[:, kept], outputs.entropy[:, kept], None

    def _shape_advantages(self, batch: dict[str, Any], entropy: Tensor, u_per: Tensor) -> None:
        """Put Â (B, T) in the place of the batch's advantages (B,), and log the uncertainties."""
        advantages = batch["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        paid = batch.get("paid", torch.zeros(len(advantages), dtype=torch.bool, device=advantages.device))[:, None]
        shaped = shaped_advantage(advantages, entropy.detach(), u_per, paid, self.guidance)
        batch["advantages"] = shaped.advantage

        mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
        metrics = {
            "u_per": (u_per, mask & paid),
            "per_capped": (shaped.per_capped, mask & paid),
            "out_capped": (shaped.out_capped, mask),
        }
        sums = [torch.stack([value[where].float().sum(), where.sum()]) for value, where in metrics.values()]
        totals = self.accelerator.reduce(torch.stack(sums), reduction="sum")
        mode = "train" if self.model.training else "eval"
        for name, (total, count) in zip(metrics, totals.tolist(), strict=True):
            # TRL leaves NaN out of its means: a micro-batch in which nothing is paid says nothing of u_per.
            self._metrics[mode][name].append(total / count if count else float("nan"))


def add_branch_head(model: PreTrainedModel, temperature: float) -> None:
    """Let TRL's fused forward of `model` give the statistics of one or two branches, by `vogue_kernels`.

    `model(…, labels=labels, fused_lm_head=True, other=OtherView | None)` returns a `BranchOutput` whose fields are
    (B, L − 1) float32, 0 where the next label is -100. A batch without any label still has a gradient, of zeros. Any
    other call is the one that was there before, so that generating and saving stay as they are. temperature divides the
    logits. Call it before the model is wrapped by DDP or FSDP, and with PEFT on the base model.

    Raises ValueError for a model whose head has an adapter.
    """
    text_config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None or hasattr(head, "base_layer"):
        raise ValueError("the model has no head" if head is None else "the head has an adapter, which isn't supported")
    softcap = getattr(text_config, "final_logit_softcapping", None)
    _let_head_compare(head, temperature / _logit_scale(text_config), softcap)
    before = model.forward

    # The signature of the model's class: `generate` validates its keyword arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self, *args, fused_lm_head=False, labels: Tensor | None = None, other: OtherView | None = None, **kwargs
    ):
        if labels is None or not fused_lm_head:
            return before(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        targets, rows, view = labels[:, 1:], [], hidden[:0]
        if other is not None:
            with torch.no_grad():
                rows, view = other.rows, self.base_model(**other.inputs, use_cache=False).last_hidden_state[:, :-1]
        scored = targets != IGNORE
        compared = torch.zeros_like(scored)
        compared[rows] = scored[rows]
        alone = scored & ~compared
        # The head is called as a module, so that ZeRO-3 and FSDP gather its weight, in the backward pass too.
        stats = self.get_output_embeddings()(
            torch.cat([hidden[compared], hidden[alone]]),
            view[scored[rows]],
            torch.cat([targets[compared], targets[alone]]),
        )
        m = int(compared.sum())
        log_probs, entropy, symmetric_kl = (
            x.new_zeros(scored.shape).masked_scatter(compared, x[:m]).masked_scatter(alone, x[m:]) for x in stats
        )
        return BranchOutput(log_probs=log_probs, entropy=entropy, symmetric_kl=symmetric_kl, label_mask=scored)

    model.forward = types.MethodType(forward, model)


def _let_head_compare(head: nn.Module, temperature: float, softcap: float | None) -> None:
    """`head(hidden, other, targets)` gives statistics of the tokens; `head(hidden)` is the projection, as before."""
    projection = head.forward

    def forward(self, hidden: Tensor, other: Tensor | None = None, targets: Tensor | None = None):
        if other is None or targets is None:
            return projection(hidden)
        return _statistics(hidden, other, targets, self.weight, self.bias, temperature, softcap)

    head.forward = types.MethodType(forward, head)


def _statistics(
    hidden: Tensor,
    other: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and symmetric KL (N,) of tokens of which the first M have another branch, (M, D)."""
    m, parts = len(other), []
    if m:
        both = linear_branch_stats(hidden[:m], other, weight, targets[:m], bias, temperature, softcap=softcap)
        parts.append((both.logprob_p, both.entropy_p, both.symmetric_kl.detach()))
    if m < len(hidden) or not m:
        alone = linear_logprob(hidden[m:], weight, targets[m:], bias, temperature, softcap=softcap)
        parts.append((alone.logprob, alone.entropy, torch.zeros_like(alone.logprob)))
    logprob, entropy, symmetric_kl = map(torch.cat, zip(*parts, strict=True))
    return logprob, entropy, symmetric_kl


def _logit_scale(text_config) -> float:
    """What a model multiplies its logits by, under the names that model families have for it; 1 without any."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(text_config, name, None)) is not None:
            return scale
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def _other_view(batch: dict[str, Any], inputs: dict[str, Any]) -> OtherView:
    """The other images of the rows that are paid.

    Where none is paid, one row stands in for them: under ZeRO-3 and FSDP every rank must call the same modules.
    """
    counts = batch["num_images"]
    rows = batch["paid"].nonzero().flatten().tolist() or [counts.index(max(counts))]
    indexed = {"num_images": counts} | ({"num_tiles": batch["num_tiles"]} if "num_tiles" in batch else {})
    split = split_pixel_values_by_grid(inputs | indexed) | {"pixel_values": batch["other_pixel_values"]}
    chosen = {
        name: [value[i] for i in rows] if isinstance(value, list) else value[rows]
        for name, value in split.items()
        if name not in NOT_THE_MODELS
    }
    return OtherView(rows, unsplit_pixel_values_by_grid(chosen))


def _images(row: dict[str, Any]) -> list[Image]:
    """A row's images, from TRL's columns `images` or `image`."""
    if "images" in row:
        return list(row["images"] or [])
    return [row["image"]] if row.get("image") is not None else []


def _with_images(inputs: list[dict[str, Any]], images: list[list[Image]]) -> list[dict[str, Any]]:
    """The rows with other images in the same columns."""
    return [
        row | ({"images": mine} if "images" in row else {"image": mine[0]}) if mine else row
        for row, mine in zip(inputs, images, strict=True)
    ]
