"""One run's folder: what goes in, whose folder it is, what ran, what was measured, what comes out.

It may import `checkpoints` and every room below it.
"""
