"""Choose the checkpoints that the shards of a restarted server go back to. Every worker makes the same choice."""

from __future__ import annotations

from collections.abc import Sequence

from danaz.protocol.messages import Offer


def choose(offers: Sequence[Offer]) -> list[int]:
    """Return the generation that each shard goes back to, shard 0 first, or an empty list if there is no way to go on.

    Once shard 0 has a checkpoint that says training is over, nothing is trained again, and each shard goes on from its
    own newest checkpoint.
    """
    if offers[0].done and all(offer.generations for offer in offers):
        return [max(offer.generations) for offer in offers]
    common = set.intersection(*(set(offer.generations) for offer in offers))
    return [max(common)] * len(offers) if common else []
