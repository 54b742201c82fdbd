"""The parts of ``python -m flame.sweep``, from the file of a sweep to the table of its losses."""
