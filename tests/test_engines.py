"""Both rollout engines, vLLM and transformers, against the policy."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from steps import batches_of, generated, listening

from vogue.config import load_config
from vogue.data import Sample, load_samples
from vogue.data.dataset import check_samples
from vogue.data.videos import Frames
from vogue.inputs import Preprocessor, load_processor
from vogue.rollout.engine import Request, media_token_ids
from vogue.rollout.hf import HfEngine
from vogue.rollout.sampling import Sampling
from vogue.trainer import Trainer

pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------------- rollout engines


def base_settings(model_folder, data, folder):
    return [
        f"model.path={model_folder}",
        "model.dtype=float32",
        f"data.train={data}",
        "data.system_prompt=Think.",
        "data.max_prompt_tokens=128",
        "rollout.prompts=4",
        "rollout.n=4",
        "rollout.max_tokens=12",
        "rollout.kv_cache_gb=0.1",
        "branch.rollout=drawn",
        "branch.probability=0.5",
        "perturb.sigma=0.8",
        f"trainer.output_dir={folder}",
    ]


KEPT = []  # vLLM ends all process groups, other trainers' too, when an engine of it is collected


@pytest.fixture(scope="module")
def trainer(model_folder, digits_folder, tmp_path_factory):
    """A trainer with vLLM, sampling at another temperature than 1."""
    settings = base_settings(model_folder, digits_folder / "train.parquet", tmp_path_factory.mktemp("run"))
    stage = "trainer.deepspeed.zero_optimization.stage=0"
    more = ["data.max_prompt_tokens=512", "rollout.engine_args.max_num_seqs=37"]
    config = load_config(None, [*settings, "rollout.engine=vllm", "rollout.temperature=0.7", stage, *more])
    # Longer than a block of vLLM's prefix cache (128 tokens on a CPU), which so holds something.
    preprocessor = Preprocessor(load_processor(config.model.path), "Think. " * 60, 512)
    data = check_samples(load_samples(config.data.train), preprocessor.lengths)
    KEPT.append(Trainer(config, data, preprocessor, resume=None))
    return KEPT[-1]


@pytest.fixture(params=["vllm", "hf"])
def engine(request, trainer):
    """Each engine in turn in the trainer's hands; its weights are put back afterwards."""
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    vllm = trainer.engine
    if request.param == "hf":
        trainer.engine = HfEngine(trainer.config, trainer.processor)
    yield trainer.engine
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            parameter.copy_(before[name])
    trainer.sync()
    trainer.engine = vllm


def disagreement(trainer):
    """Largest difference (nats) between the policy's log-probabilities of fresh tokens and its engine's."""
    groups = [give_advantages(group) for group in generated(trainer)]
    differences = []
    with torch.no_grad():
        for batch in batches_of(trainer, groups):
            logprob = trainer.policy(batch).logprob
            differences.append((logprob - batch.engine_logprob).abs().max().item())
    return max(differences)


def give_advantages(group):
    return replace(group, advantages=(1.0,) * len(group.completions))


@pytest.mark.parametrize("part", ["visual", "language_model.layers", "embed_tokens", ""])
def test_the_engine_follows_the_policys_weights(trainer, engine, part):
    """One part of the model at a time, so that nothing it keeps (vision features, prefixes, a packed head) is stale."""
    trainer.sync()
    assert disagreement(trainer) < 1e-3  # also: this step's images and prompts are in its caches now
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.policy.model.named_parameters():
            if part in name:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    assert disagreement(trainer) > 1e-2  # stale
    trainer.step += 1
    try:
        trainer.sync()
        assert engine.version == trainer.step
        trainer.step -= 1  # the same prompts, images and seeds as before
        assert disagreement(trainer) < 1e-3
    finally:
        trainer.step = 0


def requests_of(trainer, count):
    items = [trainer.loader.item(sample, 0, i, (False,)) for i, sample in enumerate(trainer.loader.samples[:count])]
    return [Request(item.prompt, item.views["raw"], seed=10 + i) for i, item in enumerate(items)]


def generate(engine, requests, n=3):
    return engine.generate(requests, n, Sampling(12, 0.7))


def test_media_tokens_are_never_sampled_even_where_the_model_favours_them(trainer, engine):
    media = media_token_ids(trainer.processor)
    head = trainer.policy.model.lm_head
    batch = batches_of(trainer, [give_advantages(group) for group in generated(trainer)])[0]
    with torch.no_grad():
        hidden = trainer.policy._hidden(batch, trainer.policy.model)
        direction = hidden.mean(0) / hidden.mean(0).norm() ** 2
        # Those that never stand in a prompt as themselves: the head is tied, so they are embeddings too.
        favoured = [
            token for token in media if trainer.processor.tokenizer.convert_ids_to_tokens(token)[-5:] == "pad|>"
        ]
        head.weight[favoured] = 40 * direction
        free = (hidden @ head.weight.T).argmax(1)
    assert len(favoured) == 2
    assert torch.isin(free, torch.tensor(favoured)).float().mean() > 0.9
    trainer.sync()
    sampled = {t for group in generate(engine, requests_of(trainer, 4)) for c in group for t in c.token_ids}
    assert not sampled & set(media)
    assert disagreement(trainer) < 1e-3  # the policy excludes them too


