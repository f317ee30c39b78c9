"""Starts the processes of one run on its machines, shows and keeps their output, and leaves none behind.

In reading order: `hosts` and `selection` (which machines), `survey` (what they are, and how they reach each other),
`plan` (hosts -> processes, pure), `run` (plays a plan), `supervisor` (what is started again, and when; pure), `life`
(one life of a worker or service) with its `agents`, `failure` (what is said of its end), `transport`, `ssh`,
`slurm` and `channel` (how an agent is reached and spoken to), `gate` (how many at once), `start` (how a module of ours
is run), `agent` (what runs on a machine), `processes` (how it ends a process tree), `rendezvous` (where Horovod's ranks
find each other), `logs` (where their output goes).

It knows nothing of training, and needs nothing but Python:

    from launcher.hosts import parse_hosts
    from launcher.machine import local_machines
    from launcher.plan import plan
    from launcher.run import run

    hosts = parse_hosts("localhost:4")
    command = ["python", "train.py"]
    todo = plan(hosts, command, one_world=True, env={}, cwd=os.getcwd(), machines=local_machines(hosts))
    outcome = run(todo, "runs/first")
"""
