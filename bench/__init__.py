"""What the scripts share: workloads, measurements, statistics, the card.

Only `device.py` and `transformers_peer.py` load torch, and only when a function of theirs runs.
"""
