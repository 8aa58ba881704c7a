"""The real engines together: vLLM and transformers against the policy, DeepSpeed's ranks against one."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from ranks import launch
from safetensors.torch import load_file
from steps import batches_of, generated, listening
from transformers import AutoModelForImageTextToText

from vogue.cli import main
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


# -------------------------------------------------------------------------------------------------- several ranks


# Partitions every parameter, which DeepSpeed doesn't do to small ones by itself.
PARTITIONED = "trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"


@pytest.fixture(scope="module")
def train(model_folder, mixed_data, tmp_path_factory):
    """A function: train on this many ranks in a folder of its own; returns the folder."""

    def run(ranks, name, *overrides, resume=False):
        folder = root / name
        settings = [*base_settings(model_folder, mixed_data, folder), "rollout.engine=hf", PARTITIONED]
        settings += ["branch.granularity=response", "trainer.micro_batch_tokens=200", "optimizer.lr=1e-4"]
        settings += ["branch.probability=0.5"]  # else another number of steps is another run
        settings += [*overrides, *(["--resume"] if resume else [])]
        if ranks == 1:
            assert main(["train", *settings]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *settings)
        return folder

    root = tmp_path_factory.mktemp("runs")
    return run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_weights(folder, step):
    return load_file(folder / f"checkpoints/step_{step:06d}/hf/model.safetensors")


TOLD = ("trainer.log_completions=1000", "trainer.eval_every=3", "data.test_limit=5", "trainer.eval_samples=3")


@pytest.fixture(scope="module")
def on_one_rank(train, mixed_data):
    return train(1, "one", "trainer.steps=3", *TOLD, f"data.test={mixed_data}")


@pytest.fixture(scope="module")
def on_two_ranks(train, mixed_data):
    return train(2, "two", "trainer.steps=3", *TOLD, f"data.test={mixed_data}")


CURVES = ("reward", "format", "loss", "entropy", "u_per", "grad_norm", "noisy_share", "tokens")


def test_two_ranks_train_as_one_does(on_one_rank, on_two_ranks):
    one, two = metrics(on_one_rank), metrics(on_two_ranks)
    assert len(one) == len(two) == 3
    assert all(row["grad_norm"] > 1e-3 for row in one)
    for a, b in zip(one, two, strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=1e-4)
        assert 0 < b["balance"] <= 1
        assert "balance" not in a
        assert 0 < b["time/rollout"] <= b["time/rollout_slowest"]
        assert b["time/wait"] > 0


def test_what_is_told_of_a_completion_does_not_depend_on_which_rank_trained_on_it(on_one_rank, on_two_ranks):
    def told(folder):
        rows = map(json.loads, (folder / "completions.jsonl").read_text().splitlines())
        return {(row["step"], row["problem"], row["branch"], row["completion"], row["advantage"]): row for row in rows}

    one, two = told(on_one_rank), told(on_two_ranks)
    assert len(two) > 8
    assert two.keys() < one.keys()  # rank 0's own
    for key, row in two.items():
        for name in ("entropy", "u_per"):
            assert (row[name] is None) == (one[key][name] is None)
            assert row[name] is None or row[name] == pytest.approx(one[key][name], rel=1e-3, abs=1e-5)


def test_problems_that_ranks_share_get_the_answers_that_one_rank_gets(on_one_rank, on_two_ranks):
    one, two = ((folder / "evaluations.jsonl").read_text() for folder in (on_one_rank, on_two_ranks))
    first = json.loads(one.splitlines()[0])
    assert len(first["distinct"]) == 5  # 3 on one rank, 2 on the other
    assert len(set(first["distinct"])) > 1  # else their order would tell nothing
    assert two == one


def test_two_ranks_go_on_from_a_checkpoint_as_if_they_had_not_stopped(train, on_two_ranks):
    train(2, "resumed", "trainer.steps=1")
    resumed = train(2, "resumed", "trainer.steps=3", resume=True)
    for a, b in zip(metrics(on_two_ranks), metrics(resumed), strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=1e-6)
    straight, again = final_weights(on_two_ranks, 3), final_weights(resumed, 3)
    assert all((straight[name] - again[name]).abs().max() < 1e-6 for name in straight)


def test_one_rank_trains_unpartitioned_as_it_does_partitioned_and_goes_on_from_a_checkpoint(train):
    alone = "trainer.deepspeed.zero_optimization.stage=1"  # as by default
    train(1, "alone", alone, "trainer.steps=2")
    found = metrics(train(1, "alone", "trainer.steps=3", resume=True))  # with stage 3
    expected = metrics(train(1, "partitioned", "trainer.steps=3"))
    assert len(found) == len(expected) == 3
    for a, b in zip(expected, found, strict=True):
        assert {name: b[name] for name in CURVES} == pytest.approx({name: a[name] for name in CURVES}, rel=1e-4)


RAW = ("branch.rollout=raw", "branch.probability=0.5", "trainer.updates=2")


def test_two_ranks_train_on_raw_rollouts_as_one_does_and_go_on_from_ones_checkpoint(train):
    one = metrics(train(1, "raw", *RAW, "trainer.steps=2"))
    train(1, "raw-two", *RAW, "trainer.steps=1")
    two = metrics(train(2, "raw-two", *RAW, "trainer.steps=2", resume=True))
    assert len(one) == len(two) == 2
    assert 0 < one[0]["paid_share"] < 1
    for a, b in zip(one, two, strict=True):
        names = (*CURVES, "paid_share")
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-4)


DAPO = ("method=dapo", "branch.probability=0", "rollout.rounds=3", "rollout.n=4", "trainer.updates=2")


@pytest.mark.long
def test_two_ranks_sample_dynamically_as_one_does_which_goes_on_from_their_checkpoint(train):
    one = metrics(train(1, "dapo", *DAPO, "trainer.steps=2"))
    train(2, "dapo-two", *DAPO, "trainer.steps=1")
    two = metrics(train(1, "dapo-two", *DAPO, "trainer.steps=2", resume=True))
    names = ("reward", "reward/overlong", "loss", "grad_norm", "entropy", "tokens", "rounds", "filled_share")
    assert len(one) == len(two) == 2
    assert max(row["rounds"] for row in one) > 1
    for a, b in zip(one, two, strict=True):
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-4, abs=1e-6)


BOTH_VIEWS = ("method=noisy_rollout", "branch.probability=0", "rollout.noisy_share=0.5", "trainer.updates=2")


@pytest.mark.long
def test_two_ranks_train_on_groups_of_both_views_as_one_does(train):
    one, two = (metrics(train(n, f"both-{n}", *BOTH_VIEWS, "trainer.steps=2")) for n in (1, 2))
    names = ("reward", "loss", "grad_norm", "entropy", "tokens", "noisy_share")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert {name: b[name] for name in names} == pytest.approx({name: a[name] for name in names}, rel=1e-4, abs=1e-6)


WEIGHTS = """
import sys, torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import AutoModelForImageTextToText
from vogue.model.weights import gathered_weights
from vogue.config import load_config
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.distributed import leave
from vogue.inputs import Preprocessor, load_processor
from vogue.trainer import Trainer