def test_equal_seeds_give_equal_completions_whatever_else_is_generated(trainer, engine):
    requests = requests_of(trainer, 3)
    together = generate(engine, requests)
    assert [c.token_ids for c in generate(engine, requests[1:2])[0]] == [c.token_ids for c in together[1]]
    assert len({c.token_ids for c in together[1]}) > 1
    other = Request(requests[1].prompt, requests[1].view, seed=99)
    assert [c.token_ids for c in generate(engine, [other])[0]] != [c.token_ids for c in together[1]]


def test_at_temperature_zero_the_likeliest_tokens_are_taken_with_their_plain_logprobs(trainer, engine):
    requests = requests_of(trainer, 3)
    greedy = [completion for (completion,) in engine.generate(requests, 1, Sampling(12, 0.0))]
    cold = [completion for (completion,) in engine.generate(requests, 1, Sampling(12, 1e-4))]
    assert [c.token_ids for c in greedy] == [c.token_ids for c in cold]
    for completion, group in zip(greedy, engine.generate(requests, 64, Sampling(12, 1.0)), strict=True):
        first = {c.token_ids[0]: c.logprobs[0] for c in group}
        assert completion.logprobs[0] == pytest.approx(first[completion.token_ids[0]], abs=1e-4)
        assert completion.logprobs[0] == pytest.approx(max(first.values()), abs=1e-4)


def test_a_completion_holds_its_end_token_its_text_and_a_logprob_a_token(trainer, engine, preprocessor):
    end = trainer.processor.tokenizer.eos_token_id
    views = [preprocessor.view(sample.load_images()) for sample in trainer.loader.samples[:4]]
    prompts = [preprocessor.prompt(sample, view) for sample, view in zip(trainer.loader.samples, views, strict=False)]
    requests = [Request(prompt, view, seed=7) for prompt, view in zip(prompts, views, strict=True)]
    completions = [c for group in generate(engine, requests, n=8) for c in group]
    assert len(completions) == 32
    assert {c.finished for c in completions} == {True, False}
    for c in completions:
        assert c.finished == (c.token_ids[-1] == end)
        assert end not in c.token_ids[:-1]
        assert len(c.logprobs) == len(c.token_ids) <= 12
        assert c.finished or len(c.token_ids) == 12
        assert max(c.logprobs) <= 0
        assert c.text == trainer.processor.tokenizer.decode(c.token_ids, skip_special_tokens=True)


def test_prompts_without_and_with_several_images_are_generated_for(trainer, engine):
    (image,) = trainer.loader.samples[0].load_images()
    samples = [Sample("2 + 2?", "4", ()), Sample("Is <image> in <image>?", "no", (image, image.resize((84, 56))))]
    items = [trainer.loader.item(sample, 0, i, (False,)) for i, sample in enumerate(samples)]
    groups = generate(engine, [Request(item.prompt, item.views["raw"], 7) for item in items])
    assert [len(group) for group in groups] == [3, 3]


def test_videos_are_generated_for_as_the_policy_sees_them(trainer, engine):
    frames = tuple(Image.effect_noise((70, 40), 90).convert("RGB") for _ in range(6))
    (image,) = trainer.loader.samples[0].load_images()
    slow, quick = Frames(frames, 1.5), Frames(frames[::-1], 2.0)
    samples = [
        Sample("What happens?", "it", (), videos=(slow,)),
        Sample("Is <image> in <video> or <video>?", "no", (image,), videos=(quick, slow)),
    ]
    items = [trainer.loader.item(sample, 0, i, (False,) * 4) for i, sample in enumerate(samples)]
    assert [clip.interval for clip in items[1].views["raw"].clips] == [0.5, 2 / 3]
    trainer.sync()
    groups = [give_advantages(group) for group in generated(trainer, items)]
    with torch.no_grad():
        pairs = [(trainer.policy(batch).logprob, batch.engine_logprob) for batch in batches_of(trainer, groups)]
    assert max((ours - theirs).abs().max().item() for ours, theirs in pairs) < 1e-4


def test_an_engine_reads_the_features_that_it_is_given_and_no_pixel_again(trainer, engine):
    first, second = requests_of(trainer, 2)
    first = replace(first, seed=second.seed, prompt=second.prompt)
    assert first.view.images[0].size == second.view.images[0].size
    expected = [c.logprobs for c in generate(engine, [second])[0]]
    assert [c.logprobs for c in generate(engine, [first])[0]] != expected
    noise = tuple(Image.effect_noise(image.size, 90).convert("RGB") for image in first.view.images)
    misleading = replace(first, view=replace(second.view, images=noise))
    found = [c.logprobs for c in generate(engine, [misleading])[0]]
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_vllm_takes_arguments_of_its_own(trainer):
    assert trainer.engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 37


def test_a_rank_with_its_engine_listens_for_nobody_but_this_machine(trainer):
    assert all(address.is_loopback for address in listening())


def test_nothing_is_generated_for_no_prompts(trainer, engine):
    assert generate(engine, []) == []
