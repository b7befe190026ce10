"""Entry point of the `rein` command: sets what torch reads when it is imported, and runs `rein.cli.main`."""

import os


def main() -> int:
    """Run the command line; returns the exit code."""
    # Otherwise idle threads of torch spin, and a busy machine is many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rein import cli

    return cli.main()
