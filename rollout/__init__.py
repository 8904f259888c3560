"""Engines that generate, samplers that decide what to generate, and the pool between them."""
