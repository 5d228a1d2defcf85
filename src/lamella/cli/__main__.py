"""``python -m lamella.cli``."""

from lamella.cli.app import main

main()
