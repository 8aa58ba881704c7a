"""Latent Visual Reasoning: states that are read in place of tokens, in rollouts, in training and in a warm start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from answering import CORPUS, write_answering
from ranks import launch
from safetensors.torch import load_file
from steps import batches_of, generated, loss_gradient, objective_of
from test_engine_families import trainer_of
from test_groups import group

from vogue.cli import main
from vogue.config import load_config
from vogue.families import FAMILIES
from vogue.inputs import Prompt, View
from vogue.method.latent import END, START, latent_loss, read_state
from vogue.metrics import Means
from vogue.model.packing import Row, collate
from vogue.rollout.engine import Completion
from vogue.rollout.hf import HfEngine
from vogue.rollout.sampling import of_rollouts
from vogue.settings import ConfigError
from vogue.step.groups import idle_row, tally
from vogue.tiny import build_model, build_processor

REWARD = Path(__file__).parent.parent / "bench" / "reward.py"  # completions of a group are seldom paid alike
NEEDED = ("model.path=some/model", "data.train=train.parquet", "rollout.engine=hf")
STEPS = 3
CURVES = ("reward", "loss", "entropy", "grad_norm", "tokens", "latents", "mismatch/logprob")
OF_THE_MACHINE = ("time", "throughput", "memory")


@pytest.fixture(scope="session")
def latent_processor():
    return build_processor(CORPUS, vocab_size=300, more_tokens=(START, END))


@pytest.fixture(scope="session")
def answering(tmp_path_factory, latent_processor, samples):
    """A function: a folder of a model that begins every other answer with an `opening`."""

    def build(opening):
        torch.manual_seed(0)
        model = build_model(latent_processor, hidden_size=64, layers=2, vision_layers=2).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        return write_answering(model, latent_processor, samples, tmp_path_factory.mktemp("latent"), opening)

    return build


@pytest.fixture(scope="session")
def latent_folder(answering):
    return answering(START)


@pytest.fixture
def latent(latent_folder):
    """The settings of runs whose completions read states."""
    return [
        *(f"model.path={latent_folder}", "method=grpo", "branch.rollout=raw", "rollout.n=4", "rollout.max_tokens=16"),
        f"rollout.latent_steps={STEPS}",
    ]


def judged(trainer):
    """The step's groups with made-up advantages; some of their completions read states, and some don't."""
    groups = [replace(each, advantages=(1.0, -0.5, 2.0, -1.0)) for each in generated(trainer)]
    counts = [len(completion.latents) for each in groups for completion in each.completions]
    assert 0 in counts and STEPS in counts
    return groups


def request_list(trainer):
    """What the step asks the engine for."""
    asked = []
    engine, trainer.engine = trainer.engine, type("Asked", (), {})()
    trainer.engine.generate = lambda requests, n, sampling: (
        asked.extend(requests) or engine.generate(requests, n, sampling)
    )
    generated(trainer)
    trainer.engine = engine
    return asked


# ------------------------------------------------------------------------------------------------------- by hand


def test_the_loss_of_states_is_the_papers_sum_over_dimensions():
    # ||(1, 0) - (1, 1)||² = ||(0, 1) - (0, 0)||² = 1; the authors' code takes the mean over both dimensions: 0.5.
    states, features = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 1], [0, 0]])
    assert latent_loss(states, features) == 1.0
    assert latent_loss(states, states) == 0


def test_noise_has_the_length_of_the_state_whose_place_it_takes():
    # (3, 4) has a length of 5: noise of (1, 0) becomes (5, 0).
    hidden, noise = torch.tensor([[3.0, 4]]), torch.tensor([[1.0, 0]])
    assert read_state(hidden, "noise", noise).tolist() == [[5, 0]]
    assert read_state(hidden, "zero", noise).tolist() == [[0, 0]]
    assert read_state(hidden, "hidden", noise) is hidden


def row_of(*completions):
    prompt = Prompt(None, (), torch.tensor([5, 6]), torch.zeros(2, dtype=torch.int64))
    advantages = tuple(torch.ones(len(completion.token_ids)) for completion in completions)
    return Row(prompt, {"raw": View((), None, None)}, "raw", completions, advantages)


def test_states_have_places_in_a_row_and_are_no_tokens():
    # Two states behind the first token and one behind the third; then a completion without any.
    states = torch.arange(6.0).view(3, 2)
    read = Completion((11, 12, 13, 14), (-1.0,) * 4, "", True, states, (1, 1, 3))
    plain = Completion((21, 22), (-1.0,) * 2, "", True, states[:0])
    row = row_of(read, plain)
    assert read.steps == 7
    assert row.tokens == 2 + 6 + 1
    batch = collate([row], 0, token_mean=False)
    assert batch.input_ids.tolist() == [[5, 6, 11, 11, 11, 12, 13, 13, 21]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 2]]
    assert batch.latent_positions.tolist() == [3, 4, 7]
    assert batch.latents.equal(states)
    assert batch.targets.tolist() == [11, 12, 13, 14, 21, 22]
    assert batch.positions.tolist() == [1, 4, 5, 7, 1, 8]  # the second and the fourth are predicted by a state
    assert batch.weights.tolist() == [0.25] * 4 + [0.5] * 2  # one over the sampled tokens


def test_the_metric_counts_states_a_completion():
    completions = tuple(
        Completion((1,), (-1.0,), "", True, torch.zeros(count, 2), (1,) * count) for count in (3, 0, 3, 6)
    )
    means = Means()
    tally([replace(group(1, 0, 0, 0, 0), completions=completions)], means)
    assert means["latents"] == (12, 4)
    plain = Means()
    tally([group(1, 0, 0, 0, 0)], plain)
    assert "latents" not in plain.parts


# ------------------------------------------------------------------------------------------------------- rollouts


@torch.no_grad()
def read_alone(trainer, request, completion):
    """Log-probabilities (T,) of a completion's tokens, and the states (L, D) of all that is read, by transformers.

    One sequence, one forward: the prompt's embeddings, with the image's in place, then tokens and states by hand.
    """
    model, prompt, view = trainer.engine.model, request.prompt, request.view
    embed = model.get_input_embeddings()
    before = embed(prompt.token_ids)
    image = model.model.get_image_features(view.pixel_values, view.sizes, return_dict=True).pooler_output
    before[prompt.token_types == 1] = torch.cat(tuple(image))
    parts, used = [], 0
    for i, token in enumerate(completion.token_ids):
        while used < len(completion.behind) and completion.behind[used] == i:
            parts.append((None, completion.latents[used]))
            used += 1
        parts.append((token, embed(torch.tensor(token))))
    inputs = torch.cat([before, torch.stack([state for _, state in parts])])[None]
    ids = torch.cat([prompt.token_ids, torch.zeros(len(parts), dtype=torch.int64)])[None]
    types = torch.cat([prompt.token_types, torch.zeros(len(parts), dtype=torch.int64)])[None]
    positions = trainer.policy.family.positions(model, ids, types, torch.ones_like(ids), view.sizes, None, [])
    attention = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "sdpa"})
    hidden = model.model(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state[0]
    model.set_attn_implementation({"text_config": attention})
    logits = hidden @ trainer.policy.model.lm_head.weight.T + trainer.engine._bias
    at = [len(prompt.token_ids) + i for i, (token, _) in enumerate(parts) if token is not None]
    logprob = logits.log_softmax(-1)[torch.tensor(at) - 1, torch.tensor(completion.token_ids)]
    return logprob, hidden, [len(prompt.token_ids) + i for i, (token, _) in enumerate(parts) if token is None]


def test_a_completion_reads_its_own_states_behind_a_start_token(new_trainer, latent):
    trainer = new_trainer(*latent)
    start = trainer.processor.tokenizer.convert_tokens_to_ids(START)
    groups, requests, spans = judged(trainer), request_list(trainer), 0
    for each, request in zip(groups, requests, strict=True):
        for completion in each.completions:
            logprob, hidden, places = read_alone(trainer, request, completion)
            assert torch.tensor(completion.logprobs) == pytest.approx(logprob, abs=1e-5)
            assert completion.latents.numpy() == pytest.approx(hidden[torch.tensor(places, dtype=int) - 1], abs=1e-4)
            begun = [i + 1 for i, token in enumerate(completion.token_ids[:-1]) if token == start]
            assert list(completion.behind) == [i for i in begun for _ in range(STEPS)]
            assert completion.latents.untyped_storage().nbytes() == completion.latents.nbytes  # nothing else is sent
            assert completion.steps <= 16 and START not in completion.text
            spans += len(begun)
    assert spans > 3


def test_completions_in_different_modes_are_those_that_they_are_alone(new_trainer, latent):
    trainer = new_trainer(*latent)
    groups, requests = judged(trainer), request_list(trainer)
    for each, request in zip(groups, requests, strict=True):
        (alone,) = trainer.engine.generate([request], 4, of_rollouts(trainer.config))
        for one, other in zip(alone, each.completions, strict=True):
            assert (one.token_ids, one.behind, one.text) == (other.token_ids, other.behind, other.text)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert one.latents.numpy() == pytest.approx(other.latents, abs=1e-4)


def test_an_end_within_a_span_leaves_out_the_states_that_no_token_comes_behind(new_trainer, latent):
    trainer = new_trainer(*latent)
    (request, *_), start = request_list(trainer), trainer.processor.tokenizer.convert_tokens_to_ids(START)
    trainer.engine._bias[start] = 1000.0  # nothing else is said
    sampling = replace(of_rollouts(trainer.config), max_tokens=7)  # start, 3 states, start, 2 of 3 states
    for completion in trainer.engine.generate([request], 2, sampling)[0]:
        assert completion.token_ids == (start, start) and not completion.finished
        assert completion.behind == (1, 1, 1) and completion.latents.shape == (3, 64)


def test_noise_is_a_function_of_the_seed_and_of_the_states_length_and_zeros_are_zeros(new_trainer, latent):
    trainer = new_trainer(*latent)
    states = {}
    for kind in ("hidden", "noise", "zero"):
        other = new_trainer(*latent, f"rollout.latent={kind}")
        states[kind] = [completion.latents for each in judged(other) for completion in each.completions]
    assert all(read.count_nonzero() == 0 for read in states["zero"])
    # Up to its first state a completion is the same, whatever is read.
    firsts = [(a[0], b[0]) for a, b in zip(states["hidden"], states["noise"], strict=True) if len(a)]
    assert [float(a.norm()) for a, _ in firsts] == pytest.approx([float(b.norm()) for _, b in firsts], rel=1e-5)
    assert all(torch.cosine_similarity(a, b, dim=0).abs() < 0.6 for a, b in firsts)
    directions = torch.stack([b / b.norm() for _, b in firsts])
    assert ((directions @ directions.T).abs().fill_diagonal_(0) < 0.6).all()  # each has its own
    other, request = new_trainer(*latent, "rollout.latent=noise"), request_list(trainer)[1]
    alone = other.engine.generate([request], 4, of_rollouts(other.config))[0]
    assert [x.latents.numpy() for x in alone] == [pytest.approx(x, abs=1e-4) for x in states["noise"][4:8]]


# ------------------------------------------------------------------------------------------------------- training


SHARED = ("trainer.shared_prefix=true", "trainer.shared_prefix=false", "model.gradient_checkpointing=true")


@pytest.mark.parametrize("setting", SHARED)
def test_what_was_sampled_is_as_likely_where_the_recorded_states_are_read_again(setting, new_trainer, latent):
    trainer = new_trainer(*latent, setting)
    for batch in batches_of(trainer, judged(trainer)):
        stats = trainer.policy(batch)
        assert stats.logprob.std() > 0.1
        assert stats.logprob.detach() == pytest.approx(batch.engine_logprob, abs=1e-5)
        # The ratio of PPO to what the engine sampled with, before the first update.
        signals = trainer.signals(batch, stats)
        old = signals._replace(logprob=batch.engine_logprob)
        error = objective_of(trainer, replace(batch, old=old), signals).metrics["ratio_error"]
        assert error.total < 1e-5 * error.count
        assert len(batch.targets) == sum(len(c.token_ids) for c in batch.completions) == len(batch.weights)


@pytest.mark.parametrize("kind", FAMILIES)
def test_states_are_read_alike_by_engine_and_policy_in_every_family(kind, latent_processor, tmp_path):
    more = "rollout.engine=hf", f"rollout.latent_steps={STEPS}", "rollout.max_tokens=12"
    trainer = trainer_of(kind, latent_processor, tmp_path, *more)
    start = trainer.processor.tokenizer.convert_tokens_to_ids(START)
    for bias in (trainer.engine._bias, trainer.policy.model.lm_head.bias):
        bias[start] += 10  # so that a random model says it
    items = [trainer.loader.item(sample, 0, i, (False,) * 3) for i, sample in enumerate(trainer.loader.samples)]
    groups = [replace(group, advantages=(1.0,) * 3) for group in generated(trainer, items)]
    assert sum(len(completion.behind) for group in groups for completion in group.completions) > 9
    with torch.no_grad():
        for batch in batches_of(trainer, groups):
            assert (trainer.policy(batch).logprob - batch.engine_logprob).abs().max() < 1e-4


def test_states_are_constants_that_matter(new_trainer, latent):
    trainer = new_trainer(*latent)
    (batch, *_) = batches_of(trainer, judged(trainer))
    held = replace(batch, latents=batch.latents.clone().requires_grad_())
    before = trainer.policy(held).logprob
    before.sum().backward()
    assert held.latents.grad is None
    after = trainer.policy(replace(batch, latents=batch.latents + 0.1)).logprob
    behind = torch.cat([torch.arange(len(c.token_ids)) >= min(c.behind, default=99) for c in batch.completions])
    assert ((after - before).abs()[behind] > 1e-6).all()
    assert (after - before).abs()[~behind].max() < 1e-6  # what was said before is as likely, and so are others


def test_recomputed_activations_and_rows_of_one_completion_have_the_same_gradient(new_trainer, latent):
    found = []
    for setting in SHARED:
        trainer = new_trainer(*latent, setting)
        found.append(loss_gradient(trainer, judged(trainer)))
    assert found[0].norm() > 1e-3
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-4 * found[0].norm()


def test_an_idle_row_and_another_view_read_states_too(new_trainer, latent):
    trainer = new_trainer(*latent, "trainer.measure_every=1")
    (first, *_) = judged(trainer)
    read = next(i for i, completion in enumerate(first.completions) if completion.behind)
    idle = collate([idle_row(replace(first, completions=first.completions[read:]), (), 0)], 0, token_mean=True)
    assert idle.latents.equal(first.completions[read].latents)
    assert torch.isfinite(trainer.policy(idle).logprob).all()
    (batch,) = batches_of(trainer, [first])
    assert batch.others[0].latents.equal(batch.latents)
    assert torch.isfinite(trainer.policy(batch).other.symmetric_kl).all()


def test_a_model_that_says_no_start_token_trains_as_without_states_bit_for_bit(settings, answering, tmp_path):
    folder = answering("")

    def train(name, *overrides):
        common = [f"model.path={folder}", f"reward.function={REWARD}:varied", "method=grpo", "branch.rollout=raw"]
        given = [*settings, *common, f"trainer.output_dir={tmp_path}/{name}", "trainer.steps=2", *overrides]
        assert main(["train", *given]) == 0
        return metrics(tmp_path / name)

    plain, other = train("plain"), train("latent", "rollout.latent_steps=3", "rollout.latent=noise")
    assert [row.pop("latents") for row in other] == [0, 0]
    assert other == plain and all(row["grad_norm"] > 0 for row in plain)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if not name.startswith(OF_THE_MACHINE)} for row in rows]


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped_and_two_ranks_train_as_one(settings, latent, mixed_data, tmp_path):
    given = [*settings, *latent, f"data.train={mixed_data}", f"reward.function={REWARD}:varied", "kl.coef=0.01"]
    given += ["trainer.updates=2", "optimizer.lr=2e-4"]

    def train(name, steps, *more, ranks=1):
        folder = tmp_path / name
        arguments = [*given, f"trainer.output_dir={folder}", f"trainer.steps={steps}", *more]
        if ranks == 1:
            assert main(["train", *arguments]) == 0
        else:
            launch(ranks, "--module", "vogue.train", *arguments)
        return folder

    straight = train("straight", 3)
    rows = metrics(straight)
    assert all(row["latents"] > 0.2 and row["grad_norm"] > 1e-3 and row["mismatch/logprob"] < 1e-4 for row in rows)
    train("resumed", 1)
    resumed = train("resumed", 3, "--resume")
    assert metrics(resumed) == rows
    ends = [load_file(run / "checkpoints/step_000003/hf/model.safetensors") for run in (straight, resumed)]
    assert ends[0].keys() == ends[1].keys() and all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    two = metrics(train("two", 3, ranks=2))
    for one, other in zip(rows, two, strict=True):
        assert {name: other[name] for name in CURVES} == pytest.approx(
            {name: one[name] for name in CURVES}, rel=2e-3, abs=1e-6
        )


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["rollout.engine=vllm", "rollout.latent_steps=4"],
            "rollout.latent_steps=4: only rollout.engine=hf gives hidden states back, not vllm",
        ),
        (
            ["rollout.engine=server", "rollout.ahead=1", "rollout.latent_steps=4"],
            "rollout.latent_steps=4: only rollout.engine=hf gives hidden states back, not server",
        ),
        (
            ["method=avatar", "rollout.latent_steps=4"],
            "replay.size=10000 with rollout.latent_steps: the buffer keeps tokens, and no states",
        ),
        (
            ["method=noisy_rollout", "rollout.latent_steps=4"],
            "rollout.latent_steps=4 with rollout.noisy_share=0.5: states that were read with T(x) aren't those of the "
            "policy on x, and no ratio tells",
        ),
        (
            ["rollout.max_tokens=5", "rollout.latent_steps=4"],
            "rollout.latent_steps=4: rollout.max_tokens=5 has no room for a token behind so many",
        ),
        (["rollout.latent=zero"], "rollout.latent=zero: with rollout.latent_steps=0 no state is read"),
    ],
)
def test_what_cannot_go_with_states_is_refused_in_one_sentence(overrides, told):
    with pytest.raises(ConfigError) as error:
        load_config(None, [*NEEDED, *overrides])
    assert str(error.value) == told


def test_a_tokenizer_without_the_tokens_is_refused(config, model_folder, preprocessor, capsys, settings):
    told = f"rollout.latent_steps=2: the tokenizer of model.path={model_folder} has no {START} and no {END}, which"
    with pytest.raises(ConfigError) as error:
        HfEngine(config("rollout.latent_steps=2"), preprocessor.processor)
    assert str(error.value).startswith(told)
    assert main(["train", *settings, "rollout.latent_steps=2", "--check"]) == 2
    assert told in capsys.readouterr().err.replace("\n", " ")
