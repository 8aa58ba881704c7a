"""vLLM against the policy in the families of models that `test_engines` doesn't train."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from kinds import model_of, processor_of, save_as_published
from PIL import Image
from ranks import apart
from safetensors.torch import load_file, save_file
from steps import batches_of, generated

from vogue.config import load_config
from vogue.data import Sample
from vogue.data.dataset import check_samples
from vogue.data.videos import Frames
from vogue.inputs import Preprocessor, load_processor
from vogue.model import loading, policy
from vogue.settings import ConfigError
from vogue.trainer import Trainer

pytestmark = pytest.mark.slow


def both_logprobs(trainer):
    """Log-probabilities (nats) of fresh tokens by the policy and by the engine."""
    items = [trainer.loader.item(sample, 0, i, (False,) * 3) for i, sample in enumerate(trainer.loader.samples)]
    groups = [replace(group, advantages=(1.0,) * 3) for group in generated(trainer, items)]
    with torch.no_grad():
        pairs = [(trainer.policy(b).logprob, b.engine_logprob) for b in batches_of(trainer, groups)]
    return torch.cat([ours for ours, _ in pairs]), torch.cat([theirs for _, theirs in pairs])


def disagreement(trainer):
    """Largest difference (nats) of the log-probabilities of fresh tokens between policy and engine."""
    ours, theirs = both_logprobs(trainer)
    assert ours.std() > 0.1
    return (ours - theirs).abs().max().item()


def trainer_of(kind, processor, folder, *overrides):
    """A trainer of a random model, on a prompt without an image, one with one and one with two, and on videos."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    own = processor_of(kind, tokenizer, processor.chat_template)
    own.save_pretrained(folder / "model")
    save_as_published(kind, model_of(kind, own), folder / "model")
    settings = [
        f"model.path={folder / 'model'}",
        "model.dtype=float32",
        "rollout.prompts=3",
        "rollout.n=3",
        "rollout.max_tokens=8",
        "rollout.kv_cache_gb=0.1",
        "trainer.deepspeed.zero_optimization.stage=0",
        f"trainer.output_dir={folder / 'run'}",
        *overrides,
    ]
    config = load_config(None, settings)
    images = [Image.effect_noise(size, 90).convert("RGB") for size in [(90, 40), (28, 28), (28, 56)]]
    samples = [
        Sample("How many?", "3", ()),
        Sample("How many?", "3", (images[0],)),
        Sample("Is <image> in <image>?", "no", (images[1], images[2])),
    ]
    preprocessor = Preprocessor(load_processor(config.model.path), "", 512)
    if preprocessor.family.videos:
        clip = Frames(tuple(Image.effect_noise((70, 40), 90).convert("RGB") for _ in range(6)), 1.5)
        samples += [
            Sample("What happens?", "it", (), videos=(clip,)),
            Sample("Is <image> in <video> or <video>?", "no", (images[0],), videos=(clip, replace(clip, fps=9.0))),
        ]
    return Trainer(config, check_samples(samples, preprocessor.lengths), preprocessor, resume=None)


def check(kind, processor, folder):
    trainer = trainer_of(kind, processor, folder)
    assert disagreement(trainer) < 1e-4
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert disagreement(trainer) > 1e-2
    trainer.sync()
    assert disagreement(trainer) < 1e-4


@pytest.mark.parametrize(
    "kind",
    [
        *("qwen2_vl", "qwen3_vl", "llava_onevision"),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("qwen3_vl_moe", "internvl", "glm4v", "glm4v_moe")),
    ],
)
def test_vllm_follows_the_policy(kind, processor, tmp_path):
    """Before and after its weights change.

    In a process of its own, and not as a rank of this one's run: vLLM's engines in one share their process groups.
    """
    apart(check, kind, processor, tmp_path)


def check_causal(kind, processor, folder):
    """With a policy whose images' tokens see none behind them, as vLLM's do on a CPU."""
    from vogue.rollout import vllm  # in the process that has the engine

    masks = policy.layer_masks
    policy.layer_masks = lambda name, segments, types, *rest: masks(name, segments, torch.zeros_like(types), *rest)
    vllm.check_images = lambda _: None
    check(kind, processor, folder)


@pytest.mark.long
def test_vllm_follows_gemma_in_all_but_what_a_cpu_refuses(processor, tmp_path):
    """Windows, tokens, positions, and weights before and after they change."""
    apart(check_causal, "gemma3", processor, tmp_path)


def with_tying(outer, inner, head, folder):
    """Let the configuration and its text part say this of tying (None: nothing), with a head of its own or without."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for part, value in ((config, outer), (config["text_config"], inner)):
        part.pop("tie_word_embeddings", None)
        part |= {} if value is None else {"tie_word_embeddings": value}
    file.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("lm_head.weight")]
    if head:
        weights[name] = 0.3 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    else:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def tied_disagreement(kind, processor, tying, folder, refuse):
    """How far apart policy and engine are at the start; `refuse`=False trains on a model that would be refused."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    own = processor_of(kind, tokenizer, processor.chat_template)
    own.save_pretrained(folder)
    save_as_published(kind, model_of(kind, own), folder)
    with_tying(*tying, folder)
    if not refuse:
        loading.misfit = lambda *_: ""
    settings = ["model.dtype=float32", "rollout.prompts=3", "rollout.n=3", "rollout.max_tokens=8"]
    settings += ["rollout.kv_cache_gb=0.1", "trainer.deepspeed.zero_optimization.stage=0"]
    config = load_config(None, [f"model.path={folder}", *settings])
    preprocessor = Preprocessor(load_processor(config.model.path), "", 512)
    data = check_samples([Sample("How many?", "3", ())] * 3, preprocessor.lengths)
    trainer = Trainer(config, data, preprocessor, resume=False)
    if refuse:
        return disagreement(trainer)
    ours, theirs = both_logprobs(trainer)  # of a head that nobody has set: they may all be alike
    return (ours - theirs).abs().max().item()


@pytest.fixture
def apart_by(processor, tmp_path):
    """A function: `tied_disagreement` in a process of its own."""

    def run(kind, tying, refuse=True):
        return apart(tied_disagreement, kind, processor, tying, tmp_path / str(refuse), refuse)

    return run


@pytest.mark.parametrize(
    ("kind", "tying"),
    [
        ("qwen3_vl", (True, False, False)),
        pytest.param("qwen3_vl", (False, True, True), marks=pytest.mark.long),
        pytest.param("qwen3_vl", (None, None, True), marks=pytest.mark.long),
        # transformers takes the text part's word in older families.
        pytest.param("qwen2_vl", (False, True, False), marks=pytest.mark.long),
        pytest.param("llava_onevision", (False, True, False), marks=pytest.mark.long),
    ],
)
def test_where_the_weights_bear_out_the_configuration_policy_and_engine_tie_alike(kind, tying, apart_by):
    assert apart_by(kind, tying) < 1e-4


@pytest.mark.parametrize("tying", [(None, True, False), pytest.param((None, None, False), marks=pytest.mark.long)])
def test_a_model_without_a_head_that_is_not_tied_is_refused_and_would_have_differed(tying, apart_by):
    with pytest.raises(ConfigError, match=r"the checkpoint lacks lm_head\.weight; tie_word_embeddings isn't true"):
        apart_by("qwen3_vl", tying)
    assert not apart_by("qwen3_vl", tying, refuse=False) <= 1e-2  # NaN of memory that nothing was written to, at times
