"""Side-by-side samples: held-out prompts answered by the base model at -dose, 0 and +dose along a direction."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from aif import results as records
from aif.basins.scoring import losses
from aif.batches import Dataset, build
from aif.corpus import Candidate
from aif.experiment import Experiment
from aif.sampling import degeneration, generate
from aif.steering import add
from aif.tokens import encode_prompt
from aif.types import Direction


def steered_samples(
    experiment: Experiment, direction: Direction, norms: np.ndarray, layer: int
) -> list[records.Sample]:
    """Greedy answers to the first held-out prompts; the three doses of all prompts are one batch."""
    config = experiment.config.samples
    rows = experiment.rows(experiment.config.corpus.heldout)[: config.prompts]
    if not rows:
        return []
    tokenizer = experiment.lm.tokenizer
    doses = [-config.dose, 0.0, config.dose]
    prompts = [encode_prompt(tokenizer, row.prompt, row.where) for row in rows for _ in doses]
    edits = add(direction.vector, jnp.tile(jnp.array(doses), len(rows)), jnp.asarray(norms), layers=[layer])
    policy = experiment.base.replace(edits=edits)
    made = generate(policy, prompts, new_tokens=config.tokens, stop=tokenizer.eos_token_id)
    answers = [np.asarray(t)[:n] for t, n in zip(made.tokens, made.lengths, strict=True)]
    texts = [tokenizer.decode(a, skip_special_tokens=True) for a in answers]
    surprise = _perplexities(experiment, rows, texts, len(doses))
    return [
        records.Sample(
            prompt=rows[k // len(doses)].prompt[-1].content,
            arm="base",
            direction="contrast direction" if doses[k % len(doses)] else "",
            layer=layer,
            dose=doses[k % len(doses)],
            text=text,
            tokens=len(answers[k]),
            perplexity=surprise[k],
            **degeneration(text, answers[k].tolist()),
        )
        for k, text in enumerate(texts)
    ]


def _perplexities(experiment: Experiment, rows: list, texts: list[str], per_row: int) -> list[float]:
    """exp(mean nats per token) of each answer under the unsteered base model; infinity for an empty answer."""
    from dataclasses import replace

    answered = [k for k, text in enumerate(texts) if text.strip()]
    asked = [
        replace(rows[k // per_row], candidates=(Candidate(content=texts[k], stance="", ratings={}, extra={}),))
        for k in answered
    ]
    out = [float("inf")] * len(texts)
    if asked:
        length = experiment.config.batch.length
        data: Dataset = build(asked, experiment.lm.tokenizer, which="target", length=length, target="")
        sums, tokens = losses(experiment.base.replace(remat="none"), data, rows=experiment.config.batch.rows)
        for k, value in zip(answered, np.exp(sums / tokens), strict=True):
            out[k] = float(value)
    return out
