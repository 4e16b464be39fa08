"""Commands beside the method, run from the project's folder as `python -m tools.NAME`."""
