"""Starts the processes of one run on its machines, shows and keeps their output, and leaves no process behind.

In reading order: `hosts` and `selection` (which machines), `survey` (what they are, and how they reach each other),
`plan` (hosts -> processes, pure), `run` (carries out a plan), `supervisor` (what to restart, and when; pure), `life`
(one life of a worker or service) with its `agents`, `failure` (how its end is reported), `transport`, `ssh`,
`slurm` and `channel` (how we reach an agent and talk to it), `gate` (how many connections at once), `start` (how we run
one of our modules), `agent` (what runs on a machine), `processes` (how it ends a process tree), `rendezvous` (where
Horovod's ranks find each other), `logs` (where their output goes).

The package knows nothing about training or about its caller, and needs only Python:

    from launcher.hosts import parse_hosts
    from launcher.machine import local_machines
    from launcher.plan import Workers, plan
    from launcher.run import run

    hosts = parse_hosts("localhost:4")
    workers = Workers(["python", "train.py"], one_world=True)
    todo = plan(hosts, workers, env={}, cwd=os.getcwd(), machines=local_machines(hosts))
    outcome = run(todo, "runs/first")
"""
