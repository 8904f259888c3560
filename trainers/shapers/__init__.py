"""Shapers: what happens to rewards, advantages and token weights between the reward and the loss. No torch here."""
