"""The only part of ttrl that may open labels. Nothing in training imports it; the loop is handed a closed box.

A test holds that rule: no module outside this package names `ttrl.evaluate.labels`.
"""
