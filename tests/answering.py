"""A model that answers in the format, with any digit: what most tests of trainings begin with."""

import torch

from vogue.data.digits import QUESTIONS
from vogue.inputs import Preprocessor
from vogue.model.packing import Row, collate
from vogue.model.policy import Policy
from vogue.rollout.engine import Completion

CORPUS = ["<think></think>\\boxed{}"] * 100 + ["system\nuser\nassistant\n", "Think.", *QUESTIONS.values()]


def write_answering(model, processor, samples, folder, opening=""):
    """Teach a model to answer in the format, every other digit behind an `opening`, and write it to a folder.

    Without the format every reward would be 0, and every advantage, loss and gradient too.
    """
    preprocessor = Preprocessor(processor, "Think.", 512)
    texts = [f"{opening * (digit % 2)}<think></think>\\boxed{{{digit}}}<|im_end|>" for digit in range(10)]
    answers = [processor.tokenizer(text)["input_ids"] for text in texts]
    completions = tuple(Completion(tuple(ids), (0.0,) * len(ids), "", True) for ids in answers)
    rows = []
    for sample in samples[:3]:
        view = preprocessor.view(sample.load_images())
        advantages = tuple(torch.zeros(len(completion.token_ids)) for completion in completions)
        rows.append(Row(preprocessor.prompt(sample, view), {"raw": view}, "raw", completions, advantages))
    batch = collate(rows, processor.tokenizer.pad_token_id, token_mean=True)
    projection = model.lm_head
    policy = Policy(model, 1.0)
    # The tied head alone: layers that learned too would learn to ignore the image, whose answer is any digit.
    optimizer = torch.optim.Adam([projection.weight], 5e-3)
    for _ in range(60):
        loss = -policy(batch).logprob.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.lm_head = projection
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
