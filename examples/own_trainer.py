r"""VOGUE in a training loop of your own: transformers' model and `generate`, `vogue_kernels`, and nothing of `vogue`.

    python examples/own_trainer.py runs/demo/base runs/demo/data/train.parquet \
        --system 'Think in <think></think>, then answer in \boxed{}.'

(`make demo` makes that model and data.) This is all that VOGUE needs of a trainer: completions, their advantages, and
the hidden states that predict their tokens, on the image that they were generated from and, where the draw says so, on
the other one too. `--rollout raw` generates everything from the raw image, as the authors' code does; `drawn` from the
noisy one where it is drawn, as the paper's Algorithm 1 does. It is meant to be read: an image and its prompt are
computed anew for each completion, and one group after the other.
"""

import argparse
import io
import random
import re

import pyarrow.parquet as parquet
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, GenerationConfig

from vogue_kernels import VogueLoss

IGNORE = -100  # a token that isn't trained on
BAN = -1e4  # added to the logit of a token that can't be sampled
perturb = transforms.Compose(
    [
        transforms.PILToTensor(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.GaussianNoise(sigma=0.4),
        transforms.ToPILImage(),
    ]
)


def as_inputs(processor, row: dict, images: list[Image.Image], system: str) -> BatchFeature:
    """One prompt of P tokens with its images' features; a row has EasyR1's columns."""
    content = []
    for i, text in enumerate(row["problem"].split("<image>")):
        content += [{"type": "image", "image": images[i - 1]}] if i else []
        content += [{"type": "text", "text": text}] if text else []
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=images, return_tensors="pt")


def load(path: str):
    """Processor, model, and the tokens that stand for images: sampled, they would ask for one that isn't there."""
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    # The checkpoint's own may shape what is sampled from: by top-k, say, or a penalty on repetitions.
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=end, pad_token_id=pad)
    media = [getattr(processor, name, None) for name in ("image_token_id", "video_token_id")]
    return processor, model, [token for token in media if token is not None]


@torch.no_grad()
def sample(model, inputs: BatchFeature, media: list[int], n: int, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions (n, T) at temperature 1, padded, and the same with IGNORE after the end token."""
    out = model.generate(**inputs, suppress_tokens=media, num_return_sequences=n, max_new_tokens=max_tokens)
    tokens = out[:, inputs["input_ids"].shape[1] :]
    end = (tokens == model.generation_config.eos_token_id).long()
    return tokens, tokens.masked_fill(end.cumsum(1) > end, IGNORE)


def hidden_states(model, inputs: BatchFeature, tokens: torch.Tensor) -> torch.Tensor:
    """(n * T, D): where each token of the completions is predicted. No logits: the loss reads the head's weight."""
    n, prompt = len(tokens), inputs["input_ids"].shape[1]
    repeated = {name: values.repeat(n, *[1] * (values.dim() - 1)) for name, values in inputs.items()}
    repeated["input_ids"] = torch.cat([repeated["input_ids"], tokens], dim=1)
    for name, value in {"attention_mask": 1, "mm_token_type_ids": 0}.items():
        if name in repeated:
            repeated[name] = torch.cat([repeated[name], torch.full_like(tokens, value)], dim=1)
    hidden = model.model(**repeated, use_cache=False).last_hidden_state
    return hidden[:, prompt - 1 : -1].flatten(0, 1)


def reward(text: str, answer: str) -> float:
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return float(bool(boxed) and boxed[-1].strip() == answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or name of a vision-language model")
    parser.add_argument("data", help="parquet with the columns problem, answer and images")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8, help="a step (default 8)")
    parser.add_argument("--n", type=int, default=8, help="completions a prompt (default 8)")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rollout", choices=["raw", "drawn"], default="raw", help="image that is seen (default raw)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dice = random.Random(0)
    processor, model, media = load(arguments.model)
    bias = torch.zeros(model.lm_head.out_features)
    bias[media] = BAN  # the distribution that is trained is the one that is sampled from
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    rows = parquet.read_table(arguments.data).to_pylist()
    loss_function = VogueLoss(rollout=arguments.rollout)
    for step in range(arguments.steps):
        accuracy, u_per = 0.0, []
        for row in dice.sample(rows, arguments.prompts):
            images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in row["images"]]
            z = dice.random() < 1 - step / arguments.steps  # early mostly 1, late mostly 0
            seen = as_inputs(processor, row, images, arguments.system)
            other = as_inputs(processor, row, list(map(perturb, images)), arguments.system) if z else None
            if z and arguments.rollout == "drawn":
                seen, other = other, seen

            tokens, targets = sample(model, seen, media, arguments.n, arguments.max_tokens)
            texts = processor.batch_decode(tokens, skip_special_tokens=True)
            rewards = torch.tensor([reward(text, row["answer"]) for text in texts])
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)

            with torch.no_grad():
                hidden_other = hidden_states(model, other, tokens) if z else None
            loss, metrics = loss_function(
                hidden_states(model, seen, tokens),
                model.lm_head.weight,
                targets.flatten(),
                advantages.repeat_interleave(tokens.shape[1]),
                hidden_other=hidden_other,
                noisy=z,
                bias=bias,
            )
            (loss / arguments.prompts).backward()
            accuracy += rewards.mean().item() / arguments.prompts
            u_per += [metrics["u_per"].item()] if z else []
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ambiguity = f"{sum(u_per) / len(u_per):.4f} nats in {len(u_per)} groups" if u_per else "not drawn"
        print(f"step {step + 1}: accuracy {accuracy:.2f}, u_per {ambiguity}", flush=True)


if __name__ == "__main__":
    main()
