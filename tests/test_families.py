"""Rows that share a prompt against the model's own forwards of each completion alone, for every family of models."""

import copy
from dataclasses import replace

import pytest
import torch
from kinds import END, IMAGE, PINPOINTS, START, TILE, config_of, fill, inputs_of, view_of
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForImageTextToText,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from vogue.data import Sample
from vogue.families import FAMILIES
from vogue.inputs import Preprocessor, Prompt, View
from vogue.model.attention import VARLEN
from vogue.model.packing import Row, collate
from vogue.model.policy import Policy
from vogue.rollout.engine import Completion

SAMPLE = Sample("?", "!", ())


def random_model(kind, dtype=torch.float64):
    """In float64 with large weights, so that entropies and log-probabilities are worth comparing."""
    torch.manual_seed(0)
    # Experts' grouped products know no float64.
    given = {"attn_implementation": "sdpa", "experts_implementation": "eager" if dtype == torch.float64 else None}
    model = AutoModelForImageTextToText.from_config(config_of(kind), **given).eval()
    return fill(model, 4 if dtype == torch.float64 else 1).to(dtype)


def row_of(model, kind, size, *completions, images=True):
    ids, view = torch.arange(6, 9 + size), View((), None, None)
    if images:
        view = view_of(kind, size)
        found = model.model.get_image_features(**inputs_of(model, view), return_dict=True).pooler_output
        tokens = sum(map(len, found))  # of the one image, or of its tiles
        ids = torch.tensor([6, START, *[IMAGE] * tokens, END, 7, 8])
    made = tuple(Completion(tuple(tokens), (0.0,) * len(tokens), "", True) for tokens in completions)
    prompt = Prompt(SAMPLE, (), ids, (ids == IMAGE).long())
    return Row(prompt, {"raw": view}, "raw", made, tuple(torch.zeros(len(c.token_ids)) for c in made))


def one_by_one(row):
    """Its completions as rows of their own."""
    pairs = zip(row.completions, row.advantages)
    return [replace(row, completions=(completion,), advantages=(shaped,)) for completion, shaped in pairs]


def alone(model, row, completion):
    """(T,) log-probabilities of one completion, from the model's own forward with its own logits."""
    tokens = torch.tensor(completion.token_ids)
    ids = torch.cat([row.prompt.token_ids, tokens])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if row.views["raw"].sizes is not None:
        inputs |= inputs_of(model, row.views["raw"])
        inputs |= FAMILIES[model.config.model_type].token_inputs((ids == IMAGE).long())
    logps = model(**inputs).logits[0, len(row.prompt.token_ids) - 1 : -1].log_softmax(-1)
    return logps.gather(1, tokens[:, None])[:, 0]


def assert_equal_to_separate_rows(kind, dtype, error, images=True, attention="auto"):
    plain = random_model(kind, dtype)
    policy = Policy(copy.deepcopy(plain), 1.0, attention=attention)
    rows = [
        row_of(plain, kind, 1, [10, 11, 12], [20, 21], images=images),
        row_of(plain, kind, 2, [13, 14, 15, 16], [30], [21, 20], images=images),
    ]
    batches = [collate(rows, 0, token_mean=True)]
    if policy.why_separate:
        rows = [one for row in rows for one in one_by_one(row)]
        batches = [collate(rows, 0, token_mean=True)]
    (batch,) = batches
    logprob = torch.cat([alone(plain, row, completion) for row in rows for completion in row.completions])
    stats = policy(batch)
    assert (stats.logprob - logprob).abs().max() < error
    weights = torch.linspace(-1, 2, len(logprob), dtype=logprob.dtype)
    (weights * stats.logprob).sum().backward()
    (weights * logprob).sum().backward()
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in plain.named_parameters()}
    # A bias of the keys has no effect: its gradient is rounding, to be measured by the others'.
    least = 1e-2 * max(gradient.norm() for gradient in theirs.values())
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is None:
            assert not theirs[name].any(), name
        else:
            assert (parameter.grad - theirs[name]).norm() <= error * max(theirs[name].norm(), least), name
    return policy


OLDER = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
SHARING = (*OLDER, "qwen3_vl_moe", "internvl", "gemma3", "glm4v", "glm4v_moe")


@pytest.mark.parametrize("kind", SHARING)
def test_sharing_a_prompt_changes_no_logprob_and_no_gradient(kind, no_float32):
    reached = []
    for images in (True, False):
        policy = assert_equal_to_separate_rows(kind, torch.float64, 1e-9, images)
        assert policy.why_separate is None
        reached.append({name for name, parameter in policy.named_parameters() if parameter.grad is not None})
    # Under ZeRO-3 a rank whose vision tower had no gradient would leave the others waiting for it.
    assert reached[0] == reached[1]
    assert any(name.startswith(f"model.model.{policy.family.tower}.") for name in reached[0])


@pytest.mark.parametrize("kind", SHARING)
def test_sharing_a_prompt_changes_little_in_float32(kind):
    assert_equal_to_separate_rows(kind, torch.float32, 1e-5)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava_onevision", "internvl"])
