"""Buffers of the engine, in elements; apart from it so that `poa plan` reads them without torch."""

BUCKET = 25_000_000
"""Gradients reduced, or weights gathered, in one collective. At stages 0 to 2 the last of a step's gradients travel
while nothing is computed; at stage 3 it is no more than the largest block."""

PERSISTENT = 100_000
"""Parameters of at most this size stay gathered under ZeRO-3."""

AT_ONCE = 2
"""Buckets of gradients under way where no rank is to hold all of them."""


def gradient_bytes(
    count: int, ranks: int, stage: int, low: int, reduced: int, passes: int = 2, bucket: int = BUCKET
) -> float:
    """The most that gradients take on a rank at a time, in a step at stage 0, 1 or 2.

    A bucket is joined beside its gradients, then widened if need be, before these are let go. Parameters count as small
    beside a bucket: one that reaches into the next is held until that is sent.

    Args:
        count: parameters.
        ranks: over which gradients are added up.
        stage: of ZeRO.
        low: bytes of a gradient as the backward pass makes it.
        reduced: bytes of one as it is added up over ranks and passes.
        passes: backward passes of a step.
        bucket: elements of a bucket.
    """
    if ranks == 1:
        return 1.0 * count * (reduced + 2 * low if reduced > low else low)
    size, buckets = min(bucket, count), -(-count // bucket)
    own = reduced * count / (ranks if stage else 1)
    joined = size * (low + max(low, reduced if reduced != low else 0))
    if stage == 2:
        under_way = min(AT_ONCE, passes * buckets - 1)
        return passes * own + joined + under_way * reduced * size
    if passes == 1:  # at stage 0 a bucket travels as the rank's own
        return own + (joined + reduced * (count - size) if stage else 2 * low * size)
    if reduced > low:  # the first pass is widened as a whole; the second goes into it bucket by bucket
        return max(count * (low + reduced), own + reduced * count + joined)
    return own + low * (count + size)
