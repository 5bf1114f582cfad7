"""`python -m galembed`."""

from galembed.cli import main

main()
