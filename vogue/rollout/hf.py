"""This engine generates with transformers, where vLLM can't be installed or takes longer to schedule than to run.

Prompts are read once for all their completions; then a token of every completion at a time. A completion draws one
uniform number a token from its request's own generator and takes the token whose share of [0, 1) holds it. Where one
reads its own states instead (`vogue.rollout.latent_spans`), the others beside it go on with tokens.

Where the policy's weights are whole on this rank the engine generates with them, adapters included, and nothing has to
be copied. Where ZeRO-3 partitions them it has a model of its own: gathering every layer for every token would take far
longer than copying all of them once a step.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Cache, PreTrainedModel, ProcessorMixin

from vogue.config import Config
from vogue.families import family_of
from vogue.inputs import cat_images
from vogue.model.embedding import reading
from vogue.rollout.cache import roomy_cache
from vogue.rollout.engine import BAN, Completion, Request, media_token_ids
from vogue.rollout.latent_spans import Read, Spans, check_latent
from vogue.rollout.sampling import Sampling, StopWatch, truncated, until_stop

SEQUENCES = 512  # generated at a time


class HfEngine:
    """A `vogue.rollout.engine.Engine` on transformers.

    `model` is the one whose weights the engine is to follow, and generates with where they are whole; None where the
    engine keeps the checkpoint's.
    """

    def __init__(self, config: Config, processor: ProcessorMixin, model: PreTrainedModel | None = None):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._copies = model is None or any(map(_is_partitioned, model.parameters()))
        own: Any = _read(config) if self._copies else model
        self.model = own.to(self.device)
        self.config, self.tokenizer = config, processor.tokenizer
        check_latent(self.tokenizer, config)
        self.family = family_of(self.model)
        self.ends = _end_tokens(self.model, self.tokenizer)
        self._bias = torch.zeros(self.model.config.text_config.vocab_size, device=self.device)
        self._bias[media_token_ids(processor)] = BAN
        self.version = 0

    def generate(self, requests: list[Request], n: int, sampling: Sampling) -> list[list[Completion]]:
        size = max(1, SEQUENCES // n)
        parts = (requests[start : start + size] for start in range(0, len(requests), size))
        with _generating(self.model):
            return [group for part in parts for group in self._generate(part, n, sampling)]

    @torch.no_grad()
    def _generate(self, requests: list[Request], n: int, sampling: Sampling) -> list[list[Completion]]:
        max_tokens, temperature = sampling.max_tokens, sampling.temperature
        uniform = torch.cat([_uniform(request.seed, n, max_tokens) for request in requests]).to(self.device)
        tokens, logprobs, ends = [], [], torch.tensor(sorted(self.ends), device=self.device)
        finished = torch.zeros(len(uniform), dtype=torch.bool, device=self.device)
        lengths = torch.full((len(uniform),), max_tokens, device=self.device)
        watch = StopWatch(sampling.stop, self.tokenizer, len(uniform))
        steps = self._steps(requests, n)
        logits, hidden = next(steps)
        spans = Spans(self.config, self.tokenizer, [request.seed for request in requests], n, hidden)
        for at in range(max_tokens):
            logits = (logits.float() + self._bias) / (temperature or 1.0)
            logp = (truncated(logits, sampling) if temperature else logits).log_softmax(-1)
            drawn = _draw(logp, uniform[:, at : at + 1]) if temperature else logp.argmax(-1, keepdim=True)
            drawn, inside = spans.silenced(drawn)
            tokens.append(drawn)
            logprobs.append(logp.gather(1, drawn))
            ended = torch.isin(drawn[:, 0], ends) | watch.stopped(drawn[:, 0])
            lengths[ended & ~finished] = at + 1
            finished |= ended
            read = spans.read(drawn, inside, hidden, at)
            if finished.all() or at == max_tokens - 1:
                break
            logits, hidden = steps.send((drawn, read))
        rows = (torch.cat(tokens, dim=1), torch.cat(logprobs, dim=1), lengths, finished)
        opened = [request.prompt.opened for request in requests for _ in range(n)]
        completions = []
        for row, (ids, values, length, done) in enumerate(zip(*(row.tolist() for row in rows), strict=True)):
            sampled, latents, behind = spans.told_apart(row, length)
            ids, values = [ids[at] for at in sampled], [values[at] for at in sampled]
            text = self._text(ids, opened[row], sampling)
            completions.append(Completion(tuple(ids), tuple(values), text, done, latents, behind))
        return [completions[start : start + n] for start in range(0, len(completions), n)]

    def _steps(
        self, requests: list[Request], n: int
    ) -> Generator[tuple[Tensor, Tensor], tuple[Tensor, Read | None], None]:
        """Yield the next token's logits (requests x n, V) and the states (requests x n, D) that they are of.

        The caller sends the tokens that it drew, and the states that some completions read in their place.
        """
        ids, types, real = self._prompts(requests)
        images = self._images(requests)
        seconds = [clip.interval for request in requests for clip in request.view.clips]
        sizes = images.get(self.family.sizes), images.get("video_grid_thw")
        positions = self.family.positions(self.model, ids, types, real, *sizes, seconds)
        after = positions[..., -1] + 1  # the last token is text, and at the highest position so far
        cache = roomy_cache(self.model.config)
        images |= self.family.token_inputs(types)
        hidden = self._next(cache, input_ids=ids, attention_mask=real, position_ids=positions, **images)
        # Not `batch_repeat_interleave`, which layers of linear attention lack.
        copies: Any = torch.arange(len(ids), device=self.device).repeat_interleave(n)
        cache.reorder_cache(copies)
        after, real = after.repeat_interleave(n, dim=-1), real.repeat_interleave(n, dim=0)
        logits, hidden = self._logits(hidden).repeat_interleave(n, dim=0), hidden[:, 0].repeat_interleave(n, dim=0)
        while True:
            drawn, read = yield logits, hidden
            real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
            with reading(self.model, *(read or (None, None))):
                found = self._next(cache, input_ids=drawn, attention_mask=real, position_ids=after[..., None])
            logits, hidden = self._logits(found), found[:, 0]
            after = after + 1

    def _next(self, cache: Cache, **inputs: Tensor) -> Tensor:
        """The hidden state (S, 1, D) of the last of the tokens that `inputs` add to those in the cache."""
        return self.model.model(past_key_values=cache, use_cache=True, **inputs).last_hidden_state[:, -1:]

    def _logits(self, hidden: Tensor) -> Tensor:
        """The logits (S, V) of states (S, 1, D)."""
        # By its weight alone: the policy's head gives statistics of tokens in place of logits.
        return nn.functional.linear(hidden, self.model.lm_head.weight)[:, -1]

    def _prompts(self, requests: list[Request]) -> tuple[Tensor, Tensor, Tensor]:
        """Pad the prompts on the left; returns token ids, token types and which tokens are real, each (requests, P)."""
        prompts = [request.prompt for request in requests]
        longest = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.tokenizer.pad_token_id)
        types, real = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.token_ids)
            ids[row, start:], types[row, start:], real[row, start:] = prompt.token_ids, prompt.token_types, 1
        return ids.to(self.device), types.to(self.device), real.to(self.device)

    def _images(self, requests: list[Request]) -> dict[str, Tensor]:
        views: list[Any] = [request.view for request in requests if request.view.images]  # none without tensors
        clips: list[Any] = [request.view for request in requests if request.view.clips]
        inputs = {}
        if views:
            sizes = torch.cat([view.sizes for view in views])
            inputs = self.family.tower_inputs(sizes, [len(view.sizes) for view in views])
            inputs["pixel_values"] = cat_images([view.pixel_values for view in views])
        if clips:
            inputs["video_grid_thw"] = torch.cat([view.video_sizes for view in clips])
            inputs["pixel_values_videos"] = torch.cat([view.video_pixel_values for view in clips])
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _text(self, token_ids: list[int], opened: str, sampling: Sampling) -> str:
        return opened + until_stop(self.tokenizer.decode(token_ids, skip_special_tokens=True), sampling.stop)

    def sleep(self) -> None:
        """Nothing is given away: the policy's own weights take no further memory, and a copy's stay where they are."""

    @torch.no_grad()
    def up_to_date(self) -> bool:
        """Always: nobody else gives this engine weights."""
        return True

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Mark the weights as those of update `version`, which are copied where the engine has a model of its own.

        Where it generates with the policy's, it has them already, and doesn't touch `weights`.
        """
        if self._copies:
            own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            for name, tensor in weights:
                own[name].copy_(tensor)
        self.version = version


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_numel")  # which DeepSpeed's ZeRO-3 gives it


def _read(config: Config) -> PreTrainedModel:
    """A model of the engine's own."""
    model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=config.model.dtype)
    return model.eval().requires_grad_(False)


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """The model as it generates, and afterwards as it was.

    Plain attention: the policy's own is of rows that share a prompt, and knows no cache. No module in training:
    gradient checkpointing would turn the cache off.
    """
    text: Any = model.config.get_text_config()
    attention, training = text._attn_implementation, [module for module in model.modules() if module.training]
    model.set_attn_implementation({"text_config": "sdpa"})
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": attention})
        for module in training:
            module.training = True


def _end_tokens(model, tokenizer) -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's, and all of the checkpoint's generation_config.json."""
    known = model.generation_config.eos_token_id
    return frozenset([tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]) - {None}


def _draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens (S, 1) from the distributions `logp` (S, V) by uniform numbers (S, 1) in [0, 1), float64."""
    share = logp.exp().cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(share, uniform * share[:, -1:]).clamp(max=logp.shape[1] - 1)


def _uniform(seed: int, n: int, max_tokens: int) -> Tensor:
    return torch.rand(n, max_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
