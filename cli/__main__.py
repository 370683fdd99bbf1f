"""Run the command as `python -m cli`, for the launcher `./darkroom`."""

from cli.main import main

main()
