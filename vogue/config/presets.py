"""Presets: what `method` fixes or starts from, and the components and weights of `reward.design`."""

from typing import Any

from vogue.settings import ConfigError

# What each method is, next to VOGUE's defaults.
GRPO: dict[str, Any] = {
    "branch.probability": 0.0,
    "rollout.noisy_share": 0.0,
    "guidance.alpha_out": 0.0,
    "guidance.alpha_per": 0.0,
    "advantage.kind": "group",
}
PPO = {"loss.kind": "ppo"}  # of those methods that are named after what they do to the clipped surrogate
METHODS: dict[str, dict[str, Any]] = {
    "vogue": {"rollout.noisy_share": 0.0},
    "grpo": GRPO | PPO,
    "dapo": GRPO | PPO | {"loss.clip_low": 0.2, "loss.clip_high": 0.28, "loss.aggregation": "token-mean"},
    "dr_grpo": GRPO | {"advantage.scale": "none", "loss.aggregation": "constant"},
    "gspo": GRPO | PPO | {"loss.importance_level": "sequence", "loss.aggregation": "sequence-mean"},
    "cispo": GRPO | {"loss.kind": "cispo", "loss.aggregation": "token-mean"},
    "sapo": GRPO | {"loss.kind": "sapo", "loss.aggregation": "sequence-mean"},
    "rloo": GRPO | {"advantage.kind": "rloo"},
    "papo": GRPO,
    "vppo": GRPO | {"credit.kind": "vppo"},
    "pgpo": GRPO | {"credit.kind": "pgpo"},
    "roma": GRPO | {"robust.completions": "right"},
    "dvrp": GRPO | {"robust.completions": "all"},
    "noisy_rollout": {name: value for name, value in GRPO.items() if name != "rollout.noisy_share"},
    "entropy": {name: value for name, value in GRPO.items() if name != "guidance.alpha_out"},
    "passk": GRPO | {"advantage.kind": "passk"},
    "dupl": {
        "branch.rollout": "raw",
        "branch.granularity": "step",
        "rollout.noisy_share": 0.0,
        "uncertainty.estimator": "sampled",
        "uncertainty.entropy": "drawn",
        "guidance.order": "sequential",
        **PPO,
        "loss.clip_dual": 3.0,
        "loss.aggregation": "token-mean",
    },
    "cde": GRPO,
    "cde_critic": GRPO | {"advantage.kind": "gae"},
    "mmr1": GRPO | {"sampling.kind": "variance"},
    "shuffle_r1": GRPO,
    "avatar": GRPO,
}

# Where a method starts from other defaults; these may be set to something else. DAPO's buffer is the paper's 4,096 of
# 20,480 tokens; its limit of rounds is ours (the paper has none). NoisyRollout's half is the paper's 6 + 6 completions,
# and its strength has halved at step 40 of the 60 that the paper trains on Geometry3K. DUPL, the name of VOGUE's
# official code, adds little noise to much else, and leaves its clipping to EasyR1's defaults. CISPO's paper bounds
# ratios from above alone and doesn't say where; 5 is ScaleRL's (arXiv 2510.13786), who took it up. CDE's rewards are 1
# and -1; the height of its bonus's weight is ours. Shuffle-R1 keeps 8 of 16 completions. AVATAR trains on 4 new and 4
# replayed ones. ROMA's weights are ours, and so is the noise of ROMA and DVRP.
STARTS: dict[str, dict[str, Any]] = {
    "dapo": {"rollout.rounds": 4, "reward.overlong_buffer": 0.2},
    "noisy_rollout": {"rollout.noisy_share": 0.5, "perturb.anneal_at": 2 / 3},
    "gspo": {"loss.clip_low": 3e-4, "loss.clip_high": 4e-4},
    "vppo": {"perturb.preset": "mask", "perturb.share": 0.5, "loss.clip_high": 0.28, "rollout.rounds": 4},
    "pgpo": {"perturb.preset": "mask", "perturb.share": 1.0, "loss.clip_high": 0.28, "rollout.rounds": 4},
    "papo": {"perturb.preset": "mask", "perception.kl_coef": 0.02, "kl.coef": 0.01},
    "roma": {"robust.kl_coef": 0.02, "robust.policy_coef": 0.1},
    "dvrp": {
        "perturb.preset": "mask",
        "perception.kl_coef": 0.01,
        "perception.gradient": "both",
        "perception.entropy_coef": 0.05,
        "robust.kl_coef": 0.01,
        "robust.sigma": (0.2,),
        "robust.gradient": "both",
        "robust.entropy_coef": 0.05,
    },
    "cispo": {"loss.clip_low": 1.0, "loss.clip_high": 4.0},
    "dupl": {"perturb.preset": "paper", "perturb.sigma": 0.2, "loss.clip_high": 0.3},
    "cde": {"curiosity.weight": 1.0, "reward.wrong": -1.0},
    "cde_critic": {"reward.wrong": -1.0},
    "shuffle_r1": {"advantage.pairs": 0.5, "trainer.shuffle": 8, "rollout.n": 16},
    "avatar": {"replay.size": 10_000, "rollout.n": 4, "advantage.shape": 0.3},
}

