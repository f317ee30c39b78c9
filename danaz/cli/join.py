"""Adds this machine as one more worker to a run that is under way."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import typer

from danaz.cli.command import fail
from danaz.cli.launch import show_events, show_failure, tell
from danaz.launch.invitation import find_server, plan_to_join, read_invitation
from danaz.run.lock import claimed_run_folder
from launcher.run import Timeouts, run
from launcher.supervisor import Policy

LEAVING_S = 30.0  # to finish the batches that have begun, and to hear from the server that it knows


def join_run(server: str, key: Path, slots: int | None, out: Path | None) -> int:
    """Work for the server at ``server``, HOST:PORT, until its run is over. Returns an exit code.

    On SIGINT or SIGTERM, this machine leaves in good order; on a second signal, at once.
    """
    with ExitStack() as held:
        try:
            invitation = read_invitation(key)
            plan = plan_to_join(invitation, find_server(server), slots, os.getcwd())
            folder = held.enter_context(claimed_run_folder(out, "join"))
        except ValueError as error:
            fail(error)
        settings = json.loads(plan.env["DANAZ_SETTINGS"])
        typer.echo(f"worker {invitation.worker} of a run of {settings['algorithm']}; its logs are in {folder}")
        try:
            outcome = run(plan, folder, policy=Policy("restart"), tell=tell, timeouts=Timeouts(grace_s=LEAVING_S))
        except OSError as error:
            fail(f"the folder {folder} cannot be written: {error.strerror}")
    show_events(outcome)
    show_failure(outcome)
    return outcome.exit_code
