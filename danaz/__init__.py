"""danaz: train a PyTorch model on several machines without retuning it.

Inside a machine Horovod averages gradients synchronously, so the machine is one worker; between machines a ZeroMQ
server applies each worker's update as it arrives, with DANA's look-ahead against staleness.
"""

from importlib.metadata import version

__version__ = version("danaz")
