from __future__ import annotations
def texts(source,n,min_chars=100,max_chars=2000,seed=0):
    from pydoc_data.topics import topics
    t=[v.strip() for k,v in sorted(topics.items()) if len(v)>min_chars]
    import random
    random.Random(seed).shuffle(t)
    return [x[:max_chars] for x in t[:n]]
