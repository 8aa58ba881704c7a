"""The shared-prefix forward against plain Hugging Face forwards of each completion alone, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vogue.data import Sample
from vogue.method.perturb import perturb
from vogue.method.uncertainty import OtherBranch
from vogue.model.packing import Row, collate
from vogue.model.policy import Policy, PolicyHead
from vogue.rollout.engine import BAN, Completion, media_token_ids

TEMPERATURE = 0.7
PAD_ID = 0


def completion(*token_ids):
    return Completion(token_ids, (0.0,) * len(token_ids), "", True)


def copy_of(model):
    twin = type(model)(copy.deepcopy(model.config)).to(torch.float64).eval()  # a policy sets the config's attention
    twin.load_state_dict(model.state_dict())
    return twin


def row(preprocessor, sample, lengths, sigma=None, seed=0):
    """A row with completions of these lengths; on the noisy branch if there is a sigma."""
    raw = preprocessor.view(sample.load_images())
    views, others = {"raw": raw}, ()
    if sigma is not None:
        views["noisy"] = preprocessor.view([perturb(image, "noise", sigma, seed) for image in raw.images])
        others = ("raw",)
    generator = torch.Generator().manual_seed(seed)
    completions = tuple(
        completion(*torch.randint(60, 250, (length,), generator=generator).tolist()) for length in lengths
    )
    prompt = preprocessor.prompt(sample, raw)
    trained = "noisy" if others else "raw"
    return Row(prompt, views, trained, completions, tuple(torch.zeros(length) for length in lengths), others)


@pytest.fixture
def kinds(samples):
    """Samples whose prompts differ in length and in number of images."""
    (image,) = samples[0].load_images()
    (other,) = samples[1].load_images()
    return {
        "one image": samples[0],
        "another image": samples[1],
        "no image": Sample("What is 2 + 2?", "4", ()),
        "two images": Sample("Is <image> larger than <image>?", "yes", (image, other.resize((112, 84)))),
    }


def banned_logits(logits, banned):
    bias = torch.zeros(logits.shape[-1], dtype=logits.dtype)
    bias[banned] = BAN
    return (logits + bias) / TEMPERATURE


def alone(model, prompt, view, tokens, banned):
    """(T, V) log-probabilities of one completion's positions, from the model's own forward with its own logits."""
    ids = torch.cat([prompt.token_ids, torch.tensor(tokens)])[None]
    images = {}
    if view.sizes is not None:
        types = torch.cat([prompt.token_types, torch.zeros(len(tokens), dtype=torch.long)])[None]
        images = {
            "pixel_values": view.pixel_values.double(),
            "image_grid_thw": view.sizes,
            "mm_token_type_ids": types,
        }
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
    return banned_logits(logits[len(prompt.token_ids) - 1 : -1], banned).log_softmax(-1)


def in_double(batch):
    images = batch.images and replace(batch.images, pixel_values=batch.images.pixel_values.double())
    views = {name: tuple(map(in_double, getattr(batch, name))) for name in ("others", "degraded")}
    return replace(batch, images=images, **views)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_gradients(policy, plain):
    """`plain`'s missing gradients (an unused vision tower) must be zeros here, not missing."""
    # Under ZeRO-3 a rank whose tower had no gradient would leave the others waiting for it.
    ours, theirs = gradients(policy.model), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        expected = torch.zeros_like(gradient) if theirs[name] is None else theirs[name]
        # Norms and vision rotations of transformers are float32 in a float64 model too: hence not 1e-9.
        assert (gradient - expected).norm() <= 1e-6 * expected.norm(), name


@pytest.mark.parametrize(
    ("names", "tied"),
    [
        (["one image", "another image"], True),
        (["one image", "no image", "two images"], True),
        (["no image"], True),
        (["one image", "two images"], False),
    ],
    ids=["prompts-of-two-lengths", "mixed-images", "text-only", "untied-head"],
)
def test_sharing_a_prompt_changes_no_logprob_entropy_or_gradient(names, tied, kinds, preprocessor, new_model):
    plain = untied(new_model()) if not tied else new_model().double()
    banned = media_token_ids(preprocessor.processor)
    policy = Policy(copy_of(plain), TEMPERATURE, banned)
    rows = [row(preprocessor, kinds[name], (3, 5, 1), seed=i) for i, name in enumerate(names)]
    batch = in_double(collate(rows, PAD_ID, token_mean=True))
    stats = policy(batch)
    assert stats.other is None

    logps = torch.cat(
        [alone(plain, r.prompt, r.views[r.trained], c.token_ids, banned) for r in rows for c in r.completions]
    )
    logprob = logps.gather(1, batch.targets[:, None])[:, 0]
    entropy = -(logps.exp() * logps).sum(1)
    assert stats.logprob.sub(logprob).abs().max() < 1e-9
    assert stats.entropy.sub(entropy).abs().max() < 1e-9

    # Weights that differ from token to token: a gradient that went to the wrong token would show.
    weights = torch.linspace(-1, 2, len(logprob), dtype=torch.float64)
    (weights * (stats.logprob + 0.5 * stats.entropy)).sum().backward()
    (weights * (logprob + 0.5 * entropy)).sum().backward()
    assert_equal_gradients(policy, plain)


