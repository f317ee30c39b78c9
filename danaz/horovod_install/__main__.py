"""`python -m danaz.horovod_install install` runs the installer when the rest of danaz cannot be imported yet."""

from danaz.horovod_install.cli import app

app(prog_name="danaz horovod")
