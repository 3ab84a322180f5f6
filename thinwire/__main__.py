"""`python -m thinwire`: the same as the `thinwire` script."""

from thinwire.launch.cli import main

main()
