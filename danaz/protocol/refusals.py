"""The reasons of refusals that a worker acts on: the server names one of these texts, and the worker recognises it."""

NOT_FINITE = "push is not finite"
OUTLIER = "push is far outside the cluster's size"
OVERFLOW = "update by this push would leave the range of float32"
SICK = frozenset((NOT_FINITE, OUTLIER, OVERFLOW))  # the values of the push are bad, and would be bad again
FRESH_AFTER = 2  # after this many sick pushes in a row, a worker's velocity is suspect, and starts from zero

NEWER_JOINED = "a newer incarnation of this worker has joined"
COMPLETE = "the run is complete"
