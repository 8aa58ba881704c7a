"""The settings of what degraded views of an image are for: PAPO's and ROMA's divergences, and a token's credit."""

# pydantic's defaults stand first in Field, where pyright doesn't look for them.
# pyright: reportCallIssue=false

from typing import Literal

from pydantic import Field, model_validator

from vogue.settings import Finite, NonNegative, Positive, Section, Share


class PerceptionConfig(Section):
    """PAPO (arXiv 2507.06448): how much the policy's words depend on the image is part of the loss."""

    kl_coef: NonNegative = Field(
        0.0, description="weight of KL(policy on x || policy on T(x)) a token, which is made larger; 0: there is none"
    )
    direction: Literal["forward", "reverse"] = Field(
        "forward",
        description="that KL (forward), or KL(policy on T(x) || policy on x), whose gradient low_var_kl has in the "
        "mean",
    )
    estimator: Literal["exact", "k1", "k3", "low_var_kl"] = Field(
        "exact", description="as kl.estimator; PAPO's own code has low_var_kl"
    )
    gradient: Literal["clean", "both"] = Field(
        "clean", description="through the policy on x alone, as PAPO's own code has it, or on T(x), too"
    )
    entropy_coef: NonNegative = Field(
        0.0,
        description="weight of the entropy of the policy on T(x), which is made smaller, with perception.gradient=both",
    )

    @model_validator(mode="after")
    def _is_read(self) -> "PerceptionConfig":
        for name, field in type(self).model_fields.items():
            if not self.kl_coef and getattr(self, name) != field.default:
                raise ValueError(f"perception.{name}={getattr(self, name)}: with perception.kl_coef=0 nothing reads it")
        if self.direction == "reverse" and self.estimator != "exact":
            raise ValueError(f"perception.direction=reverse is computed exactly alone, not by {self.estimator}")
        if self.entropy_coef and self.gradient == "clean":
            raise ValueError("perception.entropy_coef: with perception.gradient=clean that entropy has no gradient")
        if self.gradient == "both" and self.estimator != "exact":
            raise ValueError(f"perception.gradient=both is computed exactly alone, not by {self.estimator}")
        return self

    @property
    def on(self) -> bool:
        return self.kl_coef > 0


class RobustConfig(Section):
    """ROMA (arXiv 2605.09262): the policy says the same where an image is degraded, and as surely."""

    kl_coef: NonNegative = Field(
        0.0,
        description="weight of KL(policy on x || policy on a degraded view) a token, of the view where it is largest, "
        "which is made smaller; 0: there are no such views",
    )
    sigma: tuple[Positive, ...] = Field(
        (0.2, 0.4),
        min_length=1,
        description="standard deviations of the Gaussian noise on pixels in [0, 1]: one degraded view each, in a "
        "forward with gradient",
    )
    completions: Literal["right", "all"] = Field(
        "right", description="completions that are held to it: those that are right (ROMA), or all (DVRP)"
    )
    gradient: Literal["view", "both"] = Field(
        "view",
        description="through the degraded view alone, so that it follows the policy on x, or through that, too",
    )
    policy_coef: NonNegative = Field(
        0.0,
        description="weight of the policy gradient on one degraded view of each prompt, with the advantages of the "
        "completions that x gave",
    )
    entropy_coef: Finite = Field(
        0.0, description="weight of the mean entropy over the degraded views, which is made smaller (DVRP)"
    )

    @model_validator(mode="after")
    def _is_read(self) -> "RobustConfig":
        for name, field in type(self).model_fields.items():
            if not self.kl_coef and getattr(self, name) != field.default:
                raise ValueError(f"robust.{name}={getattr(self, name)}: with robust.kl_coef=0 nothing reads it")
        return self

    @property
    def on(self) -> bool:
        return self.kl_coef > 0

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the degraded views, by which they are told from x and T(x)."""
        return tuple(f"degraded {number}" for number in range(1, len(self.sigma) + 1)) if self.on else ()

    def holds(self, right: bool) -> bool:
        """Whether a completion that is right, or isn't, is held to the degraded views."""
        return self.on and (right or self.completions == "all")


class CreditConfig(Section):
    """What part of a completion's advantage each token gets, by how much the image matters to it: S, a KL."""

    kind: Literal["none", "vppo", "pgpo"] = Field(
        "none",
        description="each token has its completion's (none), those of largest S alone have it (vppo), or they have "
        "more of it (pgpo)",
    )
    estimator: Literal["exact", "k3"] = Field(
        "exact",
        description="S = KL(policy on x || policy on T(x)), or its estimate from the sampled token, as the code",
    )
    tokens: Share = Field(0.4, description="share of a completion's tokens that vppo trains")
    floor: Share = Field(
        0.9, description="least factor of a completion by its mean of S, with vppo; the mean of all is 1; 1: no factors"
    )
    divisor: Literal["all", "kept"] = Field(
        "all", description="tokens that the loss is divided by with vppo: all, as the code, or those that it trains"
    )
    threshold: Positive = Field(0.4, lt=1, description="scaled S from which on pgpo gives a token more")
    boost: NonNegative = Field(2.0, description="what pgpo adds to the weight 1 at the largest S")

    @model_validator(mode="after")
    def _is_read(self) -> "CreditConfig":
        read = {"none": (), "vppo": ("estimator", "tokens", "floor", "divisor")}
        for name, field in type(self).model_fields.items():
            known = ("kind", *read.get(self.kind, ("estimator", "threshold", "boost")))
            if name not in known and getattr(self, name) != field.default:
                raise ValueError(f"credit.{name}={getattr(self, name)}: credit.kind={self.kind} doesn't read it")
        if self.kind == "vppo" and self.tokens == 0:
            raise ValueError("credit.tokens=0: nothing would be trained")
        return self

    @property
    def on(self) -> bool:
        return self.kind != "none"
