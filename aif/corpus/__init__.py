from __future__ import annotations
import hashlib, json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
@dataclass(frozen=True)
class Message:
    role: str
    content: str
@dataclass(frozen=True)
class Candidate:
    content: str
    stance: str
    ratings: dict
    extra: dict
@dataclass(frozen=True)
class Conversation:
    id: str
    prompt: tuple
    candidates: tuple
    domain: str
    language: str
    split: str
    kind: str
    where: str
    train_turns: bool
    extra: dict
@dataclass(frozen=True)
class Corpus:
    rows: tuple
    skipped: tuple
    path: Path
    sha256: str
@dataclass(frozen=True)
class Dim:
    id: str
@dataclass(frozen=True)
class Scale:
    name: str
    levels: tuple
    dimensions: tuple
D="functional_integration, relational_responsiveness, co_creative_engagement, relational_vulnerability, ecological_belonging, epistemic_humility, metacognitive_awareness, meta_relational_integrity, ethical_consideration, self_adaptation, temporal_awareness, resonance_and_disruption, multispecies_relationality, playfulness, excess".split(", ")
def load_scale(name="nexus"): return Scale("nexus",("low","medium","cusp","high"),tuple(Dim(d) for d in D))
def bundled(name="discernment"): return Path(__file__).parent/"bundled"/f"{name}.jsonl"
def read(path,*,scale=None,columns=None,on_bad_row="error"):
    b=Path(path).read_bytes(); rows=[]
    for n,l in enumerate(b.split(b"\n"),1):
        if not l.strip(): continue
        r=json.loads(l)
        rows.append(Conversation(r["id"],tuple(Message(**m) for m in r["prompt"]),tuple(Candidate(c["content"],c["stance"],c["ratings"],{}) for c in r["candidates"]),r["domain"],r["language"],r.get("split",""),"preference",f"{path}:{n}",False,{}))
    return Corpus(tuple(rows),(),path,hashlib.sha256(b).hexdigest())
