"""What may be asked of a node, and who asks it: routers and the node's own front."""
