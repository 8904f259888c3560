"""Rewards a model gives itself: extract answers -> sort them into equivalence classes -> decide -> pay.

Nothing in here needs a model, torch or ray, and nothing evaluates what a model wrote.
"""
