import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml

from vogue.config import Config, load_config, save_config
from vogue.config.method_sections import AdvantageConfig, LossConfig
from vogue.config.presets import METHODS, STARTS, told_of_answers, told_of_starts
from vogue.config.settings_help import fields
from vogue.settings import ConfigError
from vogue_kernels.loss import AGGREGATIONS
from vogue_kernels.surrogates import KINDS, LEVELS, MODES

NEEDED = ["model.path=some/model", "data.train=train.parquet"]


def load(*overrides, path=None):
    return load_config(path, [*NEEDED, *overrides])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.stepz=3", "unknown setting trainer.stepz; `vogue train --help` lists them all"),
        ("stepz=3", "unknown setting stepz; `vogue train --help` lists them all"),
        ("trainer.steps=0", "trainer.steps=0: input should be greater than or equal to 1"),
        ("trainer.steps=many", "trainer.steps='many': input should be a valid integer"),
        ("trainer.steps=1.5", "trainer.steps=1.5: input should be a valid integer"),
        ("trainer.steps=", "trainer.steps='': input should be a valid integer"),
        ("rollout.n=1", "rollout.n=1: input should be greater than or equal to 2"),
        ("rollout.temperature=0", "rollout.temperature=0: input should be greater than 0"),
        ("rollout.engine=sglang", "rollout.engine='sglang': input should be 'vllm', 'server' or 'hf'"),
        ("branch.probability=1.5", "branch.probability=1.5: input should be less than or equal to 1"),
        ("branch.granularity=token", "branch.granularity='token': input should be 'prompt', 'response' or 'step'"),
        ("guidance.beta_per=0", "guidance.beta_per=0: input should be greater than 0"),
        ("guidance.alpha_out=-1", "guidance.alpha_out=-1: input should be greater than or equal to 0"),
        ("perturb.sigma=nan", "perturb.sigma='nan': input should be a finite number"),
        ("optimizer.lr=-1e-6", "optimizer.lr=-1e-06: input should be greater than 0"),
        ("optimizer.betas=[0.9,2]", "optimizer.betas.1=2: input should be less than or equal to 1"),
        ("model=7b", "model='7b': input should be a valid dictionary"),
        ("model.path=", "model.path='': string should have at least 1 character"),
        (
            "method=ppo",
            "method='ppo': input should be 'vogue', 'grpo', 'dapo', 'dr_grpo', 'gspo', 'cispo', 'sapo', 'rloo', "
            "'papo', 'vppo', 'pgpo', 'roma', 'dvrp', 'noisy_rollout', 'entropy', 'passk', 'dupl', 'cde', 'cde_critic', "
            "'mmr1', 'shuffle_r1' or 'avatar'",
        ),
        ("guidance.divergence=forward", "unknown setting guidance.divergence"),
        ("uncertainty.estimator=k2", "uncertainty.estimator='k2': input should be 'exact', 'k3' or 'sampled'"),
        ("rollout.rounds=0", "rollout.rounds=0: input should be greater than or equal to 1"),
        ("advantage=passk", "advantage='passk': input should be a valid dictionary"),
        ("seed=-1", "seed=-1: input should be greater than or equal to 0"),
        ("trainer.updates=5", "trainer.updates=5 does not divide rollout.prompts=32"),
        ("trainer.eval_every=10", "trainer.eval_every is set, but data.test is not"),
        ("trainer.eval_temperature=0", "trainer.eval_samples=4 completions would be alike with"),
        ("loss.clip_dual=1", "loss.clip_dual=1: input should be greater than 1"),
        ("guidance.sign_transition=[0.6,0.2]", "guidance.sign_transition=[0.6, 0.2] ends before it begins"),
        ("branch.rollout=noisy", "branch.rollout='noisy': input should be 'raw' or 'drawn'"),
    ],
)
def test_a_wrong_setting_is_told_by_key_and_value_in_one_line(override, told):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert str(error.value).startswith(told)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n- b\n", "FILE: expected settings, name: value, but found a list"),
        ("hello\n", "FILE: expected settings, name: value, but found a str"),
        ("true\n", "FILE: expected settings, name: value, but found a bool"),
        ("", "FILE is empty: expected settings, name: value"),
        ("# nothing\n", "FILE is empty: expected settings, name: value"),
        ("seed: 1\nseed: 2\n", "FILE, line 2: found duplicate key seed"),
        ("trainer:\n  steps: 1\n  steps: 2\n", "FILE, line 3: found duplicate key steps"),
        ("trainer:\n\tsteps: 3\n", "FILE, line 2: a tab, where YAML takes spaces"),
        ("trainer: {steps: 3\n", "FILE, line 2: expected ',' or '}', but got '<stream end>'"),
        ("seed: !!python/object:os.system x\n", "FILE, line 1: could not determine a constructor for the tag"),
        ("seed: ${nowhere}\n", "FILE: Interpolation key 'nowhere' not found"),
        ("data: [1]\n", "FILE: data=[1], but key=value settings set data={'train': 'train.parquet'}"),
        ("trainer: [1, 2]\n", "trainer=[1, 2]: input should be a valid dictionary"),
        ("trainer: 3\n", "trainer=3: input should be a valid dictionary"),
        ("trainer:\n", "trainer=None: input should be a valid dictionary"),
        ("1: 2\n", "1=1: keys should be strings"),
        ("method: [a]\n", "method=['a']: input should be 'vogue'"),
    ],
)
def test_a_file_that_holds_no_settings_is_told_by_its_line_in_one_sentence(text, told, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path=path)
    message = str(error.value).replace(str(path), "FILE")
    assert message.startswith(told)
    assert "\n" not in message


