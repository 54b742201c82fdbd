"""What attention weights and activations are like, from q, k and layer outputs.

It may import `models`, `base` and the operators.
"""
