"""The groups of verbs of the command line, one file each: `NAME` and a typer `app`. Heavy imports stay inside verbs."""