def test_a_folder_or_no_text_in_place_of_a_configuration_file(tmp_path):
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load(path=tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml: 'utf-8' codec can't decode byte 0xff"):
        load(path=tmp_path / "run.yaml")


@pytest.mark.parametrize("setting", ["tensor_parallel=2", "sleep=true"])
def test_what_vllm_alone_can_do_is_refused_with_another_engine(setting, config):
    config("rollout.engine=vllm", f"rollout.{setting}")
    with pytest.raises(ConfigError, match=rf"^rollout\.{setting} is vLLM's, but rollout\.engine=hf"):
        config("rollout.engine=hf", f"rollout.{setting}")


def test_evaluations_sample_as_the_rollout_does_unless_told_otherwise():
    assert load().trainer.eval_temperature == 1.0
    assert load("rollout.temperature=0.7").trainer.eval_temperature == 0.7
    assert load("rollout.temperature=0.7", "trainer.eval_temperature=0.2").trainer.eval_temperature == 0.2
    assert load("rollout.temperature='0.7'").trainer.eval_temperature == 0.7
    with pytest.raises(ConfigError) as error:
        load("rollout.temperature=-1")
    assert str(error.value) == "rollout.temperature=-1: input should be greater than 0"


def test_every_wrong_setting_has_its_own_line():
    with pytest.raises(ConfigError) as error:
        load("rollout.n=1", "seed=-1", "nonsense=1")
    keys = {line.split("=")[0].split(";")[0] for line in str(error.value).splitlines()}
    assert keys == {"rollout.n", "seed", "unknown setting nonsense"}


def test_a_model_that_is_not_named_is_asked_for():
    with pytest.raises(ConfigError, match=r"^model\.path is not set: Hugging Face model folder or hub name$"):
        load_config(None, ["data.train=train.parquet"])


@pytest.mark.parametrize("override", ["branch.probability=0.5", "guidance.alpha_out=0.4", "guidance.alpha_per=1"])
def test_a_setting_cannot_contradict_the_method(override):
    key, value = override.split("=")
    with pytest.raises(ConfigError, match=rf"^method=grpo fixes {key}=0\.0, but it is set to {value}$"):
        load("method=grpo", override)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["method=passk", "rollout.n=3"], "advantage.k=4 is more than rollout.n=3"),
        (
            ["method=passk", "reward.wrong=-1"],
            "reward.wrong=-1.0: advantage.kind=passk reads right and wrong alone, not the reward",
        ),
        (
            ["rollout.ahead=1", "rollout.engine=server", "loss.importance_cap=2", "method=avatar"],
            "rollout.ahead=1: replay.size=10000 replays what the step before generated",
        ),
        (["method=dapo", "loss.clip_high=0.2"], "method=dapo fixes loss.clip_high=0.28, but it is set to 0.2"),
        (["method=grpo", "advantage.kind=passk"], "method=grpo fixes advantage.kind=group, but it is set to passk"),
        (
            ["method=rloo", "advantage.scale=none"],
            "advantage.scale=none: only advantage.kind=group is scaled, not rloo",
        ),
        (
            ["loss.importance_mode=token_mask"],
            "loss.importance_mode=token_mask: without loss.importance_cap or loss.importance_floor nothing reads it",
        ),
        (
            ["loss.importance_floor=0.5", "loss.importance_cap=0.5"],
            "loss.importance_floor=0.5 is not below loss.importance_cap=0.5",
        ),
        (["method=gspo", "loss.kind=sapo"], "method=gspo fixes loss.kind=ppo, but it is set to sapo"),
        (["method=sapo", "loss.clip_high=0.3"], "loss.clip_high=0.3: loss.kind=ppo or cispo reads it, sapo doesn't"),
        (["method=cispo", "loss.clip_dual=3"], "loss.clip_dual=3.0: loss.kind=ppo reads it, cispo doesn't"),
        (["loss.sapo_temperature_neg=2"], "loss.sapo_temperature_neg=2.0: loss.kind=sapo reads it, ppo doesn't"),
        (
            ["loss.entropy_coef_delta=0.1"],
            "loss.entropy_coef_delta=0.1: without loss.entropy_target nothing reads it",
        ),
        (
            ["loss.entropy_target=0.5", "loss.entropy_coef=-0.1"],
            "loss.entropy_coef=-0.1: with loss.entropy_target it starts between 0 and loss.entropy_coef_max=1.0",
        ),
        (["rollout.noisy_share=0.5"], "method=vogue fixes rollout.noisy_share=0.0, but it is set to 0.5"),
        (
            ["method=noisy_rollout", "rollout.noisy_share=0.05"],
            "rollout.noisy_share=0.05 of rollout.n=8 is 0 of them, not some",
        ),
        (
            ["uncertainty.estimator=sampled", "uncertainty.divergence=reverse"],
            "uncertainty.divergence=reverse could be negative with estimator=sampled",
        ),
        (
            ["uncertainty.estimator=k3", "uncertainty.entropy=drawn", "branch.rollout=raw"],
            "uncertainty.entropy=drawn with estimator=k3 and branch.rollout=raw: tokens of the raw branch say nothing "
            "without bias of the noisy one's entropy",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_told(overrides, told):
    with pytest.raises(ConfigError) as error:
        load(*overrides)
    assert str(error.value) == told


def test_each_method_is_its_papers():
    entropy, passk, dapo, noisy = (load(f"method={name}") for name in ("entropy", "passk", "dapo", "noisy_rollout"))
    assert (entropy.guidance.alpha_out, entropy.guidance.beta_out, entropy.guidance.alpha_per) == (0.4, 2, 0)
    assert (passk.advantage.kind, passk.guidance.alpha_out, passk.guidance.alpha_per) == ("passk", 0, 0)
    assert (dapo.loss.clip_low, dapo.loss.clip_high, dapo.loss.aggregation) == (0.2, 0.28, "token-mean")
    assert (dapo.rollout.rounds, dapo.reward.overlong_buffer) == (4, 0.2)
    assert (noisy.rollout.noisy_count, noisy.rollout.n, noisy.perturb.anneal_at) == (4, 8, pytest.approx(40 / 60))
    unscaled, sequences, others = (load(f"method={name}") for name in ("dr_grpo", "gspo", "rloo"))
    assert (unscaled.advantage.scale, unscaled.loss.aggregation) == ("none", "constant")
    assert (sequences.loss.importance_level, sequences.loss.aggregation) == ("sequence", "sequence-mean")
    assert (sequences.loss.clip_low, sequences.loss.clip_high) == (3e-4, 4e-4)
    assert others.advantage.kind == "rloo"
    cispo, sapo = load("method=cispo"), load("method=sapo")
    assert (cispo.loss.kind, cispo.loss.aggregation) == ("cispo", "token-mean")
    assert (1 - cispo.loss.clip_low, 1 + cispo.loss.clip_high) == (0, 5)
    assert (sapo.loss.kind, sapo.loss.aggregation) == ("sapo", "sequence-mean")
    assert (sapo.loss.sapo_temperature_pos, sapo.loss.sapo_temperature_neg) == (1, 1.05)
    found = (entropy, passk, dapo, noisy, unscaled, sequences, others, cispo, sapo)
    assert {config.branch.probability for config in found} == {0}


def test_the_authors_code_is_a_method_whose_noise_and_upper_clip_may_be_changed():
    dupl = load("method=dupl", "perturb.sigma=0.4")
    assert (dupl.branch.rollout, dupl.branch.granularity, dupl.branch.probability) == ("raw", "step", None)
    assert (dupl.uncertainty.estimator, dupl.uncertainty.entropy) == ("sampled", "drawn")
    assert (dupl.guidance.order, dupl.guidance.alpha_per, dupl.guidance.alpha_out) == ("sequential", 1, 0.4)
    assert (dupl.loss.clip_low, dupl.loss.clip_high, dupl.loss.clip_dual) == (0.2, 0.3, 3)
    assert (dupl.perturb.preset, dupl.perturb.sigma) == ("paper", 0.4)
    with pytest.raises(ConfigError, match=r"method=dupl fixes branch\.rollout=raw"):
        load("method=dupl", "branch.rollout=drawn")


def test_vogue_takes_dapos_parts_and_a_start_may_be_changed():
    config = load("loss.clip_high=0.28", "rollout.rounds=3", "reward.overlong_buffer=0.2", "advantage.kind=rloo")
    assert (config.branch.probability, config.guidance.alpha_per, config.rollout.rounds) == (None, 1, 3)
    assert load("method=dapo", "rollout.rounds=9").rollout.rounds == 9


def test_the_losss_names_are_those_of_the_operators_loss():
    known = {"kind": KINDS, "importance_level": LEVELS, "importance_mode": MODES, "aggregation": AGGREGATIONS}
    assert {name: get_args(LossConfig.model_fields[name].annotation) for name in known} == known


def test_the_combinations_and_ablations_that_the_document_of_the_method_names_can_be_set():
    document = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    section = document[document.index("- VOGUE runs on those") : document.index("- `branch.granularity` says")]
    named = re.findall(r"`([a-z_]+\.[a-z_]+)=([^`\s]+)`", section)
    assert len(named) == 13
    for key, value in named:
        found = load(f"{key}={value}").model_dump(mode="json")
        for part in key.split("."):
            found = found[part]
        assert str(found) == value or float(found) == float(value)


def test_the_document_has_a_row_for_every_method_and_names_every_setting_of_advantages_and_losses():
    document = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    methods, _ = document.split("## Advantages")
    assert sorted(re.findall(r"^\| `(\w+)` \|", methods, re.M)) == sorted(METHODS)
    for section, names in (("advantage", AdvantageConfig.model_fields), ("loss", LossConfig.model_fields)):
        assert [name for name in names if f"`{section}.{name}" not in document] == []


def test_a_method_fixes_what_makes_it_what_it_is():
    assert load().branch.probability is None
    grpo = load("method=grpo", "branch.probability=0")
    assert (grpo.branch.probability, grpo.guidance.alpha_out, grpo.guidance.alpha_per) == (0, 0, 0)
    for preset in (*METHODS.values(), *STARTS.values()):
        assert preset.keys() <= {key for key, _ in fields(Config, "")}


def test_what_is_set_otherwise_than_a_method_starts_from_is_told():
    assert told_of_starts(load("method=papo")) is None
    assert told_of_starts(load("perturb.sigma=0.1", "rollout.rounds=2")) is None  # VOGUE starts from the defaults
    assert told_of_starts(load("method=papo", "perturb.preset=paper", "kl.coef=0")) == (
        "method=papo is set otherwise than it starts from: perturb.preset=paper, not mask; kl.coef=0.0, not 0.01"
    )


@pytest.mark.parametrize(
    "given, is_told",
    [
        ([], False),
        (["reward.weights.accuracy=0"], True),
        (["reward.weights.accuracy=0", "kl.coef=0.01"], False),
        (["reward.weights.accuracy=0", "reward.functions.own.function=own.py:judge"], False),
        (["reward.design=no_accuracy"], True),
        (["reward.design=pebr_perception", "reward.weights.similarity=0"], True),
        (["reward.design=pebr_reasoning"], False),
        (["reward.function=own.py:judge"], False),
    ],
)
def test_a_run_whose_answers_nothing_holds_in_place_is_told_of(given, is_told):
    assert bool(told := told_of_answers(load("method=grpo", *given))) == is_told
    assert not is_told or "with kl.coef=0 nothing else holds them in place" in (told or "")


def test_overrides_win_over_the_file_and_leave_the_rest_of_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: from/file, dtype: float32}\ndata: {train: file.parquet}\nrollout: {n: 4}\n")
    config = load_config(path, ["rollout.n=6", "data.train=override.parquet", "optimizer.lr=1e-4"])
    assert (config.model.path, config.model.dtype) == ("from/file", "float32")
    assert (config.rollout.n, config.data.train) == (6, "override.parquet")
    assert config.optimizer.lr == 1e-4
    assert config.rollout.temperature == 1.0  # the default


