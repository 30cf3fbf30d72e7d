"""``python -m flowspec``: the command line."""

from flowspec.cli.main import main

main()
