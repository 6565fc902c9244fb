"""Chest side by side with its peers and with what the hardware allows.

``python -m benchmarks --help`` says how to run it. Nothing here is part of the installed package.
"""
