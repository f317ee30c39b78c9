"""The packages of danaz, lowest first."""

# Each package may import itself and the packages before it, and nothing else from danaz.
ORDER = (
    "options",
    "files",
    "optimizers",
    "rules",
    "vectors",
    "protocol",
    "worker",
    "server",
    "run",
    "serving",
    "torch",
    "workloads",
    "horovod_install",
    "launch",
    "simulate",
    "compare",
    "report",
    "cli",
)
