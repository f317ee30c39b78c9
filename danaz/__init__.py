"""danaz: train a PyTorch model on several machines without retuning it.

Inside a machine Horovod averages gradients synchronously, so the machine is one worker; between machines a ZeroMQ
server applies each worker's update as it arrives, with DANA's look-ahead against staleness.
"""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not at import, when `python -m danaz` still searches the working directory first.
    from importlib.metadata import version

    return version("danaz")
