"""`python -m tapeline` is the `tapeline` command."""

from tapeline.cli.app import main

main()
