"""Objectives, losses, packing and the back-ends that move the weights. Naming a part does not import torch."""
