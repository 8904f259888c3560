"""Stabilizers that act around an update. Terms of the loss are in `ttrl.trainers.losses`."""
