"""`python -m kamiyo`: the same as the command `kamiyo`."""

from kamiyo.cli import main

main()
