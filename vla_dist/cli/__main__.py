"""``python -m vla_dist.cli`` is ``vla-dist``."""

from vla_dist.cli.main import main

main()