def test_a_forward_that_takes_images_and_no_features_sees_them_all_the_same(kind, monkeypatch):
    """As that of transformers 5.17 is, which takes features for any other keyword and leaves the images out."""
    model = random_model(kind)
    policy = Policy(model, 1.0)
    rows = [row_of(model, kind, size, [10, 11], [20, 21]) for size in (1, 2, 1)]
    batch = collate(rows, 0, token_mean=True)
    expected = policy(batch).logprob
    black = replace(batch.images, pixel_values=torch.zeros_like(batch.images.pixel_values))
    assert (policy(replace(batch, images=black)).logprob - expected).abs().max() > 0.1
    own = model.model.forward

    def forward(pixel_values=None, **inputs):
        inputs.pop("mm_encoder_outputs", None)
        return own(pixel_values=pixel_values, **inputs)

    monkeypatch.setattr(model.model, "forward", forward)
    assert torch.equal(policy(batch).logprob, expected)
    pixels = inputs_of(model, rows[0].views["raw"])  # and the tower is asked again by whoever asks for it
    assert len(model.model.get_image_features(**pixels, return_dict=True).pooler_output) == 1


def test_a_model_with_linear_attention_gets_separate_rows_and_says_why():
    policy = assert_equal_to_separate_rows("qwen3_5", torch.float32, 1e-5)
    assert policy.why_separate == "qwen3_5 has layers of linear_attention"


LONG = ("qwen3_vl_moe", "internvl", "glm4v", "glm4v_moe")  # of which profiles take long


@pytest.mark.parametrize("kind", [pytest.param(x, marks=pytest.mark.long) if x in LONG else x for x in SHARING])
def test_recomputing_activations_changes_no_gradient(kind, no_float32):
    gradients, plans = [], []
    for checkpointing in (False, True):
        model = random_model(kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        rows = [row_of(model, kind, 1, [10, 11, 12], [20, 21]), row_of(model, kind, 2, [13, 14], [30])]
        calls = []
        layer = model.model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            Policy(model, 1.0)(collate(rows, 0, token_mean=True)).logprob.sum().backward()
        assert len(calls) == 1 + checkpointing
        plans.append(sum(x.count for x in profiled.key_averages() if x.key == "aten::unique_consecutive"))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    # Where rows' completions lie is found once a forward, for all layers and for their recomputation.
    assert plans[0] == plans[1]
    assert plans[0] > 0 or FAMILIES[kind].both_ways  # by a mask
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-9 * gradient.norm() + 1e-15, name


@pytest.mark.parametrize("kind", SHARING)
def test_the_vision_tower_sees_each_image_once_however_many_rows_show_it(kind):
    model = random_model(kind, torch.float32)
    small = row_of(model, kind, 1, [10, 11, 12], [20, 21], [30])
    large = row_of(model, kind, 2, [13], [14])
    seen = []
    policy = Policy(model, 1.0)
    tower = getattr(model.model, policy.family.tower)
    tower.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(len(arguments[0] if arguments else named["pixel_values"])),
        with_kwargs=True,
    )
    together = collate([small, large], 0, token_mean=True)
    separate = [*one_by_one(small), *one_by_one(large)]
    shared, alone = policy(together), policy(collate(separate, 0, token_mean=True))
    patches = {size: len(view_of(kind, size).pixel_values) for size in (1, 2)}
    if kind == "llava_onevision":
        patches = {1: 2, 2: 3}  # tiles, the whole image as one of them
    assert seen == [patches[1] + patches[2]] * 2
    torch.testing.assert_close(shared.logprob, alone.logprob, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", SHARING)
def test_every_attention_of_shared_prompts_gives_the_same_log_probabilities(kind):
    plain = random_model(kind, torch.float32)
    rows = [row_of(plain, kind, 1, [10, 11, 12], [20, 21]), row_of(plain, kind, 2, [13, 14], [30])]
    batch = collate(rows, 0, token_mean=True)
    found = {}
    # On a CPU it has no backward pass, and compiling it takes longer than what it computes here.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for attention in ("auto", "sdpa", "flex_attention", *(() if FAMILIES[kind].both_ways else (VARLEN,))):
            policy = Policy(copy.deepcopy(plain), 1.0, attention=attention)
            assert policy.why_separate is None
            found[attention] = policy(batch).logprob
    for attention, logprob in found.items():
        torch.testing.assert_close(logprob, found["sdpa"], rtol=0, atol=2e-5, msg=attention)


def test_a_model_type_that_is_not_known_is_refused(new_model):
    model = new_model()
    model.config.model_type = "idefics3"
    with pytest.raises(ValueError, match="model type idefics3 is not known here; these are: qwen2_vl, "):
        Policy(model, 1.0)


def llava_processor(processor):
    """LLaVA-OneVision's, with the tokenizer of another one."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    pixels = {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": PINPOINTS}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**pixels),
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template="{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}",
    )


@pytest.mark.parametrize("sizes", [[(28, 28)], [(40, 90)], [(90, 40), (28, 28)]], ids=str)
def test_prompts_of_llava_onevision_have_the_tokens_of_its_own_processor(processor, sizes):
    llava = llava_processor(processor)
    images = [Image.new("RGB", (width, height), "red") for height, width in sizes]
    preprocessor = Preprocessor(llava, "", 512)
    view = preprocessor.view(images)
    prompt = preprocessor.prompt(Sample("<image>" * len(images) + "How many?", "3", tuple(images)), view)
    theirs = llava(images=[images], text="<image>" * len(images) + "How many?", return_tensors="pt")
    assert prompt.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert view.sizes.tolist() == theirs["image_sizes"].tolist()
    assert torch.equal(view.pixel_values, theirs["pixel_values"])
