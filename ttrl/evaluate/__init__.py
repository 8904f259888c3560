"""The only part of ttrl that may open labels. Nothing in training imports it; the loop is handed a closed box.

A test holds that rule: outside this package only `ttrl.setup` names `ttrl.evaluate.labels`, to hand labels to the `gold` control
when a recipe says `allow_labels: true`.
"""
