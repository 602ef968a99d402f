"""`python -m sparse_engine.cli`: the command where no script was installed."""

from sparse_engine.cli import main

main()
