"""The routes by which a cluster, or one node, is watched and steered."""
