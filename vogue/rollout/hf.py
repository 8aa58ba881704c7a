"""transformers' own `generate`, where vLLM can't be installed: the same results, slower."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, ProcessorMixin

from vogue.config import Config
from vogue.inputs import Preprocessor, sizes_name
from vogue.rollout import BAN, Completion, Request, media_token_ids


class HfEngine:
    """See `vogue.rollout.Engine`. Holds its own copy of the model, as vLLM does."""

    def __init__(self, config: Config, processor: ProcessorMixin):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=config.model.dtype)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = processor.tokenizer
        self.preprocessor = Preprocessor(processor, "", config.data.max_prompt_tokens)
        self._sizes = sizes_name(processor)
        self._bias = {(token,): BAN for token in media_token_ids(processor)}
        self.version = 0

    def generate(self, requests: list[Request], n: int, max_tokens: int, temperature: float) -> list[list[Completion]]:
        return [self._generate(request, n, max_tokens, temperature) for request in requests]

    def _generate(self, request: Request, n: int, max_tokens: int, temperature: float) -> list[Completion]:
        prompt, view = request.prompt, self.preprocessor.view(request.images)
        inputs = {"input_ids": prompt.token_ids[None]}
        if view.sizes is not None:
            inputs |= {"pixel_values": view.pixel_values, self._sizes: view.sizes}
        if self._sizes == "image_grid_thw":
            inputs["mm_token_type_ids"] = prompt.token_types[None]
        else:
            inputs["batch_num_images"] = torch.tensor([len(view.images)])
        with torch.random.fork_rng():
            torch.manual_seed(request.seed)
            output = self.model.generate(
                **{name: tensor.to(self.device) for name, tensor in inputs.items()},
                attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.long, device=self.device),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                num_return_sequences=n,
                max_new_tokens=max_tokens,
                sequence_bias=self._bias,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = output.sequences[:, len(prompt.token_ids) :]
        logprobs = self.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        return [self._completion(*row) for row in zip(tokens.tolist(), logprobs.tolist(), strict=True)]

    def _completion(self, token_ids: list[int], logprobs: list[float]) -> Completion:
        end = self.tokenizer.eos_token_id
        finished = end in token_ids
        length = token_ids.index(end) + 1 if finished else len(token_ids)
        text = self.tokenizer.decode(token_ids[:length], skip_special_tokens=True)
        return Completion(tuple(token_ids[:length]), tuple(logprobs[:length]), text, finished)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy the trainer's weights and mark them as those of update `version`."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)
        self.version = version
