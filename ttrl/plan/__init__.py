"""`ttrl plan`: memory, time and money of a recipe before it is run. Pure arithmetic: nothing here imports torch."""
