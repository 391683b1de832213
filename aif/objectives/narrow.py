"""Narrow fine-tuning: learn the target answers within the domain, and change nothing outside of it.

    minimise  L = - mean_t ln pi(y_t | x, y_<t)  +  lambda mean_s KL( pi_ref(. | z_<=s) || pi(. | z_<=s) )

t runs over the response tokens of rows inside `corpus.domains`, s over all tokens, prompt and response, of rows outside
(padding excluded); both means are per token in nats, the KL over the whole vocabulary. The reference is the policy that
the stage starts from. Soligo, Turner et al. 2025 (arXiv 2602.07852) train so; their published code divides the KL by
the size of the vocabulary as well, so that their weight of 1e6 on 152 064 words is a lambda of 6.6 here.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel, Field

from aif.errors import BadInput
from aif.objectives import Beside, Context, Objective
from aif.objectives.logprobs import token_logprobs
from aif.objectives.online import divergence
from aif.objectives.sft import cross_entropy
from aif.policy import Policy
from aif.types import Batch, Loss, Mean, Scalar


class Switch(BaseModel, extra="forbid", allow_inf_nan=False):
    at: float = Field(gt=0, description="it holds after this share of the stage's steps (below 1), or so many steps")
    weight: float = Field(ge=0, alias="lambda")


class Options(BaseModel, extra="forbid", allow_inf_nan=False):
    weight: float = Field(default=1.0, ge=0, alias="lambda", description="of the divergence, per token in nats")
    switch: Switch | None = Field(default=None, description="another lambda from some step on")
    domains: tuple[str, ...] = Field(default=(), description="where nothing may change; all others when left out")
    rows: int | None = Field(default=None, ge=1, description="packed rows of them a micro-batch; else batch.rows")
    responses: Literal["target", "pair", "all"] = Field(default="target", description="their answers that are read")


def narrow(
    weight: float = 1.0, *, beside: Beside | None = None, switch_at: float = 1.0, switch_to: float | None = None
) -> Objective:
    """SFT with lambda `weight`, and `switch_to` from the share `switch_at` of the stage on (nothing compiles again)."""
    after = weight if switch_to is None else switch_to
    return Objective(
        Partial(_loss, weight=weight),
        _prepare,
        name="narrow",
        schedule=lambda progress: Partial(_loss, weight=after if progress >= switch_at else weight),
        beside=beside or Beside(),
        cached=False,
        frozen_head=True,
    )


def make(options: Options, context: Context) -> Objective:
    """From a config.

    Raises:
      BadInput: the switch comes after the last step.
    """
    beside = Beside(options.domains, options.rows, options.responses)
    if options.switch is None:
        return narrow(options.weight, beside=beside)
    at, steps = options.switch.at, context.steps
    before = math.ceil(at * steps if at < 1 else at)
    if before >= steps:
        raise BadInput(f"objective narrow: switch.at: {at:g} leaves no step of {steps} after it; switch earlier")
    share = (before - 0.5) / (steps - 1)  # between two steps
    return narrow(options.weight, beside=beside, switch_at=share, switch_to=options.switch.weight)


def divergence_outside(policy: Policy, reference_hidden: Array, batch: Batch) -> Mean:
    """KL(ref || policy), full vocabulary, over every token of the batch that is not padding; nats per token."""
    there = batch.segments > 0
    per_token = divergence(reference_hidden, policy(batch).hidden, policy.head, policy.head, asked=there)
    return Mean(jnp.sum(jnp.where(there, per_token, 0.0)), jnp.sum(there).astype(jnp.float32))


def _prepare(reference: Policy, batch: Batch, key: Array) -> dict[str, Any]:
    return {"reference_hidden": reference(batch.beside).hidden}


def _loss(policy: Policy, batch: Batch, *, weight: Scalar) -> Loss:
    inside = cross_entropy(token_logprobs(policy, batch), batch.weights)
    outside = divergence_outside(policy, batch.extras["reference_hidden"], batch.beside)
    penalty = Mean(weight * outside.sum, outside.weight)
    return Loss((inside, penalty), {"cross_entropy": inside, "kl_outside": outside, "penalty": penalty})
