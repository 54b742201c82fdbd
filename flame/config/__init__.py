"""Every flag of the trainer, its default and its check (`sections`), and how a command line becomes them (`parse`).

It may import `base` alone.
"""
