"""The page and tables of `flame.analyze`, made from records alone.

It may import `analysis.records` and `base`.
"""
