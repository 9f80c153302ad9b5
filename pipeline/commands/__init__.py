"""One module per `poa` command: `HELP`, `add_arguments(parser)` and `run(args)`, which `pipeline.cli` finds by name.

A command parses, asks the room that does the work, prints, and returns an exit code. Importing one loads nothing heavy;
that happens inside `run`.
"""
