"""What attention does in finished models: measured, written as records, and drawn.

It may import `run` and every room below it, and not `training`.
"""
