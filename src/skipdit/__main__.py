"""`python -m skipdit`, which `torchrun -m skipdit` needs."""

from skipdit.cli import main

main()