def test_deepspeeds_own_settings_go_through_at_any_depth():
    config = load("trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
    assert config.trainer.deepspeed == {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def test_a_value_that_yaml_would_take_for_a_date_is_text():
    assert load("trainer.run_name=2026-31-12").trainer.run_name == "2026-31-12"


@pytest.mark.parametrize("text", ["{{ content }} Be brief.", "[1", "it's: 'so", "a: b: c", '"$HOME" `x`: a: b'])
def test_a_value_that_is_not_yaml_is_named_with_what_it_is_as_text(text):
    with pytest.raises(ConfigError) as error:
        load_config(None, ["seed=1", f"data.format_prompt={text}"])
    told = str(error.value)
    assert told.startswith(f"data.format_prompt={text}: the value isn't YAML: ")
    (argument,) = shlex.split(told.partition(" As text it is ")[2])
    key, _, value = argument.partition("=")
    assert (key, yaml.safe_load(value)) == ("data.format_prompt", text)


def test_a_file_that_is_missing_or_not_yaml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml does not exist"):
        load(path=tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("rollout: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load(path=tmp_path / "broken.yaml")


@pytest.mark.parametrize("overrides", [[], ["method=grpo"], ["branch.probability=0.5", "data.system_prompt=''"]])
def test_a_saved_configuration_is_read_back_as_it_was(tmp_path, overrides):
    config = load(*overrides, "trainer.deepspeed.zero_optimization.stage=2", "trainer.report_to=[mlflow]")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", []) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["method"] == config.method


def test_a_configuration_cannot_be_changed_in_passing():
    with pytest.raises(Exception, match="frozen"):
        load().rollout.n = 3


def test_every_setting_says_what_it_is():
    assert [key for key, field in fields(Config, "") if not field.description] == []
