"""``python -m flowspec``: the command line."""

from flowspec.cli import main

main()
