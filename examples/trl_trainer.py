r"""VOGUE in TRL: `vogue.trl.VogueTrainer` is a GRPOTrainer, with TRL's data, rewards, settings and checkpoints.

    python examples/trl_trainer.py runs/demo/base runs/demo/data/train.parquet \
        --system 'Think in <think></think>, then answer in \boxed{}.'

(`make demo` makes that model and data; TRL is installed with the extra `dev`.) `--resume` goes on from the last
checkpoint in `--out`.
"""

import argparse
import re

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from vogue.data import load_samples
from vogue.trl import VogueConfig, VogueTrainer


def right(completions, answer, **_) -> list[float]:
    """1 for a completion whose last box holds the answer."""
    boxes = [re.findall(r"\\boxed\{([^{}]*)\}", completion[0]["content"]) for completion in completions]
    return [float(box[-1:] == [wanted]) for box, wanted in zip(boxes, answer, strict=True)]


def as_rows(path: str, system: str) -> list[dict]:
    """Samples with one image, in TRL's columns; every further column reaches the reward function."""
    return [
        {
            "prompt": [
                {"role": "system", "content": system},
                {"role": "user", "content": sample.problem.removeprefix("<image>")},
            ],
            "image": sample.load_images()[0],
            "answer": sample.answer,
        }
        for sample in load_samples(path)
    ]


class Lines(TrainerCallback):
    """Prints a line a step."""

    def on_log(self, args, state, control, logs, **_):
        if "reward" in logs:
            told = "not drawn" if logs.get("u_per") is None else f"{logs['u_per']:.4f} nats"
            line = f"step {state.global_step}: accuracy {logs['reward']:.2f}, entropy {logs['entropy']:.3f}"
            print(f"{line}, paid {logs['paid_share']:.2f}, u_per {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or name of a vision-language model")
    parser.add_argument("data", help="parquet with the columns problem, answer and images")
    parser.add_argument("--system", default="Answer the question.", help="system prompt")
    parser.add_argument("--out", default="runs/trl", help="folder of the checkpoints (default runs/trl)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8, help="a step (default 8)")
    parser.add_argument("--n", type=int, default=8, help="completions a prompt (default 8)")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--rollout", choices=["raw", "drawn"], default="raw", help="image that is seen (default raw)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    config = VogueConfig(
        output_dir=arguments.out,
        branch_rollout=arguments.rollout,
        alpha_out=0.4,
        alpha_per=1.0,
        perturb_sigma=0.4,
        per_device_train_batch_size=arguments.n,
        gradient_accumulation_steps=arguments.prompts,
        num_generations=arguments.n,
        max_completion_length=arguments.max_tokens,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        max_steps=arguments.steps,
        save_steps=arguments.steps // 2 or 1,
        logging_steps=1,
        report_to="none",
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,
        disable_tqdm=True,
    )
    trainer = VogueTrainer(
        model=AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32),
        reward_funcs=[right],
        args=config,
        train_dataset=Dataset.from_list(as_rows(arguments.data, arguments.system)),
        processing_class=AutoProcessor.from_pretrained(arguments.model),
        callbacks=[Lines()],
    )
    trainer.train(resume_from_checkpoint=arguments.resume)


if __name__ == "__main__":
    main()
