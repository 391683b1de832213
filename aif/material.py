"""What a config names, loaded: scale, corpus, model, and the encoded data sets that stages and metrics use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aif.batches import Dataset, build, evenly
from aif.config import Config
from aif.corpus import Conversation, load_scale, located, read
from aif.corpus.tiers import Tiers, sampling_weights, scores, tiers
from aif.errors import BadInput
from aif.models.hub import load
from aif.objectives import Context, Objective
from aif.policy import Policy, bind
from aif.runtime import compilation_cache
from aif.sharding import make_mesh, place_leaf


@dataclass(frozen=True)
class Material:
    """The parts of an experiment that no training changes. Everything is derived lazily, so checks come before device
    work."""

    config: Config

    @cached_property
    def scale(self) -> Any:
        return load_scale(self.config.corpus.scale)

    @cached_property
    def corpus(self) -> Any:
        c = self.config.corpus
        return read(located(c.path), scale=self.scale, columns=c.columns or None, on_bad_row=c.on_bad_row)

    @cached_property
    def lm(self) -> Any:
        compilation_cache()
        put = None if self.mesh is None else partial(place_leaf, self.mesh)
        return load(self.config.model.source, chat_template=self.config.model.chat_template, put=put)

    @cached_property
    def mesh(self) -> Mesh | None:
        """The devices that the config asks for; None for one."""
        m = self.config.mesh
        return make_mesh(m.data, m.fsdp, m.tensor)

    @cached_property
    def base(self) -> Policy:
        """The pre-trained model, without adapter."""
        m = self.config.model
        return bind(self.lm, remat=m.remat, compute_dtype=jnp.dtype(m.compute_dtype), mesh=self.mesh)

    def rows(self, *splits: str) -> list[Conversation]:
        """Rows of the corpus in these splits, scaffolding left out; training rows obey `domains` and `limit`,
        all others `heldout_limit`."""
        c = self.config.corpus
        found = [r for r in self.corpus.rows if r.split in splits and r.kind != "scaffolding"]
        training = splits == tuple(c.train)
        if training:
            found = [r for r in found if not c.domains or r.domain in c.domains]
        limit = c.limit if training else c.heldout_limit
        return found if not limit or limit >= len(found) else [found[k] for k in evenly(len(found), limit)]

    def outside(self, objective: Objective, domains: tuple[str, ...]) -> list[Conversation]:
        """Training rows outside `corpus.domains`, of these domains or of all others; `corpus.limit` holds for them too.

        Raises:
          BadInput: nothing is inside or outside, or a domain has no such rows.
        """
        c, name = self.config.corpus, objective.name
        if not c.domains:
            raise BadInput(f"corpus.domains: {name} needs the domains to stay within; name them")
        rows = [r for r in self.corpus.rows if r.split in c.train and r.kind != "scaffolding"]
        rows = [r for r in rows if r.domain not in c.domains]
        known = sorted({r.domain for r in rows})
        if not rows:
            raise BadInput(f"{self.corpus.path}: no training rows outside of corpus.domains; {name} needs some")
        wrong = [d for d in domains if d not in known]
        if wrong:
            raise BadInput(
                f"objective {name}: outside: no training rows of {wrong[0]!r} outside of corpus.domains; there are "
                f"{', '.join(known)}"
            )
        rows = [r for r in rows if not domains or r.domain in domains]
        return rows if not c.limit or c.limit >= len(rows) else [rows[k] for k in evenly(len(rows), c.limit)]

    def data(self, which: str, *splits: str, length: int | None = None) -> Dataset:
        """Encoded rows of these splits with the candidates `which` names; encoded once."""
        key = (which, splits, length)
        if key not in self._encoded:
            rows = self.rows(*splits)
            if not rows:
                raise BadInput(
                    f"{self.corpus.path}: no rows with split {' or '.join(map(repr, splits))}; check the corpus section"
                )
            weights = self.weights(rows) if splits == tuple(self.config.corpus.train) else None
            self._encoded[key] = self._encode(rows, which, length, weights)
        return self._encoded[key]

    def encoded(self, objective: Objective) -> Dataset:
        """The candidates an objective trains on, and the rows that it wants beside them."""
        data, beside = self.data(objective.responses, *self.config.corpus.train), objective.beside
        if beside is None:
            return data
        return replace(data, beside=self._encode(self.outside(objective, beside.domains), beside.responses))

    @cached_property
    def _encoded(self) -> dict[tuple, Dataset]:
        return {}

    def _encode(
        self, rows: list[Conversation], which: str, length: int | None = None, weights: list[float] | None = None
    ) -> Dataset:
        dimensions = [d.id for d in self.scale.dimensions]
        longest = self.lm.config.max_position
        if (length or self.config.batch.length) > longest:
            raise BadInput(f"batch.length: {length or self.config.batch.length} is longer than the model's {longest}")
        return build(
            rows,
            self.lm.tokenizer,
            which=which,
            length=length or self.config.batch.length,
            target=self.config.corpus.target,
            dimensions=dimensions,
            weights=weights,
        )

    def weights(self, rows: list[Conversation]) -> list[float] | None:
        """What training rows count in the loss, by their tiers; None where all count the same."""
        c = self.config.corpus
        rule = None if c.tiers is None else Tiers(**c.tiers.model_dump())
        return None if rule is None else sampling_weights(rows, self.scale, rule, c.target)

    def tiers(self, rows: list[Conversation]) -> np.ndarray:
        """The tier of every row, by the rule of the config or, without one, by its defaults."""
        c = self.config.corpus
        rule = Tiers() if c.tiers is None else Tiers(**c.tiers.model_dump())
        return np.array(tiers([s.score for s in scores(rows, self.scale, rule, c.target)], rule))

    @cached_property
    def context(self) -> Context:
        """What objectives' factories read."""
        dimensions = tuple(d.id for d in self.scale.dimensions)
        rows = self.rows(*self.config.corpus.train)
        candidates = [c for row in rows for c in row.candidates]
        table = np.array([[c.ratings.get(d, -1) for d in dimensions] for c in candidates])
        liked = np.array([c.stance in (self.config.corpus.target, "chosen") for c in candidates], bool)
        prompts = np.array([n for n, row in enumerate(rows) for _ in row.candidates])
        about = {"scale": self.scale, "liked": liked, "prompts": prompts}
        about["tiers"] = lambda: self.tiers(rows)[prompts]
        return Context(dimensions, tuple(self.scale.levels), table, table[liked], **about)