# What each reward design adds up, and with which weights. VOGUE's; the six of arXiv 2601.00215, whose weights are known
# from a secondary source; Vision-SR1's (arXiv 2508.19652) and PeBR-R1's (arXiv 2509.13031), as in their code. A weight
# of 0: asked for, not rewarded.
DESIGNS: dict[str, dict[str, float]] = {
    "verifiable": {"accuracy": 0.9, "format": 0.1},
    "vanilla": {"think": 0.1, "answer": 0.9},
    "only_accuracy": {"think": 0.0, "answer": 1.0},
    "mixture": {"description": 0.06, "think": 0.06, "rethink": 0.08, "answer": 0.8},
    "continuous": {"description": 0.06, "think": 0.06, "rethink": 0.08, "answer": 0.8},
    "visual_fusion": {"think": 0.1, "visual": 0.1, "answer": 0.8},
    "no_accuracy": {"description": 0.3, "think": 0.3, "rethink": 0.3, "answer": 0.1},
    "vision_sr1": {"accuracy": 0.9, "format": 0.1, "blind": 1.0},
    "pebr_perception": {"similarity": 0.4, "keywords": 0.4, "format": 0.1, "length": 0.1},
    "pebr_reasoning": {"accuracy": 0.9, "format": 0.1},
}
HEADED = ("pebr_perception", "pebr_reasoning")  # completions stand under headings, without tags and boxes
# The score of each design that says how right an answer is, and not that there is one; where it has such a score.
JUDGING = {
    design: name
    for design, weights in DESIGNS.items()
    for name in ("accuracy", "answer")
    if name in weights and design != "no_accuracy"
}
# Names that no function of a user's own may have; those of PeBR-R1's scores, with its designs alone.
COMPONENTS = tuple(
    dict.fromkeys(name for design, weights in DESIGNS.items() for name in weights if design not in HEADED)
)


def with_method(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by section, filled in with what their `method` fixes and where it starts.

    Raises `ConfigError` for a setting that contradicts the method.
    """
    method = values.get("method", "vogue")
    if not isinstance(method, str):
        return values  # as the check of all settings will say
    for key, value in (STARTS.get(method, {}) | METHODS.get(method, {})).items():
        section, name = key.split(".")
        if not isinstance(values.setdefault(section, {}), dict):
            continue  # not a section, as the check of all settings will say
        given = values[section].setdefault(name, value)
        if given != value and key in METHODS[method]:
            raise ConfigError(f"method={method} fixes {key}={value}, but it is set to {given}")
    return values


def told_of_starts(config: Any) -> str | None:
    """A sentence about what a `Config` sets otherwise than its method starts from; None where there is nothing."""
    others = []
    for key, value in STARTS.get(config.method, {}).items():
        section, name = key.split(".")
        if (given := getattr(getattr(config, section), name)) != value:
            others.append(f"{key}={given}, not {value}")
    if not others:
        return None
    return f"method={config.method} is set otherwise than it starts from: {'; '.join(others)}"


def told_of_answers(config: Any) -> str | None:
    """A warning where nothing holds the answers of a `Config` in place, neither its reward nor a KL."""
    reward = config.reward
    is_judged = reward.weights.get(JUDGING.get(reward.design)) or reward.function or reward.functions
    if is_judged or config.kl.coef:
        return None
    return (
        f"reward.design={reward.design} with its weights doesn't judge answers, and with kl.coef=0 nothing else holds "
        "them in place: they may get worse while the reward rises"
    )
