"""Rollout workers and trainer ranks as Ray actors: where they are placed, how they are called, what happens when one dies.

Nothing here imports ray before `connect` is called.
"""

from ttrl.cluster.cluster import Cluster, Lost
from ttrl.cluster.join import check_cluster, connect, survey

__all__ = ["Cluster", "Lost", "check_cluster", "connect", "survey"]
