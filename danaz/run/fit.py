"""Checks what fits together: an algorithm with its number of workers, its codecs and its pipeline."""

from __future__ import annotations

from danaz.rules import Rule, find_algorithm
from danaz.run.settings import Settings
from danaz.vectors.codecs import push_codec, view_codec


class UnfitError(ValueError):
    """Some settings cannot be combined; the message says why and what to use instead."""


def is_all_reduce(settings: Settings) -> bool:
    """Whether all machines form one Horovod world that trains without a server."""
    return find_algorithm(settings.algorithm).rule().all_reduce


def check_workers(settings: Settings) -> None:
    """Check that the algorithm can train with these settings.

    Raises:
        UnfitError: it cannot train with this number of workers, wire or pipeline, or cannot train live.
        UnknownAlgorithmError, UnsupportedPeriodError, UnknownCodecError: there is no such algorithm, period or codec.
    """
    rule = settings.for_server().rule()
    if settings.schedule == "live" and not rule.live:
        raise UnfitError(f"{settings.algorithm} has no server, and runs in the simulator only: danaz simulate …")
    check_wire(settings, rule)
    check_pipeline(settings, rule)
    limit = rule.max_workers
    if limit is not None and settings.workers > limit:
        one = "one host that is not split" if settings.schedule == "live" else "one worker"
        raise UnfitError(
            f"{settings.algorithm} trains on {limit} worker, {settings.workers} were asked for; use {one}, or another "
            "algorithm"
        )


def check_wire(settings: Settings, rule: Rule) -> None:
    """Raise UnfitError if the vectors cannot travel in these codecs, UnknownCodecError for an unknown one."""
    push_codec(settings.wire), view_codec(settings.wire_view)
    codecs = {"wire": settings.wire, "wire_view": settings.wire_view}
    asked = " and ".join(f"{key} {name}" for key, name in codecs.items() if name != "fp32")
    if asked and rule.pushes == "parameters":
        raise UnfitError(
            f"{settings.algorithm} cannot train with {asked}: its workers push parameters, so each push would round "
            "the model itself instead of a step. Use fp32, or an algorithm that pushes gradients or "
            "displacements, such as dana"
        )
    if asked and rule.all_reduce and settings.schedule == "live":
        raise UnfitError(
            f"{settings.algorithm} has no use for {asked}: live, its workers average by all-reduce, and "
            "nothing is sent to a server. Use fp32, or an algorithm with a server, such as dana"
        )


def check_pipeline(settings: Settings, rule: Rule) -> None:
    """Raise UnfitError if the exchange of this rule cannot run while the next batch is computed."""
    reasons = {
        "its workers wait for each other at every update": rule.barrier or rule.all_reduce,
        "its workers push parameters, which must hold the step before": rule.pushes == "parameters",
        "a worker that steps alone between pushes changes what is being exchanged": rule.worker_rule.sync_period > 1,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if settings.pipeline and reason:
        raise UnfitError(
            f"{settings.algorithm} cannot train with pipeline: {reason}. Leave pipeline out, or use an algorithm such "
            "as dana with sync_period 1"
        )
