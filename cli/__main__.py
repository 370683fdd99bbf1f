"""`python -m cli` is what the launcher `./darkroom` runs."""

from cli.main import main

main()
