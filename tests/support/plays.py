"""A program for the machines of `namespaces`. It runs a plan over ssh by the launcher alone, and trains nothing."""

# Its arguments: the folder, the hosts, the seconds of silence after which a machine is given up, the command.
# It prints the exit code and the failure.
LAUNCHER = """
import json, os, sys
from launcher import agents
from launcher.connections import SharedConnections
from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import Workers, plan
from launcher.run import Timeouts, run
from launcher.ssh import Ssh

folder, hosts, silence_s, *command = sys.argv[1:]
agents.SILENCE_S, agents.PING_S = float(silence_s), float(silence_s) / 10
laid = plan(parse_hosts(hosts), Workers(command), env={"TRAVELS": os.environ["SENT"]}, cwd="/")
ssh = Ssh(connections=SharedConnections())
outcome = run(laid, folder, echo=quiet, agent_command=ssh, timeouts=Timeouts(grace_s=0.2))
print(json.dumps([outcome.exit_code, str(outcome.failure)]))
"""
