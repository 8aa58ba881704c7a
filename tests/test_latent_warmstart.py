"""Latent Visual Reasoning's warm start: states learn to be the image's tokens."""

import pytest
import torch
from answering import CORPUS

from vogue.cli import main
from vogue.data.digits import SYSTEM_PROMPT, digit_pairs
from vogue.families import family_of
from vogue.inputs import Preprocessor
from vogue.method.latent import END, LOSS_WEIGHT, START, latent_loss
from vogue.tiny import build_model, build_processor
from vogue.warmstart import Demonstration, Examples, demonstration_loss


@pytest.fixture(scope="module")
def latent_processor():
    return build_processor(CORPUS, vocab_size=300, more_tokens=(START, END))


@pytest.fixture
def examples(latent_processor):
    """A function: examples of three pairs of digits with spans of so many states."""
    pairs = digit_pairs("train", 3, seed=0)
    return lambda steps: Examples(pairs, Preprocessor(latent_processor, SYSTEM_PROMPT, 512), steps)


def new_model(processor):
    torch.manual_seed(0)
    return build_model(processor, hidden_size=64, layers=2, vision_layers=2)


def test_a_warm_start_teaches_states_to_be_the_images_tokens(examples, latent_processor):
    # By hand: a forward of each sequence alone, with the vision tokens in place of what stands behind the start token.
    model, steps, nothing = new_model(latent_processor), 3, [(None, None)] * 2
    some = examples(steps)
    spans, said = [], []
    for i, printed in ((0, False), (1, True)):
        (one,) = some._with_spans(model, [_demonstration(some, i, printed)])
        text = latent_processor.tokenizer(one.text)["input_ids"] + [latent_processor.tokenizer.eos_token_id]
        assert (one.latents is None) == printed and one.text.startswith(START + END) != printed
        loss = demonstration_loss(model, latent_processor.tokenizer, [one])
        if printed:
            said.append((loss, len(text)))
            continue
        features = torch.cat(tuple(model.model.get_image_features(one.view.pixel_values, one.view.sizes).pooler_output))
        assert one.latents.numpy() == pytest.approx(
            8 * (features / features.norm(dim=1, keepdim=True))[[0, 1, 0]].detach()
        )
        states, logprob = _states_by_hand(model, one, text)
        spans.append(latent_loss(states, one.latents))
        said.append((-logprob.mean(), len(text)))
        assert loss.item() == pytest.approx((said[-1][0] + LOSS_WEIGHT * spans[-1]).item(), rel=1e-5)
    # Both together: means over all tokens and all states.
    both = some.loss(model, [0, 1], nothing, [False, True])
    mean = sum(loss * count for loss, count in said) / sum(count for _, count in said)
    assert both.item() == pytest.approx((mean + LOSS_WEIGHT * spans[0]).item(), rel=1e-5)


def _demonstration(examples, i, printed):
    return Demonstration(*examples._shown(i, printed), examples.pairs[i].demonstration())


def _states_by_hand(model, one, text):
    """The states (K, D) before the read ones, and the log-probabilities of the text's tokens."""
    count, embed, prompt = len(one.latents), model.get_input_embeddings(), one.prompt
    before = embed(prompt.token_ids).clone()
    before[prompt.token_types == 1] = torch.cat(
        tuple(model.model.get_image_features(one.view.pixel_values, one.view.sizes).pooler_output)
    )
    ids = torch.tensor(text)
    inputs = torch.cat([before, embed(ids[:1]), one.latents, embed(ids[1:])])[None]
    padded = torch.cat([prompt.token_ids, torch.zeros(len(text) + count, dtype=torch.int64)])[None]
    types = torch.cat([prompt.token_types, torch.zeros(len(text) + count, dtype=torch.int64)])[None]
    positions = family_of(model).positions(model, padded, types, torch.ones_like(padded), one.view.sizes, None, [])
    hidden = model.model(inputs_embeds=inputs, position_ids=positions).last_hidden_state[0]
    start = len(prompt.token_ids)
    at = [start - 1, *range(start + count, start + count + len(text) - 1)]
    logprob = (hidden[at] @ model.lm_head.weight.T).log_softmax(-1)[range(len(text)), ids]
    return hidden[start : start + count], logprob


def test_a_warm_started_model_knows_the_tokens_and_others_have_none(tmp_path):
    brief = ["--vision-batches", "1", "--batches", "2", "--batch-size", "2", "--printed", "0.5"]
    assert main(["warmstart", str(tmp_path / "latent"), *brief, "--latent-steps", "2"]) == 0
    assert main(["warmstart", str(tmp_path / "plain"), *brief]) == 0
    known = [(tmp_path / name / "tokenizer.json").read_text() for name in ("latent", "plain")]
    assert [START in text and END in text for text in known] == [True, False]


def test_states_are_of_the_digits_alone(tmp_path, capsys):
    assert main(["warmstart", str(tmp_path / "x"), "--data", "train.parquet", "--latent-steps", "2"]) == 2
    assert "--latent-steps 2 is of the digits' demonstrations" in capsys.readouterr().err.replace("\n", " ")
    assert main(["warmstart", str(tmp_path / "x"), "--latent-steps", "-1"]) == 2
    assert "--latent-steps -1 is negative" in capsys.readouterr().err
    assert main(["warmstart", str(tmp_path / "x"), "--latent-weight", "1"]) == 2
    assert "--latent-weight 1.0: without --latent-steps no state is read" in capsys.readouterr().err.replace("\n", " ")