# argv: bytes to hold at most, settings
budget, *settings = [text for text in sys.argv[1:] if not text.startswith("--")]
config = load_config(None, settings)
preprocessor = Preprocessor(load_processor(config.model.path), "Think.", 128)
data = check_samples(load_samples(config.data.train), preprocessor.lengths)
trainer = Trainer(config, data, preprocessor, resume=None)
expected = dict(AutoModelForImageTextToText.from_pretrained(config.model.path, dtype="float32").named_parameters())
parameters = list(trainer.policy.model.parameters())
largest = max(p.ds_numel * p.element_size() for p in parameters)
assert all(p.numel() == 0 for p in parameters), "nothing is partitioned"
names = []
for name, tensor in gathered_weights(trainer.policy.model, int(budget)):
    held = sum(p.ds_numel * p.element_size() for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
    assert held <= max(int(budget), largest), held
    assert torch.equal(tensor, expected[name]), name
    names.append(name)
assert set(names) == expected.keys() and len(names) == len(expected)
assert all(p.numel() == 0 for p in parameters), "something stays gathered"
print("whole" if trainer.rank == 0 else "")
leave(0)
"""


def test_no_rank_holds_more_of_the_partitioned_weights_than_the_budget(model_folder, mixed_data, tmp_path):
    script = tmp_path / "weights.py"
    script.write_text(WEIGHTS)
    settings = [*base_settings(model_folder, mixed_data, tmp_path / "run"), "rollout.engine=hf", PARTITIONED]
    assert "whole" in launch(2, script, 100_000, *settings)


COLLECTIVES = """
import torch, torch.distributed as dist
from vogue import distributed

distributed.start()
for _ in range(20):
    dist.all_gather_into_tensor(torch.empty(2000), torch.ones(1000))
    dist.all_reduce(torch.ones(3))
print("rank done")
"""


def test_ranks_end_without_an_abort_right_after_a_collective(tmp_path):
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    assert launch(2, script).count("rank done") == 2  # and `launch` asserts the exit code of both


GRADIENTS = """
import sys, torch
from dataclasses import replace
from deepspeed.utils import safe_get_full_grad
from vogue.config import load_config
from vogue.data import load_samples
from vogue.data.dataset import check_samples
from vogue.distributed import leave
from vogue.groups import generate
from vogue.inputs import Preprocessor, load_processor
from vogue.metrics import Clock, Means
from vogue.trainer import Trainer

# argv: where to save, a model with a tied and one with an untied head, settings
target, tied, untied, *settings = [text for text in sys.argv[1:] if not text.startswith("--")]

def gradients(path):
    config = load_config(None, [*settings, f"model.path={path}"])
    preprocessor = Preprocessor(load_processor(config.model.path), "Think.", 128)
    data = check_samples(load_samples(config.data.train), preprocessor.lengths)
    trainer = Trainer(config, data, preprocessor, resume=None)
    items = trainer.loader.items(trainer.step)
    groups = generate(trainer.engine, config, items, trainer.step)
    advantages = lambda prompt: tuple((-1.0) ** (prompt + i) * (1 + prompt) for i in range(4))
    groups = [replace(g, advantages=advantages(g.item.number)) for g in groups]
    whole = config.trainer.deepspeed["zero_optimization"].get("stage") == 0
    assert whole or all(p.numel() == 0 for p in trainer.policy.parameters()), "nothing is partitioned"
    found = {}

    def record():  # in place of the optimizer's step
        found.update({name: safe_get_full_grad(p).clone() for name, p in trainer.policy.named_parameters()})

    trainer.deepspeed.step = record
    trainer.update(groups, Means(), Clock())
    return found, trainer.rank

found = {"tied": gradients(tied)[0]}
found["untied"], rank = gradients(untied)
if rank == 0:
    torch.save(found, target)
if torch.distributed.get_world_size() > 1:
    leave(0)
"""


@pytest.fixture(scope="module")
def gradients(model_folder, mixed_data, tmp_path_factory):
    """(whole, partitioned): gradients by name, of a tied and an untied model, on one rank and on two."""
    folder = tmp_path_factory.mktemp("gradients")
    script = folder / "gradients.py"
    script.write_text(GRADIENTS)
    settings = [*base_settings(model_folder, mixed_data, folder / "run"), "rollout.engine=hf"]
    settings += ["branch.granularity=response", "trainer.micro_batch_tokens=200"]
    models = [model_folder, untie(model_folder, folder / "untied")]
    with pytest.MonkeyPatch.context() as patch:
        stage = "trainer.deepspeed.zero_optimization.stage=0"
        patch.setattr(sys, "argv", [str(script), str(folder / "whole.pt"), *map(str, models), *settings, stage])
        runpy.run_path(str(script), run_name="__main__")
    launch(2, script, folder / "partitioned.pt", *models, *settings, PARTITIONED)
    return torch.load(folder / "whole.pt"), torch.load(folder / "partitioned.pt")


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_gradients_of_partitioned_parameters_equal_those_of_whole_ones(head, gradients):
    whole, partitioned = (found[head] for found in gradients)
    assert whole.keys() == partitioned.keys()
    assert ("model.lm_head.weight" in whole) == (head == "untied")
    for name, gradient in whole.items():
        assert (partitioned[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    weight = "model.model.language_model.embed_tokens.weight" if head == "tied" else "model.lm_head.weight"
    assert whole[weight].norm() > 1e-2


def untie(model_folder, target):
    """The model with a head of its own."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype="float32")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(target)
    load_processor(str(model_folder)).save_pretrained(target)
    return target