def untied(model):
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    twin = type(model)(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.lm_head.weight.mul_(torch.linspace(0.5, 1.5, twin.lm_head.weight.shape[1]))
    assert twin.lm_head.weight is not twin.get_input_embeddings().weight
    return twin


@pytest.mark.parametrize("with_others", [False, True], ids=["compared-rows-alone", "with-a-row-of-one-branch"])
def test_noisy_rows_compare_both_branches_and_learn_through_the_noisy_one_alone(
    with_others, kinds, preprocessor, new_model
):
    plain = new_model().double()
    banned = media_token_ids(preprocessor.processor)
    policy = Policy(copy_of(plain), TEMPERATURE, banned)
    names = ("one image", "two images", "no image")
    rows = [row(preprocessor, kinds[name], (2, 4), sigma=0.8, seed=i) for i, name in enumerate(names)]
    rows += [row(preprocessor, kinds["another image"], (3, 2), seed=3)] * with_others
    batch = in_double(collate(rows, PAD_ID, token_mean=True))
    stats, other = policy(batch), policy(batch).other

    completions = [(r, c.token_ids) for r in rows for c in r.completions]
    q = torch.cat([alone(plain, r.prompt, r.views[r.trained], tokens, banned) for r, tokens in completions])
    with torch.no_grad():
        p = torch.cat(
            [alone(plain, r.prompt, r.views["raw"], tokens, banned) for r, tokens in completions if r.compared]
        )
    targets = batch.targets[:, None]
    logprob, entropy = q.gather(1, targets)[:, 0], -(q.exp() * q).sum(1)
    assert stats.logprob.sub(logprob).abs().max() < 1e-9
    assert stats.entropy.sub(entropy).abs().max() < 1e-9
    m, noisy = len(p), q[: len(p)]
    assert (m < len(q)) == with_others
    forward, reverse = (p.exp() * (p - noisy)).sum(1), (noisy.exp() * (noisy - p)).sum(1)
    expected = OtherBranch(
        logprob=p.gather(1, targets[:m])[:, 0],
        entropy=-(p.exp() * p).sum(1),
        kl_own_other=reverse,
        kl_other_own=forward,
        symmetric_kl=(forward + reverse) / 2,
    )
    for name, value in expected._asdict().items():
        assert getattr(other, name).sub(value).abs().max() < 1e-9, name
        assert not getattr(other, name).requires_grad
    assert other.symmetric_kl[: 2 * 6].min() > 1e-4  # the branches do differ where there is an image
    assert other.symmetric_kl[2 * 6 :].max() < 1e-12  # and are one where there is none

    weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
    (weights * stats.logprob).sum().backward()
    (weights * logprob).sum().backward()
    assert_equal_gradients(policy, plain)


def test_media_tokens_have_no_probability_even_where_the_head_favours_them(processor, new_model):
    media = media_token_ids(processor)
    assert processor.tokenizer.convert_ids_to_tokens(media) == [
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    ]  # fmt: skip
    head = Policy(new_model(), 1.0, media).model.lm_head
    hidden = 25 * torch.nn.functional.normalize(head.weight.detach()[media])
    free = (hidden @ head.weight.T).log_softmax(1)[range(4), media]
    assert free.min() > -0.1  # each would be sampled nearly always
    assert head(hidden, None, torch.tensor(media)).logprob.max() < -69  # a probability below 1e-30


def test_attention_that_takes_no_mask_of_ours_is_not_given_one(kinds, preprocessor, new_model, tmp_path):
    new_model().save_pretrained(tmp_path)
    rows = [row(preprocessor, kinds["one image"], (3,)), row(preprocessor, kinds["two images"], (2,))]
    batch = collate(rows, PAD_ID, token_mean=True)
    logprobs = {}
    for name in ("sdpa", "eager"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="float32", attn_implementation=name)
        policy = Policy(model, 1.0, attention=name)
        assert (policy.why_separate is None) == (name == "sdpa")
        logprobs[name] = policy(batch).logprob
    torch.testing.assert_close(logprobs["eager"], logprobs["sdpa"], rtol=0, atol=2e-5)


def test_the_head_keeps_logits_of_the_trained_branch_within_its_bytes():
    head = PolicyHead(torch.nn.Linear(8, 5000, bias=False), 1.0, [], keep_logits_bytes=100_000)
    hidden, targets, kept = torch.randn(10, 8, requires_grad=True), torch.arange(10), []

    def pack(saved):
        if saved.dtype == torch.uint8 and len(saved):
            kept.append(saved.nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        stats = head(hidden, [torch.randn(4, 8), torch.randn(2, 8)], targets)
        assert kept == [40_000, 60_000]  # of four tokens that are compared, and of six that aren't
        kept.clear()
        head(hidden, [], targets)
        assert kept == [100_000]
    stats.logprob.sum().backward()
