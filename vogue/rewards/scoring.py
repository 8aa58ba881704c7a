"""The scores of a rollout, with a second question to the policy where the design has one.

Vision-SR1 (arXiv 2508.19652): the policy answers again from its own description of the image, without the image.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from vogue.config import Config
from vogue.data import DataError, Sample
from vogue.data.prompts import SYSTEM_PROMPT, with_view
from vogue.inputs import Preprocessor
from vogue.rewards.designs import Score, content, score_batch
from vogue.rollout.engine import Completion, Engine, Request
from vogue.rollout.sampling import Sampling
from vogue.seeds import Purpose, seed_for


def score_groups(
    engine: Engine,
    preprocessor: Preprocessor,
    config: Config,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Completion]],
    places: Sequence[tuple[int, ...]],
    sampling: Sampling,
) -> list[tuple[Score, ...]]:
    """The scores of each sample's group of completions by `config.reward`.

    places    where each group stands in the run, such as (step, prompt): seeds the sampling of second answers
    sampling  how those are sampled

    Raises RewardError where `reward.function` fails.
    """
    completions = [completion.text for group in groups for completion in group]
    repeated = [sample for sample, group in zip(samples, groups, strict=True) for _ in group]
    blind = None
    if config.reward.weights.get("blind"):
        seeds = [
            seed_for(config.seed, Purpose.BLIND, *place, number)
            for place, group in zip(places, groups, strict=True)
            for number in range(len(group))
        ]
        blind = blind_answers(engine, preprocessor, config, completions, repeated, seeds, sampling)
    tokens = [len(completion.token_ids) for group in groups for completion in group]
    scores = iter(score_batch(completions, repeated, config.reward, blind, tokens))
    return [tuple(islice(scores, len(group))) for group in groups]


def blind_answers(
    engine: Engine,
    preprocessor: Preprocessor,
    config: Config,
    completions: Sequence[str],
    samples: Sequence[Sample],
    seeds: Sequence[int],
    sampling: Sampling,
) -> list[str | None]:
    """What the policy answers to each sample from the completion's <description>, printed in the image's place.

    None without a description, and for one that doesn't fit into `data.max_prompt_tokens`. Ours: one answer each,
    sampled as the completions are, to the prompt of design `verifiable`, whatever `data.system_prompt` says.
    """
    blindfolded = Preprocessor(preprocessor.processor, SYSTEM_PROMPT, config.data.max_prompt_tokens)
    requests, nothing = {}, blindfolded.view(())
    for number, (completion, sample, seed) in enumerate(zip(completions, samples, seeds, strict=True)):
        description = content(completion, "description")
        if description and description.strip():
            shown = with_view(replace(sample, state=description), "text")
            try:
                prompt = blindfolded.prompt(shown, nothing)
            except DataError:  # the sample is known to be good: its description is too long
                continue
            requests[number] = Request(prompt, nothing, seed)
    # Asked even where there is nothing to ask: ranks that share an engine call it as often as each other.
    outputs = engine.generate([*requests.values()], 1, sampling)
    answers = {number: output[0].text for number, output in zip(requests, outputs, strict=True)}
    return [answers.get(number) for number in range(len(completions))]
