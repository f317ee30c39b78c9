"""`python -m danaz.horovod_install install`: the installer before anything else of danaz can be imported."""

from danaz.horovod_install.cli import app

app(prog_name="danaz horovod")
